// The ask/tell interface that every search of head scales is behind.
//
// A point is x = log gamma, one number a head, flattened [layers * heads]; x = 0 leaves the model
// as it is. Losses are minimised. The optimiser never evaluates anything: the caller does, in a
// loop that can stop and go on anywhere:
//
//   while (!optimizer.finished()) {
//     std::vector<Outcome> outcomes;
//     for (const Evaluation& wanted : optimizer.ask()) outcomes.push_back(evaluate(wanted));
//     optimizer.tell(outcomes);
//     save(optimizer.state());
//   }
//   use(optimizer.best());
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "search/state_text.h"

namespace zerotuning::search {

// The examples that a loss is measured on: those that drive the search, or those kept aside to
// judge what it found.
enum class Part { fit, held_out };

// "fit" or "held_out".
const char* part_name(Part part);

// What the optimiser wants to know: the loss at a point on one part, and its gradient where
// `gradient` is set.
struct Evaluation {
  std::vector<double> point;  // x = log gamma, [dimension]
  Part part;
  bool gradient;
};

// The answer to one Evaluation.
struct Outcome {
  double loss;                   // finite
  std::vector<double> gradient;  // dloss/dx, [dimension], where it was asked for; else empty
};

// The best point found. It is x = 0 until a point beats the loss there, so it is never worse than
// leaving the model alone.
struct Incumbent {
  explicit Incumbent(int64_t dimension) : point(static_cast<size_t>(dimension), 0.0) {}

  std::vector<double> point;
  double loss = std::numeric_limits<double>::quiet_NaN();
  double baseline = std::numeric_limits<double>::quiet_NaN();  // loss at x = 0

  void set_baseline(double loss_at_zero);
  // Takes the candidate over if its loss is lower.
  void consider(const std::vector<double>& candidate, double candidate_loss);
};

// One list of an Incumbent's fields, for a StateWriter and a StateReader.
template <class Archive, class MaybeConstIncumbent>
void list_fields(Archive& archive, MaybeConstIncumbent& incumbent) {
  archive.numbers("best_point", incumbent.point, static_cast<int64_t>(incumbent.point.size()));
  archive.number("best_loss", incumbent.loss);
  archive.number("baseline_loss", incumbent.baseline);
}

// One object serves one thread at a time. All errors are std::invalid_argument and leave the object
// as it was.
class Optimizer {
 public:
  virtual ~Optimizer() = default;
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  // The method's name as the command line has it: "gradient", "paper", "cma-es".
  virtual std::string method() const = 0;
  int64_t dimension() const { return dimension_; }

  // The evaluations wanted now; the same ones until tell() is called, none when finished.
  std::vector<Evaluation> ask() const { return pending_; }
  // Answers the last ask(), in its order. Refuses another number of outcomes, a loss or gradient
  // that is not finite, and a gradient that is missing, of the wrong length or was not asked for;
  // the caller may then evaluate again.
  void tell(const std::vector<Outcome>& outcomes);
  bool finished() const { return pending_.empty(); }

  // The point with the lowest held-out loss so far, x = 0 if none beats it there.
  std::vector<double> best() const { return incumbent().point; }
  // Held-out loss of best() and of x = 0; NaN before they were told.
  double best_loss() const { return incumbent().loss; }
  double baseline_loss() const { return incumbent().baseline; }

  // Where the search stands, for people, e.g. "step 12/30".
  virtual std::string progress() const = 0;
  // Where it stands in numbers. What a step is depends on the method; a search may finish in fewer
  // than the total.
  virtual int64_t steps_done() const = 0;
  virtual int64_t steps_total() const = 0;

  // All that the search knows, as text (state_text.h): restored into an optimiser of the same
  // method, dimension and options, it continues as the saved one would have, bit for bit.
  std::string state() const;
  void restore(const std::string& state);

 protected:
  // dimension: number of heads, >= 1.
  explicit Optimizer(int64_t dimension);

  size_t size() const { return static_cast<size_t>(dimension_); }
  std::vector<double> zeros() const { return std::vector<double>(size(), 0.0); }
  // To be called at the end of a constructor.
  void plan_next() { pending_ = plan(); }

  // The next evaluations, computed from the state alone.
  virtual std::vector<Evaluation> plan() const = 0;
  // Takes in the outcomes of `asked`, already checked.
  virtual void learn(const std::vector<Evaluation>& asked,
                     const std::vector<Outcome>& outcomes) = 0;
  virtual const Incumbent& incumbent() const = 0;
  virtual void write_options(StateWriter& writer) const = 0;
  virtual void write(StateWriter& writer) const = 0;
  // Reads all lines left, then changes the object: not at all if a line is wrong.
  virtual void read(StateReader& reader) = 0;

 private:
  void write_heading(StateWriter& writer) const;

  int64_t dimension_;
  std::vector<Evaluation> pending_;
};

// Throws std::invalid_argument "<name> must be <expected>, got <value>" unless `valid`.
void require(bool valid, const char* name, const std::string& expected, double value);

// A start point: empty stands for x = 0; else [dimension], finite, within the bound.
std::vector<double> checked_start(const std::vector<double>& start, int64_t dimension,
                                  double max_abs_log_scale);

}  // namespace zerotuning::search
