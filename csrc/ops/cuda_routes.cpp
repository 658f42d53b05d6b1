// The choice between our CUDA kernels and torch's kernels (cuda_routes.h).
#include "ops/cuda_routes.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <set>
#include <sstream>

namespace zerotuning::ops {
namespace {

using attention::DType;

constexpr int64_t any_number = std::numeric_limits<int64_t>::max();

// The limit of a grid's second and third dimension: batch and heads in torch's kernels, batch and
// key heads in our decode kernels.
constexpr int64_t max_grid = 65535;

// Our fast kernels and torch's kernels support 16-bit dtypes and head sizes that are multiples of 8
// up to 256.
constexpr int64_t max_head_size = 256;

bool is_16_bit(const StaticCall& c) {
  return c.dtype == DType::bfloat16 || c.dtype == DType::float16;
}

bool supports_head_size(int64_t size) { return size > 0 && size % 8 == 0 && size <= max_head_size; }

bool has_fast_kernel(const StaticCall& c) {
  return is_16_bit(c) && supports_head_size(c.head_size) && supports_head_size(c.value_head_size);
}

// cuDNN's attention is built for sm_90 to sm_11x, not for sm_120.
bool has_cudnn(const Card& card) { return card.capability >= 90 && card.capability < 120; }

// cuDNN's kernels support larger heads only in Hopper's forward.
constexpr int64_t max_cudnn_head_size = 128;

// Whether torch's kernel can compute, as a causal square call, all keys but the initial token. Up
// to head size 128, cuDNN's backward excludes padding by a bias; flash-attention 2 has no bias.
bool torch_kernel_supports(const StaticCall& c, Route route, const Card& card) {
  if (!has_fast_kernel(c) || c.head_size != c.value_head_size) return false;
  if (c.has_span || c.has_query_start) return false;
  return route == Route::cudnn ? has_cudnn(card) : !c.has_key_mask;
}

constexpr Lengths no_lengths{};

Lengths square_lengths() {
  return {
      .any = true,
      .min_queries = 2,
      .max_batch = max_grid,
      .max_heads = max_grid,
      .row_multiple = 1,
      .row_elements = 0,
      .max_elements = any_number,
      .key_divisor = 1,
      .forbidden_key_remainder = 1,
  };
}

// The lengths for which torch's kernel computes the forward pass correctly.
Lengths supported_lengths(const StaticCall& c, Route route, const Card& card) {
  return torch_kernel_supports(c, route, card) && !c.has_key_mask ? square_lengths() : no_lengths;
}

// The lengths for which torch's kernel computes the backward pass correctly.
Lengths supported_gradient_lengths(const StaticCall& c, Route route, const Card& card) {
  if (!torch_kernel_supports(c, route, card)) return no_lengths;
  Lengths lengths = square_lengths();
  if (route == Route::cudnn) return c.head_size <= max_cudnn_head_size ? lengths : no_lengths;
  // flash-attention 2 needs more shared memory for these head sizes than some cards have.
  const bool large_memory = card.capability == 80 || has_cudnn(card);
  if (c.head_size > 192 && c.head_size <= 224 && !large_memory) return no_lengths;
  // flash-attention 2 indexes its float32 sums of grad_query by 32 bits.
  lengths.row_multiple = 128;
  lengths.row_elements = c.head_size > 192 ? 256 : (c.head_size + 31) / 32 * 32;
  lengths.max_elements = std::numeric_limits<int32_t>::max();
  return lengths;
}

// For shorter sequences the plain kernels need no more time than the launches of torch's route.
constexpr int64_t min_torch_queries = 16;

// Up to this length Hopper's kernel for all keys is no slower than torch's kernel and the launches
// around torch's kernel (on an H100, forward + backward over untuned cuDNN's, `bench attention`: 4
// x 1024 0.87 against 1.22, 1 x 4096 1.07 against 1.06, 4 x 4096 1.05 against 1.09, 1 x 8192 1.09
// against 1.05), and γ's gradient is more exact; with padding at every length, since torch's
// kernels skip no padding.
constexpr int64_t max_hopper_backward_queries = 4096;
constexpr int64_t max_hopper_backward_head_size = 128;

// cuDNN's backward with a bias can give NaN if the last of its tiles of 128 keys is half empty
// (logsumexp below -88: pytorch issue 196678, on Hopper).
constexpr int64_t cudnn_key_tile = 128, half_empty_remainder = 64;

bool hopper_backward_supports(const StaticCall& c, const Card& card) {
  return card.capability == 90 && has_fast_kernel(c) &&
         c.head_size <= max_hopper_backward_head_size &&
         c.value_head_size <= max_hopper_backward_head_size;
}

// The lengths for which torch_kernel is the better choice than the plain kernels.
Lengths preferred_to_plain(const StaticCall& c, const Card& card) {
  Lengths lengths = supported_gradient_lengths(c, torch_kernel(c, card), card);
  lengths.min_queries = min_torch_queries;
  if (c.has_key_mask) {
    lengths.key_divisor = cudnn_key_tile;
    lengths.forbidden_key_remainder = half_empty_remainder;
  }
  return lengths;
}

bool can_use_tensor_maps(const CudaCall& c) {
  return c.aligned_rows && c.positive_strides && c.positive_scale && c.keys > 0;
}

bool has_torch_layout(const CudaCall& c) { return c.aligned_rows && c.positive_strides; }

}  // namespace

bool Lengths::contain(const CudaCall& c) const {
  if (!any) return false;
  const int64_t rows = (c.queries + row_multiple - 1) / row_multiple * row_multiple;
  return c.queries >= min_queries && c.batch <= max_batch && c.heads <= max_heads &&
         c.batch * c.heads * rows * row_elements <= max_elements && c.queries == c.keys &&
         (c.window == 0 || c.window >= c.keys) && c.keys % key_divisor != forbidden_key_remainder;
}

Route torch_kernel(const StaticCall& c, const Card& card) {
  return has_cudnn(card) && c.head_size <= max_cudnn_head_size ? Route::cudnn : Route::flash;
}

Lengths torch_gradient_lengths(const StaticCall& c, const Card& card) {
  if (card.capability < 80) return no_lengths;
  Lengths lengths = preferred_to_plain(c, card);
  if (!hopper_backward_supports(c, card)) return lengths;
  if (c.has_key_mask) return no_lengths;
  lengths.min_queries = max_hopper_backward_queries + 1;
  return lengths;
}

bool supports_forward(Route route, const CudaCall& c, const Card& card) {
  switch (route) {
    case Route::hopper:
      return card.capability == 90 && has_fast_kernel(c.fixed) && can_use_tensor_maps(c);
    case Route::cudnn:
    case Route::flash:
      return has_torch_layout(c) && supported_lengths(c.fixed, route, card).contain(c);
    default:
      return true;
  }
}

bool supports_backward(Route route, const CudaCall& c, const Card& card) {
  switch (route) {
    case Route::hopper:
      return hopper_backward_supports(c.fixed, card) && can_use_tensor_maps(c);
    case Route::cudnn:
    case Route::flash:
      return has_torch_layout(c) && supported_gradient_lengths(c.fixed, route, card).contain(c);
    default:
      return true;
  }
}

bool supports_decode(DecodeRoute route, const CudaCall& c, const Card& card) {
  constexpr int64_t max_queries = 16;
  if (route == DecodeRoute::forward) return true;
  const bool rings = card.capability >= 80 && has_fast_kernel(c.fixed) && c.aligned_rows &&
                     c.queries >= 1 && c.queries <= max_queries && c.batch <= max_grid &&
                     c.key_heads <= max_grid;
  if (route != DecodeRoute::bulk) return rings;
  const int64_t size = c.fixed.head_size;
  return rings && card.capability == 90 && c.positive_strides && size == c.fixed.value_head_size &&
         (size == 64 || size == 128);
}

Route forward_route(const CudaCall& c, const Card& card) {
  if (supports_forward(Route::hopper, c, card)) return Route::hopper;
  const Route torch = torch_kernel(c.fixed, card);
  const bool long_enough = c.queries >= min_torch_queries;
  return long_enough && supports_forward(torch, c, card) ? torch : Route::plain;
}

Route backward_route(const CudaCall& c, const Card& card) {
  const bool torch_layout = has_torch_layout(c);
  if (torch_layout && torch_gradient_lengths(c.fixed, card).contain(c))
    return torch_kernel(c.fixed, card);
  if (supports_backward(Route::hopper, c, card)) return Route::hopper;
  const bool torch = torch_layout && preferred_to_plain(c.fixed, card).contain(c);
  return torch ? torch_kernel(c.fixed, card) : Route::plain;
}

DecodeRoute decode_route(const CudaCall& c, const Card& card) {
  if (!supports_decode(DecodeRoute::rings, c, card)) return DecodeRoute::forward;
  const bool large = attention::exceeds_level2(
      c.batch, c.key_heads, attention::visible_keys(c.queries, c.keys, c.window), c.fixed.head_size,
      c.fixed.value_head_size, card.l2_bytes);
  return large && supports_decode(DecodeRoute::bulk, c, card) ? DecodeRoute::bulk
                                                              : DecodeRoute::rings;
}

const char* name_of(Route route) {
  constexpr const char* names[] = {"automatic", "plain", "hopper", "cudnn", "flash"};
  return names[static_cast<int64_t>(route)];
}

const char* name_of(DecodeRoute route) {
  constexpr const char* names[] = {"automatic", "rings", "bulk", "forward"};
  return names[static_cast<int64_t>(route)];
}

std::string describe(const char* pass, const CudaCall& c, const Card& card, const char* route) {
  constexpr const char* dtypes[] = {"float64", "float32", "bfloat16", "float16"};
  std::ostringstream text;
  text << pass << " " << c.batch << " x " << c.heads << "/" << c.key_heads << " heads x "
       << c.queries << " queries x " << c.keys << " keys, head size " << c.fixed.head_size;
  if (c.fixed.value_head_size != c.fixed.head_size) text << "/" << c.fixed.value_head_size;
  text << ", " << dtypes[static_cast<int>(c.fixed.dtype)];
  if (c.window > 0) text << ", window " << c.window;
  if (c.fixed.has_key_mask) text << ", key_mask";
  if (c.fixed.has_span) text << ", span";
  if (c.fixed.has_query_start) text << ", query_start";
  if (!c.aligned_rows) text << ", unaligned rows";
  text << ", sm_" << card.capability << ": " << route;
  return text.str();
}

void print_route(const char* pass, const CudaCall& call, const Card& card, const char* route) {
  static const bool enabled = [] {
    const char* setting = std::getenv("ZEROTUNING_PRINT_ROUTES");
    return setting && *setting && std::string(setting) != "0";
  }();
  if (!enabled) return;
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::string line = describe(pass, call, card, route);
  const std::lock_guard lock(mutex);
  if (printed.insert(line).second) std::fprintf(stderr, "zerotuning: %s\n", line.c_str());
}

}  // namespace zerotuning::ops
