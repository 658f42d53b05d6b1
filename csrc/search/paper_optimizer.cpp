// Profile, dominant group, sweep.
#include "search/paper_optimizer.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace zerotuning::search {
namespace {

constexpr double kNotMeasured = std::numeric_limits<double>::quiet_NaN();

void check(const PaperOptions& options) {
  require(options.profile_gamma > 1 && std::isfinite(options.profile_gamma), "profile_gamma",
          "finite and greater than 1", options.profile_gamma);
  require(!options.sweep.empty(), "sweep", "a list of at least one gamma, a length",
          static_cast<double>(options.sweep.size()));
  for (const double gamma : options.sweep) {
    require(gamma > 0 && std::isfinite(gamma), "sweep", "a list of positive finite gammas", gamma);
  }
  require(options.top_fraction > 0 && options.top_fraction <= 1, "top_fraction", "in (0, 1]",
          options.top_fraction);
  require(options.chunk >= 1, "chunk", "at least 1", static_cast<double>(options.chunk));
}

}  // namespace

const char* direction_name(Direction direction) {
  if (direction == Direction::none) return "none";
  return direction == Direction::up ? "up" : "down";
}

PaperOptimizer::PaperOptimizer(int64_t dimension, PaperOptions options)
    : Optimizer(dimension), options_(std::move(options)), incumbent_(dimension) {
  check(options_);
  plan_next();
}

std::string PaperOptimizer::progress() const {
  const auto stage = [](const char* name, size_t done, size_t total) {
    return std::string(name) + " " + std::to_string(done) + "/" + std::to_string(total);
  };
  const size_t told = losses_.size();
  const size_t start = std::min(told, baseline_count());
  if (told < profile_end()) return stage("profile", told - start, profile_end() - start);
  if (direction_ == Direction::none) return "finished: no head has an effect";
  if (told < sweep_end()) return stage("sweep", told - profile_end(), options_.sweep.size());
  return finished() ? "finished" : "judging the winner";
}

int64_t PaperOptimizer::steps_total() const {
  return static_cast<int64_t>(sweep_end() + (options_.held_out ? 1 : 0));
}

// The end of what can be asked for without knowing more losses.
size_t PaperOptimizer::planned_end() const {
  const size_t told = losses_.size();
  if (told < profile_end()) return profile_end();
  if (direction_ == Direction::none) return told;
  if (told < sweep_end()) return sweep_end();
  return winner_.empty() || !options_.held_out ? told : sweep_end() + 1;
}

std::vector<Evaluation> PaperOptimizer::plan() const {
  std::vector<Evaluation> wanted;
  const size_t end = std::min(planned_end(), losses_.size() + static_cast<size_t>(options_.chunk));
  for (size_t i = losses_.size(); i < end; ++i) wanted.push_back(evaluation(i));
  return wanted;
}

Evaluation PaperOptimizer::evaluation(size_t index) const {
  if (index < baseline_count()) {
    return {zeros(), index == 0 ? Part::fit : Part::held_out, false};
  }
  if (index < profile_end()) {
    const size_t trial = index - baseline_count();
    const double log_gamma = std::log(options_.profile_gamma);
    std::vector<double> point = zeros();
    point[trial / trials_per_head()] = trial % trials_per_head() == 0 ? log_gamma : -log_gamma;
    return {std::move(point), Part::fit, false};
  }
  if (index < sweep_end()) {
    return {group_point(options_.sweep[index - profile_end()]), Part::fit, false};
  }
  return {winner_, Part::held_out, false};
}

std::vector<double> PaperOptimizer::group_point(double gamma) const {
  std::vector<double> point = zeros();
  for (const int64_t head : group_) point[static_cast<size_t>(head)] = std::log(gamma);
  return point;
}

void PaperOptimizer::learn(const std::vector<Evaluation>&, const std::vector<Outcome>& outcomes) {
  for (const Outcome& outcome : outcomes) losses_.push_back(outcome.loss);
  conclude();
}

