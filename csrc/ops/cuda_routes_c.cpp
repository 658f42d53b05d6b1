// cuda_routes.h for Python's ctypes (python/zerotuning/cuda_routes.py). Fake kernels call these
// functions while torch traces a graph; operators cannot be called there. The structs are plain C:
// when Python loads the library, Python compares the sizes of both sides' structs.
#include "ops/cuda_routes.h"

#if defined(_MSC_VER)
#define ZEROTUNING_EXPORT extern "C" __declspec(dllexport)
#else
#define ZEROTUNING_EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace zerotuning::ops;

// Sizes of Card, CudaCall and Lengths.
ZEROTUNING_EXPORT void zerotuning_route_struct_bytes(int64_t* sizes) {
  sizes[0] = sizeof(Card);
  sizes[1] = sizeof(CudaCall);
  sizes[2] = sizeof(Lengths);
}

ZEROTUNING_EXPORT int64_t zerotuning_forward_route(const CudaCall* call, const Card* card) {
  return static_cast<int64_t>(forward_route(*call, *card));
}

ZEROTUNING_EXPORT int64_t zerotuning_backward_route(const CudaCall* call, const Card* card) {
  return static_cast<int64_t>(backward_route(*call, *card));
}

ZEROTUNING_EXPORT int64_t zerotuning_decode_route(const CudaCall* call, const Card* card) {
  return static_cast<int64_t>(decode_route(*call, *card));
}

// Reads only the static part of the call.
ZEROTUNING_EXPORT void zerotuning_torch_gradient_lengths(const CudaCall* call, const Card* card,
                                                         Lengths* lengths) {
  *lengths = torch_gradient_lengths(call->fixed, *card);
}
