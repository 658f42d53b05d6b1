// Reads the device, the stream and the kernels' arguments (call.h).
#include "ops/cuda/call.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <array>
#include <limits>
#include <mutex>

#include "attention/cuda_key_mask.h"
#include "ops/layout.h"

namespace zerotuning::ops::cuda {
namespace {

using attention::CudaAttention;
using attention::CudaDevice;

CudaDevice read_device(int index) {
  constexpr int32_t min_capability = 80;
  const auto read = [&](cudaDeviceAttr attribute) {
    int value;
    check(cudaDeviceGetAttribute(&value, attribute, index), "device");
    return value;
  };
  const int32_t capability =
      10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor);
  int32_t compiled_capability = 0;
  require(capability >= min_capability &&
              attention::compiled_capability_of_kernels(compiled_capability) == cudaSuccess,
          "zerotuning was built without kernels for cuda:", index, ", of compute capability ",
          capability / 10, ".", capability % 10, " (8.0 is the lowest that is supported)");
  return {
      .multiprocessors = read(cudaDevAttrMultiProcessorCount),
      .capability = capability,
      .max_shared_bytes_per_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      .l2_bytes = read(cudaDevAttrL2CacheSize),
      .compiled_capability = compiled_capability,
      .index = index,
  };
}

const CudaDevice& device_at(int index) {
  static std::array<CudaDevice, attention::max_devices> devices;
  static std::array<std::once_flag, attention::max_devices> read;
  require(index < attention::max_devices, "device index must be below ", attention::max_devices,
          ", got cuda:", index);
  std::call_once(read[index], [&] { devices[index] = read_device(index); });
  return devices[index];
}

// Whether a condition holds for every stride of query, key and value along which there is a step.
template <typename Holds>
bool all_strides(const CudaAttention& a, const Holds& holds) {
  const auto strides_of = [&](const Strided4<const void>& array, int32_t heads, int32_t rows) {
    return (a.batch == 1 || holds(array.batch_stride)) &&
           (heads == 1 || holds(array.head_stride)) && (rows == 1 || holds(array.row_stride));
  };
  return strides_of(a.query, a.heads, a.queries) && strides_of(a.key, a.key_heads, a.keys) &&
         strides_of(a.value, a.key_heads, a.keys);
}

// Whether rows of 16-bit numbers begin at multiples of 16 bytes.
bool has_aligned_rows(const CudaAttention& a) {
  const auto aligned = [](const Strided4<const void>& array) {
    return reinterpret_cast<uintptr_t>(array.data) % 16 == 0;
  };
  return aligned(a.query) && aligned(a.key) && aligned(a.value) &&
         all_strides(a, [](int64_t stride) { return stride % 8 == 0; });
}

CudaCall shape_of(const Problem& p, const CudaAttention& a) {
  return {
      .fixed = {.dtype = p.dtype,
                .head_size = p.head_size,
                .value_head_size = p.value_head_size,
                .has_key_mask = p.key_mask.has_value(),
                .has_span = p.span.has_value(),
                .has_query_start = p.query_start.has_value()},
      .batch = p.batch,
      .heads = p.heads,
      .key_heads = p.key_heads,
      .queries = p.queries,
      .keys = p.keys,
      .window = a.geometry.window,
      .positive_scale = p.scale > 0,
      .aligned_rows = has_aligned_rows(a),
      .positive_strides = all_strides(a, [](int64_t stride) { return stride > 0; }),
  };
}

CudaAttention arguments_of(const Problem& p, const Call& call) {
  CudaAttention a{};
  a.dtype = p.dtype;
  a.batch = static_cast<int32_t>(p.batch);
  a.heads = static_cast<int32_t>(p.heads);
  a.key_heads = static_cast<int32_t>(p.key_heads);
  a.queries = static_cast<int32_t>(p.queries);
  a.keys = static_cast<int32_t>(p.keys);
  a.head_size = static_cast<int32_t>(p.head_size);
  a.value_head_size = static_cast<int32_t>(p.value_head_size);
  a.scale = p.scale;
  a.query = const_array(call.query);
  a.key = const_array(call.key);
  a.value = const_array(call.value);
  a.log_scale = call.log_scale.const_data_ptr();
  a.log_scale_batch_stride = p.log_scale_per_sample() ? p.heads : 0;
  a.log_scale_head_stride = 1;
  a.geometry.window = p.window < p.keys ? static_cast<int32_t>(p.window) : 0;
  if (p.span) {
    a.geometry.span = p.span->const_data_ptr<int64_t>();
    a.geometry.span_batch_stride = p.span->stride(0);
    a.geometry.span_stride = p.span->stride(1);
  }
  if (p.query_start) {
    a.geometry.query_start = p.query_start->const_data_ptr<int64_t>();
    a.geometry.query_start_stride = p.query_start->stride(0);
  }
  return a;
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("zerotuning: ") + what + ": " + cudaGetErrorString(error));
}

