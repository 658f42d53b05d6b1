// The generations of CMA-ES.
#include "search/cma_es_optimizer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "search/argument_checks.h"

namespace zerotuning::search {
namespace {

constexpr int64_t kLargestFullDimension = 200;
constexpr double kLargestCondition = 1e14;

double length(const std::vector<double>& vector) {
  double sum = 0;
  for (const double value : vector) sum += value * value;
  return std::sqrt(sum);
}

// path <- (1 - rate) path + gain * direction
void follow(std::vector<double>& path, double rate, double gain,
            const std::vector<double>& direction) {
  for (size_t i = 0; i < path.size(); ++i) path[i] = (1 - rate) * path[i] + gain * direction[i];
}

// greatest - least, 0 where both are infinite: every evaluation failed.
double range(double least, double greatest) { return least == greatest ? 0 : greatest - least; }

CmaEsOptions checked(CmaEsOptions options, int64_t dimension) {
  require(options.population == 0 || options.population >= 4, "population", "0 or at least 4",
          static_cast<double>(options.population));
  if (options.population == 0)
    options.population = default_population(std::max<int64_t>(1, dimension));
  require(options.evaluations >= options.population, "evaluations",
          "at least the population, " + std::to_string(options.population),
          static_cast<double>(options.evaluations));
  require(options.max_abs_log_scale > 0 && std::isfinite(options.max_abs_log_scale),
          "max_abs_log_scale", "positive and finite", options.max_abs_log_scale);
  require(options.sigma > 0 && options.sigma <= options.max_abs_log_scale, "sigma",
          "positive and at most max_abs_log_scale", options.sigma);
  require(options.tolfun >= 0, "tolfun", "at least 0", options.tolfun);
  require(options.tolx >= 0, "tolx", "at least 0", options.tolx);
  return options;
}

}  // namespace

CmaEsOptimizer::State::State(int64_t dimension, bool diagonal, uint64_t seed)
    : mean(static_cast<size_t>(dimension), 0.0),
      sigma_path(mean),
      covariance_path(mean),
      covariance(dimension, diagonal),
      random(seed),
      best_seen(mean) {}

CmaEsOptimizer::CmaEsOptimizer(int64_t dimension, CmaEsOptions options)
    : Optimizer(dimension),
      options_(checked(std::move(options), dimension)),
      diagonal_(options_.diagonal.value_or(dimension > kLargestFullDimension)),
      interval_(options_.max_abs_log_scale),
      parameters_(cma_es_parameters(dimension, options_.population, diagonal_)),
      state_(dimension, diagonal_, options_.seed) {
  state_.mean = checked_start(options_.start, dimension, options_.max_abs_log_scale);
  for (double& value : state_.mean) value = interval_.inverse(value);
  state_.sigma = options_.sigma;
  draw_candidates();
  plan_next();
}

std::string CmaEsOptimizer::progress() const {
  const std::string reason = stop_reason();
  return "evaluation " + std::to_string(steps_done()) + "/" + std::to_string(steps_total()) +
         (reason.empty() ? "" : ", stopped by " + reason);
}

int64_t CmaEsOptimizer::steps_done() const { return state_.generation * parameters_.population; }

int64_t CmaEsOptimizer::steps_total() const {
  return options_.evaluations / parameters_.population * parameters_.population;
}

// 10 + ceil(30 n / lambda) generations, as in the tutorial's appendix B.3.
size_t CmaEsOptimizer::history_limit() const {
  const auto lambda = candidate_count();
  return 10 + (30 * size() + lambda - 1) / lambda;
}

std::string CmaEsOptimizer::stop_reason() const {
  if (state_.generation == 0) return "";
  double widest = 0;
  for (size_t i = 0; i < size(); ++i) {
    const double path = std::fabs(state_.covariance_path[i]);
    widest = std::max({widest, path, state_.covariance.deviation(i)});
  }
  if (state_.covariance.condition() > kLargestCondition) return "condition";
  if (state_.sigma * widest <= options_.tolx) return "tolx";
  if (state_.history.size() == history_limit()) {
    const auto extremes = std::minmax_element(state_.history.begin(), state_.history.end());
    const double change = std::max(range(*extremes.first, *extremes.second), state_.recent_range);
    if (change <= options_.tolfun) return "tolfun";
  }
  return steps_done() >= steps_total() ? "evaluations" : "";
}

std::vector<double> CmaEsOptimizer::candidate(size_t index) const {
  const double* first = state_.candidates.data() + index * size();
  return std::vector<double>(first, first + size());
}

std::vector<double> CmaEsOptimizer::bounded(std::vector<double> free) const {
  for (double& value : free) value = interval_.map(value);
  return free;
}

std::vector<Point> CmaEsOptimizer::plan() const {
  std::vector<Point> points;
  if (!stop_reason().empty()) return points;
  for (size_t k = 0; k < candidate_count(); ++k) points.push_back(bounded(candidate(k)));
  return points;
}

std::vector<Point> CmaEsOptimizer::finalists() const {
  if (state_.generation == 0) return {};
  return {mean(), state_.best_seen};
}

void CmaEsOptimizer::draw_candidates() {
  state_.candidates.clear();
  std::vector<double> normal(size());
  for (size_t k = 0; k < candidate_count(); ++k) {
    for (double& value : normal) value = state_.random.normal();
    const std::vector<double> step = state_.covariance.shape(normal);
    for (size_t i = 0; i < size(); ++i) {
      state_.candidates.push_back(state_.mean[i] + state_.sigma * step[i]);
    }
  }
}

void CmaEsOptimizer::update(const std::vector<double>& losses) {
  std::vector<size_t> ranking(losses.size());
  std::iota(ranking.begin(), ranking.end(), size_t{0});
  std::stable_sort(ranking.begin(), ranking.end(),
                   [&](size_t a, size_t b) { return losses[a] < losses[b]; });
  record_losses(losses, ranking);
  const std::vector<std::vector<double>> steps = ranked_steps(ranking);
  ++state_.generation;
  const bool sigma_path_is_short = update_paths(move_mean(steps));
  update_covariance(steps, sigma_path_is_short);
  const size_t most = (7 * ranking.size() + 9) / 10;  // ceil(0.7 lambda)
  update_sigma(losses[ranking.front()] == losses[ranking[most - 1]]);
  refresh_covariance();
  if (stop_reason().empty()) draw_candidates();
}

void CmaEsOptimizer::record_losses(const std::vector<double>& losses,
                                   const std::vector<size_t>& ranking) {
  const double least = losses[ranking.front()];
  state_.recent_range = range(least, losses[ranking.back()]);
  state_.history.push_back(least);
  if (state_.history.size() > history_limit()) state_.history.erase(state_.history.begin());
  if (least < state_.best_seen_loss) {
    state_.best_seen_loss = least;
    state_.best_seen = bounded(candidate(ranking.front()));
  }
}

// (y_k - m) / sigma, best first.
std::vector<std::vector<double>> CmaEsOptimizer::ranked_steps(
    const std::vector<size_t>& ranking) const {
  std::vector<std::vector<double>> steps;
  for (const size_t k : ranking) {
    std::vector<double> step = candidate(k);
    for (size_t i = 0; i < size(); ++i) step[i] = (step[i] - state_.mean[i]) / state_.sigma;
    steps.push_back(std::move(step));
  }
  return steps;
}

// m <- m + sigma <y>_w. Returns <y>_w, the weighted mean of the best mu steps.
std::vector<double> CmaEsOptimizer::move_mean(const std::vector<std::vector<double>>& steps) {
  std::vector<double> mean_step = zeros();
  for (size_t k = 0; k < static_cast<size_t>(parameters_.parents); ++k) {
    for (size_t i = 0; i < size(); ++i) mean_step[i] += parameters_.weights[k] * steps[k][i];
  }
  for (size_t i = 0; i < size(); ++i) state_.mean[i] += state_.sigma * mean_step[i];
  return mean_step;
}

// p_sigma <- (1 - c_sigma) p_sigma + sqrt(c_sigma (2 - c_sigma) mu_eff) C^{-1/2} <y>_w
// p_c     <- (1 - c_c) p_c + h_sigma sqrt(c_c (2 - c_c) mu_eff) <y>_w
// h_sigma is 0 while p_sigma is long, else 1. Returns h_sigma.
bool CmaEsOptimizer::update_paths(const std::vector<double>& mean_step) {
  const double c_sigma = parameters_.sigma_path_rate;
  const double c_c = parameters_.covariance_path_rate;
  const double mu_eff = parameters_.effective_parents;
  follow(state_.sigma_path, c_sigma, std::sqrt(c_sigma * (2 - c_sigma) * mu_eff),
         state_.covariance.whiten(mean_step));
  const auto n = static_cast<double>(dimension());
  const double age = 2 * static_cast<double>(state_.generation);
  const double settled = std::sqrt(1 - std::pow(1 - c_sigma, age));
  const bool is_short = length(state_.sigma_path) / settled <
                        (1.4 + 2 / (n + 1)) * parameters_.expected_normal_length;
  follow(state_.covariance_path, c_c, is_short ? std::sqrt(c_c * (2 - c_c) * mu_eff) : 0,
         mean_step);
  return is_short;
}

// C <- (1 + c_1 delta - c_1 - c_mu sum w) C + c_1 p_c p_c^T + c_mu sum_k w_k' y_k y_k^T, where a
// negative weight is w' = w n / |C^{-1/2} y|^2. delta = c_c (2 - c_c) replaces the variance that
// p_c lacks if h_sigma = 0; else delta = 0.
void CmaEsOptimizer::update_covariance(const std::vector<std::vector<double>>& steps,
                                       bool sigma_path_is_short) {
  const double c_1 = parameters_.rank_one_rate;
  const double c_mu = parameters_.rank_mu_rate;
  const double c_c = parameters_.covariance_path_rate;
  const double delta = sigma_path_is_short ? 0 : c_c * (2 - c_c);
  std::vector<double> weights = parameters_.weights;
  for (size_t k = 0; k < steps.size(); ++k) {
    if (weights[k] >= 0) continue;
    const double squared_length = state_.covariance.squared_length(steps[k]);
    weights[k] *= static_cast<double>(dimension()) / std::max(squared_length, 1e-300);
  }
  state_.covariance.scale(1 + c_1 * delta - c_1 - c_mu * parameters_.weight_sum);
  state_.covariance.add(c_1, state_.covariance_path);
  for (size_t k = 0; k < steps.size(); ++k) state_.covariance.add(c_mu * weights[k], steps[k]);
}

// sigma <- sigma exp(c_sigma/d_sigma (|p_sigma| / E|N(0, I)| - 1)). On a plateau, where 70 % of the
// losses equal the least one, sigma grows further, so that the search leaves the plateau.
void CmaEsOptimizer::update_sigma(bool flat) {
  const double rate = parameters_.sigma_path_rate / parameters_.sigma_damping;
  const double excess = length(state_.sigma_path) / parameters_.expected_normal_length - 1;
  state_.sigma *= std::exp(std::min(1.0, rate * excess));
  if (flat) state_.sigma *= std::exp(0.2 + rate);
  const double widest = options_.max_abs_log_scale / state_.covariance.largest_deviation();
  state_.sigma = std::min(state_.sigma, widest);
}

// A decomposition costs n^3 operations. C is decomposed when it can have changed by a tenth
// (appendix B.2).
void CmaEsOptimizer::refresh_covariance() {
  const double rate = parameters_.rank_one_rate + parameters_.rank_mu_rate;
  const double wait = diagonal_ ? 1 : 1 / (10 * static_cast<double>(dimension()) * rate);
  if (static_cast<double>(state_.generation - state_.refreshed) < wait) return;
  state_.covariance.refresh();
  state_.refreshed = state_.generation;
}

void CmaEsOptimizer::write_options(StateWriter& writer) const {
  writer.number("sigma", options_.sigma);
  writer.integer("population", options_.population, 4, options_.population);
  writer.seed("seed", options_.seed);
  writer.integer("evaluations", options_.evaluations, 4, options_.evaluations);
  writer.flag("diagonal", diagonal_);
  writer.number("max_abs_log_scale", options_.max_abs_log_scale);
  writer.number("tolfun", options_.tolfun);
  writer.number("tolx", options_.tolx);
  writer.numbers("start", options_.start, 0, dimension());
}

template <class Archive, class MaybeConstState>
void CmaEsOptimizer::list_state(Archive& archive, MaybeConstState& state) const {
  archive.integer("generation", state.generation, 0, options_.evaluations);
  archive.integer("refreshed", state.refreshed, 0, options_.evaluations);
  archive.number("current_sigma", state.sigma);
  archive.numbers("mean", state.mean, dimension());
  archive.numbers("sigma_path", state.sigma_path, dimension());
  archive.numbers("covariance_path", state.covariance_path, dimension());
  Covariance::list_fields(archive, state.covariance);
  archive.bits("random", state.random.state());
  archive.numbers("candidates", state.candidates, parameters_.population * dimension());
  archive.losses("history", state.history, 0, static_cast<int64_t>(history_limit()));
  archive.loss("recent_range", state.recent_range);
  archive.numbers("best_seen", state.best_seen, dimension());
  archive.loss("best_seen_loss", state.best_seen_loss);
}

void CmaEsOptimizer::write(StateWriter& writer) const { list_state(writer, state_); }

void CmaEsOptimizer::read(StateReader& reader) {
  State restored(dimension(), diagonal_, options_.seed);
  list_state(reader, restored);
  reader.end();
  state_ = std::move(restored);
}

}  // namespace zerotuning::search
