# heed::heed, the core library for C++ programs: in this tree, and after
# `cmake --install build --component core` through find_package(heed).

add_library(heed_core INTERFACE)
add_library(heed::heed ALIAS heed_core)
set_target_properties(heed_core PROPERTIES EXPORT_NAME heed)
target_link_libraries(heed_core INTERFACE heed_mechanisms)

# heed_closure(TARGET): appends to heed_rooms the libraries of this tree that TARGET links, itself
# included, and to heed_packages the packages that the others come from (hwy::hwy is of hwy).
function(heed_closure target)
  if(target IN_LIST heed_rooms)
    return()
  endif()
  list(APPEND heed_rooms ${target})
  get_target_property(links ${target} INTERFACE_LINK_LIBRARIES)
  foreach(link IN LISTS links)
    string(REGEX REPLACE "^\\$<LINK_ONLY:(.*)>$" "\\1" link "${link}")
    if(TARGET ${link} AND link MATCHES "^heed_")
      heed_closure(${link})
    elseif(link MATCHES "^(.+)::")
      list(APPEND heed_packages ${CMAKE_MATCH_1})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES heed_packages)
  set(heed_rooms ${heed_rooms} PARENT_SCOPE)
  set(heed_packages ${heed_packages} PARENT_SCOPE)
endfunction()

# A Python wheel takes only the operators, and a parent project installs what it wants.
if(PROJECT_IS_TOP_LEVEL AND NOT SKBUILD)
  include(GNUInstallDirs)
  set(heed_rooms "")
  set(heed_packages "")
  heed_closure(heed_core)
  set(where ${CMAKE_INSTALL_LIBDIR}/cmake/heed)
  install(TARGETS ${heed_rooms} EXPORT heed COMPONENT core
          ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT core)
  install(EXPORT heed NAMESPACE heed:: FILE heedTargets.cmake DESTINATION ${where} COMPONENT core)
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/heed DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
          COMPONENT core)

  set(config "include(CMakeFindDependencyMacro)\n")
  foreach(package IN LISTS heed_packages)
    string(APPEND config "find_dependency(${package})\n")
  endforeach()
  string(APPEND config "include(\"\${CMAKE_CURRENT_LIST_DIR}/heedTargets.cmake\")\n")
  file(WRITE ${PROJECT_BINARY_DIR}/heedConfig.cmake "${config}")
  include(CMakePackageConfigHelpers)
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/heedConfigVersion.cmake
                                   COMPATIBILITY SameMinorVersion)
  install(FILES ${PROJECT_BINARY_DIR}/heedConfig.cmake ${PROJECT_BINARY_DIR}/heedConfigVersion.cmake
          DESTINATION ${where} COMPONENT core)
endif()
