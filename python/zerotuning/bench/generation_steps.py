"""The time of each step of `generate`, of several models whose steps are interleaved."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def steps_by_turns(
    models: Mapping[str, Any], ids: Tensor, new: int, runs: int, **options: Any
) -> dict[str, list[list[float]]]:
    """Measure the steps of several runs of `generate`.

    Several models take their steps by turns, one at a time, on one core. On a shared host a core can be half as fast
    for seconds at a time, and not all cores alike; by turns such a phase affects all models. Each model has a thread of
    its own, because cuDNN keeps its plans by thread.

    Args:
        models: transformers models by name.
        ids: Prompts, int64 [B, T].
        new: Tokens that each run generates.
        runs: How often each model generates.
        options: Further arguments of `generate`.

    Returns:
        For each model and run the seconds of the steps, without the step of the first token.
    """
    turns = _Turns(models)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(runs)] for name in models}

    def run_all(name: str) -> None:
        with turns.taking_part(name):
            for steps in seconds[name]:
                _generate(models[name], ids, new, _Steps(turns, name, steps, ids.is_cuda), options)

    if len(models) == 1:  # in the calling thread: the CUDA graphs of a compiled model belong to a thread
        run_all(*models)
    else:
        with ThreadPoolExecutor(len(models), initializer=_use_one_core) as threads:
            for running in [threads.submit(run_all, name) for name in models]:
                running.result()
    return {name: [steps[1:] for steps in of_runs] for name, of_runs in seconds.items()}


def _generate(model: Any, ids: Tensor, new: int, after_step: _Steps, options: Mapping[str, Any]) -> None:
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        max_length=None,
        stopping_criteria=[after_step],
        **options,
    )


class _Turns:
    """Lets one of several threads run at a time, in a fixed order."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._order = deque(names)
        self._changed = threading.Condition()
        self._started = dict.fromkeys(names, 0.0)

    def wait(self, name: str) -> None:
        """Block until the thread's turn, then start the thread's clock."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == name)
        self._started[name] = time.perf_counter()

    def elapsed(self, name: str) -> float:
        return time.perf_counter() - self._started[name]

    def pass_on(self) -> None:
        """Give the turn to the next thread."""
        with self._changed:
            self._order.rotate(-1)
            self._changed.notify_all()

    @contextmanager
    def taking_part(self, name: str) -> Iterator[None]:
        """Within the context the thread takes part in the turns; the context begins with its first turn."""
        try:
            self.wait(name)
            yield
        finally:
            with self._changed:
                self._order.remove(name)
                self._changed.notify_all()


class _Steps:
    """A stopping criterion that never stops: each call records a step's time and gives the turn to the next model."""

    def __init__(self, turns: _Turns, name: str, seconds: list[float], on_gpu: bool) -> None:
        self._turns, self._name, self._seconds, self._on_gpu = turns, name, seconds, on_gpu

    def __call__(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self._on_gpu:
            torch.cuda.synchronize()
        self._seconds.append(self._turns.elapsed(self._name))
        self._turns.pass_on()
        self._turns.wait(self._name)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _use_one_core() -> None:
    """Bind the calling thread to the first core of its affinity mask."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
