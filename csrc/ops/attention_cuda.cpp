// The choice between the CUDA kernels (attention/cuda_*.h) and torch's own, and the calls.
#include "ops/attention_cuda.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <limits>
#include <map>
#include <mutex>

#include "attention/cuda_backward.h"
#include "attention/cuda_decode.h"
#include "attention/cuda_forward.h"
#include "attention/cuda_initial_token.h"
#include "attention/cuda_key_mask.h"
#include "attention/key_mask_layout.h"
#include "ops/cuda_routes.h"
#include "ops/layout.h"

namespace zerotuning::ops {
namespace {

using attention::CudaAttention;
using attention::CudaDevice;
using attention::Strided4;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("zerotuning: ") + what + ": " + cudaGetErrorString(error));
}

CudaDevice read_device(int index) {
  constexpr int32_t oldest = 80;
  const auto read = [&](cudaDeviceAttr attribute) {
    int value;
    check(cudaDeviceGetAttribute(&value, attribute, index), "device");
    return value;
  };
  const int32_t capability =
      10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor);
  int32_t compiled_capability = 0;
  require(capability >= oldest &&
              attention::compiled_capability_of_kernels(compiled_capability) == cudaSuccess,
          "zerotuning was built without kernels for cuda:", index, ", of compute capability ",
          capability / 10, ".", capability % 10, " (8.0 is the oldest that it knows)");
  return {read(cudaDevAttrMultiProcessorCount),
          capability,
          read(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          read(cudaDevAttrL2CacheSize),
          compiled_capability,
          index};
}

const CudaDevice& device_at(int index) {
  constexpr int most = attention::max_devices;
  static std::array<CudaDevice, most> devices;
  static std::array<std::once_flag, most> read;
  require(index < most, "zerotuning knows ", most, " devices, got cuda:", index);
  std::call_once(read[index], [&] { devices[index] = read_device(index); });
  return devices[index];
}

Strided4<const void> const_array(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}
Strided4<void> mutable_array(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// A call's arguments for the kernels, and the tensors that they point into.
struct Call {
  torch::stable::accelerator::DeviceGuard guard;
  const CudaDevice& device;
  cudaStream_t stream;
  Tensor query, key, value, log_scale;
  std::optional<Tensor> key_mask, real_keys;
  CudaAttention arguments;
};

cudaStream_t current_stream(int32_t device) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Call begin(const Problem& p) {
  constexpr int64_t largest = 256;
  require(p.head_size <= largest && p.value_head_size <= largest, "head sizes on a GPU go up to ",
          largest, ", got ", p.head_size, " (query) and ", p.value_head_size, " (value)");
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  require(p.batch <= most && p.heads <= most && p.queries <= most && p.keys <= most,
          "batch, heads, queries and keys on a GPU go up to ", most, " each, got ", p.batch, ", ",
          p.heads, ", ", p.queries, " and ", p.keys);
  const int32_t index = p.query.get_device_index();
  Call call{torch::stable::accelerator::DeviceGuard(index),
            device_at(index),
            current_stream(index),
            unit_stride(p.query),
            unit_stride(p.key),
            unit_stride(p.value),
            // A batch stride of 0 is the kernels' word for one vector.
            aten::dense(p.log_scale),
            p.key_mask,
            std::nullopt,
            {}};
  CudaAttention& a = call.arguments;
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
  return call;
}

// Padding. Where it ends is worth a kernel of its own unless the call is short and names its span.
void read_key_mask(const Problem& p, Call& call, bool find = true) {
  if (!p.key_mask || p.batch == 0) return;
  if (p.key_mask->stride(1) != 1) call.key_mask = aten::contiguous(*p.key_mask);
  auto& g = call.arguments.geometry;
  g.key_mask = static_cast<const bool*>(call.key_mask->const_data_ptr());
  g.key_mask_batch_stride = call.key_mask->stride(0);
  if (!find) return;
  call.real_keys = aten::empty(p.query, Sizes{3, p.batch}, ScalarType::Int);
  int32_t* first_key = call.real_keys->mutable_data_ptr<int32_t>();
  g.first_key = first_key;
  g.end_key = first_key + p.batch;
  g.past_key = first_key + 2 * p.batch;
  check(attention::find_real_keys(g.key_mask, g.key_mask_batch_stride, call.arguments.batch,
                                  call.arguments.keys, first_key, first_key + p.batch,
                                  first_key + 2 * p.batch, call.stream),
        "key_mask");
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

// The call as the choice of a route sees it (cuda_routes.h).
CudaCall cuda_call(const Problem& p, const Call& call) {
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
      .window = call.arguments.geometry.window,
      .positive_scale = p.scale > 0,
      .aligned_rows = has_aligned_rows(call.arguments),
      .positive_strides = all_strides(call.arguments, [](int64_t stride) { return stride > 0; }),
  };
}

Card card_of(const CudaDevice& device) {
  return {.capability = device.capability, .l2_bytes = device.l2_bytes};
}

Tensor scratch(const Tensor& like, int64_t bytes) {
  return aten::empty(like, Sizes{std::max<int64_t>(bytes, 1)}, ScalarType::Byte);
}

// What the calls of one stream, which run one after the other, may count in. Null where there is
// nothing: a captured call may be replayed on any stream, and there is enough for so many streams.
uint32_t* counters_of(const Call& call) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(call.stream, &status), "stream");
  if (status != cudaStreamCaptureStatusNone) return nullptr;
  unsigned long long stream;  // not the handle, which a later stream may have again
  check(cudaStreamGetId(call.stream, &stream), "stream");
  static std::mutex mutex;
  static std::array<std::map<unsigned long long, uint32_t*>, attention::max_devices> of_devices;
  const std::lock_guard lock(mutex);
  auto& of_streams = of_devices[call.device.index];
  if (const auto found = of_streams.find(stream); found != of_streams.end()) return found->second;
  if (of_streams.size() >= attention::decode_counter_sets) return nullptr;
  uint32_t* counters;
  check(attention::decode_counters(static_cast<int32_t>(of_streams.size()), counters),
        "decode_attention");
  return of_streams[stream] = counters;
}

