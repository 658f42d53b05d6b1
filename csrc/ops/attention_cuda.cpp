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

// As many queries as keys, no window, no chosen keys.
bool square(const Problem& p) {
  return p.queries == p.keys && !p.query_start && !p.span && (p.window == 0 || p.window >= p.keys);
}

// A square causal problem, which is torch's kernels' too.
bool ordinary(const Problem& p, const Call& call) {
  return attention::has_16_byte_rows(call.arguments) && square(p) && p.queries > 1;
}

// cuDNN's kernels are built for cards from sm_90 on, not for sm_120.
bool has_cudnn(int32_t capability) { return capability >= 90 && capability < 120; }

// The faster one of torch's kernels. cuDNN's know larger heads on Hopper's forward alone.
constexpr int64_t largest_cudnn_head = 128;
Route stock_of(const Problem& p, int32_t capability) {
  const bool cudnn = has_cudnn(capability) && p.head_size <= largest_cudnn_head;
  return cudnn ? Route::cudnn : Route::flash;
}

// By the card, the sizes and the mask. Batch and heads are dimensions of torch's grids.
bool stock_knows(const Problem& p, Route stock, int32_t capability) {
  constexpr int64_t most_sequences = 65535, largest_head = 256;
  if (p.batch > most_sequences || p.heads > most_sequences) return false;
  if (p.head_size != p.value_head_size || p.head_size > largest_head) return false;
  return stock == Route::cudnn ? has_cudnn(capability) : !p.key_mask;
}

bool stock_takes(const Problem& p, const Call& call, Route stock) {
  return !p.key_mask && ordinary(p, call) && stock_knows(p, stock, call.device.capability);
}

// Of shorter sequences the plain kernels take no more time than the stock route's launches.
constexpr int64_t shortest_stock = 16;

Route choose_forward(const Problem& p, const Call& call) {
  if (call.device.capability == 90 && attention::supports_hopper_forward(call.arguments))
    return Route::hopper;
  const Route stock = stock_of(p, call.device.capability);
  return p.queries >= shortest_stock && stock_takes(p, call, stock) ? stock : Route::plain;
}

// Up to here one kernel for all keys is no slower than torch's own and the launches around it (on
// an H100, forward + backward over untuned cuDNN's, `bench attention`: 4 x 1024 0.87 against 1.22,
// 1 x 4096 1.07 against 1.06, 4 x 4096 1.05 against 1.09, 1 x 8192 1.09 against 1.05), and γ's
// gradient is exacter; with padding always, of which torch's kernels skip nothing.
constexpr int64_t longest_hopper_backward = 4096;

// Where Hopper's own kernel takes a backward that torch's could take as well.
bool hopper_is_faster(const Problem& p) {
  return p.head_size <= attention::max_hopper_backward_head_size &&
         (p.key_mask || p.queries <= longest_hopper_backward);
}

bool hopper_takes_backward(const Call& call) {
  return call.device.capability == 90 && attention::supports_hopper_backward(call.arguments);
}

// cuDNN's backward with a bias can give NaN where the last of its tiles of 128 keys is half empty
// (logsumexp below -88: pytorch issue 196678, on Hopper).
bool cudnn_may_fail(const Problem& p) { return p.key_mask && p.keys % 128 == 64; }

// What torch's flash kernel cannot differentiate: head sizes that it wants more shared memory for
// than some cards have, and float32 sums of grad_query that 32 bits do not count.
bool flash_may_fail(const Problem& p, int32_t capability) {
  const bool large_memory = capability == 80 || (capability >= 90 && capability < 120);
  const int64_t rows = (p.queries + 127) / 128 * 128;
  const int64_t columns = p.head_size > 192 ? 256 : (p.head_size + 31) / 32 * 32;
  return (p.head_size > 192 && p.head_size <= 224 && !large_memory) ||
         p.batch * p.heads * rows * columns > std::numeric_limits<int32_t>::max();
}

bool stock_knows_backward(const Problem& p, Route stock, int32_t capability) {
  return stock_knows(p, stock, capability) &&
         (stock == Route::cudnn ? p.head_size <= largest_cudnn_head
                                : !flash_may_fail(p, capability));
}

bool stock_takes_backward(const Problem& p, const Call& call, Route stock) {
  return ordinary(p, call) && stock_knows_backward(p, stock, call.device.capability);
}

