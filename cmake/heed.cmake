# Rooms and their tests.

add_library(heed_flags INTERFACE)
target_compile_features(heed_flags INTERFACE cxx_std_20)
target_compile_options(heed_flags INTERFACE $<BUILD_INTERFACE:-Wall -Wextra -Wshadow>)
target_include_directories(
  heed_flags INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
                       $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/src> $<INSTALL_INTERFACE:include>)
# GCC 12 warns about overlapping copies in its own operator+ of strings (GCC bug 105651).
target_compile_options(
  heed_flags INTERFACE $<BUILD_INTERFACE:$<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>>)
set(HEED_FUZZ_SECONDS 60 CACHE STRING "How long ctest runs each fuzz target")

# -O1: instrumented vector code takes minutes to compile at -O3.
set(heed_checked -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1
    -O1)
if(HEED_SANITIZE)
  add_compile_options(${heed_checked})
  add_link_options(-fsanitize=address,undefined)
endif()
if(HEED_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES Clang)
    message(FATAL_ERROR "HEED_FUZZ needs clang++; found ${CMAKE_CXX_COMPILER_ID}")
  endif()
  add_compile_options(${heed_checked} -fsanitize=fuzzer-no-link)
  add_link_options(-fsanitize=address,undefined)
  add_custom_target(heed_fuzzers)
endif()

# heed_room(NAME SOURCES... [LINK LIBS...]): the static library of one folder.
function(heed_room name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_library(heed_${name} STATIC ${ARG_SOURCES})
  target_link_libraries(heed_${name} PUBLIC heed_flags ${ARG_LINK})
endfunction()

# heed_test(NAME SOURCES... [LINK LIBS...] [LABELS...] [SHARDS N]): one GoogleTest program, run by ctest,
# a long one in shards that may run at once.
function(heed_test name)
  if(NOT HEED_TESTS)
    return()
  endif()
  cmake_parse_arguments(ARG "" "SHARDS" "SOURCES;LINK;LABELS" ${ARGN})
  find_package(GTest REQUIRED)
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE heed_flags ${ARG_LINK} GTest::gtest GTest::gtest_main)
  if(NOT ARG_SHARDS)
    set(ARG_SHARDS 1)
  endif()
  math(EXPR last "${ARG_SHARDS} - 1")
  foreach(shard RANGE ${last})
    set(test ${name})
    if(shard GREATER 0)
      set(test ${name}_${shard})
    endif()
    add_test(NAME ${test} COMMAND ${name} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
    set_tests_properties(
      ${test} PROPERTIES LABELS "${ARG_LABELS}" ENVIRONMENT
                         "GTEST_TOTAL_SHARDS=${ARG_SHARDS};GTEST_SHARD_INDEX=${shard}")
  endforeach()
endfunction()

# heed_fuzz(NAME SOURCES... [LINK LIBS...] [SEEDS FOLDERS...]): one libFuzzer target. ctest runs it
# for HEED_FUZZ_SECONDS; it starts from the seeds and keeps what it finds in the build folder.
function(heed_fuzz name)
  if(NOT HEED_FUZZ)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK;SEEDS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE heed_flags ${ARG_LINK})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  add_dependencies(heed_fuzzers ${name})
  set(corpus ${CMAKE_BINARY_DIR}/corpus/${name})
  file(MAKE_DIRECTORY ${corpus})
  list(TRANSFORM ARG_SEEDS PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/)
  # One input: at most 10 s, and no allocation near a gigabyte.
  add_test(NAME ${name}
           COMMAND ${name} -max_total_time=${HEED_FUZZ_SECONDS} -timeout=10 -rss_limit_mb=2048
                   -malloc_limit_mb=512 -print_final_stats=1 -artifact_prefix=${corpus}- ${corpus}
                   ${ARG_SEEDS})
  set_tests_properties(${name} PROPERTIES LABELS fuzz ENVIRONMENT OMP_NUM_THREADS=1)
endfunction()
