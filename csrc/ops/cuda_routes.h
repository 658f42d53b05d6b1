// The choice of the kernel that computes a call on a GPU: pure functions of the call's sizes and of
// the card. These functions need neither CUDA nor torch nor the card itself. The CPU library
// contains them too. Python calls them through cuda_routes_c.cpp
// (python/zerotuning/cuda_routes.py).
#pragma once

#include <cstdint>
#include <string>

#include "attention/arguments.h"
#include "attention/decode_route.h"

namespace zerotuning::ops {

using attention::DecodeRoute;

enum class Route : int64_t {
  automatic = 0,  // forward_route or backward_route chooses
  plain = 1,      // our kernels without tensor cores: any dtype, shape and geometry
  hopper = 2,     // our kernels for sm_90a: 16-bit, any geometry; backward up to head size 128
  // A kernel of torch computes all keys but the initial token, which is then merged.
  cudnn = 3,
  flash = 4,  // flash-attention 2
};

struct Card {
  int64_t capability;  // compute capability: 90 for sm_90
  int64_t l2_bytes;    // size of the level-2 cache
};

// The part of a call that is constant in a traced graph; the graph's lengths may be symbolic.
struct StaticCall {
  attention::DType dtype;
  int64_t head_size, value_head_size;
  bool has_key_mask, has_span, has_query_start;
};

struct CudaCall {
  StaticCall fixed;
  int64_t batch, heads, key_heads, queries, keys;
  int64_t window;       // number of keys that a query may attend to; 0 = all
  bool positive_scale;  // of the logits
  bool aligned_rows;    // rows of query, key and value begin at multiples of 16 bytes
  // The strides of query, key and value are positive: tensor maps of Hopper's copy engine and
  // torch's kernels need this.
  bool positive_strides;
};

// The conditions on a call's lengths under which a kernel of torch is chosen. All must hold. They
// are data, not code, so that Python can evaluate them on symbolic sizes.
struct Lengths {
  bool any;  // false: no lengths at all
  int64_t min_queries;
  int64_t max_batch, max_heads;
  // batch × heads × queries rounded up to a multiple of row_multiple × row_elements.
  int64_t row_multiple, row_elements, max_elements;
  int64_t key_divisor, forbidden_key_remainder;  // keys % key_divisor; key_divisor 1 forbids none
  // Two conditions need no member: as many queries as keys, and no window that excludes a key.

  bool contain(const CudaCall& call) const;
};

// Torch's faster kernel for the card and the head size.
Route torch_kernel(const StaticCall& call, const Card& card);

// The lengths for which torch_kernel computes the gradients because torch_kernel is the only fast
// kernel that supports the call, or is faster than our Hopper kernel. For these lengths backward
// needs output_minus_initial_value.
Lengths torch_gradient_lengths(const StaticCall& call, const Card& card);

// Whether a kernel can compute the call; `plain` can compute every call.
bool supports_forward(Route route, const CudaCall& call, const Card& card);
bool supports_backward(Route route, const CudaCall& call, const Card& card);
bool supports_decode(DecodeRoute route, const CudaCall& call, const Card& card);

// The kernel that computes the call if the caller's route is `automatic`; never `automatic` itself.
Route forward_route(const CudaCall& call, const Card& card);
Route backward_route(const CudaCall& call, const Card& card);
DecodeRoute decode_route(const CudaCall& call, const Card& card);

const char* name_of(Route route);
const char* name_of(DecodeRoute route);

// "forward 1 x 32/8 heads x 4096 queries x 4096 keys, head size 128, bfloat16, sm_90: hopper"
std::string describe(const char* pass, const CudaCall& call, const Card& card, const char* route);

// Prints the description to stderr, each distinct text once, if the environment variable
// ZEROTUNING_PRINT_ROUTES is set and neither empty nor 0.
void print_route(const char* pass, const CudaCall& call, const Card& card, const char* route);

}  // namespace zerotuning::ops
