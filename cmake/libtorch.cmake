# libtorch from the PyTorch wheel of the Python interpreter at hand: the active virtual environment,
# else the project's own .venv, else what is on the path. -DTorch_DIR or -DPython_EXECUTABLE override.
# Defines the target heed_libtorch, which everything that includes PyTorch headers links.

if(NOT Torch_DIR)
  if(NOT Python_EXECUTABLE AND NOT DEFINED ENV{VIRTUAL_ENV} AND
     EXISTS ${CMAKE_SOURCE_DIR}/.venv/bin/python)
    set(Python_EXECUTABLE ${CMAKE_SOURCE_DIR}/.venv/bin/python)
  endif()
  set(Python_FIND_VIRTUALENV FIRST)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.utils.cmake_prefix_path)"
    OUTPUT_VARIABLE heed_torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_VARIABLE heed_torch_error RESULT_VARIABLE heed_torch_result)
  if(NOT heed_torch_result EQUAL 0)
    message(FATAL_ERROR "${Python_EXECUTABLE} cannot import torch, which HEED_TORCH=ON needs.\n"
                        "Install torch for it, or configure with -DHEED_TORCH=OFF.\n"
                        "${heed_torch_error}")
  endif()
  list(APPEND CMAKE_PREFIX_PATH ${heed_torch_prefix})
endif()
find_package(Torch REQUIRED)

add_library(heed_libtorch INTERFACE)
# OpenMP: without it at::parallel_for in our files would be serial.
target_link_libraries(heed_libtorch INTERFACE torch OpenMP::OpenMP_CXX)
