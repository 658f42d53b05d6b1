// zerotuning._search: the searches of csrc/search for Python. Nothing is computed here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "search/cma_es_optimizer.h"
#include "search/gradient_optimizer.h"
#include "search/paper_optimizer.h"

namespace py = pybind11;
using namespace py::literals;
namespace search = zerotuning::search;

namespace {

using Vector = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Answer = std::pair<double, std::optional<Vector>>;
using without_gil = py::call_guard<py::gil_scoped_release>;

Vector to_numpy(const std::vector<double>& values) {
  return Vector(static_cast<py::ssize_t>(values.size()), values.data());
}

std::vector<double> from_numpy(const std::string& name, const Vector& values) {
  if (values.ndim() != 1) {
    throw std::invalid_argument(name + " must be one-dimensional, got " +
                                std::to_string(values.ndim()) + " dimensions");
  }
  return std::vector<double>(values.data(), values.data() + values.size());
}

void tell(search::Optimizer& optimizer, const std::vector<Answer>& answers) {
  std::vector<search::Outcome> outcomes;
  for (const Answer& answer : answers) {
    const std::string name = "outcomes[" + std::to_string(outcomes.size()) + "].gradient";
    outcomes.push_back({answer.first, {}});
    if (answer.second) outcomes.back().gradient = from_numpy(name, *answer.second);
  }
  const py::gil_scoped_release release;
  optimizer.tell(outcomes);
}

std::vector<double> start_point(const std::optional<Vector>& start) {
  return start ? from_numpy("start", *start) : std::vector<double>();
}

search::Schedule schedule_named(const std::string& name) {
  if (name == "constant") return search::Schedule::constant;
  if (name == "cosine") return search::Schedule::cosine;
  throw std::invalid_argument("schedule must be 'constant' or 'cosine', got '" + name + "'");
}

void bind_evaluation(py::module_& module) {
  py::class_<search::Evaluation>(module, "Evaluation", "One loss that an optimizer asks for.")
      .def_property_readonly(
          "point", [](const search::Evaluation& wanted) { return to_numpy(wanted.point); },
          "x = log gamma: numpy float64 [dimension], a copy.")
      .def_property_readonly(
          "part", [](const search::Evaluation& wanted) { return search::part_name(wanted.part); },
          "Which examples: 'fit' or 'held_out'.")
      .def_readonly("gradient", &search::Evaluation::gradient,
                    "Whether the gradient is wanted as well.");
}

void bind_optimizer(py::module_& module) {
  py::class_<search::Optimizer>(module, "Optimizer",
                                "A search for x = log gamma [dimension] with the least loss: ask() "
                                "says what to evaluate, tell() takes the "
                                "answers.\n\nErrors are ValueError and leave the object as it was. "
                                "One object serves one thread at a time.")
      .def("ask", &search::Optimizer::ask, without_gil(),
           "The evaluations wanted now: the same until tell() is called, none when finished.")
      .def("tell", &tell, "outcomes"_a,
           "Answers the last ask(), in its order, with (loss, gradient) pairs; gradient: "
           "[dimension], None where it was "
           "not asked for.\n\nRaises ValueError for another number of pairs, numbers that are not "
           "finite, a gradient "
           "of another length; the points may then be evaluated again.")
      .def("finished", &search::Optimizer::finished, "Whether nothing is left to evaluate.")
      .def(
          "best", [](const search::Optimizer& optimizer) { return to_numpy(optimizer.best()); },
          "The point with the lowest held-out loss so far, 0 if none beats 0: numpy float64 "
          "[dimension].")
      .def("best_loss", &search::Optimizer::best_loss,
           "Held-out loss of best(); NaN before it is known.")
      .def("baseline_loss", &search::Optimizer::baseline_loss,
           "Held-out loss of x = 0; NaN before it is known.")
      .def("progress", &search::Optimizer::progress, "Where the search stands, e.g. 'step 12/30'.")
      .def("steps_done", &search::Optimizer::steps_done)
      .def("steps_total", &search::Optimizer::steps_total,
           "The most steps there can be; the search may finish earlier.")
      .def("state", &search::Optimizer::state, without_gil(),
           "All that the search knows, as text; restored, it continues bit for bit.")
      .def("restore", &search::Optimizer::restore, "state"_a, without_gil(),
           "Takes over the state() of an optimizer of the same method, dimension and options; "
           "ValueError if it is of "
           "another, truncated or changed.")
      .def_property_readonly("method", &search::Optimizer::method)
      .def_property_readonly("dimension", &search::Optimizer::dimension);
}

void bind_gradient(py::module_& module) {
  const search::GradientOptions defaults;
  py::class_<search::GradientOptimizer, search::Optimizer>(
      module, "GradientOptimizer",
      "Adam on the fit loss + penalty/2 |x|^2, clamped to |x| <= max_abs_log_scale; stops after "
      "`patience` "
      "evaluations of the held-out loss without improvement.")
      .def(
          py::init([](int64_t dimension, int64_t steps, double learning_rate, double beta1,
                      double beta2, double epsilon, double penalty, double max_abs_log_scale,
                      const std::string& schedule, int64_t evaluate_every, int64_t patience,
                      bool held_out, double average, const std::optional<Vector>& start) {
            return std::make_unique<search::GradientOptimizer>(
                dimension,
                search::GradientOptions{steps, learning_rate, beta1, beta2, epsilon, penalty,
                                        max_abs_log_scale, schedule_named(schedule), evaluate_every,
                                        patience, held_out, average, start_point(start)});
          }),
          "dimension"_a, py::kw_only(), "steps"_a = defaults.steps,
          "learning_rate"_a = defaults.learning_rate, "beta1"_a = defaults.beta1,
          "beta2"_a = defaults.beta2, "epsilon"_a = defaults.epsilon,
          "penalty"_a = defaults.penalty, "max_abs_log_scale"_a = defaults.max_abs_log_scale,
          "schedule"_a = "cosine", "evaluate_every"_a = defaults.evaluate_every,
          "patience"_a = defaults.patience, "held_out"_a = defaults.held_out,
          "average"_a = defaults.average, "start"_a = py::none(),
          "schedule: 'cosine' (learning_rate falls to 0 over the steps) or 'constant'. patience = "
          "0: never stops "
          "early. held_out = False: the fit loss takes the held-out loss's place. average: decay "
          "of a moving "
          "average of the points that is judged beside them, 0: none. start: [dimension], None: 0.")
      .def("stopped_early", &search::GradientOptimizer::stopped_early);
}

void bind_paper(py::module_& module) {
  const search::PaperOptions defaults;
  py::class_<search::PaperOptimizer, search::Optimizer>(
      module, "PaperOptimizer",
      "The ZeroTuning paper's search (arXiv 2505.11739): profiles every head, tunes the larger of "
      "the up- and the "
      "down-effective group with one shared gamma.")
      .def(py::init([](int64_t dimension, double profile_gamma, bool two_sided,
                       std::vector<double> sweep, double top_fraction, int64_t chunk,
                       bool held_out) {
             return std::make_unique<search::PaperOptimizer>(
                 dimension, search::PaperOptions{profile_gamma, two_sided, std::move(sweep),
                                                 top_fraction, chunk, held_out});
           }),
           "dimension"_a, py::kw_only(), "profile_gamma"_a = defaults.profile_gamma,
           "two_sided"_a = defaults.two_sided, "sweep"_a = defaults.sweep,
           "top_fraction"_a = defaults.top_fraction, "chunk"_a = defaults.chunk,
           "held_out"_a = defaults.held_out,
           "two_sided: each head is tried with 1/profile_gamma as well. sweep: the gammas tried on "
           "the group. "
           "top_fraction: share of the group, by size of effect, that is tuned. chunk: most "
           "evaluations in one ask().")
      .def(
          "profile",
          [](const search::PaperOptimizer& optimizer) { return to_numpy(optimizer.profile()); },
          "Fall of the loss when a head is scaled up: numpy float64 [dimension], NaN: not "
          "measured.")
      .def(
          "direction",
          [](const search::PaperOptimizer& optimizer) {
            return search::direction_name(optimizer.direction());
          },
          "The group tuned: 'up', 'down'; 'none' before the profile is complete or without "
          "effects.")
      .def("group", &search::PaperOptimizer::group, "The heads tuned: ascending indices into x.")
      .def(
          "sweep_losses",
          [](const search::PaperOptimizer& optimizer) {
            return to_numpy(optimizer.sweep_losses());
          },
          "Fit loss of each gamma of `sweep`: numpy float64, NaN: not measured.");
}

void bind_cma_es(py::module_& module) {
  const search::CmaEsOptions defaults;
  py::class_<search::CmaEsOptimizer, search::Optimizer>(
      module, "CmaEsOptimizer",
      "CMA-ES (arXiv 1604.00772) for losses without a gradient; only their order counts.")
      .def(py::init([](int64_t dimension, double sigma, int64_t population, uint64_t seed,
                       int64_t evaluations, std::optional<bool> diagonal, double max_abs_log_scale,
                       double tolfun, double tolx, bool held_out,
                       const std::optional<Vector>& start) {
             return std::make_unique<search::CmaEsOptimizer>(
                 dimension, search::CmaEsOptions{sigma, population, seed, evaluations, diagonal,
                                                 max_abs_log_scale, tolfun, tolx, held_out,
                                                 start_point(start)});
           }),
           "dimension"_a, py::kw_only(), "sigma"_a = defaults.sigma,
           "population"_a = defaults.population, "seed"_a = defaults.seed,
           "evaluations"_a = defaults.evaluations, "diagonal"_a = defaults.diagonal,
           "max_abs_log_scale"_a = defaults.max_abs_log_scale, "tolfun"_a = defaults.tolfun,
           "tolx"_a = defaults.tolx, "held_out"_a = defaults.held_out, "start"_a = py::none(),
           "sigma: first standard deviation of log gamma. population = 0: 4 + floor(3 ln "
           "dimension). evaluations: "
           "most losses on the fit part. diagonal = None: above 200 dimensions. tolfun, tolx: the "
           "search ends when "
           "losses or deviations are this small. start: [dimension], None: 0.")
      .def("stop_reason", &search::CmaEsOptimizer::stop_reason,
           "'evaluations', 'tolfun', 'tolx' or 'condition'; empty while it searches.")
      .def_property_readonly("population", &search::CmaEsOptimizer::population)
      .def_property_readonly("diagonal", &search::CmaEsOptimizer::diagonal)
      .def("sigma", &search::CmaEsOptimizer::sigma, "The step size now.")
      .def(
          "mean",
          [](const search::CmaEsOptimizer& optimizer) { return to_numpy(optimizer.mean()); },
          "The mean of the distribution now: numpy float64 [dimension].");
}

}  // namespace

PYBIND11_MODULE(_search, module) {
  module.doc() =
      "Searches of head scales: x = log gamma, float64, minimised through ask() and tell().";
  bind_evaluation(module);
  bind_optimizer(module);
  bind_gradient(module);
  bind_paper(module);
  bind_cma_es(module);
}