Tensor undefined() {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&handle));
  return Tensor(handle);
}

Tensor rows_from(const Tensor& t, int64_t begin) { return aten::narrow(t, 2, begin, t.size(2)); }

// Torch's attention of queries 1… over keys 1…: (output, logsumexp). Called by their C functions:
// the dispatcher's stable interface does not return the sequence lengths that are among the
// results.
std::tuple<Tensor, Tensor> stock_forward(const Problem& p, const Call& call, Route stock) {
  const Tensor query = rows_from(call.query, 1), key = rows_from(call.key, 1),
               value = rows_from(call.value, 1);
  double scale = p.scale;
  std::array<AtenTensorHandle, 7> results{};
  int64_t most_queries, most_keys;
  if (stock == Route::cudnn) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda__scaled_dot_product_cudnn_attention(
        query.get(), key.get(), value.get(), nullptr, true, 0.0, true, false, &scale, &results[0],
        &results[1], &results[2], &results[3], &most_queries, &most_keys, &results[4], &results[5],
        &results[6]));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda__scaled_dot_product_flash_attention(
        query.get(), key.get(), value.get(), 0.0, true, false, &scale, &results[0], &results[1],
        &results[2], &results[3], &most_queries, &most_keys, &results[4], &results[5],
        &results[6]));
  }
  for (size_t unused = 2; unused < results.size(); ++unused) {
    if (results[unused]) Tensor freed(results[unused]);
  }
  return {Tensor(results[0]), Tensor(results[1])};
}

