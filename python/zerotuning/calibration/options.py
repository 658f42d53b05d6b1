"""The options of a calibration: what each means, its default and its range."""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

from zerotuning.errors import ZeroTuningError

METHODS = ("gradient", "paper", "cma-es")
OBJECTIVES = ("task-loss", "entropy", "information")
COMBINATIONS = ("average", "refit")
TIES = ("none", "layer", "all")
PRIORS = ("unknown", "estimate")

DEFAULT_STEPS = {"gradient": 60, "paper": 0, "cma-es": 300}
#: With few examples, one held-out fifth is too noisy: the gradient method makes folds. From MANY_EXAMPLES on the
#: gradient method makes one fold and twice the steps, and averages the searches of three seeds. These numbers were
#: chosen on validation examples outside the search (docs/results).
DEFAULT_FOLDS = 4
MANY_EXAMPLES = 128
STEPS_OF_MANY = 120
SEARCHES_OF_MANY = 3
LABEL_FREE_FOLDS = 2
#: The gradient in a head's log γ is some 1e-3 to 1e-2 nats.
DEFAULT_L2_PENALTIES = (1e-3,)
#: Old names of options, accepted for one version -> new names.
RENAMED_OPTIONS = {"seeds": "num_searches", "penalties": "l2_penalties"}

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of `calibrate`. A calibration resumes only with equal options.

    Sequences may be lists, sets or arrays of any library; they are stored as tuples.

    Attributes:
        method: How scales are searched: `gradient`; `paper`, the profiling of heads of arXiv 2505.11739; or `cma-es`,
            an evolution strategy that needs no gradient.
        objective: What is minimised: `task-loss`, the cross-entropy of the right label in nats; `entropy` of the
            predictions, the paper's label-free objective; or `information`, minus the mutual information between
            example and predicted label, without labels too. The paper's method with `task-loss` minimises
            1 - accuracy, as the paper does.
        examples: Number of examples of each task that are used, drawn by `seed`; at least 4. Default: all.
        steps: Number of gradient steps or of CMA-ES evaluations, at least 1. Default: 60 gradient steps, 120 from 128
            examples on; 300 evaluations. The paper's method has a fixed number.
        seconds: Search time in seconds, time before an interruption included; above 0. Default: no
            limit.
        seed: Seed of the choice of examples, the folds, the order of batches and CMA-ES; at least 0.
        num_searches: Number of searches on the same examples, with the seeds from `seed` on; at least 1. The gradient
            method averages their log γ, the others keep the search of the least held-out loss. Default: 1, or 3 where
            the gradient method has labels, one fold and 128 examples or more.
        folds: Number of cross-validation folds of the gradient method, at least 1; 1 is a single 80/20 split. Default:
            4; 1 from 128 examples on; 2 without labels, so that two searches without a common example can confirm each
            other. The other methods always make a single 80/20 split.
        combine: How the gradient method combines its folds: `average`, the mean of the folds' log γ at the chosen step,
            or `refit`, one more search on all examples that ends at that step.
        l2_penalties: Strengths p of the penalty p/2 · |log γ|² that is added to the objective, each at least 0. With
            several, the held-out loss chooses one.
        average: Decay of a moving average of each search's points, in [0, 1). Averaged points are candidates beside the
            points themselves. 0: no average.
        learning_rate: Approximate length of the first gradient step in each log γ; above 0.
        epsilon: Gradient, in nats per unit of log γ, below which a head's step is shorter than `learning_rate`;
            above 0.
        step_examples: Number of examples that one gradient step reads, at least 1. Default: 64, or 32 in each of
            several folds.
        patience: Number of held-out evaluations without improvement after which the gradient method ends. 0: no early
            end.
        prior: For `information`, the share of each label: `unknown`, as equal as possible; `estimate`, from the untuned
            predictions (evaluation/objectives.py); or a positive number for each label, with sum 1.
        guard: Without labels, whether to refuse scales that may be due to chance, by the three thresholds of
            calibration/acceptance.py.
        layers: Layers whose heads are tuned, from 0. Default: all.
        heads: (layer, head) pairs that are tuned, from 0. Default: all.
        exclude_heads: (layer, head) pairs that keep their scale.
        tie: `none`; `layer`, one γ for the heads of a layer; or `all`, one γ for all heads.
        batch_size: Number of prompts in one forward pass, at least 1.
        max_new_tokens: Longest generated text in tokens, at least 1, where a metric of generated text is the objective.
        truncate: Whether prompts that exceed the model's context are shortened (tasks/tokenization.py). Otherwise such
            a prompt is an error.

    Raises:
        ZeroTuningError: A value outside its range; the message names the option.
    """

    method: str = "gradient"
    objective: str = "task-loss"
    examples: int | None = None
    steps: int | None = None
    seconds: float | None = None
    seed: int = 0
    num_searches: int | None = None
    folds: int | None = None
    combine: str = "average"
    l2_penalties: Sequence[float] = DEFAULT_L2_PENALTIES
    average: float = 0.0
    learning_rate: float = 0.1
    epsilon: float = 1e-3
    step_examples: int | None = None
    patience: int = 0
    prior: str | Sequence[float] = "unknown"
    guard: bool = True
    layers: Sequence[int] | None = None
    heads: Sequence[tuple[int, int]] | None = None
    exclude_heads: Sequence[tuple[int, int]] = ()
    tie: str = "none"
    batch_size: int = 16
    max_new_tokens: int = 32
    truncate: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("objective", OBJECTIVES),
            ("combine", COMBINATIONS),
            ("tie", TIES),
        ):
            if getattr(self, name) not in allowed:
                raise ZeroTuningError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("guard", "truncate"):
            if not isinstance(getattr(self, name), bool):
                raise ZeroTuningError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_counts()
        self._check_heads()
        self._check_numbers()
        self._check_prior()
        self._check_method()

    def _check_counts(self) -> None:
        for name, least in (
            ("examples", 4),
            ("steps", 1),
            ("seed", 0),
            ("num_searches", 1),
            ("folds", 1),
            ("step_examples", 1),
            ("patience", 0),
            ("batch_size", 1),
            ("max_new_tokens", 1),
        ):
            value = getattr(self, name)
            if value is None and name in ("examples", "steps", "num_searches", "folds", "step_examples"):
                continue
            if not _is_integer(value) or value < least:
                raise ZeroTuningError(f"{name} must be at least {least}, got {value!r}")
            self._set(name, int(value))

    def _check_heads(self) -> None:
        if self.layers is not None:
            layers = _items(self.layers)
            if layers is None or not all(map(_is_integer, layers)):
                raise ZeroTuningError(f"layers must be a sequence of integers, got {self.layers!r}")
            self._set("layers", tuple(map(int, layers)))
        for name in ("heads", "exclude_heads"):
            value = getattr(self, name)
            if value is None and name == "heads":
                continue
            pairs = _items(value)
            if pairs is None:
                raise ZeroTuningError(f"{name} must be (layer, head) pairs, got {value!r}")
            self._set(name, tuple(_pair(name, pair) for pair in pairs))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        if self.seconds is not None and not (_is_number(self.seconds) and self.seconds > 0):
            raise ZeroTuningError(f"seconds must be positive, got {self.seconds!r}")
        if not (_is_number(self.average) and 0 <= self.average < 1):
            raise ZeroTuningError(f"average must be in [0, 1), got {self.average!r}")
        for name in ("learning_rate", "epsilon"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ZeroTuningError(f"{name} must be positive, got {getattr(self, name)!r}")
        penalties = _items(self.l2_penalties)
        if not penalties or not all(_is_number(penalty) and penalty >= 0 for penalty in penalties):
            raise ZeroTuningError(f"l2_penalties must be numbers of at least 0, got {self.l2_penalties!r}")
        self._set("l2_penalties", tuple(map(float, penalties)))
        for name in ("seconds", "average", "learning_rate", "epsilon"):
            if getattr(self, name) is not None:
                self._set(name, float(getattr(self, name)))

    def _check_prior(self) -> None:
        if isinstance(self.prior, str):
            if self.prior not in PRIORS:
                raise ZeroTuningError(
                    f"prior must be one of {', '.join(PRIORS)} or one number for each label, got {self.prior!r}"
                )
        else:
            shares = _items(self.prior) or ()
            is_valid = len(shares) >= 2 and all(_is_number(share) and share > 0 for share in shares)
            if not is_valid or abs(sum(shares) - 1) > 1e-3:
                raise ZeroTuningError(
                    f"prior must be positive numbers, one for each label, with sum 1, got {self.prior!r}"
                )
            self._set("prior", tuple(map(float, shares)))
        if self.prior != "unknown" and self.objective != "information":
            raise ZeroTuningError(f"prior requires the objective information, got {self.objective}")

    def _check_method(self) -> None:
        if self.method != "gradient" and self.folds is not None and self.folds != 1:
            raise ZeroTuningError(f"folds are for the method gradient, got {self.folds} with {self.method}")

    def resolved(self, examples: int) -> CalibrationOptions:
        """Fill in the defaults that depend on the number of examples, the smallest of the tasks'."""
        if self.method != "gradient" or self.objective != "task-loss" or examples < MANY_EXAMPLES:
            return self
        searches = self.num_searches or (SEARCHES_OF_MANY if self.folds in (None, 1) else 1)
        return replace(self, folds=self.folds or 1, steps=self.steps or STEPS_OF_MANY, num_searches=searches)

    @property
    def total_steps(self) -> int:
        """`steps`, or the method's default."""
        return self.steps or DEFAULT_STEPS[self.method]

    @property
    def search_count(self) -> int:
        """`num_searches`, or 1."""
        return self.num_searches or 1

    @property
    def fold_count(self) -> int:
        """`folds`, or the default of the method and the objective."""
        if self.method != "gradient":
            return 1
        return self.folds or (DEFAULT_FOLDS if self.objective == "task-loss" else LABEL_FREE_FOLDS)

    @property
    def examples_per_step(self) -> int:
        """`step_examples`, or the default for the number of folds."""
        return self.step_examples or (64 if self.fold_count == 1 else 32)

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values: tuples become lists."""
        return {name: _plain(value) for name, value in asdict(self).items()}


class CalibrationKeywords(TypedDict, total=False):
    """The fields of CalibrationOptions as keywords, for editors and type checkers."""

    method: str
    objective: str
    examples: int | None
    steps: int | None
    seconds: float | None
    seed: int
    num_searches: int | None
    folds: int | None
    combine: str
    l2_penalties: Sequence[float]
    average: float
    learning_rate: float
    epsilon: float
    step_examples: int | None
    patience: int
    prior: str | Sequence[float]
    guard: bool
    layers: Sequence[int] | None
    heads: Sequence[tuple[int, int]] | None
    exclude_heads: Sequence[tuple[int, int]]
    tie: str
    batch_size: int
    max_new_tokens: int
    truncate: bool


def shows_option_keywords(function: F) -> F:
    """Replace `**keywords` in a function's signature, which help() prints, by the fields of CalibrationOptions."""
    signature = inspect.signature(function)
    parameters = [given for given in signature.parameters.values() if given.kind is not inspect.Parameter.VAR_KEYWORD]
    for field in fields(CalibrationOptions):
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        )
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def options_from(options: CalibrationOptions | None, keywords: Mapping[str, Any]) -> CalibrationOptions:
    """Return `options`, or the defaults, with the fields replaced that `keywords` names.

    Raises:
        ZeroTuningError: A keyword that names no field, or a value outside its range.
    """
    if options is None:
        options = CalibrationOptions()
    elif not isinstance(options, CalibrationOptions):
        raise ZeroTuningError(f"options must be CalibrationOptions, got {type(options).__name__}")
    changes = {}
    for name, value in keywords.items():
        new_name = RENAMED_OPTIONS.get(name, name)
        if new_name != name:
            warnings.warn(f"the option {name} is now called {new_name}", DeprecationWarning, stacklevel=3)
        field_names = CalibrationOptions.__dataclass_fields__
        if new_name not in field_names:
            raise ZeroTuningError(f"calibrate has no option {name!r}: there are {', '.join(field_names)}")
        if new_name in changes or (new_name != name and new_name in keywords):
            raise ZeroTuningError(f"{name} is the old name of {new_name}: give one of the two, got both")
        changes[new_name] = value
    return replace(options, **changes)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _items(value: Any) -> tuple[Any, ...] | None:
    """The items of a sequence, a set or an array of any library; None for a value of another kind."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, (str, bytes, Mapping)) or not isinstance(plain, Iterable):
        return None
    return tuple(sorted(plain, key=repr) if isinstance(plain, (set, frozenset)) else plain)


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = _items(value)
    if pair is None or len(pair) != 2 or not all(map(_is_integer, pair)):
        raise ZeroTuningError(f"{name} must be (layer, head) pairs, got {value!r}")
    return int(pair[0]), int(pair[1])


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
