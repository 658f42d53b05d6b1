// Reads the geometry and writes the bias (geometry.h).
#include "ops/cpu/geometry.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace zerotuning::ops {
namespace {

void read_query_start(const Problem& p, Geometry& geometry) {
  geometry.query_start.assign(p.batch, p.keys - p.queries);
  if (!p.query_start) return;
  const int64_t* data = p.query_start->const_data_ptr<int64_t>();
  const int64_t stride = p.query_start->stride(0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t start = data[b * stride];
    require(start >= 0 && start + p.queries <= p.keys, "query_start[", b,
            "] must be between 0 and Tk - Tq = ", p.keys - p.queries, ", got ", start);
    geometry.query_start[b] = start;
  }
}

void read_span(const Problem& p, Geometry& geometry) {
  geometry.span.assign(2 * p.batch, 0);
  if (p.span) {
    const int64_t* data = p.span->const_data_ptr<int64_t>();
    const int64_t sample_stride = p.span->stride(0), stride = p.span->stride(1);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t first = data[b * sample_stride], end = data[b * sample_stride + stride];
      require(0 <= first && first <= end && end <= p.keys, "span[", b,
              "] must be [first, end) within the ", p.keys, " keys, got [", first, ", ", end, ")");
      geometry.span[2 * b] = first;
      geometry.span[2 * b + 1] = end;
    }
    return;
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    const bool* mask = geometry.key_mask ? geometry.key_mask + b * p.keys : nullptr;
    const int64_t first = mask ? std::find(mask, mask + p.keys, true) - mask : 0;
    geometry.span[2 * b] = first;
    geometry.span[2 * b + 1] = std::min(first + 1, p.keys);
  }
}

template <typename Real>
void check_finite(const Tensor& log_scale) {
  const Tensor values = aten::contiguous(log_scale);
  const Real* data = values.const_data_ptr<Real>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    require(std::isfinite(data[i]), "log_scale must be finite, got ", data[i], " at index ", i);
  }
}

template <typename Real>
void write_bias(const Problem& p, const Geometry& geometry, int64_t begin, int64_t samples,
                int64_t keys, const Tensor& bias) {
  const Real* log_scale = static_cast<const Real*>(p.log_scale.const_data_ptr());
  const int64_t sample_stride = p.log_scale_per_sample() ? p.log_scale.stride(0) : 0;
  const int64_t head_stride = p.log_scale.stride(p.log_scale.dim() - 1);
  Real* row = bias.mutable_data_ptr<Real>();
  for (int64_t b = begin; b < begin + samples; ++b) {
    const int64_t first = std::min(geometry.span[2 * b], keys),
                  end = std::min(geometry.span[2 * b + 1], keys);
    const bool* mask = geometry.key_mask ? geometry.key_mask + b * p.keys : nullptr;
    for (int64_t h = 0; h < p.heads; ++h, row += keys) {
      std::fill(row, row + keys, Real{0});
      std::fill(row + first, row + end, log_scale[b * sample_stride + h * head_stride]);
      for (int64_t j = 0; mask && j < keys; ++j) {
        if (!mask[j]) row[j] = -std::numeric_limits<Real>::infinity();
      }
    }
  }
}

}  // namespace

bool Geometry::same_query_start() const {
  return std::adjacent_find(query_start.begin(), query_start.end(), std::not_equal_to<>()) ==
         query_start.end();
}

Geometry read_geometry(const Problem& p) {
  Geometry geometry;
  if (p.key_mask) {
    geometry.key_mask_owner = aten::contiguous(*p.key_mask);
    geometry.key_mask = static_cast<const bool*>(geometry.key_mask_owner.const_data_ptr());
  }
  read_query_start(p, geometry);
  read_span(p, geometry);
  if (p.dtype == attention::DType::float64) {
    check_finite<double>(p.log_scale);
  } else {
    check_finite<float>(p.log_scale);
  }
  return geometry;
}

Tensor make_bias(const Problem& p, const Geometry& geometry, int64_t begin, int64_t end,
                 int64_t keys) {
  const bool shared = !p.log_scale_per_sample() && !p.key_mask && !p.span;
  const int64_t samples = shared ? 1 : end - begin;
  const bool is_float64 = p.dtype == attention::DType::float64;
  Tensor bias = aten::empty(p.log_scale, Sizes{samples, p.heads, 1, keys},
                            is_float64 ? ScalarType::Double : ScalarType::Float);
  if (is_float64) {
    write_bias<double>(p, geometry, begin, samples, keys, bias);
  } else {
    write_bias<float>(p, geometry, begin, samples, keys, bias);
  }
  return bias;
}

}  // namespace zerotuning::ops
