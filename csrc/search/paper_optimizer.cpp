// The three stages of the paper's search: profile, dominant group, sweep.
#include "search/paper_optimizer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "search/argument_checks.h"

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
    : Optimizer(dimension), options_(std::move(options)) {
  check(options_);
  plan_next();
}

std::string PaperOptimizer::progress() const {
  const auto stage = [](const char* name, size_t done, size_t total) {
    return std::string(name) + " " + std::to_string(done) + "/" + std::to_string(total);
  };
  const size_t done = losses_.size();
  if (done < profile_end())
    return stage("profile", done - std::min<size_t>(done, 1), profile_end() - 1);
  if (direction_ == Direction::none) return "finished: no head has an effect";
  if (done < sweep_end()) return stage("sweep", done - profile_end(), options_.sweep.size());
  return "finished";
}

std::vector<Point> PaperOptimizer::finalists() const {
  return winner_.empty() ? std::vector<Point>() : std::vector<Point>{winner_};
}

int64_t PaperOptimizer::steps_total() const { return static_cast<int64_t>(sweep_end()); }

// The end of the evaluations whose points depend only on losses that were received.
size_t PaperOptimizer::planned_end() const {
  if (losses_.size() < profile_end()) return profile_end();
  return direction_ == Direction::none ? losses_.size() : sweep_end();
}

std::vector<Point> PaperOptimizer::plan() const {
  std::vector<Point> points;
  const size_t end = std::min(planned_end(), losses_.size() + static_cast<size_t>(options_.chunk));
  for (size_t i = losses_.size(); i < end; ++i) points.push_back(point(i));
  return points;
}

Point PaperOptimizer::point(size_t index) const {
  if (index == 0) return zeros();
  if (index >= profile_end()) return group_point(options_.sweep[index - profile_end()]);
  const size_t trial = index - 1;
  const double log_gamma = std::log(options_.profile_gamma);
  Point point = zeros();
  point[trial / trials_per_head()] = trial % trials_per_head() == 0 ? log_gamma : -log_gamma;
  return point;
}

Point PaperOptimizer::group_point(double gamma) const {
  Point point = zeros();
  for (const int64_t head : group_) point[static_cast<size_t>(head)] = std::log(gamma);
  return point;
}

void PaperOptimizer::update(const std::vector<double>& losses) {
  losses_.insert(losses_.end(), losses.begin(), losses.end());
  conclude();
}

void PaperOptimizer::conclude() {
  direction_ = Direction::none;
  group_.clear();
  winner_.clear();
  if (losses_.size() >= profile_end()) choose_group();
  if (losses_.size() >= sweep_end() && direction_ != Direction::none) choose_winner();
}

std::vector<double> PaperOptimizer::profile() const {
  std::vector<double> effects(size(), kNotMeasured);
  for (size_t head = 0; head < size(); ++head) {
    const size_t first = 1 + head * trials_per_head();
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
}

void PaperOptimizer::write_options(StateWriter& writer) const {
  writer.number("profile_gamma", options_.profile_gamma);
  writer.flag("two_sided", options_.two_sided);
  const auto sweep_count = static_cast<int64_t>(options_.sweep.size());
  writer.numbers("sweep", options_.sweep, sweep_count);
  writer.number("top_fraction", options_.top_fraction);
  writer.integer("chunk", options_.chunk, 1, options_.chunk);
}

void PaperOptimizer::write(StateWriter& writer) const {
  writer.losses("losses", losses_, 0, steps_total());
}

void PaperOptimizer::read(StateReader& reader) {
  std::vector<double> losses;
  reader.losses("losses", losses, 0, steps_total());
  reader.end();
  losses_ = std::move(losses);
  conclude();
}

}  // namespace zerotuning::search
