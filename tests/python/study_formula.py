"""The paper's formula in float64, one unpadded prompt at a time, and figures of a study by it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from zerotuning.patching.patch import unpatch
from zerotuning.study import Setting
from zerotuning.tasks.task import Task

LAYERS, HEADS = 2, 4
#: Step of log γ in finite differences: losses are exact to 1e-7 only, since Llama's norms compute in float32.
STEP = 0.02


_formula: dict[str, Any] = {}


def eager_formula(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    logits = (query @ key.transpose(2, 3) * scaling).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    weights = torch.softmax(logits, -1)
    first, end = _formula["span"]
    factors = torch.ones(HEADS, length, dtype=torch.float64)
    factors[:, first:end] = torch.as_tensor(_formula["log_scale"][module.layer_idx]).exp()[:, None]
    weights = weights * factors[:, None]
    return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2), None


AttentionInterface.register("study_formula", eager_formula)


def formula_figures(
    setting: Setting, task: Task, records: Sequence[Any], log_scale: Any, spans: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """Return (accuracy, loss) by the formula; the score of a label is the log-probability of all its tokens."""
    model, tokenizer = setting.loaded()
    plain = unpatch(copy.deepcopy(model)).double()
    plain.set_attn_implementation("study_formula")
    right, losses = [], []
    for record, span in zip(records, spans, strict=True):
        _formula.update(log_scale=np.broadcast_to(log_scale, (LAYERS, HEADS)).copy(), span=span)
        prompt = task.render(record)
        ids = tokenizer(prompt.text)["input_ids"]
        scores = []
        for label in prompt.labels:
            both = tokenizer(prompt.text + label)["input_ids"]
            with torch.no_grad():
                logits = torch.log_softmax(plain(torch.tensor([both]), use_cache=False).logits[0].double(), -1)
            scores.append(sum(float(logits[place - 1, both[place]]) for place in range(len(ids), len(both))))
        log_total = math.log(sum(math.exp(score - max(scores)) for score in scores)) + max(scores)
        right.append(int(np.argmax(scores)) == prompt.label)
        losses.append(log_total - scores[prompt.label or 0])
    return float(np.mean(right)), float(np.mean(losses))


def ends(setting: Setting, task: Task, records: Sequence[Any]) -> list[int]:
    return [len(setting.loaded()[1](task.render(record).text)["input_ids"]) for record in records]


def rows_of(rows: Sequence[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row["key"].get(name) == value for name, value in key.items())]
