// attention/flash_cpu.h on this processor against the formula in double.
// Before each call, NaN fills every array that the kernels write.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "attention/flash_cpu.h"

namespace zerotuning::attention {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

struct Sizes {
  int64_t batch, heads, key_heads, queries, keys, head_size, value_head_size, window;
};

// Random inputs of a call, with holes in the mask, and with a span and a query_start for each
// sample. Heads lie inside rows, as in a model.
template <typename T>
struct Call {
  Sizes s;
  std::vector<T> query, key, value, output;
  std::vector<float> logsumexp, log_scale;
  std::unique_ptr<bool[]> mask;
  std::vector<int64_t> span, start;
  std::unique_ptr<void, decltype(&std::free)> packed{nullptr, &std::free};
  FlashArguments arguments;

  static std::vector<T> numbers(int64_t count, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<T> x(static_cast<size_t>(count));
    for (T& number : x) number = narrow<T>(normal(random));
    return x;
  }
  static Strided4<void> rows(std::vector<T>& x, int64_t count, int64_t heads, int64_t size) {
    return {x.data(), count * heads * size, size, heads * size};
  }

  Call(Sizes sizes, const FlashKernel& kernel, bool masked, unsigned seed) : s(sizes) {
    std::mt19937 random(seed);
    query = numbers(s.batch * s.queries * s.heads * s.head_size, random);
    key = numbers(s.batch * s.keys * s.key_heads * s.head_size, random);
    value = numbers(s.batch * s.keys * s.key_heads * s.value_head_size, random);
    output.assign(static_cast<size_t>(s.batch * s.queries * s.heads * s.value_head_size),
                  narrow<T>(nan));
    logsumexp.assign(static_cast<size_t>(s.batch * s.heads * s.queries), nan);
    mask = std::make_unique<bool[]>(static_cast<size_t>(s.batch * s.keys));
    for (int64_t i = 0; i < s.batch * s.keys; ++i) mask[i] = random() % 5 > 0;
    for (int64_t i = 0; i < s.batch * s.heads; ++i)
      log_scale.push_back(static_cast<float>(random() % 800) / 100 - 4);
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t first = static_cast<int64_t>(random() % s.keys);
      span.insert(span.end(), {b ? first : 0, b ? std::min(first + 9, s.keys) : 1});
      start.push_back(static_cast<int64_t>(random() % (s.keys - s.queries + 1)));
    }
    arguments = {
        .batch = s.batch,
        .heads = s.heads,
        .key_heads = s.key_heads,
        .queries = s.queries,
        .keys = s.keys,
        .head_size = s.head_size,
        .value_head_size = s.value_head_size,
        .window = s.window,
        .scale = scale(),
        .query = rows(query, s.queries, s.heads, s.head_size),
        .key = rows(key, s.keys, s.key_heads, s.head_size),
        .value = rows(value, s.keys, s.key_heads, s.value_head_size),
        .output = rows(output, s.queries, s.heads, s.value_head_size),
        .logsumexp = {logsumexp.data(), s.heads * s.queries, s.queries, 1},
        .log_scale = log_scale.data(),
        .log_scale_batch_stride = s.heads,
        .log_scale_head_stride = 1,
        .key_mask = masked ? mask.get() : nullptr,
        .span = span.data(),
        .query_start = start.data(),
        .packed = nullptr,
    };
    const int64_t bytes = kernel.packed_bytes(arguments);
    packed.reset(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
    std::fill_n(static_cast<float*>(packed.get()), bytes / 4, nan);
    arguments.packed = packed.get();
  }

  double scale() const { return 1.5 / std::sqrt(double(s.head_size)); }

  bool visible(int64_t b, int64_t i, int64_t j) const {
    const int64_t position = start[b] + i;
    return j <= position && (!s.window || j > position - s.window) &&
           (!arguments.key_mask || mask[b * s.keys + j]);
  }

