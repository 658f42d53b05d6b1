// The search of the ZeroTuning paper (arXiv 2505.11739): profile every head, pick the dominant
// group, sweep one gamma over it.
#pragma once

#include <string>
#include <vector>

#include "search/optimizer.h"

namespace zerotuning::search {

struct PaperOptions {
  // The scale that each head is tried with, > 1.
  double profile_gamma = 1.5;
  // Whether each head is also tried with the scale 1/profile_gamma.
  bool two_sided = false;
  // The scales tried on the group, > 0.
  std::vector<double> sweep{0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 0.8, 1.25, 1.5, 2.0, 2.75, 4.0};
  // Share of the group that is tuned, in (0, 1]: the heads with the largest effects.
  double top_fraction = 1.0;
  // Maximum number of points in one ask(), >= 1: a run that is killed loses at most the evaluations
  // of one ask().
  int64_t chunk = 16;
};

enum class Direction { none, up, down };

// "none", "up" or "down".
const char* direction_name(Direction direction);

// The loss may be any number, such as the paper's 1 - accuracy. With L(h, gamma) the loss when head
// h alone is scaled:
//   effect_h = L(0) - L(h, profile_gamma)
//   effect_h = (L(h, 1/profile_gamma) - L(h, profile_gamma)) / 2      two-sided
// Up-effective heads have effect > 0, down-effective heads effect < 0. The larger group is tuned (a
// tie: up): every gamma of `sweep` is tried on all its heads at once. The lowest loss wins (a tie:
// the gamma nearest 1). The winner is the only finalist, if its loss is lower than that of x = 0.
class PaperOptimizer final : public Optimizer {
 public:
  explicit PaperOptimizer(int64_t dimension, PaperOptions options = {});

  std::string method() const override { return "paper"; }
  std::string progress() const override;
  std::vector<Point> finalists() const override;
  int64_t steps_done() const override { return static_cast<int64_t>(losses_.size()); }
  int64_t steps_total() const override;

  // effect_h of each head [dimension]; NaN for a head that is not measured yet, infinite for a head
  // with a failed evaluation.
  std::vector<double> profile() const;
  // The group that is tuned; none before the profile is complete, or when no head has an effect.
  Direction direction() const { return direction_; }
  // The heads that are tuned, as ascending indices into x; empty where direction() is none.
  const std::vector<int64_t>& group() const { return group_; }
  // Losses of options.sweep, in its order; NaN where a loss is not measured yet.
  std::vector<double> sweep_losses() const;

 private:
  std::vector<Point> plan() const override;
  void update(const std::vector<double>& losses) override;
  void write_options(StateWriter& writer) const override;
  void write(StateWriter& writer) const override;
  void read(StateReader& reader) override;

  // All evaluations have one fixed order: x = 0, the heads, the sweep. losses_ holds the losses of
  // a prefix of this order and is the whole state; the other members below follow from losses_.
  size_t trials_per_head() const { return options_.two_sided ? 2 : 1; }
  size_t profile_end() const { return 1 + size() * trials_per_head(); }
  size_t sweep_end() const { return profile_end() + options_.sweep.size(); }
  Point point(size_t index) const;
  size_t planned_end() const;
  Point group_point(double gamma) const;
  // Brings direction_, group_ and winner_ up to date with losses_.
  void conclude();
  void choose_group();
  void choose_winner();

  PaperOptions options_;
  std::vector<double> losses_;
  Direction direction_ = Direction::none;
  std::vector<int64_t> group_;
  Point winner_;  // the sweep's best point; empty if no point beats x = 0
};

}  // namespace zerotuning::search
