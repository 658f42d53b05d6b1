// toolchain_check RUNTIME FOLDER: loads the C++ runtime RUNTIME (libstdc++.so.6 as torch loads it),
// then the two libraries in FOLDER. Exit code 0: the libraries use RUNTIME, and an exception
// crosses their boundary with its type and text. Otherwise one line on standard output names the
// fault.
//
// The program itself needs no C++ runtime and loads every library locally, as Python does. With a
// C++ runtime in the global scope, the symbols of a second copy would resolve to the global copy,
// and the check would find nothing.
#include <dlfcn.h>
#include <stdio.h>

namespace {

using Throw = void (*)(double);
using ThrowingRuntime = void* (*)();
using CatchFrom = int (*)(Throw);

void* load(const char* folder, const char* name) {
  char path[4096];
  snprintf(path, sizeof path, "%s%s", folder, name);
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) printf("%s\n", dlerror());
  return library;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  void* const runtime = load(arguments[1], "");
  void* const throwing = load(arguments[2], "/libthrowing.so");
  void* const catching = load(arguments[2], "/libcatching.so");
  if (!runtime || !throwing || !catching) return 1;
  const auto throwing_runtime =
      reinterpret_cast<ThrowingRuntime>(dlsym(throwing, "throwing_runtime"));
  if (throwing_runtime() != dlsym(runtime, "__cxa_throw")) {
    printf("it links libstdc++ statically, and torch loads %s into the same process\n",
           arguments[1]);
    return 1;
  }
  const auto catch_from = reinterpret_cast<CatchFrom>(dlsym(catching, "catch_from"));
  const int error = catch_from(reinterpret_cast<Throw>(dlsym(throwing, "throw_formatted")));
  if (error != 0) printf("an exception lost its type or text between two libraries (%d)\n", error);
  return error != 0;
}