  // Adds a row's squares of the error and of the expected output, and checks the row's logsumexp.
  void check_row(int64_t b, int64_t h, int64_t i, double* squared_error, double* squares) const {
    const int64_t kh = h / (s.heads / s.key_heads);
    std::vector<double> expected(static_cast<size_t>(s.value_head_size), 0.0);
    double row_sum = 0;
    for (int64_t j = 0; j < s.keys; ++j) {
      if (!visible(b, i, j)) continue;
      double logit = 0;
      for (int64_t d = 0; d < s.head_size; ++d) {
        logit += double(widen(query[((b * s.queries + i) * s.heads + h) * s.head_size + d])) *
                 double(widen(key[((b * s.keys + j) * s.key_heads + kh) * s.head_size + d]));
      }
      const bool scaled = j >= span[2 * b] && j < span[2 * b + 1];
      const double gamma = scaled ? std::exp(double(log_scale[b * s.heads + h])) : 1;
      const double weight = gamma * std::exp(scale() * logit);
      row_sum += weight;
      for (int64_t d = 0; d < s.value_head_size; ++d) {
        expected[d] +=
            weight *
            double(widen(value[((b * s.keys + j) * s.key_heads + kh) * s.value_head_size + d]));
      }
    }
    const float lse = logsumexp[(b * s.heads + h) * s.queries + i];
    if (row_sum == 0) {
      EXPECT_EQ(lse, -std::numeric_limits<float>::infinity());
    } else {
      EXPECT_NEAR(lse, std::log(row_sum), 1e-5 * (1 + std::abs(std::log(row_sum))));
    }
    for (int64_t d = 0; d < s.value_head_size; ++d) {
      const double exact = row_sum == 0 ? 0 : expected[d] / row_sum;
      const double actual =
          widen(output[((b * s.queries + i) * s.heads + h) * s.value_head_size + d]);
      *squared_error += (actual - exact) * (actual - exact);
      *squares += exact * exact;
    }
  }

  double error() const {
    double squared_error = 0, squares = 0;
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t h = 0; h < s.heads; ++h) {
        for (int64_t i = 0; i < s.queries; ++i) check_row(b, h, i, &squared_error, &squares);
      }
    }
    return std::sqrt(squared_error / squares);
  }
};

template <typename T>
class Flash : public testing::Test {};
using Types = testing::Types<float, BFloat16>;
TYPED_TEST_SUITE(Flash, Types);

template <typename T>
constexpr DType dtype_of = std::is_same_v<T, float> ? DType::float32 : DType::bfloat16;
template <typename T>
constexpr double rounding = std::is_same_v<T, float> ? 1e-6 : 4e-3;

TYPED_TEST(Flash, equals_the_formula_for_sizes_windows_masks_spans_and_positions) {
  const FlashKernel* kernel = flash_kernel(dtype_of<TypeParam>);
  if (!kernel) GTEST_SKIP() << "this processor has no such kernel";
  unsigned seed = 0;
  for (const Sizes& sizes :
       {Sizes{1, 1, 1, 1, 1, 16, 16, 0}, Sizes{2, 4, 2, 37, 37, 64, 64, 0},
        Sizes{2, 6, 2, 50, 301, 40, 80, 0}, Sizes{1, 2, 1, 131, 270, 128, 128, 0},
        Sizes{2, 2, 2, 70, 200, 192, 128, 33}, Sizes{1, 2, 1, 300, 300, 64, 64, 1},
        Sizes{2, 2, 1, 97, 129, 256, 256, 64}, Sizes{3, 2, 1, 16, 400, 24, 8, 150}}) {
    for (const bool masked : {false, true}) {
      Call<TypeParam> call(sizes, *kernel, masked, ++seed);
      kernel->pack(call.arguments, 0, kernel->pack_items(call.arguments));
      kernel->attend(call.arguments, 0, kernel->items(call.arguments));
      EXPECT_LE(call.error(), rounding<TypeParam>)
          << "queries " << sizes.queries << " keys " << sizes.keys << " head size "
          << sizes.head_size << " window " << sizes.window << " masked " << masked;
    }
  }
}

