// attention/: the decomposition into pieces, the number types and the CPU kernels, each against its
// formula in double.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "attention/cpu_kernels.h"
#include "attention/pieces.h"

namespace zerotuning::attention {
namespace {

// The number of pieces in which query row r attends to key j.
std::vector<std::vector<int>> coverage(const std::vector<Piece>& pieces, int64_t queries,
                                       int64_t keys) {
  std::vector<std::vector<int>> pieces_of_key(queries, std::vector<int>(keys, 0));
  for (const Piece& piece : pieces) {
    const int64_t rows = piece.query_end - piece.query_begin,
                  columns = piece.key_end - piece.key_begin;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; ++j) {
        if (piece.causal && j > r) continue;
        const int64_t row = piece.reversed ? piece.query_end - 1 - r : piece.query_begin + r;
        const int64_t key = piece.reversed ? piece.key_end - 1 - j : piece.key_begin + j;
        ++pieces_of_key[row][key];
      }
    }
  }
  return pieces_of_key;
}

TEST(Pieces, show_each_query_each_key_of_its_window_exactly_once) {
  for (int64_t queries = 1; queries <= 12; ++queries) {
    for (int64_t start = 0; start <= 9; ++start) {
      for (int64_t window = 0; window <= 14; ++window) {
        const auto pieces_of_key =
            coverage(decompose(queries, start, window), queries, start + queries);
        for (int64_t i = 0; i < queries; ++i) {
          for (int64_t j = 0; j < start + queries; ++j) {
            const bool visible = j <= start + i && (window == 0 || j > start + i - window);
            ASSERT_EQ(pieces_of_key[i][j], visible ? 1 : 0)
                << "queries " << queries << " start " << start << " window " << window << " at "
                << i << ", " << j;
          }
        }
      }
    }
  }
}

TEST(Pieces, first_piece_of_a_block_covers_all_its_rows) {
  for (const Piece& piece : decompose(100, 30, 16)) {
    if (piece.first) continue;
    bool covered = false;
    for (const Piece& other : decompose(100, 30, 16)) {
      covered |= other.first && other.query_begin <= piece.query_begin &&
                 piece.query_end <= other.query_end;
    }
    EXPECT_TRUE(covered);
  }
}

TEST(Pieces, an_unwindowed_square_problem_is_one_causal_piece) {
  const auto pieces = decompose(512, 0, 0);
  ASSERT_EQ(pieces.size(), 1u);
  EXPECT_TRUE(pieces[0].causal);
  EXPECT_EQ(decompose(512, 0, 512).size(), 1u);
  EXPECT_EQ(decompose(512, 0, 100000).size(), 1u);
}

TEST(NumberTypes, every_float16_survives_widening_and_narrowing) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Float16 x{static_cast<uint16_t>(bits)};
    const float wide = widen(x);
    if (std::isnan(wide)) {
      EXPECT_TRUE((bits & 0x7c00) == 0x7c00 && (bits & 0x3ff) != 0);
      continue;
    }
    ASSERT_EQ(narrow<Float16>(wide).bits, x.bits) << bits;
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const double magnitude = exponent == 31  ? std::numeric_limits<double>::infinity()
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    ASSERT_EQ(wide, static_cast<float>(bits & 0x8000 ? -magnitude : magnitude)) << bits;
  }
}

TEST(NumberTypes, narrowing_rounds_to_the_nearest_value_and_ties_to_even) {
  EXPECT_EQ(narrow<BFloat16>(1.0f + 1.0f / 256).bits, 0x3f80);  // tie, even below
  EXPECT_EQ(narrow<BFloat16>(1.0f + 3.0f / 256).bits, 0x3f82);  // tie, even above
  EXPECT_EQ(narrow<Float16>(1.0f + 1.0f / 2048).bits, 0x3c00);  // tie, even below
  EXPECT_EQ(narrow<Float16>(1.0f + 3.0f / 2048).bits, 0x3c02);  // tie, even above
  EXPECT_EQ(narrow<Float16>(65519.0f).bits, 0x7bff);
  EXPECT_EQ(narrow<Float16>(65520.0f).bits, 0x7c00);
  EXPECT_TRUE(std::isnan(widen(narrow<BFloat16>(std::nanf("")))));
  EXPECT_TRUE(std::isnan(widen(narrow<Float16>(std::nanf("")))));
}

template <typename T>
struct Numbers {
  std::vector<T> values;
  explicit Numbers(int64_t count, std::mt19937& random) : values(static_cast<size_t>(count)) {
    std::normal_distribution<float> normal;
    for (T& x : values) x = narrow<T>(normal(random));
  }
  double operator[](int64_t i) const {
    return static_cast<double>(widen(values[static_cast<size_t>(i)]));
  }
};

template <typename T>
class CpuKernel : public testing::Test {};
template <typename T>
constexpr DType dtype_of = std::is_same_v<T, double>     ? DType::float64
                           : std::is_same_v<T, float>    ? DType::float32
                           : std::is_same_v<T, BFloat16> ? DType::bfloat16
                                                         : DType::float16;
template <typename T>
constexpr double rounding = std::is_same_v<T, double>     ? 1e-12
                            : std::is_same_v<T, float>    ? 1e-5
                            : std::is_same_v<T, BFloat16> ? 1.0 / 128
                                                          : 1.0 / 1024;
using Types = testing::Types<double, float, BFloat16, Float16>;
TYPED_TEST_SUITE(CpuKernel, Types);

