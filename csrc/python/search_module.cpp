// zerotuning._search: the Python bindings of the searches of csrc/search.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "search/cma_es_optimizer.h"
#include "search/gradient_stepper.h"
#include "search/paper_optimizer.h"

namespace py = pybind11;
using namespace py::literals;
namespace search = zerotuning::search;

namespace {

using Vector = py::array_t<double, py::array::c_style | py::array::forcecast>;

Vector to_numpy(const std::vector<double>& values) {
  return Vector(static_cast<py::ssize_t>(values.size()), values.data());
}

std::vector<Vector> to_numpy(const std::vector<search::Point>& points) {
  std::vector<Vector> vectors;
  for (const search::Point& point : points) vectors.push_back(to_numpy(point));
  return vectors;
}

std::vector<double> from_numpy(const std::string& name, const Vector& values) {
  if (values.ndim() != 1) {
    throw std::invalid_argument(name + " must be one-dimensional, got " +
                                std::to_string(values.ndim()) + " dimensions");
  }
  return std::vector<double>(values.data(), values.data() + values.size());
}

std::vector<double> start_point(const std::optional<Vector>& start) {
  return start ? from_numpy("start", *start) : std::vector<double>();
}

// A state is JSON in C++ and the same as dict and lists in Python.
template <class Search>
py::dict state(const Search& search) {
  std::string text;
  {
    const py::gil_scoped_release release;
    text = search.state();
  }
  return py::module_::import("json").attr("loads")(text);
}

template <class Search>
void restore(Search& search, const py::dict& state) {
  const auto text = py::module_::import("json").attr("dumps")(state).template cast<std::string>();
  const py::gil_scoped_release release;
  search.restore(text);
}

void tell(search::Optimizer& optimizer, const std::vector<std::optional<double>>& losses) {
  std::vector<double> numbers;
  for (const std::optional<double>& loss : losses) {
    numbers.push_back(loss.value_or(std::numeric_limits<double>::infinity()));
  }
  const py::gil_scoped_release release;
  optimizer.tell(std::move(numbers));
}

search::Schedule schedule_named(const std::string& name) {
  if (name == "constant") return search::Schedule::constant;
  if (name == "cosine") return search::Schedule::cosine;
  throw std::invalid_argument("schedule must be 'constant' or 'cosine', got '" + name + "'");
}

void bind_gradient(py::module_& module) {
  const search::GradientOptions defaults;
  py::class_<search::GradientStepper>(
      module, "GradientStepper",
      "Adam on loss + l2_penalty/2 |x|^2, clamped to |x| <= max_abs_log_scale.")
      .def(py::init([](int64_t dimension, int64_t steps, double learning_rate, double beta1,
                       double beta2, double epsilon, double l2_penalty, double max_abs_log_scale,
                       const std::string& schedule, double average_decay,
                       const std::optional<Vector>& start) {
             return std::make_unique<search::GradientStepper>(
                 dimension,
                 search::GradientOptions{steps, learning_rate, beta1, beta2, epsilon, l2_penalty,
                                         max_abs_log_scale, schedule_named(schedule), average_decay,
                                         start_point(start)});
           }),
           "dimension"_a, py::kw_only(), "steps"_a = defaults.steps,
           "learning_rate"_a = defaults.learning_rate, "beta1"_a = defaults.beta1,
           "beta2"_a = defaults.beta2, "epsilon"_a = defaults.epsilon,
           "l2_penalty"_a = defaults.l2_penalty, "max_abs_log_scale"_a = defaults.max_abs_log_scale,
           "schedule"_a = "cosine", "average_decay"_a = defaults.average_decay,
           "start"_a = py::none(),
           "schedule: 'cosine' (learning_rate falls to 0 over the steps) or 'constant'. "
           "average_decay: of averaged_point(). start: [dimension], None: 0.")
      .def(
          "point", [](const search::GradientStepper& stepper) { return to_numpy(stepper.point()); },
          "x, where the next gradient is to be taken: numpy float64 [dimension], a copy.")
      .def(
          "averaged_point",
          [](const search::GradientStepper& stepper) { return to_numpy(stepper.averaged_point()); },
          "The moving average of the points after the steps so far: numpy float64 [dimension].")
      .def(
          "step",
          [](search::GradientStepper& stepper, const Vector& gradient) {
            stepper.step(from_numpy("gradient", gradient));
          },
          "gradient"_a, "Take a step; gradient: of the loss at point(), [dimension].")
      .def("learning_rate", &search::GradientStepper::learning_rate, "Of the next step.")
      .def("finished", &search::GradientStepper::finished, "Whether all steps are done.")
      .def_property_readonly("steps_done", &search::GradientStepper::steps_done)
      .def_property_readonly("steps_total", &search::GradientStepper::steps_total)
      .def_property_readonly("dimension", &search::GradientStepper::dimension)
      .def("state", &state<search::GradientStepper>, "The whole state; restored, bit for bit.")
      .def("restore", &restore<search::GradientStepper>, "state"_a,
           "Continue from the state() of a stepper of the same dimension and options.");
}

void bind_optimizer(py::module_& module) {
  py::class_<search::Optimizer>(
      module, "Optimizer",
      "A search for x = log gamma [dimension] with the least loss: ask() gives the points to "
      "evaluate, tell() takes their losses.")
      .def(
          "ask", [](const search::Optimizer& optimizer) { return to_numpy(optimizer.ask()); },
          "The points to evaluate now: the same until tell() is called, none when finished.")
      .def("tell", &tell, "losses"_a,
           "The losses of the points of the last ask(), in its order; None, NaN or an infinity: "
           "the evaluation failed.")
      .def("finished", &search::Optimizer::finished, "Whether nothing is left to evaluate.")
      .def(
          "finalists",
          [](const search::Optimizer& optimizer) { return to_numpy(optimizer.finalists()); },
          "The points that the search proposes so far, to be compared on held-out examples.")
      .def("progress", &search::Optimizer::progress, "How far the search is: 'sweep 3/12'.")
      .def_property_readonly("steps_done", &search::Optimizer::steps_done)
      .def_property_readonly("steps_total", &search::Optimizer::steps_total)
      .def_property_readonly("method", &search::Optimizer::method)
      .def_property_readonly("dimension", &search::Optimizer::dimension)
      .def("state", &state<search::Optimizer>, "The whole state; restored, bit for bit.")
      .def("restore", &restore<search::Optimizer>, "state"_a,
           "Continue from the state() of an optimizer of the same method, dimension and options.");
}

void bind_paper(py::module_& module) {
  const search::PaperOptions defaults;
  py::class_<search::PaperOptimizer, search::Optimizer>(
      module, "PaperOptimizer",
      "The ZeroTuning paper's search (arXiv 2505.11739): profile every head, tune the larger of "
      "the up- and the down-effective group with one shared gamma.")
      .def(py::init([](int64_t dimension, double profile_gamma, bool two_sided,
                       std::vector<double> sweep, double top_fraction, int64_t chunk) {
             return std::make_unique<search::PaperOptimizer>(
                 dimension, search::PaperOptions{profile_gamma, two_sided, std::move(sweep),
                                                 top_fraction, chunk});
           }),
           "dimension"_a, py::kw_only(), "profile_gamma"_a = defaults.profile_gamma,
           "two_sided"_a = defaults.two_sided, "sweep"_a = defaults.sweep,
           "top_fraction"_a = defaults.top_fraction, "chunk"_a = defaults.chunk,
           "two_sided: each head is tried with 1/profile_gamma as well. sweep: the gammas tried on "
           "the group. top_fraction: share of the group, by size of effect, that is tuned. chunk: "
           "most points in one ask().")
      .def(
          "profile",
          [](const search::PaperOptimizer& optimizer) { return to_numpy(optimizer.profile()); },
          "Fall of the loss when a head is scaled up: numpy float64 [dimension]. NaN: not measured "
          "yet; infinite: an evaluation failed.")
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
          "Loss of each gamma of `sweep`: numpy float64, NaN: not measured yet.");
}

