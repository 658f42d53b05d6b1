"""Texts that a model generates after prompts, greedily or sampled, and the labels that they begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zerotuning.evaluation.batches import Batch, left_padded
from zerotuning.evaluation.label_scorer import LabelScorer
from zerotuning.models.device_maps import input_device
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import Task
from zerotuning.tasks.tokenization import SPARE_TOKENS

#: Arguments of transformers' `generate` for greedy decoding, in place of the model's own generation settings.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


@torch.no_grad()
def generate_tokens(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, **decoding: Any
) -> Tensor:
    """Generate after several prompts together, which are padded on the left.

    Args:
        model: A transformers causal language model as it stands: patched or not, scaled or not.
        tokenizer: Its tokenizer, for the padding token (0 where it has none).
        prompts: n prompts as token ids.
        max_new_tokens: The most tokens after each prompt.
        **decoding: Further arguments of transformers' `generate`, such as GREEDY. Other settings are the
            model's own generation settings.

    Returns:
        int64 [n, at most max_new_tokens]; a row that ends early is filled with the padding token.
    """
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    input_ids, attention_mask = left_padded(prompts, padding)
    device = input_device(model)
    output: Tensor = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=padding,
        **decoding,
    )
    return output[:, input_ids.shape[1] :]


def generate_texts(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, **decoding: Any
) -> list[str]:
    """The texts of `generate_tokens`, without special tokens, one for each prompt."""
    tokens = generate_tokens(model, tokenizer, prompts, max_new_tokens, **decoding)
    return list(tokenizer.batch_decode(tokens, skip_special_tokens=True))


def generate_answers(
    scorer: LabelScorer, tokenizer: Any, batch: Batch, max_new_tokens: int, **decoding: Any
) -> list[str]:
    """The texts that the scorer's model generates after each prompt of one of its batches.

    Args:
        scorer: The scorer whose model generates.
        tokenizer: The model's tokenizer.
        batch: A batch of the scorer.
        max_new_tokens: The most tokens of an answer; `max_answer_tokens` allows every label.
        **decoding: Arguments of transformers' `generate` that replace those of GREEDY.
    """
    prompts = [example.prompt for example in batch.examples]
    return generate_texts(scorer.model, tokenizer, prompts, max_new_tokens, **(GREEDY | decoding))


def max_answer_tokens(scorer: LabelScorer) -> int:
    """The number of generated tokens that suffices to recognize every label of the scorer's examples."""
    return max(len(tokens) for example in scorer.examples for tokens in example.labels) + SPARE_TOKENS


def chosen_label(text: str, labels: Sequence[str]) -> int | None:
    """The index of the longest label that a text begins with, up to case and surrounding space; None for no label."""
    text = text.strip().casefold()
    beginning = [index for index, label in enumerate(labels) if text.startswith(label.strip().casefold())]
    return max(beginning, key=lambda index: len(labels[index].strip()), default=None)


def generated_accuracy(task: Task, texts: Sequence[str], records: Sequence[Record]) -> float:
    """The fraction, in [0, 1], of the texts that begin with their example's gold label (or continuation)."""
    correct = 0
    for text, record in zip(texts, records, strict=True):
        prompt = task.render(record, require_label=True)
        correct += chosen_label(text, prompt.labels) == prompt.label
    return correct / len(records)
