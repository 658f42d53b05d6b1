// The source of the CPU kernels, compiled once for each instruction set. The including file defines
// ZEROTUNING_CPU_TARGET, the namespace that separates the copies; csrc/attention/CMakeLists.txt
// sets its compiler flags.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/arguments.h"
#include "attention/cpu_kernels.h"

namespace zerotuning::attention::ZEROTUNING_CPU_TARGET {

// Σ_i a_i b_i in 16 independent lanes, which compilers turn into vector registers.
template <typename T>
typename Accumulator<T>::type dot(const T* a, const T* b, int64_t count) {
  using Real = typename Accumulator<T>::type;
  constexpr int64_t lanes = 16;
  Real sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane)
      sums[lane] += widen(a[i + lane]) * widen(b[i + lane]);
  }
  for (int64_t lane = 0; i + lane < count; ++lane)
    sums[lane] += widen(a[i + lane]) * widen(b[i + lane]);
  for (int64_t width = lanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

template <typename T>
void merge_row(T* output, const T* part, int64_t columns, typename Accumulator<T>::type* lse,
               typename Accumulator<T>::type part_lse) {
  using Real = typename Accumulator<T>::type;
  if (part_lse == -std::numeric_limits<Real>::infinity()) return;
  const Real maximum = std::max(*lse, part_lse);
  const Real weight = std::exp(*lse - maximum);
  const Real part_weight = std::exp(part_lse - maximum);
  const Real sum = weight + part_weight;
  const Real factor = weight / sum, part_factor = part_weight / sum;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    output[i] = narrow<T>(factor * widen(output[i]) + part_factor * widen(part[i]));
  }
  *lse = maximum + std::log(sum);
}

template <typename T>
void merge(const MergeArguments& a, int64_t begin, int64_t end) {
  using Real = typename Accumulator<T>::type;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item % a.rows, head = item / a.rows % a.heads,
                  batch = item / a.rows / a.heads;
    merge_row(a.output.row<T>(batch, head, row), a.part_output.row<T>(batch, head, row), a.columns,
              a.logsumexp.row<Real>(batch, head, row),
              *a.part_logsumexp.row<Real>(batch, head, row));
  }
}

template <typename T>
void add(const AddArguments& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item % a.rows, head = item / a.rows % a.heads,
                  batch = item / a.rows / a.heads;
    T* sum = a.sum.row<T>(batch, head, row);
    const T* part = a.part.row<T>(batch, head, row);
#pragma omp simd
    for (int64_t i = 0; i < a.columns; ++i) sum[i] = narrow<T>(widen(sum[i]) + widen(part[i]));
  }
}

// The share of query rows [begin, end) of one head and one scaled key in the gradient.
template <typename T>
double log_scale_gradient_of_key(const LogScaleGradientArguments& a, int64_t batch, int64_t head,
                                 int64_t key, int64_t begin, int64_t end) {
  using Real = typename Accumulator<T>::type;
  const int64_t key_head = head / a.heads_per_key_head;
  const T* k = a.key.row<T>(batch, key_head, key);
  const T* v = a.value.row<T>(batch, key_head, key);
  const Real log_scale =
      static_cast<const Real*>(a.log_scale)[batch * a.log_scale_batch_stride + head];
  double sum = 0;
  for (int64_t row = begin; row < end; ++row) {
    const Real lse = *a.logsumexp.row<Real>(batch, head, row);
    const T* grad = a.grad_output.row<T>(batch, head, row);
    const Real logit =
        static_cast<Real>(a.scale) * dot(a.query.row<T>(batch, head, row), k, a.head_size);
    const Real weight = std::exp(logit + log_scale - lse);
    const Real change = dot(grad, v, a.value_head_size) -
                        dot(grad, a.output.row<T>(batch, head, row), a.value_head_size);
    sum += static_cast<double>(weight * change);
  }
  return sum;
}

template <typename T>
void log_scale_gradient(const LogScaleGradientArguments& a, int64_t begin, int64_t end) {
  const int64_t chunks = log_scale_gradient_chunks(a.query_rows);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item % chunks, head = item / chunks % a.heads,
                  batch = item / chunks / a.heads;
    const int64_t row_begin = chunk * log_scale_gradient_chunk_rows;
    const int64_t row_end = std::min(a.query_rows, row_begin + log_scale_gradient_chunk_rows);
    const int64_t start = a.query_start[batch];
    double sum = 0;
    for (int64_t key = a.span[2 * batch]; key < a.span[2 * batch + 1]; ++key) {
      if (a.key_mask && !a.key_mask[batch * a.key_mask_batch_stride + key]) continue;
      const int64_t first = std::max(row_begin, key - start);
      const int64_t last = a.window > 0 ? std::min(row_end, key - start + a.window) : row_end;
      sum += log_scale_gradient_of_key<T>(a, batch, head, key, first, last);
    }
    a.partial[item] = sum;
  }
}

template <typename Arguments, typename Kernel>
void for_dtype(const Arguments& arguments, Kernel&& kernel) {
  switch (arguments.dtype) {
    case DType::float64:
      return kernel(double{});
    case DType::float32:
      return kernel(float{});
    case DType::bfloat16:
      return kernel(BFloat16{});
    case DType::float16:
      return kernel(Float16{});
  }
}

const CpuKernels kernels = {
    [](const MergeArguments& a, int64_t begin, int64_t end) {
      for_dtype(a, [&](auto type) { merge<decltype(type)>(a, begin, end); });
    },
    [](const AddArguments& a, int64_t begin, int64_t end) {
      for_dtype(a, [&](auto type) { add<decltype(type)>(a, begin, end); });
    },
    [](const LogScaleGradientArguments& a, int64_t begin, int64_t end) {
      for_dtype(a, [&](auto type) { log_scale_gradient<decltype(type)>(a, begin, end); });
    },
};

}  // namespace zerotuning::attention::ZEROTUNING_CPU_TARGET