TYPED_TEST(Flash, gives_the_same_however_the_items_are_spread) {
  const FlashKernel* kernel = flash_kernel(dtype_of<TypeParam>);
  if (!kernel) GTEST_SKIP() << "this processor has no such kernel";
  const Sizes sizes{2, 4, 2, 150, 200, 48, 64, 40};
  Call<TypeParam> whole(sizes, *kernel, true, 1), spread(sizes, *kernel, true, 1);
  kernel->pack(whole.arguments, 0, kernel->pack_items(whole.arguments));
  kernel->attend(whole.arguments, 0, kernel->items(whole.arguments));
  for (int64_t i = kernel->pack_items(spread.arguments); i-- > 0;)
    kernel->pack(spread.arguments, i, i + 1);
  for (int64_t i = kernel->items(spread.arguments); i-- > 0;)
    kernel->attend(spread.arguments, i, i + 1);
  EXPECT_EQ(std::memcmp(whole.output.data(), spread.output.data(),
                        whole.output.size() * sizeof(TypeParam)),
            0);
  EXPECT_EQ(whole.logsumexp, spread.logsumexp);
}

TYPED_TEST(Flash, a_nan_in_a_query_reaches_its_row_alone) {
  const FlashKernel* kernel = flash_kernel(dtype_of<TypeParam>);
  if (!kernel) GTEST_SKIP() << "this processor has no such kernel";
  Call<TypeParam> call({1, 1, 1, 40, 40, 16, 16, 0}, *kernel, false, 1);
  call.query[7 * 16 + 3] = narrow<TypeParam>(nan);
  kernel->pack(call.arguments, 0, kernel->pack_items(call.arguments));
  kernel->attend(call.arguments, 0, kernel->items(call.arguments));
  for (int64_t i = 0; i < 40 * 16; ++i)
    EXPECT_EQ(std::isnan(widen(call.output[i])), i / 16 == 7) << i;
}

TYPED_TEST(Flash, one_query_without_packing_equals_the_formula_however_heads_are_spread) {
  const FlashKernel* kernel = flash_kernel(dtype_of<TypeParam>);
  const DecodeKernel decode = decode_kernel(dtype_of<TypeParam>);
  if (!kernel || !decode) GTEST_SKIP() << "this processor has no such kernel";
  unsigned seed = 20;
  for (const Sizes& sizes : {Sizes{3, 2, 1, 1, 5, 16, 16, 0}, Sizes{2, 4, 2, 1, 301, 40, 80, 0},
                             Sizes{2, 9, 3, 1, 130, 64, 64, 50}, Sizes{3, 8, 1, 1, 400, 24, 8, 0},
                             Sizes{2, 6, 6, 1, 300, 256, 200, 0}}) {
    for (const bool masked : {false, true}) {
      Call<TypeParam> call(sizes, *kernel, masked, ++seed);
      const FlashArguments& f = call.arguments;
      kernel->pack(f, 0, kernel->pack_items(f));
      kernel->attend(f, 0, kernel->items(f));  // writes the logsumexp that check_row reads
      std::fill(call.output.begin(), call.output.end(), narrow<TypeParam>(nan));
      for (int64_t row = f.batch * f.heads; row-- > 0;) decode(f, row, row + 1);
      EXPECT_LE(call.error(), rounding<TypeParam>) << "keys " << f.keys << " masked " << masked;
      const auto alone = call.output;
      decode(f, 0, f.batch * f.heads);
      EXPECT_EQ(std::memcmp(alone.data(), call.output.data(), alone.size() * sizeof(TypeParam)), 0);
    }
  }
}

}  // namespace
}  // namespace zerotuning::attention
