"""Answers as the model writes them: greedy text after the prompt, and the label that it begins with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.models.device_maps import input_device
from zerotuning.tasks.task import Record, Task
from zerotuning.tasks.tokenization import SPARE_TOKENS


def answer_tokens(scorer: LabelScorer) -> int:
    """How many tokens the model may write so that every label can be recognised."""
    return max(len(tokens) for example in scorer.examples for tokens in example.labels) + SPARE_TOKENS


@torch.no_grad()
def written_texts(
    model: nn.Module, tokenizer: Any, scorer: LabelScorer, batch: Batch, max_new_tokens: int
) -> list[str]:
    """What the model writes after each prompt of a batch of the scorer's, greedily, without special tokens."""
    prompts = scorer.prompt_batch(batch.indices.tolist())
    device = input_device(model)
    ids = model.generate(  # type: ignore[operator]
        input_ids=prompts.input_ids.to(device),
        attention_mask=prompts.attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # greedy whatever the model's own generation settings say
        pad_token_id=getattr(tokenizer, "pad_token_id", None) or 0,
    )
    return list(tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True))


def chosen_label(text: str, labels: Sequence[str]) -> int | None:
    """The index of the label that a text begins with, case and surrounding space aside; of several the longest.
    None where it begins with none."""
    text = text.strip().casefold()
    found = [index for index, label in enumerate(labels) if text.startswith(label.strip().casefold())]
    return max(found, key=lambda index: len(labels[index].strip()), default=None)


def share_right(task: Task, texts: Sequence[str], records: Sequence[Record]) -> float:
    """Fraction, in [0, 1], of the texts that begin with their example's right label (or continuation)."""
    right = 0
    for text, record in zip(texts, records, strict=True):
        prompt = task.render(record, require_label=True)
        right += chosen_label(text, prompt.labels) == prompt.label
    return right / len(records)
