"""Batches of tokenized examples: which examples share a pass, and their left-padded sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zerotuning.tasks.tokenization import TokenizedPrompt, Tokens


@dataclass(frozen=True)
class Batch:
    """Examples that share a forward pass: n examples in S >= n left-padded sequences of T tokens.

    Attributes:
        indices: int64 [n], the examples' positions in the scorer's list.
        labels: int64 [n], gold labels, -1 where an example has none.
        input_ids: int64 [S, T].
        attention_mask: int64 [S, T], 1 for a real token.
        position_ids: int64 [S, T].
        examples: The n tokenized prompts.
        rows: For each example, the row of its first sequence and the beginnings of labels that end its sequences.
        copies: Number of copies of the examples, one below the other: a copy for each candidate of
            `patch.candidates`.
    """

    indices: Tensor
    labels: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    examples: tuple[TokenizedPrompt, ...]
    rows: tuple[tuple[int, tuple[Tokens, ...]], ...]
    copies: int = 1

    def __len__(self) -> int:
        return len(self.examples)

    def repeated(self, copies: int) -> Batch:
        """The batch `copies` times, one copy below the other."""
        sequences = len(self.input_ids)
        return replace(
            self,
            indices=self.indices.repeat(copies),
            labels=self.labels.repeat(copies),
            input_ids=self.input_ids.repeat(copies, 1),
            attention_mask=self.attention_mask.repeat(copies, 1),
            position_ids=self.position_ids.repeat(copies, 1),
            examples=self.examples * copies,
            rows=tuple((first + copy * sequences, runs) for copy in range(copies) for first, runs in self.rows),
            copies=copies * self.copies,
        )


def left_padded(sequences: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Sequences of one batch, padded on the left to the longest of them.

    Args:
        sequences: S sequences of token ids.
        padding: The token id that fills the left.

    Returns:
        input_ids and attention_mask (1 for a real token), each int64 [S, T].
    """
    length = max(map(len, sequences))
    input_ids = torch.tensor([[padding] * (length - len(one)) + list(one) for one in sequences])
    attention_mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in sequences])
    return input_ids, attention_mask


def padded_batch(
    examples: Sequence[TokenizedPrompt],
    indices: Sequence[int],
    beginnings: Sequence[tuple[Tokens, ...]],
    padding: int,
) -> Batch:
    """One batch, in which each example's prompt is repeated before each of the example's token runs.

    Args:
        examples: All examples of a scorer.
        indices: Positions in `examples` of the batch's examples.
        beginnings: For each of `indices` the token runs that follow the prompt, one sequence for each run.
        padding: The token id of the padding.
    """
    chosen = tuple(examples[index] for index in indices)
    sequences: list[Tokens] = []
    rows = []
    for example, runs in zip(chosen, beginnings, strict=True):
        rows.append((len(sequences), runs))
        sequences.extend(example.prompt + run for run in runs)
    input_ids, attention_mask = left_padded(sequences, padding)
    return Batch(
        indices=torch.tensor(indices),
        labels=torch.tensor([example.label for example in chosen]),
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=-1) - 1).clamp_min(0),
        examples=chosen,
        rows=tuple(rows),
    )


def grouped_by_length(
    examples: Sequence[TokenizedPrompt],
    places: Iterable[int],
    *,
    batch_size: int,
    batch_tokens: int | None,
    prefix_length: int,
) -> Iterator[list[int]]:
    """The positions of each batch's examples: sorted by length, ties in their given order.

    Args:
        examples: All examples of a scorer.
        places: Positions in `examples` of the examples to group.
        batch_size: The most sequences of a batch.
        batch_tokens: The most tokens of a batch, padding included; None for no limit. A batch has at least one example.
        prefix_length: Tokens of each prompt that do not count toward `batch_tokens`, because a pass reads them once
            for all sequences.
    """
    group: list[int] = []
    sequences = 0
    for index in sorted(places, key=lambda place: examples[place].longest):
        added = len(examples[index].beginnings)
        # The examples are sorted by length, so the last example sets the padded length.
        tokens = (sequences + added) * (examples[index].longest - prefix_length)
        if group and (sequences + added > batch_size or (batch_tokens is not None and tokens > batch_tokens)):
            yield group
            group, sequences = [], 0
        group.append(index)
        sequences += added
    if group:
        yield group
