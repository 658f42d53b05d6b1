// The choice of a CUDA kernel, for any card: the tests need no GPU.
#include "ops/cuda_routes.h"

#include <gtest/gtest.h>

namespace zerotuning::ops {
namespace {

using attention::DType;

constexpr int64_t mebibyte = 1 << 20;
constexpr Card ampere{80, 40 * mebibyte}, ada{89, 96 * mebibyte}, hopper{90, 50 * mebibyte},
    blackwell{100, 126 * mebibyte}, consumer_blackwell{120, 96 * mebibyte};

// A square causal call of bfloat16 with 32 heads and 8 key heads.
CudaCall square(int64_t length, int64_t head_size = 128, int64_t batch = 2) {
  return {
      .fixed = {.dtype = DType::bfloat16,
                .head_size = head_size,
                .value_head_size = head_size,
                .has_key_mask = false,
                .has_span = false,
                .has_query_start = false},
      .batch = batch,
      .heads = 32,
      .key_heads = 8,
      .queries = length,
      .keys = length,
      .window = 0,
      .positive_scale = true,
      .aligned_rows = true,
      .positive_strides = true,
  };
}

CudaCall with_key_mask(CudaCall call) {
  call.fixed.has_key_mask = true;
  return call;
}

CudaCall step(int64_t batch, int64_t keys, int64_t queries = 1) {
  CudaCall call = square(keys, 128, batch);
  call.queries = queries;
  return call;
}

TEST(ForwardRoute, is_hoppers_own_kernel_there_and_torchs_on_other_cards) {
  EXPECT_EQ(forward_route(square(1024), hopper), Route::hopper);
  EXPECT_EQ(forward_route(square(1024, 256), hopper), Route::hopper);
  EXPECT_EQ(forward_route(square(1024), blackwell), Route::cudnn);
  EXPECT_EQ(forward_route(square(1024, 256), blackwell), Route::flash);
  for (const Card& card : {ampere, ada, consumer_blackwell})
    EXPECT_EQ(forward_route(square(1024), card), Route::flash);
}

TEST(ForwardRoute, is_plain_where_torchs_kernels_cannot_compute_the_call) {
  for (const Card& card : {ampere, blackwell}) {
    EXPECT_EQ(forward_route(square(15), card), Route::plain);
    EXPECT_EQ(forward_route(square(16), card), card.capability == 80 ? Route::flash : Route::cudnn);
    EXPECT_EQ(forward_route(with_key_mask(square(1024)), card), Route::plain);
    CudaCall call = square(1024);
    call.window = 1023;
    EXPECT_EQ(forward_route(call, card), Route::plain);
    call.window = 1024;  // hides no key
    EXPECT_NE(forward_route(call, card), Route::plain);
    call.fixed.has_span = true;
    EXPECT_EQ(forward_route(call, card), Route::plain);
    call = square(1024);
    call.fixed.has_query_start = true;
    EXPECT_EQ(forward_route(call, card), Route::plain);
    call = square(1024);
    call.keys = 1025;
    EXPECT_EQ(forward_route(call, card), Route::plain);
    EXPECT_EQ(forward_route(square(1024, 128, 65536), card), Route::plain);
    EXPECT_EQ(forward_route(square(1024, 60), card), Route::plain);
  }
}

TEST(ForwardRoute, is_plain_for_wide_dtypes_and_for_arrays_that_fast_kernels_cannot_read) {
  for (const Card& card : {ampere, hopper, blackwell}) {
    CudaCall call = square(1024);
    call.fixed.dtype = DType::float32;
    EXPECT_EQ(forward_route(call, card), Route::plain);
    call = square(1024);
    call.aligned_rows = false;
    EXPECT_EQ(forward_route(call, card), Route::plain);
    call = square(1024);
    call.positive_strides = false;
    EXPECT_EQ(forward_route(call, card), Route::plain);
  }
  CudaCall negative = square(1024);
  negative.positive_scale = false;
  EXPECT_NE(forward_route(negative, hopper), Route::hopper);
}

TEST(BackwardRoute, on_hopper_is_its_own_kernel_up_to_4096_queries_and_with_padding) {
  EXPECT_EQ(backward_route(square(1), hopper), Route::hopper);
  EXPECT_EQ(backward_route(square(4096), hopper), Route::hopper);
  EXPECT_EQ(backward_route(square(4097), hopper), Route::cudnn);
  EXPECT_EQ(backward_route(with_key_mask(square(5000)), hopper), Route::hopper);
  EXPECT_EQ(backward_route(square(300, 256), hopper), Route::flash);
  EXPECT_EQ(backward_route(with_key_mask(square(300, 256)), hopper), Route::plain);
  CudaCall windowed = square(5000);
  windowed.window = 100;
  EXPECT_EQ(backward_route(windowed, hopper), Route::hopper);
  CudaCall negative = square(300);
  negative.positive_scale = false;
  EXPECT_EQ(backward_route(negative, hopper), Route::cudnn);
}

TEST(BackwardRoute, is_cudnns_with_padding_unless_its_last_tile_of_keys_is_half_empty) {
  EXPECT_EQ(backward_route(with_key_mask(square(300)), blackwell), Route::cudnn);
  EXPECT_EQ(backward_route(with_key_mask(square(320)), blackwell), Route::plain);
  EXPECT_EQ(backward_route(square(320), blackwell), Route::cudnn);
  EXPECT_EQ(backward_route(with_key_mask(square(300)), ampere), Route::plain);
}

TEST(BackwardRoute, is_plain_where_flash_attention_cannot_differentiate) {
  EXPECT_EQ(backward_route(square(300, 200), ampere), Route::flash);
  EXPECT_EQ(backward_route(square(300, 200), ada), Route::plain);
  EXPECT_EQ(backward_route(square(300, 224), ada), Route::plain);
  EXPECT_EQ(backward_route(square(300, 256), ada), Route::flash);
  EXPECT_EQ(backward_route(square(8192, 128, 63), ampere), Route::flash);
  EXPECT_EQ(backward_route(square(8192, 128, 64), ampere), Route::plain);  // 2^31 sums
}

// The gradients' route depends on data that a fake kernel evaluates on symbolic sizes (Lengths).
TEST(TorchGradientLengths, contain_the_calls_that_are_routed_to_torchs_kernels) {
  for (const Card& card : {ampere, ada, hopper, blackwell, consumer_blackwell}) {
    for (const int64_t size : {64, 128, 192, 200, 256}) {
      for (const int64_t length : {1, 2, 15, 16, 320, 4096, 4097, 8192}) {
        for (const int64_t batch : {1, 64, 70000}) {
          for (const CudaCall& call :
               {square(length, size, batch), with_key_mask(square(length, size, batch))}) {
            const Route route = backward_route(call, card);
            const bool torch = route == Route::cudnn || route == Route::flash;
            EXPECT_EQ(torch_gradient_lengths(call.fixed, card).contain(call), torch)
                << describe("backward", call, card, name_of(route));
          }
        }
      }
    }
  }
}

TEST(TorchGradientLengths, are_none_for_cards_older_than_sm_80) {
  EXPECT_FALSE(torch_gradient_lengths(square(1).fixed, {75, 0}).any);
}

TEST(DecodeRoute, is_bulk_on_hopper_for_caches_much_larger_than_level_2) {
  EXPECT_EQ(decode_route(step(1, 8192), hopper), DecodeRoute::rings);
  EXPECT_EQ(decode_route(step(16, 8192), hopper), DecodeRoute::bulk);
  EXPECT_EQ(decode_route(step(16, 8192), blackwell), DecodeRoute::rings);
  CudaCall windowed = step(16, 8192);
  windowed.window = 512;
  EXPECT_EQ(decode_route(windowed, hopper), DecodeRoute::rings);
  CudaCall expanded = step(16, 8192);
  expanded.positive_strides = false;
  EXPECT_EQ(decode_route(expanded, hopper), DecodeRoute::rings);
}

TEST(DecodeRoute, is_forward_for_many_queries_wide_dtypes_and_unaligned_rows) {
  EXPECT_EQ(decode_route(step(1, 8192, 16), ampere), DecodeRoute::rings);
  EXPECT_EQ(decode_route(step(1, 8192, 17), ampere), DecodeRoute::forward);
  CudaCall call = step(1, 8192);
  call.fixed.dtype = DType::float64;
  EXPECT_EQ(decode_route(call, ampere), DecodeRoute::forward);
  call = step(1, 8192);
  call.aligned_rows = false;
  EXPECT_EQ(decode_route(call, ampere), DecodeRoute::forward);
}

TEST(Describe, names_the_call_the_card_and_the_route) {
  CudaCall call = with_key_mask(square(4096, 128, 1));
  call.fixed.value_head_size = 64;
  EXPECT_EQ(describe("forward", call, hopper, name_of(Route::hopper)),
            "forward 1 x 32/8 heads x 4096 queries x 4096 keys, head size 128/64, bfloat16, "
            "key_mask, sm_90: hopper");
}

}  // namespace
}  // namespace zerotuning::ops