// Where torch's kernel may make the gradients, by the card and the shapes.
bool stock_may_differentiate(const Problem& p, int32_t capability) {
  return p.queries >= shortest_stock &&
         stock_knows_backward(p, stock_of(p, capability), capability) && !cudnn_may_fail(p);
}

Route choose_backward(const Problem& p, const Call& call) {
  const bool stock = ordinary(p, call) && stock_may_differentiate(p, call.device.capability);
  if ((!stock || hopper_is_faster(p)) && hopper_takes_backward(call)) return Route::hopper;
  return stock ? stock_of(p, call.device.capability) : Route::plain;
}

// Whether backward will want the output_minus_initial_value: output minus the initial token's
// value, of which the 16-bit output alone holds nothing where that token has all the weight. By
// shapes and the card: fake kernels know no more (python/zerotuning/ops.py has the same rule).
bool needs_output_minus_initial_value(const Problem& p, int32_t capability) {
  const bool narrow = p.dtype == attention::DType::bfloat16 || p.dtype == attention::DType::float16;
  return narrow && square(p) && p.head_size % 8 == 0 && stock_may_differentiate(p, capability) &&
         !(capability == 90 && hopper_is_faster(p));
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
  const Tensor output = new_output(p);
  const bool wanted =
      with_output_minus_initial_value &&
      (route != Route::automatic || needs_output_minus_initial_value(p, call.device.capability));
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
  if (route == Route::automatic) route = choose_forward(p, call);
  switch (route) {
    case Route::hopper:
      require(call.device.capability == 90 && attention::supports_hopper_forward(a),
              "the hopper route does not take this call");
      check(attention::attention_hopper(a, call.device.multiprocessors, call.stream), "attention");
      break;
    case Route::cudnn:
    case Route::flash: {
      require(stock_takes(p, call, route), "torch's kernel does not take this call");
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
  if (route == Route::automatic) route = choose_backward(p, call);
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
    require(stock_takes_backward(p, call, route), "torch's kernel does not take this call");
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
    require(hopper_takes_backward(call), "the hopper route does not take this call");
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

Tensor decode_attention_cuda(const Problem& p, attention::DecodeRoute route, bool transpose) {
  constexpr int64_t most_queries = 16;
  Call call = begin(p);
  CudaAttention& a = call.arguments;
  // Made as it is returned: a view of it would cost a step more than making it does.
  const Tensor output = transpose
                            ? aten::empty(p.query, {p.batch, p.queries, p.heads, p.value_head_size},
                                          p.query.scalar_type())
                            : new_output(p);
  a.output = mutable_array(output);
  if (transpose) std::swap(a.output.head_stride, a.output.row_stride);
  if (empty(p) || p.queries > most_queries || call.device.capability < 80 ||
      !attention::supports_decode(a)) {
    const Tensor result = std::get<0>(attention_cuda(p));
    return transpose ? transposed(result) : result;
  }
  read_key_mask(p, call, !p.span);
  const int64_t scratch_bytes = attention::decode_scratch(a, call.device.multiprocessors);
  const Tensor memory = scratch(p.query, scratch_bytes);
  require(route != attention::DecodeRoute::bulk ||
              (call.device.capability == 90 && attention::supports_bulk_decode(a)),
          "the bulk route does not take this call");
  uint32_t* counters = scratch_bytes > 0 ? counters_of(call) : nullptr;
  check(attention::decode(a, memory.mutable_data_ptr(), counters, call.device, call.stream, route),
        "decode_attention");
  return output;
}

Tensor step_geometry_cuda(const Tensor& key_mask, int64_t keys,
                          const std::optional<int64_t>& query_start) {
  const attention::StepWords step = check_step(key_mask, keys, query_start);
  const int64_t batch = key_mask.size(0), length = std::min(key_mask.size(1), keys);
  const torch::stable::accelerator::DeviceGuard guard(key_mask.get_device_index());
  const Tensor mask = key_mask.stride(1) == 1 ? key_mask : aten::contiguous(key_mask);
  const Tensor words =
      aten::empty(mask, Sizes{batch, 1, 1, step.header + step.key_words}, ScalarType::Long);
  if (batch == 0) return words;
  check(attention::pack_step_words(static_cast<const bool*>(mask.const_data_ptr()), mask.stride(0),
                                   static_cast<int32_t>(batch), static_cast<int32_t>(length), step,
                                   words.mutable_data_ptr<int64_t>(),
                                   current_stream(mask.get_device_index())),
        "key_mask");
  return words;
}

}  // namespace zerotuning::ops
