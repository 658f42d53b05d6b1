"""The choices that make a calibration: what each means, its default, and what it must be."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from zerotuning.errors import ZeroTuningError

METHODS = ("gradient", "paper", "cma-es")
OBJECTIVES = ("task-loss", "entropy", "information")
COMBINATIONS = ("average", "refit")
TIES = ("none", "layer", "all")
PRIORS = ("unknown", "estimate")

DEFAULT_STEPS = {"gradient": 60, "paper": 0, "cma-es": 300}
#: With few examples one fifth held out is noise: the gradient method takes folds. With MANY_EXAMPLES it takes one fold,
#: twice the steps, and averages the searches of three seeds. All were chosen on validation examples outside the search
#: (README).
DEFAULT_FOLDS = 4
MANY_EXAMPLES = 128
STEPS_OF_MANY = 120
SEEDS_OF_MANY = 3
LABEL_FREE_FOLDS = 2
#: Chosen among by the held-out loss: gradients of a head's log γ are some 1e-3 to 1e-2 nats.
DEFAULT_PENALTIES = (1e-3,)


@dataclass(frozen=True)
class CalibrationOptions:
    """What `calibrate` is asked to do; a resumed run must be asked the same.

    method          `gradient`, `paper` (arXiv 2505.11739) or `cma-es`
    objective       `task-loss` (nats, needs labels), `entropy` (the paper's label-free one) or `information`. The
                    paper's method with `task-loss` minimises 1 - accuracy, as the paper does.
    examples        use only so many records of each task, drawn by `seed`; default all
    steps           gradient steps (default 60, 120 with 128 examples or more) or CMA-ES evaluations (default 300); the
                    paper's method has its own number
    seconds         stop stepping after so many seconds of search, those before an interruption included
    seed            of the draw, the folds, the order of batches and CMA-ES
    seeds           searches to make, with seeds of their own, on the same examples: the gradient method averages
                    their log γ, the others keep the one with the best held-out loss. Default 1, or 3 of one fold
                    each where the gradient method has labels and 128 examples or more
    folds           parts of the examples that are held out in turn, by the gradient method: 1 holds one fifth out,
                    once. Default 4; without labels 2, whose searches share no example and so can confirm each other.
                    The other methods always hold one fifth out.
    combine         what the gradient method makes of its folds: `average` of the folds' log γ at the chosen step, or
                    `refit`, a search on all examples that stops at that step
    penalties       strengths p of the penalty p/2 · |log γ|² toward γ = 1; the held-out loss chooses one
    average         in [0, 1): decay of a moving average of each search's points, judged beside them; 0: none
    learning_rate   the first gradient step moves each log γ by about so much
    epsilon         a head whose gradients are smaller than this (nats per unit of log γ) moves by less than
                    learning_rate in a step
    step_examples   fit examples that one gradient step sees; default 64, or 32 in each of several folds
    patience        held-out evaluations without improvement after which the gradient method stops; 0: never
    prior           for `information`, the classes' shares: `unknown` (as equal as they can be), `estimate`
                    (objectives.estimated_prior of the untuned predictions) or one number a label
    guard           without labels: refuse scales that are more likely chance than knowledge of the model's: three
                    thresholds, in judgement.py
    layers          tune heads of these layers only
    heads           tune these (layer, head) pairs only
    exclude_heads   leave these (layer, head) pairs as they are
    tie             `none`, `layer`: one γ for the heads of a layer, `all`: one γ for all
    batch_size      prompts that go through the model together
    max_new_tokens  of generated text, where a metric of it is the objective
    truncate        shorten prompts that are longer than the model's context (scoring.LabelScorer), instead of an error
    Sequences may be lists, sets or arrays, and are kept as tuples.
    Errors: ZeroTuningError that names the option.
    """

    method: str = "gradient"
    objective: str = "task-loss"
    examples: int | None = None
    steps: int | None = None
    seconds: float | None = None
    seed: int = 0
    seeds: int | None = None
    folds: int | None = None
    combine: str = "average"
    penalties: Sequence[float] = DEFAULT_PENALTIES
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
        for name, known in (
            ("method", METHODS),
            ("objective", OBJECTIVES),
            ("combine", COMBINATIONS),
            ("tie", TIES),
        ):
            if getattr(self, name) not in known:
                raise ZeroTuningError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
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
            ("seeds", 1),
            ("folds", 1),
            ("step_examples", 1),
            ("patience", 0),
            ("batch_size", 1),
            ("max_new_tokens", 1),
        ):
            value = getattr(self, name)
            if value is None and name in ("examples", "steps", "seeds", "folds", "step_examples"):
                continue
            if not _is_whole(value) or value < least:
                raise ZeroTuningError(f"{name} must be at least {least}, got {value!r}")
            self._set(name, int(value))

    def _check_heads(self) -> None:
        if self.layers is not None:
            layers = _items(self.layers)
            if layers is None or not all(map(_is_whole, layers)):
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
        penalties = _items(self.penalties)
        if not penalties or not all(_is_number(penalty) and penalty >= 0 for penalty in penalties):
            raise ZeroTuningError(f"penalties must be numbers of at least 0, got {self.penalties!r}")
        self._set("penalties", tuple(map(float, penalties)))
        for name in ("seconds", "average", "learning_rate", "epsilon"):
            if getattr(self, name) is not None:
                self._set(name, float(getattr(self, name)))

    def _check_prior(self) -> None:
        if isinstance(self.prior, str):
            if self.prior not in PRIORS:
                raise ZeroTuningError(
                    f"prior must be one of {', '.join(PRIORS)} or one number a label, got {self.prior!r}"
                )
        else:
            shares = _items(self.prior) or ()
            good = len(shares) >= 2 and all(_is_number(share) and share > 0 for share in shares)
            if not good or abs(sum(shares) - 1) > 1e-3:
                raise ZeroTuningError(
                    f"prior must be positive numbers, one a label, that add up to 1, got {self.prior!r}"
                )
            self._set("prior", tuple(map(float, shares)))
        if self.prior != "unknown" and self.objective != "information":
            raise ZeroTuningError(f"prior belongs to the objective information, got {self.objective}")

    def _check_method(self) -> None:
        if self.method != "gradient" and self.folds is not None and self.folds != 1:
            raise ZeroTuningError(f"folds are for the method gradient, got {self.folds} with {self.method}")

    def resolved(self, examples: int) -> CalibrationOptions:
        """The same with the defaults that depend on the number of examples, the least of the tasks', filled in."""
        if self.method != "gradient" or self.objective != "task-loss" or examples < MANY_EXAMPLES:
            return self
        seeds = self.seeds or (SEEDS_OF_MANY if self.folds in (None, 1) else 1)
        return replace(self, folds=self.folds or 1, steps=self.steps or STEPS_OF_MANY, seeds=seeds)

    @property
    def total_steps(self) -> int:
        return self.steps or DEFAULT_STEPS[self.method]

    @property
    def seed_count(self) -> int:
        return self.seeds or 1

    @property
    def fold_count(self) -> int:
        if self.method != "gradient":
            return 1
        return self.folds or (DEFAULT_FOLDS if self.objective == "task-loss" else LABEL_FREE_FOLDS)

    @property
    def examples_per_step(self) -> int:
        return self.step_examples or (64 if self.fold_count == 1 else 32)

    def to_json(self) -> dict[str, Any]:
        """The options as JSON holds them: tuples are lists."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def checked_options(options: Mapping[str, Any]) -> CalibrationOptions:
    """CalibrationOptions of these names. Errors: ZeroTuningError for a name or a value that they do not take."""
    known = CalibrationOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ZeroTuningError(f"calibrate has no option {name!r}: there are {', '.join(known)}")
    return CalibrationOptions(**options)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _items(value: Any) -> tuple[Any, ...] | None:
    """The items of a sequence, a set or an array of any library's; None where it is none of them."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, (str, bytes, Mapping)) or not isinstance(plain, Iterable):
        return None
    return tuple(sorted(plain, key=repr) if isinstance(plain, (set, frozenset)) else plain)


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = _items(value)
    if pair is None or len(pair) != 2 or not all(map(_is_whole, pair)):
        raise ZeroTuningError(f"{name} must be (layer, head) pairs, got {value!r}")
    return int(pair[0]), int(pair[1])


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