TYPED_TEST(CpuKernel, merge_weighs_two_parts_by_their_logsumexp_and_skips_a_part_that_saw_nothing) {
  using Real = typename Accumulator<TypeParam>::type;
  constexpr Real none = -std::numeric_limits<Real>::infinity();
  std::mt19937 random(1);
  const int64_t rows = 5, columns = 37;
  Numbers<TypeParam> whole(rows * columns, random), part(rows * columns, random);
  const Numbers<TypeParam> before = whole;
  std::vector<Real> lse = {0, 40, -40, none, 1}, part_lse = {1, -40, 40, 2, none};
  const std::vector<Real> lse_before = lse;
  const MergeArguments arguments{
      .dtype = dtype_of<TypeParam>,
      .batch = 1,
      .heads = 1,
      .rows = rows,
      .columns = columns,
      .output = {whole.values.data(), 0, 0, columns},
      .logsumexp = {lse.data(), 0, 0, 1},
      .part_output = {part.values.data(), 0, 0, columns},
      .part_logsumexp = {part_lse.data(), 0, 0, 1},
  };
  cpu_kernels().merge(arguments, 0, rows);
  for (int64_t r = 0; r < rows; ++r) {
    const double a = std::exp(double(lse_before[r])), b = std::exp(double(part_lse[r]));
    EXPECT_NEAR(lse[r], std::log(a + b), 1e-5 * (1 + std::abs(std::log(a + b))));
    for (int64_t i = r * columns; i < (r + 1) * columns; ++i) {
      EXPECT_NEAR(whole[i], (a * before[i] + b * part[i]) / (a + b), rounding<TypeParam> * 4);
    }
  }
}

TYPED_TEST(CpuKernel, add_sums_rows_in_reverse_order_too) {
  std::mt19937 random(2);
  const int64_t rows = 4, columns = 19;
  Numbers<TypeParam> sums(rows * columns, random), part(rows * columns, random);
  const Numbers<TypeParam> before = sums;
  const AddArguments arguments{
      .dtype = dtype_of<TypeParam>,
      .batch = 1,
      .heads = 1,
      .rows = rows,
      .columns = columns,
      .sum = {sums.values.data(), 0, 0, columns},
      .part = {part.values.data() + (rows - 1) * columns, 0, 0, -columns},
  };
  cpu_kernels().add(arguments, 0, rows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const double expected = before[r * columns + c] + part[(rows - 1 - r) * columns + c];
      EXPECT_NEAR(sums[r * columns + c], expected, rounding<TypeParam> * (1 + std::abs(expected)));
    }
  }
}

// dlog_scale = Σ_i a_ij (do_i·v_j - do_i·o_i) over the queries that attend to key j, in double.
TYPED_TEST(CpuKernel, log_scale_gradient_equals_its_formula_with_windows_masks_and_spans) {
  // Long: the arguments of one call, and the formula with the same names.
  using Real = typename Accumulator<TypeParam>::type;
  std::mt19937 random(3);
  const int64_t heads = 4, key_heads = 2, queries = 300, keys = 310, size = 24, value_size = 40,
                window = 280;
  Numbers<TypeParam> q(heads * queries * size, random), k(key_heads * keys * size, random),
      v(key_heads * keys * value_size, random), o(heads * queries * value_size, random),
      grad(heads * queries * value_size, random);
  std::vector<Real> lse(heads * queries, Real(3)),
      log_scale = {Real(-2), Real(0), Real(1), Real(2)};
  std::vector<char> mask(keys, 1);
  mask[6] = 0;
  const int64_t span[2] = {4, 9}, start[1] = {10};
  std::vector<double> partial(heads * log_scale_gradient_chunks(queries), std::nan(""));
  const LogScaleGradientArguments arguments{
      .dtype = dtype_of<TypeParam>,
      .batch = 1,
      .heads = heads,
      .heads_per_key_head = heads / key_heads,
      .query_rows = queries,
      .head_size = size,
      .value_head_size = value_size,
      .window = window,
      .scale = 0.2,
      .query = {q.values.data(), 0, queries * size, size},
      .key = {k.values.data(), 0, keys * size, size},
      .value = {v.values.data(), 0, keys * value_size, value_size},
      .output = {o.values.data(), 0, queries * value_size, value_size},
      .grad_output = {grad.values.data(), 0, queries * value_size, value_size},
      .logsumexp = {lse.data(), 0, queries, 1},
      .log_scale = log_scale.data(),
      .log_scale_batch_stride = 0,
      .key_mask = reinterpret_cast<const bool*>(mask.data()),
      .key_mask_batch_stride = keys,
      .span = span,
      .query_start = start,
      .partial = partial.data(),
  };
  cpu_kernels().log_scale_gradient(arguments, 0, static_cast<int64_t>(partial.size()));

  for (int64_t h = 0; h < heads; ++h) {
    double expected = 0, magnitude = 0, got = 0;
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t j = span[0]; j < span[1]; ++j) {
        if (!mask[j] || j > start[0] + i || j <= start[0] + i - window) continue;
        double logit = 0, change = 0;
        for (int64_t d = 0; d < size; ++d) {
          logit += 0.2 * q[(h * queries + i) * size + d] * k[(h / 2 * keys + j) * size + d];
        }
        for (int64_t d = 0; d < value_size; ++d) {
          const int64_t row = (h * queries + i) * value_size + d;
          change += grad[row] * (v[(h / 2 * keys + j) * value_size + d] - o[row]);
        }
        const double term = std::exp(logit + double(log_scale[h]) - 3) * change;
        expected += term, magnitude += std::abs(term);
      }
    }
    for (int64_t c = 0; c < log_scale_gradient_chunks(queries); ++c)
      got += partial[h * log_scale_gradient_chunks(queries) + c];
    EXPECT_NEAR(got, expected, 1e-5 * magnitude);
  }
}

}  // namespace
}  // namespace zerotuning::attention