Tensor gradient_like(const Tensor& t) {
  return new_rows(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
}

struct Gradients {
  Tensor query, key, value;
};

Gradients new_gradients(const Problem& p) {
  return {gradient_like(p.query), gradient_like(p.key), gradient_like(p.value)};
}

// cuDNN's bias of keys that are not its business: padding and the initial token. [B, 1, 1, T]
Tensor exclusion_bias(const Problem& p, const Call& call) {
  const Tensor bias = aten::empty(p.query, Sizes{p.batch, 1, 1, p.keys}, p.query.scalar_type());
  check(attention::exclusion_bias(call.arguments, bias.mutable_data_ptr(), call.stream), "bias");
  return bias;
}

// Torch's gradients, given the output and logsumexp of all keys: exact for the keys it sees. Its
// graph cache knows calls by query, key and value alone, so the other arrays always come in one
// layout.
Gradients stock_backward(const Problem& p, const Call& call, Route stock, const Tensor& grad_output,
                         const Tensor& output, const Tensor& logsumexp) {
  const Tensor seed = aten::empty(p.query, Sizes{}, ScalarType::Long);
  Tensor key = call.key, value = call.value, bias = undefined();
  if (p.key_mask) {
    bias = exclusion_bias(p, call);
  } else {
    key = gradient_like(p.key);
    value = gradient_like(p.value);
    check(attention::replace_initial_key(call.arguments, mutable_array(key), mutable_array(value),
                                         call.stream),
          "keys");
  }
  const auto stack = [&] {
    if (stock == Route::flash) {
      return aten::call<3>("aten::_scaled_dot_product_flash_attention_backward", "", grad_output,
                           call.query, key, value, output, logsumexp, undefined(), undefined(),
                           p.queries, p.keys, 0.0, true, seed, seed, std::optional(p.scale));
    }
    const Tensor sums = aten::tensor("aten::unsqueeze", "", logsumexp, int64_t{3});
    return aten::call<3>("aten::_scaled_dot_product_cudnn_attention_backward", "", grad_output,
                         call.query, key, value, output, sums, seed, seed, bias, undefined(),
                         undefined(), p.queries, p.keys, 0.0, true, std::optional(p.scale));
  }();
  const auto rows = [](const Tensor& t) { return in_row_layout(t, t.size(3)); };
  return {torch::stable::detail::to<Tensor>(stack[0]),
          rows(torch::stable::detail::to<Tensor>(stack[1])),
          rows(torch::stable::detail::to<Tensor>(stack[2]))};
}

// Rows that see no key have logsumexp -inf, of which torch's kernels would make NaN; +inf gives 0.
Tensor backward_logsumexp(const Problem& p, const Call& call, const Tensor& logsumexp) {
  if (!p.key_mask) return logsumexp;
  const Tensor copy = aten::contiguous(logsumexp);
  check(attention::negate_minus_infinity(static_cast<float*>(copy.mutable_data_ptr()), copy.numel(),
                                         call.stream),
        "logsumexp");
  return copy;
}

// The row layout, which a view into other memory may have at an address that 16 bytes do not
// divide.
Tensor aligned_rows(const Tensor& t) {
  const Tensor rows = in_row_layout(t, t.size(3));
  if (reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0) return rows;
  const Tensor copy = new_rows(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
  aten::copy_(copy, t);
  return copy;
}

}  // namespace

ThreeTensors attention_cuda(const Problem& p, Route route, bool with_output_minus_initial_value) {
  Call call = begin(p);
  const CudaCall shape = cuda_call(p, call);
  const Card card = card_of(call.device);
  const Tensor output = new_output(p);
  const bool wanted =
      with_output_minus_initial_value &&
      (route != Route::automatic || torch_gradient_lengths(shape.fixed, card).contain(shape));
  const Tensor output_minus_initial_value =
      wanted ? new_output(p) : aten::empty(p.query, Sizes{0}, p.query.scalar_type());
  const Tensor logsumexp =
      aten::empty(p.query, Sizes{p.batch, p.heads, p.queries}, p.log_scale.scalar_type());
  if (empty(p)) return {output, logsumexp, output_minus_initial_value};
  CudaAttention& a = call.arguments;
  a.output = mutable_array(output);
  a.logsumexp = mutable_array(logsumexp);
  if (wanted) a.output_minus_initial_value = mutable_array(output_minus_initial_value);
  read_key_mask(p, call);
  if (route == Route::automatic) route = forward_route(shape, card);
  require(supports_forward(route, shape, card), "the ", name_of(route),
          " route does not support this call");
  print_route("forward", shape, card, name_of(route));
  switch (route) {
    case Route::hopper:
      check(attention::attention_hopper(a, call.device.multiprocessors, call.stream), "attention");
      break;
    case Route::cudnn:
    case Route::flash: {
      const auto [part, part_logsumexp] = stock_forward(p, call, route);
      check(attention::initial_token_merge(a, const_array(part), const_array(part_logsumexp), 1,
                                           call.device, call.stream),
            "attention");
      break;
    }
    default:
      check(attention::attention_plain(a, call.stream), "attention");
  }
  return {output, logsumexp, output_minus_initial_value};
}

FourTensors attention_backward_cuda(const Problem& p, const BackwardArguments& backward,
                                    Route route) {
  const auto& [grad_output, output, logsumexp, output_minus_initial_value] = backward;
  Call call = begin(p);
  const Tensor grad_log_scale = torch::stable::empty_like(call.log_scale);
  if (empty(p)) {
    const Gradients zero = new_gradients(p);
    for (const Tensor* gradient : {&zero.query, &zero.key, &zero.value, &grad_log_scale}) {
      Tensor zeroed = *gradient;
      torch::stable::zero_(zeroed);
    }
    return {zero.query, zero.key, zero.value, grad_log_scale};
  }
  const Tensor grad_rows = aligned_rows(grad_output), output_rows = aligned_rows(output),
               sums = aten::dense(logsumexp);
  std::optional<Tensor> departure_rows;
  CudaAttention& a = call.arguments;
  read_key_mask(p, call);
  const CudaCall shape = cuda_call(p, call);
  const Card card = card_of(call.device);
  if (route == Route::automatic) route = backward_route(shape, card);
  require(supports_backward(route, shape, card), "the ", name_of(route),
          " route does not support this call");
  print_route("backward", shape, card, name_of(route));
  Tensor memory;
  attention::CudaAttentionGradients gradients{};
  const auto write_to = [&](const Gradients& g, int64_t scratch_bytes) {
    memory = scratch(p.query, scratch_bytes);
    gradients = {
        .output = const_array(output_rows),
        .logsumexp = const_array(sums),
        .output_minus_initial_value =
            departure_rows ? const_array(*departure_rows) : Strided4<const void>{},
        .grad_output = const_array(grad_rows),
        .grad_query = mutable_array(g.query),
        .grad_key = mutable_array(g.key),
        .grad_value = mutable_array(g.value),
        .grad_log_scale = grad_log_scale.mutable_data_ptr(),
        .scratch = memory.mutable_data_ptr(),
    };
  };
  if (route == Route::cudnn || route == Route::flash) {
    if (output_minus_initial_value && output_minus_initial_value->numel() > 0) {
      departure_rows = aligned_rows(*output_minus_initial_value);
    }
    Gradients g =
        stock_backward(p, call, route, grad_rows, output_rows, backward_logsumexp(p, call, sums));
    const attention::TorchKernelGradients stock{const_array(g.query), !p.key_mask};
    const Tensor part_query = g.query;  // lives until the launch, also where it is not the result
    if (!has_row_layout(g.query)) g.query = gradient_like(p.query);
    write_to(g, attention::initial_token_backward_scratch(a));
    check(attention::initial_token_backward(a, gradients, stock, call.device, call.stream),
          "attention_backward");
    return {g.query, g.key, g.value, grad_log_scale};
  }
  const Gradients g = new_gradients(p);
  if (route == Route::hopper) {
    write_to(g, attention::attention_backward_hopper_scratch(a));
    check(attention::attention_backward_hopper(a, gradients, call.device.multiprocessors,
                                               call.stream),
          "attention_backward");
  } else {
    write_to(g, attention::attention_backward_plain_scratch(a));
    check(attention::attention_backward_plain(a, gradients, call.stream), "attention_backward");
  }
  return {g.query, g.key, g.value, grad_log_scale};
}

Tensor decode_attention_cuda(const Problem& p, DecodeRoute route, bool transpose) {
  Call call = begin(p);
  const CudaCall shape = cuda_call(p, call);
  const Card card = card_of(call.device);
  CudaAttention& a = call.arguments;
  // Allocated in the layout that is returned: a view of it would cost more than the allocation.
  const Tensor output = transpose
                            ? aten::empty(p.query, {p.batch, p.queries, p.heads, p.value_head_size},
                                          p.query.scalar_type())
                            : new_output(p);
  a.output = mutable_array(output);
  if (transpose) std::swap(a.output.head_stride, a.output.row_stride);
  if (empty(p) || !supports_decode(DecodeRoute::rings, shape, card)) {
    const Tensor result = std::get<0>(attention_cuda(p));
    return transpose ? transposed(result) : result;
  }
  read_key_mask(p, call, !p.span);
  const int64_t scratch_bytes = attention::decode_scratch(a, call.device.multiprocessors);
  const Tensor memory = scratch(p.query, scratch_bytes);
  if (route == DecodeRoute::automatic) route = decode_route(shape, card);
  require(supports_decode(route, shape, card), "the ", name_of(route),
          " route does not support this call");
  print_route("decode", shape, card, name_of(route));
  uint32_t* counters = scratch_bytes > 0 ? counters_of(call) : nullptr;
  check(attention::decode(a, memory.mutable_data_ptr(), counters, call.device, call.stream, route),
        "decode_attention");
  return output;
}

Tensor encode_key_mask_cuda(const Tensor& key_mask, int64_t keys, int64_t query_start) {
  using Layout = attention::KeyMaskLayout;
  check_key_mask_to_encode(key_mask, keys);
  const int64_t batch = key_mask.size(0), length = std::min(key_mask.size(1), keys);
  const torch::stable::accelerator::DeviceGuard guard(key_mask.get_device_index());
  const Tensor mask = key_mask.stride(1) == 1 ? key_mask : aten::contiguous(key_mask);
  const Sizes sizes{batch, 1, Layout::header + Layout::words(keys), 1};
  const Tensor encoded = aten::empty(mask, sizes, ScalarType::Long);
  if (batch == 0) return encoded;
  check(attention::encode_key_mask(static_cast<const bool*>(mask.const_data_ptr()), mask.stride(0),
                                   static_cast<int32_t>(batch), static_cast<int32_t>(length),
                                   static_cast<int32_t>(keys), query_start,
                                   encoded.mutable_data_ptr<int64_t>(),
                                   current_stream(mask.get_device_index())),
        "key_mask");
  return encoded;
}

}  // namespace zerotuning::ops
