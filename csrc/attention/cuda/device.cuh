// What the CUDA kernels share: number conversions, reductions, and what a sample's geometry says.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "attention/cuda_arguments.h"

namespace zerotuning::attention::device {

template <typename T>
using AccumulatorOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrowed(AccumulatorOf<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Two numbers as one register of a tensor core's operand, `low` in its lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the four neighbouring lanes that hold a row of a tensor core's result.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Whether a kernel can start while the one before it runs, and wait for its end
// (CudaDevice::supports_dependent_launch).
#if __CUDA_ARCH__ >= 900
constexpr bool starts_early = true;
#else
constexpr bool starts_early = false;
#endif
__device__ __forceinline__ void start_dependent_kernel() {
  if constexpr (starts_early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous_kernel() {
  if constexpr (starts_early) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets a kernel have more shared memory than it may have unasked. Once for each device: it takes
// the driver about a microsecond. `bytes` are the same at each call for a device.
template <auto kernel>
cudaError_t allow_shared_bytes(int bytes, const CudaDevice& device) {
  static std::atomic<uint64_t> allowed{0};
  static_assert(max_devices <= 64);
  const uint64_t bit = uint64_t{1} << device.index;
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// early: it may start before the kernel before it ends, for which it then waits.
template <typename... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const dim3& grid, int threads, int bytes,
                          bool early, cudaStream_t stream,
                          const std::common_type_t<Parameters>&... parameters) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, parameters...);
  return cudaGetLastError();
}

// What some keys have of a query row: their weights P and the gradients dS of their logits, summed.
template <typename C>
struct RowShare {
  C weight = 0, change = 0;

  __device__ __forceinline__ void add(C key_weight, C key_change) {
    weight += key_weight;
    change += key_change;
  }
  // dS of these keys, given that of all others. It is P (dO V^T - Δ) of which Δ = dO·O is made of
  // the output in 16 bits: where these keys have nearly all of the weight, the difference is small
  // and that rounding leaves nothing of it. But Δ = Σ P dO V^T, so that over all keys dS adds up to
  // what Δ is off by, of which these keys' share is their weight.
  __device__ __forceinline__ C settled(C others) const {
    return (1 - weight) * change - weight * others;
  }
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ int clamped(int64_t x, int low, int high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

// What CudaGeometry says of one sample, brought within its keys.
struct SampleGeometry {
  const bool* key_mask;  // of the sample, or null
  int first_key;         // no key before it is real
  int past_key;          // none from it on is
  int start;             // position of query row 0
  int span_begin, span_end;
};

__device__ __forceinline__ SampleGeometry sample_geometry(const CudaGeometry& g, int sample,
                                                          int queries, int keys) {
  SampleGeometry s;
  s.key_mask = g.key_mask ? g.key_mask + sample * g.key_mask_batch_stride : nullptr;
  s.first_key = g.first_key ? clamped(g.first_key[sample], 0, keys) : 0;
  s.past_key = g.past_key ? clamped(g.past_key[sample], 0, keys) : keys;
  const int latest = max(keys - queries, 0);
  s.start =
      g.query_start ? clamped(g.query_start[sample * g.query_start_stride], 0, latest) : latest;
  if (g.span) {
    const int64_t* span = g.span + sample * g.span_batch_stride;
    s.span_begin = clamped(span[0], 0, keys);
    s.span_end = clamped(span[g.span_stride], s.span_begin, keys);
  } else {
    s.span_begin = s.first_key;
    s.span_end = min(s.span_begin + 1, keys);
  }
  return s;
}

// One sample's geometry, asked key by key.
struct Sight : SampleGeometry {
  int window, keys;

  __device__ __forceinline__ bool visible(int key, int position) const {
    return key < keys && key <= position && (!window || key > position - window) &&
           (!key_mask || key_mask[key]);
  }
  __device__ __forceinline__ bool scaled(int key) const {
    return key >= span_begin && key < span_end;
  }
};

__device__ __forceinline__ Sight sight_of(const CudaAttention& c, int sample) {
  return {sample_geometry(c.geometry, sample, c.queries, c.keys), c.geometry.window, c.keys};
}

template <typename A>
__device__ __forceinline__ int64_t offset(const Strided4<A>& a, int64_t sample, int64_t head,
                                          int64_t row) {
  return sample * a.batch_stride + head * a.head_stride + row * a.row_stride;
}
template <typename T, typename A>
__device__ __forceinline__ const T* row_of(const Strided4<A>& a, int64_t sample, int64_t head,
                                           int64_t row) {
  return static_cast<const T*>(a.data) + offset(a, sample, head, row);
}
template <typename T>
__device__ __forceinline__ T* written_row_of(const Strided4<void>& a, int64_t sample, int64_t head,
                                             int64_t row) {
  return static_cast<T*>(a.data) + offset(a, sample, head, row);
}

}  // namespace zerotuning::attention::device
