"""Scores of labels: log-probabilities of texts after a prompt under a causal language model.

The score of a label is the sum of its tokens' log-probabilities after the prompt, or another function of them (the
task's `scoring`). Only the necessary logits are computed: with single-token labels those of the labels at the last
position, otherwise those at the last few positions of one sequence for each distinct beginning of a label.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.batches import Batch, grouped_by_length, padded_batch
from zerotuning.evaluation.forward import Forward, PlainForward
from zerotuning.models.inspection import context_length
from zerotuning.tasks.examples import as_records
from zerotuning.tasks.task import Task
from zerotuning.tasks.tokenization import Tokens, shared_length, tokenize

#: Tokens of a pass with gradients beyond which more tokens gain no speed and only take memory: a model of Llama-8B's
#: shape on an H100 keeps 4 MiB of activations a token.
GRADIENT_TOKENS = 4096


class Continuations(NamedTuple):
    """The gold continuations of n examples under a model.

    Attributes:
        log_probability: float32 [n], mean over the continuation's tokens, nats.
        exact: bool [n], whether each of the continuation's tokens is the most likely token, as in greedy decoding.
        entropy: float32 [n], entropy of the next token, mean over the continuation's tokens, nats.
    """

    log_probability: Tensor
    exact: Tensor
    entropy: Tensor


class LabelScorer:
    """Tokenizes the examples of a task once, batches them, and scores their labels.

    Attributes:
        model: The model, patched or not.
        task: The task, which supplies prompts and labels.
        examples: The N tokenized examples in their given order.
        num_labels: The most labels of an example: the columns C of the scores.
        labels: Gold labels, int64 [N], -1 where an example has none.
        forward: Computes the logits. `using` returns a scorer with another forward.
        batches: All examples in batches, fixed by the records, `batch_size` and `batch_tokens`: sorted by length (ties
            in their given order), with at most `batch_size` sequences and, if given, at most `batch_tokens` tokens,
            padding included. A batch has at least one example. An example has one sequence, or one for each distinct
            beginning of its labels where labels have several tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        task: Task,
        records: Iterable[Mapping[str, Any]],
        *,
        batch_size: int = 16,
        batch_tokens: int | None = None,
        require_labels: bool = True,
        truncate: bool = False,
        forward: Forward | None = None,
    ) -> None:
        """Tokenize and batch the examples.

        Args:
            model: A transformers causal language model, patched or not.
            tokenizer: The model's tokenizer, which adds its usual special tokens, such as BOS, to each text.
            task: Supplies prompts and labels.
            records: Examples: mappings with the fields of the prompt, and `label` unless `require_labels` is False.
            batch_size: The most sequences of a batch.
            batch_tokens: The most tokens of a batch, padding included; None for no limit.
            require_labels: Whether an example without its label is an error.
            truncate: Shorten a prompt that is longer than the model's context. Whole shots are removed first, the
                oldest before the others, then the beginning of the example's own prompt. The special
                tokens and the chat template at the start, the prompt's end and the labels stay whole.
            forward: How logits are computed; a PlainForward of the model by default.

        Raises:
            ZeroTuningError: There are no examples; a record is bad; the tokenizer gives two labels the same tokens (the
                same first token, with scoring `first-token`); a chat has no template; a prompt is longer than the
                model's context. The error names the example.
        """
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1):
                raise ZeroTuningError(f"{name} must be a positive integer, got {value!r}")
        self.model = model
        self.task = task
        self.forward = PlainForward(model) if forward is None else forward
        self.examples = tokenize(
            tokenizer,
            task,
            as_records(records),
            require_labels=require_labels,
            context=context_length(model),
            truncate=truncate,
        )
        self.num_labels = max(len(example.labels) for example in self.examples)
        self.labels = torch.tensor([example.label for example in self.examples])
        self._padding = getattr(tokenizer, "pad_token_id", None) or 0
        self._label_ids = tuple(sorted({token for e in self.examples for tokens in e.labels for token in tokens}))
        self._single_tokens = all(len(tokens) == 1 for e in self.examples for tokens in e.labels)
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self.batches: list[Batch] = self.batches_of(range(len(self.examples)))

    def __len__(self) -> int:
        return len(self.examples)

    def using(self, forward: Forward) -> LabelScorer:
        """A scorer of the same tokenized examples and batches that computes logits by `forward`."""
        other = copy.copy(self)
        other.forward = forward
        return other

    @cached_property
    def shared_prefix(self) -> Tokens:
        """The tokens that all prompts begin with; at least one token of each prompt follows them."""
        return self.examples[0].prompt[: shared_length(self.examples)]

    def batches_of(self, places: Iterable[int], batch_size: int | None = None) -> list[Batch]:
        """Some of the examples in batches, formed as `batches` are.

        A prefix that the forward reads once for all sequences does not count toward `batch_tokens`.

        Args:
            places: Positions in `examples`.
            batch_size: The most sequences of a batch; by default the scorer's own `batch_size`.
        """
        groups = grouped_by_length(
            self.examples,
            places,
            batch_size=batch_size or self._batch_size,
            batch_tokens=self._batch_tokens,
            prefix_length=self.forward.prefix_length,
        )
        return [self._batch(indices, [tuple(self.examples[i].beginnings) for i in indices]) for indices in groups]

    def prompt_batch(self, places: Sequence[int]) -> Batch:
        """Some of the examples as one batch of their prompts without labels, after which the model generates."""
        return self._batch(list(places), [((),)] * len(places))

    def scores(self, batch: Batch) -> Tensor:
        """Log-probability of each label, given that the answer is one of the example's labels: float32 [n, C].

        Each row is `log_probabilities`, divided by the labels' numbers of tokens with scoring `mean`, normalized:
        the exponentials of a row sum to 1 over the example's labels. Columns beyond an example's labels are -inf. For a
        task with a continuation: the continuation's mean log-probability per token, [n, 1]. Differentiable when
        gradients are enabled.
        """
        if self.task.continuation:
            return self.continuations(batch).log_probability[:, None]
        if self._single_tokens:
            logits = self.forward.logits(batch, positions=1, token_ids=self._label_ids)[:, -1]
            return torch.log_softmax(self._label_columns(logits, batch), dim=-1)
        scores = self.log_probabilities(batch)
        if self.task.scoring == "mean":
            scores = scores / self._label_lengths(batch).to(scores)
        return torch.log_softmax(scores, dim=-1)

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Log-probability of each label after the prompt, summed over its tokens: float32 [n, C].

        Normalized over the whole vocabulary. With scoring `first-token` a label is its first token alone. Columns
        beyond an example's labels are -inf. Differentiable when gradients are enabled.
        """
        positions = max(len(tokens) for example in batch.examples for tokens in example.labels)
        logits = self.forward.logits(batch, positions)
        normalizer = torch.logsumexp(logits, dim=-1)
        # For each token of each label: a sequence with the preceding tokens, the position there, the token's id.
        sequences, places, ids, targets = [], [], [], []
        for n, (example, (first, beginnings)) in enumerate(zip(batch.examples, batch.rows, strict=True)):
            for column, tokens in enumerate(example.labels):
                offset = next(i for i, one in enumerate(beginnings) if one[: len(tokens) - 1] == tokens[:-1])
                for k, token in enumerate(tokens):
                    sequences.append(first + offset)
                    places.append(logits.shape[1] - 1 - len(beginnings[offset]) + k)
                    ids.append(token)
                    targets.append(n * self.num_labels + column)
        device = logits.device
        sequence, place = torch.tensor(sequences, device=device), torch.tensor(places, device=device)
        target = torch.tensor(targets, device=device)
        token_scores = logits[sequence, place, torch.tensor(ids, device=device)] - normalizer[sequence, place]
        sums = token_scores.new_zeros(len(batch) * self.num_labels).index_add(0, target, token_scores)
        absent = torch.ones(sums.shape, dtype=torch.bool, device=device).index_fill(0, target, False)
        return sums.masked_fill(absent, -torch.inf).view(len(batch), self.num_labels)

    def continuations(self, batch: Batch) -> Continuations:
        """The log-probability, exactness and entropy of the gold continuations, each [n]."""
        gold = [example.labels[0] for example in batch.examples]
        longest = max(map(len, gold))
        # Left padding: the last token of every row is the last but one of the continuation.
        log_probabilities = torch.log_softmax(self.forward.logits(batch, longest), dim=-1)
        device = log_probabilities.device
        ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in gold], device=device)
        real = torch.tensor([[k >= longest - len(one) for k in range(longest)] for one in gold], device=device)
        lengths = real.sum(dim=-1)
        chosen = log_probabilities.gather(-1, ids[:, :, None]).squeeze(-1).masked_fill(~real, 0.0)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).masked_fill(~real, 0.0)
        exact = ((log_probabilities.argmax(dim=-1) == ids) | ~real).all(dim=-1)
        return Continuations(chosen.sum(dim=-1) / lengths, exact, entropy.sum(dim=-1) / lengths)

    def gather(self, per_batch: Sequence[Tensor]) -> Tensor:
        """One tensor [n, ...] for each of `batches`, in their order, to one [N, ...] in the examples' order."""
        indices = torch.cat([batch.indices for batch in self.batches])
        values = torch.cat(list(per_batch))
        return values[torch.argsort(indices).to(values.device)]

    def _batch(self, indices: Sequence[int], beginnings: Sequence[tuple[Tokens, ...]]) -> Batch:
        return padded_batch(self.examples, indices, beginnings, self._padding)

    def _label_lengths(self, batch: Batch) -> Tensor:
        """Tokens of each label, [n, C]; 1 beyond an example's own labels."""
        lengths = [[len(tokens) for tokens in example.labels] for example in batch.examples]
        return torch.tensor([row + [1] * (self.num_labels - len(row)) for row in lengths])

    def _label_columns(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits [n, len(_label_ids)] of single-token labels to [n, C] in each example's order, -inf beyond."""
        column_of = {token: column for column, token in enumerate(self._label_ids)}
        columns = [[column_of[tokens[0]] for tokens in example.labels] for example in batch.examples]
        index = torch.tensor([row + [0] * (self.num_labels - len(row)) for row in columns], device=logits.device)
        absent = [[c >= len(row) for c in range(self.num_labels)] for row in columns]
        return logits.gather(1, index).masked_fill(torch.tensor(absent, device=logits.device), -torch.inf)