void bind_cma_es(py::module_& module) {
  const search::CmaEsOptions defaults;
  py::class_<search::CmaEsOptimizer, search::Optimizer>(
      module, "CmaEsOptimizer",
      "CMA-ES (arXiv 1604.00772) for losses without a gradient; only their order counts.")
      .def(py::init([](int64_t dimension, double sigma, int64_t population, uint64_t seed,
                       int64_t evaluations, std::optional<bool> diagonal, double max_abs_log_scale,
                       double tolfun, double tolx, const std::optional<Vector>& start) {
             return std::make_unique<search::CmaEsOptimizer>(
                 dimension,
                 search::CmaEsOptions{sigma, population, seed, evaluations, diagonal,
                                      max_abs_log_scale, tolfun, tolx, start_point(start)});
           }),
           "dimension"_a, py::kw_only(), "sigma"_a = defaults.sigma,
           "population"_a = defaults.population, "seed"_a = defaults.seed,
           "evaluations"_a = defaults.evaluations, "diagonal"_a = defaults.diagonal,
           "max_abs_log_scale"_a = defaults.max_abs_log_scale, "tolfun"_a = defaults.tolfun,
           "tolx"_a = defaults.tolx, "start"_a = py::none(),
           "sigma: first standard deviation of log gamma. population = 0: 4 + floor(3 ln "
           "dimension). evaluations: most losses. diagonal = None: above 200 dimensions. tolfun, "
           "tolx: the search ends when the range of recent losses, or every standard deviation, is "
           "this small. start: [dimension], None: 0.")
      .def("stop_reason", &search::CmaEsOptimizer::stop_reason,
           "'evaluations', 'tolfun', 'tolx' or 'condition'; empty while the search goes on.")
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
  module.doc() = "Searches of head scales: the loss is minimised over x = log gamma, float64.";
  bind_gradient(module);
  bind_optimizer(module);
  bind_paper(module);
  bind_cma_es(module);
}
