// zerotuning::decode_attention on a GPU.
#include <array>
#include <map>
#include <mutex>
#include <utility>

#include "attention/cuda_decode.h"
#include "ops/attention_cuda.h"
#include "ops/cuda/call.h"
#include "ops/layout.h"

namespace zerotuning::ops {
namespace {

using namespace cuda;

// The set of counters of the call's stream, whose calls run one after the other. Null while a CUDA
// graph is captured, since a graph may be replayed on any stream, and for streams beyond the number
// of sets.
uint32_t* counters_of(const Call& call) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(call.stream, &status), "stream");
  if (status != cudaStreamCaptureStatusNone) return nullptr;
  unsigned long long stream;  // an id is unique; a later stream may have the same handle
  check(cudaStreamGetId(call.stream, &stream), "stream");
  static std::mutex mutex;
  static std::array<std::map<unsigned long long, uint32_t*>, attention::max_devices> sets;
  const std::lock_guard lock(mutex);
  auto& sets_of_streams = sets[call.device.index];
  if (const auto set = sets_of_streams.find(stream); set != sets_of_streams.end())
    return set->second;
  if (sets_of_streams.size() >= attention::decode_counter_sets) return nullptr;
  uint32_t* counters;
  check(attention::decode_counters(static_cast<int32_t>(sets_of_streams.size()), counters),
        "decode_attention");
  return sets_of_streams[stream] = counters;
}

}  // namespace

Tensor decode_attention_cuda(const Problem& p, DecodeRoute route, bool transpose) {
  Call call = begin(p);
  if (has_empty_output(p) || route == DecodeRoute::forward ||
      !supports_decode(DecodeRoute::rings, call.shape, call.card)) {
    const Tensor result = std::get<0>(attention_cuda(p));
    return transpose ? transposed(result) : result;
  }
  // Allocated in the returned layout: on top of new_output, a transposed view would cost more time.
  const Tensor output = transpose
                            ? aten::empty(p.query, {p.batch, p.queries, p.heads, p.value_head_size},
                                          p.query.scalar_type())
                            : new_output(p);
  attention::CudaAttention& a = call.arguments;
  a.output = mutable_array(output);
  if (transpose) std::swap(a.output.head_stride, a.output.row_stride);
  read_key_mask(p, call, !p.span);
  if (route == DecodeRoute::automatic) route = decode_route(call.shape, call.card);
  require(supports_decode(route, call.shape, call.card), "the ", name_of(route),
          " route does not support this call");
  print_route("decode", call.shape, call.card, name_of(route));
  const int64_t scratch_bytes = attention::decode_scratch(a, call.device.multiprocessors);
  const Tensor memory = scratch(p.query, scratch_bytes);
  uint32_t* counters = scratch_bytes > 0 ? counters_of(call) : nullptr;
  check(attention::decode(a, memory.mutable_data_ptr(), counters, call.device, call.stream, route),
        "decode_attention");
  return output;
}

}  // namespace zerotuning::ops
