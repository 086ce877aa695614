# What makes builds faster where it is present: ccache and the mold linker.

find_program(HEED_CCACHE ccache)
if(HEED_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${HEED_CCACHE}")
endif()

find_program(HEED_MOLD mold)
if(HEED_MOLD)
  add_link_options(-fuse-ld=mold)
endif()
