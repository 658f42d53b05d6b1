# One C++ runtime in the process: torch loads libstdc++.so.6 and libgcc_s.so.1, and the libraries here must use the same.
#
# A compiler that links libstdc++ statically (conda toolchains, cluster modules, wrappers with -static-libstdc++) gives each
# library a copy of the runtime. An exception thrown in one copy and caught in another then loses its type or ends the process.
# With the shared libraries named in front of the compiler's own libraries, every symbol of the runtime resolves to the shared
# libraries. Measured with GCC
# 12 and -static-libstdc++ -static-libgcc: the libraries need libstdc++.so.6 and libgcc_s.so.1 and have the size of an ordinary
# build; hidden symbols and --exclude-libs keep the second copy. csrc/toolchain_check tests the result before anything is built.

# Sets RESULT to the path of the shared library SONAME that torch's LIBRARY loads, or to an empty string if there is none.
function(zerotuning_runtime_library result library soname)
  execute_process(COMMAND ldd ${library} OUTPUT_VARIABLE needed ERROR_QUIET)
  if(needed MATCHES "${soname} => (/[^\n]*) \\(0x")
    set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
  else()
    set(${result} "" PARENT_SCOPE)
  endif()
endfunction()

# Makes the libraries of this project use torch's C++ runtime. Where this is impossible, the error names the compiler.
macro(zerotuning_share_cxx_runtime torch_library)
  zerotuning_runtime_library(cxx_runtime ${torch_library} "libstdc\\+\\+\\.so\\.6")
  zerotuning_runtime_library(gcc_runtime ${torch_library} "libgcc_s\\.so\\.1")
  if(cxx_runtime AND gcc_runtime AND NOT CMAKE_CROSSCOMPILING)
    set(zerotuning_shared_runtime "\"${cxx_runtime}\" \"${gcc_runtime}\" ")
    string(PREPEND CMAKE_CXX_STANDARD_LIBRARIES "${zerotuning_shared_runtime}")
    zerotuning_check_toolchain("${cxx_runtime}")
  endif()
endmacro()

function(zerotuning_check_toolchain cxx_runtime)
  set(folder ${CMAKE_BINARY_DIR}/toolchain_check)
  try_compile(built ${folder} ${PROJECT_SOURCE_DIR}/csrc/toolchain_check toolchain_check
              CMAKE_FLAGS "-DCMAKE_CXX_STANDARD_LIBRARIES=${CMAKE_CXX_STANDARD_LIBRARIES}" OUTPUT_VARIABLE log)
  set(reason "it cannot build a shared library: ${log}")
  if(built)
    execute_process(COMMAND ${folder}/toolchain_check ${cxx_runtime} ${folder}
                    RESULT_VARIABLE failed OUTPUT_VARIABLE reason ERROR_VARIABLE reason OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  if(NOT built OR failed)
    message(FATAL_ERROR "zerotuning: the compiler ${CMAKE_CXX_COMPILER} cannot build for this torch: ${reason}. "
                        "Set CXX (and CC) to a compiler that links libstdc++.so.6, such as CXX=/usr/bin/g++, or unset both.")
  endif()
  message(STATUS "zerotuning: C++ runtime ${cxx_runtime}, shared with torch")
endfunction()
