// The ask/tell interface of the searches that need losses alone, no gradients.
//
// A point is x = log gamma, one number a head, flattened [layers * heads]; x = 0 leaves the model
// as it is. Losses are minimised. The caller evaluates the points, in a loop that can stop and
// resume anywhere:
//
//   while (!optimizer.finished()) {
//     std::vector<double> losses;
//     for (const Point& point : optimizer.ask()) losses.push_back(loss(point));
//     optimizer.tell(losses);
//     save(optimizer.state());
//   }
//   for (const Point& point : optimizer.finalists()) ...
//
// A search never decides whether its result is better than x = 0: the caller compares the finalists
// with x = 0 on examples that the search did not use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "search/state_json.h"

namespace zerotuning::search {

using Point = std::vector<double>;

// One object serves one thread at a time. All errors are std::invalid_argument and leave the object
// as it was.
class Optimizer {
 public:
  virtual ~Optimizer() = default;
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  // The method's name on the command line: "paper", "cma-es".
  virtual std::string method() const = 0;
  int64_t dimension() const { return dimension_; }

  // The points to evaluate now: the same points until tell() is called, none when finished.
  std::vector<Point> ask() const { return asked_; }
  // Updates the search with the losses of the points of the last ask(), in the order of the points.
  // An infinite loss or NaN stands for a failed evaluation, which is worse than every finite loss.
  // Throws if the number of losses differs.
  void tell(std::vector<double> losses);
  bool finished() const { return asked_.empty(); }

  // The points that the search proposes so far, to be compared on held-out examples; none before
  // the first proposal.
  virtual std::vector<Point> finalists() const = 0;

  // How far the search is, for people, e.g. "sweep 3/12".
  virtual std::string progress() const = 0;
  // Number of losses received, and its maximum: a search may finish earlier.
  virtual int64_t steps_done() const = 0;
  virtual int64_t steps_total() const = 0;

  // The whole state as JSON (state_json.h). An optimizer of the same method, dimension and options
  // that restores this state continues as the saved optimizer would have, bit for bit.
  std::string state() const;
  void restore(const std::string& state);

 protected:
  // dimension: number of heads, >= 1.
  explicit Optimizer(int64_t dimension);

  size_t size() const { return static_cast<size_t>(dimension_); }
  Point zeros() const { return Point(size(), 0.0); }
  // Must be called at the end of a constructor.
  void plan_next() { asked_ = plan(); }

  // The next points, computed from the state alone.
  virtual std::vector<Point> plan() const = 0;
  // Updates the search with the losses of the points of the last ask(): finite, or +infinity.
  virtual void update(const std::vector<double>& losses) = 0;
  virtual void write_options(StateWriter& writer) const = 0;
  virtual void write(StateWriter& writer) const = 0;
  // Reads the remaining fields, then changes the object. If a field is wrong, the object stays as
  // it was.
  virtual void read(StateReader& reader) = 0;

 private:
  void write_heading(StateWriter& writer) const;

  int64_t dimension_;
  std::vector<Point> asked_;
};

}  // namespace zerotuning::search
