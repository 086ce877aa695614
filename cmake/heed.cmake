# Rooms and their tests.

add_library(heed_flags INTERFACE)
target_compile_options(heed_flags INTERFACE -Wall -Wextra -Wshadow)
target_include_directories(heed_flags INTERFACE ${CMAKE_SOURCE_DIR}/include ${CMAKE_SOURCE_DIR}/src)
if(HEED_SANITIZE)
  target_compile_options(heed_flags INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=all
                                              -fno-omit-frame-pointer -g)
  target_link_options(heed_flags INTERFACE -fsanitize=address,undefined)
endif()
if(HEED_FUZZ)
  target_compile_options(heed_flags INTERFACE -fsanitize=fuzzer-no-link,address,undefined
                                              -fno-sanitize-recover=all -g)
  target_link_options(heed_flags INTERFACE -fsanitize=address,undefined)
endif()

# heed_room(NAME SOURCES... [LINK LIBS...]): the static library of one folder.
function(heed_room name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_library(heed_${name} STATIC ${ARG_SOURCES})
  target_link_libraries(heed_${name} PUBLIC heed_flags ${ARG_LINK})
endfunction()

# heed_test(NAME SOURCES... [LINK LIBS...]): one GoogleTest program, run by ctest.
function(heed_test name)
  if(NOT HEED_TESTS)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK;LABELS" ${ARGN})
  find_package(GTest REQUIRED)
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE heed_flags ${ARG_LINK} GTest::gtest GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  if(ARG_LABELS)
    set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}")
  endif()
endfunction()

# heed_fuzz(NAME SOURCES... [LINK LIBS...]): one libFuzzer target.
function(heed_fuzz name)
  if(NOT HEED_FUZZ)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE heed_flags ${ARG_LINK})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
endfunction()
