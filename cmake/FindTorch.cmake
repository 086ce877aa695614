# Finds the libtorch inside the PyTorch of a Python environment: Torch_FOUND, TORCH_LIBRARIES,
# TORCH_INCLUDE_DIRS, TORCH_LIBRARY_DIR and the target `torch`.
#
# heed needs only the CPU side. The config file that PyTorch ships insists on a CUDA toolkit when the
# wheel was built with CUDA, although nothing here uses it; this module links both kinds of wheel.
# The environment is Python_EXECUTABLE if given, else .venv, else python3; Torch_ROOT (the folder with
# include and lib) or Torch_DIR (its share/cmake/Torch) overrides it.

if(Torch_ROOT)
  set(_torch_root "${Torch_ROOT}")
elseif(Torch_DIR)
  get_filename_component(_torch_root "${Torch_DIR}/../../.." ABSOLUTE)
else()
  if(Python_EXECUTABLE)
    set(_torch_python "${Python_EXECUTABLE}")
  elseif(EXISTS "${CMAKE_SOURCE_DIR}/.venv/bin/python")
    set(_torch_python "${CMAKE_SOURCE_DIR}/.venv/bin/python")
  else()
    set(_torch_python python3)
  endif()
  execute_process(
    COMMAND "${_torch_python}" -c
            "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))"
    OUTPUT_VARIABLE _torch_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()

find_path(_torch_include torch/library.h PATHS "${_torch_root}/include" NO_DEFAULT_PATH NO_CACHE)
foreach(_part torch torch_cpu c10)
  find_library(_torch_lib_${_part} ${_part} PATHS "${_torch_root}/lib" NO_DEFAULT_PATH NO_CACHE)
endforeach()
if(EXISTS "${_torch_root}/version.py")
  file(STRINGS "${_torch_root}/version.py" _torch_version REGEX "^__version__")
  string(REGEX REPLACE ".*'([0-9.]+).*" "\\1" Torch_VERSION "${_torch_version}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  Torch
  REQUIRED_VARS _torch_root _torch_include _torch_lib_torch _torch_lib_torch_cpu _torch_lib_c10
  VERSION_VAR Torch_VERSION
  REASON_FAILURE_MESSAGE "No PyTorch in ${_torch_python}: install it there, or set HEED_TORCH=OFF.")

if(Torch_FOUND)
  set(TORCH_INCLUDE_DIRS "${_torch_include}" "${_torch_include}/torch/csrc/api/include")
  set(TORCH_LIBRARY_DIR "${_torch_root}/lib")
  set(TORCH_LIBRARIES torch)
  if(NOT TARGET torch)
    add_library(torch INTERFACE IMPORTED GLOBAL)
    target_include_directories(torch SYSTEM INTERFACE ${TORCH_INCLUDE_DIRS})
    # PyTorch's own build defines it; both sides must agree on the layout of std::string.
    target_compile_definitions(torch INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
    target_link_libraries(torch INTERFACE "${_torch_lib_torch}" "${_torch_lib_torch_cpu}"
                                          "${_torch_lib_c10}")
  endif()
endif()