void PaperOptimizer::conclude() {
  direction_ = Direction::none;
  group_.clear();
  winner_.clear();
  incumbent_ = Incumbent(dimension());
  if (losses_.size() >= baseline_count()) incumbent_.set_baseline(losses_[baseline_count() - 1]);
  if (losses_.size() >= profile_end()) choose_group();
  if (losses_.size() >= sweep_end() && direction_ != Direction::none) choose_winner();
}

std::vector<double> PaperOptimizer::profile() const {
  std::vector<double> effects(size(), kNotMeasured);
  for (size_t head = 0; head < size(); ++head) {
    const size_t first = baseline_count() + head * trials_per_head();
    if (first + trials_per_head() > losses_.size()) break;
    effects[head] = options_.two_sided ? (losses_[first + 1] - losses_[first]) / 2
                                       : losses_[0] - losses_[first];
  }
  return effects;
}

std::vector<double> PaperOptimizer::sweep_losses() const {
  std::vector<double> swept(options_.sweep.size(), kNotMeasured);
  for (size_t i = 0; i < swept.size() && profile_end() + i < losses_.size(); ++i) {
    swept[i] = losses_[profile_end() + i];
  }
  return swept;
}

void PaperOptimizer::choose_group() {
  const std::vector<double> effects = profile();
  std::vector<int64_t> up;
  std::vector<int64_t> down;
  for (size_t head = 0; head < effects.size(); ++head) {
    if (effects[head] > 0) up.push_back(static_cast<int64_t>(head));
    if (effects[head] < 0) down.push_back(static_cast<int64_t>(head));
  }
  group_ = up.size() >= down.size() ? up : down;
  if (group_.empty()) return;
  direction_ = up.size() >= down.size() ? Direction::up : Direction::down;
  std::stable_sort(group_.begin(), group_.end(), [&](int64_t a, int64_t b) {
    return std::fabs(effects[static_cast<size_t>(a)]) > std::fabs(effects[static_cast<size_t>(b)]);
  });
  const double share = options_.top_fraction * static_cast<double>(group_.size());
  const auto count = static_cast<size_t>(std::ceil(share - 1e-9));  // 0.07 * 100 is just above 7
  group_.resize(std::clamp<size_t>(count, 1, group_.size()));
  std::sort(group_.begin(), group_.end());
}

void PaperOptimizer::choose_winner() {
  const std::vector<double> swept = sweep_losses();
  double best_loss = losses_[0];
  double best_change = 0;
  for (size_t i = 0; i < swept.size(); ++i) {
    const double change = std::fabs(std::log(options_.sweep[i]));
    const bool tied_nearer = swept[i] == best_loss && !winner_.empty() && change < best_change;
    if (swept[i] < best_loss || tied_nearer) {
      best_loss = swept[i];
      best_change = change;
      winner_ = group_point(options_.sweep[i]);
    }
  }
  if (winner_.empty()) return;
  if (!options_.held_out) incumbent_.consider(winner_, best_loss);
  if (losses_.size() > sweep_end()) incumbent_.consider(winner_, losses_.back());
}

void PaperOptimizer::write_options(StateWriter& writer) const {
  writer.number("profile_gamma", options_.profile_gamma);
  writer.flag("two_sided", options_.two_sided);
  const auto sweep_count = static_cast<int64_t>(options_.sweep.size());
  writer.numbers("sweep", options_.sweep, sweep_count);
  writer.number("top_fraction", options_.top_fraction);
  writer.integer("chunk", options_.chunk, 1, options_.chunk);
  writer.flag("held_out", options_.held_out);
}

void PaperOptimizer::write(StateWriter& writer) const {
  writer.numbers("losses", losses_, 0, steps_total());
}

void PaperOptimizer::read(StateReader& reader) {
  std::vector<double> losses;
  reader.numbers("losses", losses, 0, steps_total());
  reader.end();
  losses_ = std::move(losses);
  conclude();
}

}  // namespace zerotuning::search
