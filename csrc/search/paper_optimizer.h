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
  // Whether each head is also tried with 1/profile_gamma.
  bool two_sided = false;
  // The scales tried on the group, > 0.
  std::vector<double> sweep{0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 0.8, 1.25, 1.5, 2.0, 2.75, 4.0};
  // Share of the group, by size of effect, that is tuned, in (0, 1].
  double top_fraction = 1.0;
  // Most evaluations in one ask(), >= 1: so much at most is lost when a run is killed.
  int64_t chunk = 16;
  // false: there is no held-out part, and the winner is compared with x = 0 on the fit part alone.
  bool held_out = true;
};

enum class Direction { none, up, down };

// "none", "up" or "down".
const char* direction_name(Direction direction);

// The loss may be any number, 1 - accuracy as in the paper included. With L(h, gamma) the fit loss
// when head h alone is scaled:
//   effect_h = L(0) - L(h, profile_gamma)
//   effect_h = (L(h, 1/profile_gamma) - L(h, profile_gamma)) / 2      two-sided
// Up-effective heads have effect > 0, down-effective ones effect < 0. The larger group is tuned (a
// tie: up): every gamma of `sweep` is tried on all its heads at once. The lowest fit loss wins (a
// tie: the gamma nearest 1), and is kept if it beats x = 0 on the fit part and then on the held-out
// part. No gradients are asked for.
class PaperOptimizer final : public Optimizer {
 public:
  explicit PaperOptimizer(int64_t dimension, PaperOptions options = {});

  std::string method() const override { return "paper"; }
  std::string progress() const override;
  // Evaluations told, and the most there can be.
  int64_t steps_done() const override { return static_cast<int64_t>(losses_.size()); }
  int64_t steps_total() const override;

  // effect_h of each head [dimension]; NaN where it is not measured yet.
  std::vector<double> profile() const;
  // Which group is tuned; none before the profile is complete, or when no head has an effect.
  Direction direction() const { return direction_; }
  // The heads that are tuned, as ascending indices into x; empty where direction() is none.
  const std::vector<int64_t>& group() const { return group_; }
  // Fit losses of options.sweep, in its order; NaN where one is not measured.
  std::vector<double> sweep_losses() const;

 private:
  std::vector<Evaluation> plan() const override;
  void learn(const std::vector<Evaluation>& asked, const std::vector<Outcome>& outcomes) override;
  const Incumbent& incumbent() const override { return incumbent_; }
  void write_options(StateWriter& writer) const override;
  void write(StateWriter& writer) const override;
  void read(StateReader& reader) override;

  // All evaluations stand in one fixed order: x = 0 (fit, then held-out), the heads, the sweep, the
  // winner (held-out). What has been told is a prefix of it, so the losses told are the whole
  // state; the rest below follows from them.
  size_t baseline_count() const { return options_.held_out ? 2 : 1; }
  size_t trials_per_head() const { return options_.two_sided ? 2 : 1; }
  size_t profile_end() const { return baseline_count() + size() * trials_per_head(); }
  size_t sweep_end() const { return profile_end() + options_.sweep.size(); }
  Evaluation evaluation(size_t index) const;
  size_t planned_end() const;
  std::vector<double> group_point(double gamma) const;
  // Brings everything below up to date with losses_.
  void conclude();
  void choose_group();
  void choose_winner();

  PaperOptions options_;
  std::vector<double> losses_;
  Direction direction_ = Direction::none;
  std::vector<int64_t> group_;
  std::vector<double> winner_;  // the sweep's best point; empty if none beats x = 0 on the fit part
  Incumbent incumbent_;
};

}  // namespace zerotuning::search