cudaStream_t current_stream(int32_t device) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Strided4<const void> const_array(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Strided4<void> mutable_array(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor scratch(const Tensor& like, int64_t bytes) {
  return aten::empty(like, Sizes{std::max<int64_t>(bytes, 1)}, ScalarType::Byte);
}

Call begin(const Problem& p) {
  constexpr int64_t max_head_size = 256;
  require(p.head_size <= max_head_size && p.value_head_size <= max_head_size,
          "head sizes on a GPU go up to ", max_head_size, ", got ", p.head_size, " (query) and ",
          p.value_head_size, " (value)");
  constexpr int64_t max_size = std::numeric_limits<int32_t>::max();
  require(p.batch <= max_size && p.heads <= max_size && p.queries <= max_size && p.keys <= max_size,
          "batch, heads, queries and keys on a GPU go up to ", max_size, " each, got ", p.batch,
          ", ", p.heads, ", ", p.queries, " and ", p.keys);
  const int32_t index = p.query.get_device_index();
  Call call{
      .guard = torch::stable::accelerator::DeviceGuard(index),
      .device = device_at(index),  // reads the current device, which the guard has set
      .stream = current_stream(index),
      .query = with_contiguous_rows(p.query),
      .key = with_contiguous_rows(p.key),
      .value = with_contiguous_rows(p.value),
      // An expanded [batch, heads] tensor is copied: the kernels interpret a batch stride of 0 as
      // one vector [heads].
      .log_scale = aten::contiguous(p.log_scale),
      .key_mask = p.key_mask,
      .real_keys = std::nullopt,
      .arguments = {},
      .shape = {},
      .card = {},
  };
  call.arguments = arguments_of(p, call);
  call.shape = shape_of(p, call.arguments);
  call.card = {.capability = call.device.capability, .l2_bytes = call.device.l2_bytes};
  return call;
}

void read_key_mask(const Problem& p, Call& call, bool find_real_keys) {
  if (!p.key_mask || p.batch == 0) return;
  if (p.key_mask->stride(1) != 1) call.key_mask = aten::clone_contiguous(*p.key_mask);
  attention::CudaGeometry& g = call.arguments.geometry;
  g.key_mask = static_cast<const bool*>(call.key_mask->const_data_ptr());
  g.key_mask_batch_stride = call.key_mask->stride(0);
  if (!find_real_keys) return;
  call.real_keys = aten::empty(p.query, Sizes{3, p.batch}, ScalarType::Int);
  int32_t* first_key = call.real_keys->mutable_data_ptr<int32_t>();
  int32_t *end_key = first_key + p.batch, *past_key = end_key + p.batch;
  g.first_key = first_key;
  g.end_key = end_key;
  g.past_key = past_key;
  check(attention::find_real_keys(g.key_mask, g.key_mask_batch_stride, call.arguments.batch,
                                  call.arguments.keys, first_key, end_key, past_key, call.stream),
        "key_mask");
}

}  // namespace zerotuning::ops::cuda
