# heed::heed, the core library for C++ programs: in this tree and after `cmake --install`.

set(heed_core_rooms)
foreach(room mechanisms engine tiled cascade kernels base)
  if(TARGET heed_${room})
    list(APPEND heed_core_rooms heed_${room})
  endif()
endforeach()

add_library(heed_core INTERFACE)
add_library(heed::heed ALIAS heed_core)
target_link_libraries(heed_core INTERFACE ${heed_core_rooms})
