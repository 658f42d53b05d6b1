"""Label log-probabilities of prompts under a causal language model.

A label is scored by the summed log-probability of its tokens after the prompt (design.md §7), or as the task's
`scoring` says. Only the logits
that are needed are computed: the last position, and there only the labels' rows of the output layer when
every label is a single token; otherwise the last few positions of one sequence per distinct beginning of a
label.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.cuda_graphs import RecordedPasses
from zerotuning.models.device_maps import input_device
from zerotuning.models.tensor_parallel import whole_rows
from zerotuning.tasks.task import Task, as_records
from zerotuning.tasks.tokenization import TokenizedPrompt, Tokens, shared_length, tokenize

if TYPE_CHECKING:
    from zerotuning.evaluation.prefix_cache import SharedPrefix

#: Tokens of one pass with gradients beyond which it gains no speed and only takes memory (a model of Llama-8B's shape
#: on an H100 keeps 4 MiB a token).
GRADIENT_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Examples that go through the model together: n examples, S ≥ n left-padded sequences of T tokens.

    indices         int64 [n], the examples' places in the list given to the scorer
    labels          int64 [n], gold labels, -1 where an example has none
    input_ids       int64 [S, T];  attention_mask int64 [S, T], 1 = real token;  position_ids int64 [S, T]
    examples        the n tokenised prompts
    rows            for each example, its sequences: (first row, beginnings)
    copies          how often the same examples stand below each other, a candidate each (`patch.candidates`)
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
        """The batch below itself, so often in all."""
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


class Continuations(NamedTuple):
    """How a model finds the gold continuations of n examples.

    log_probability   float32 [n], mean over the continuation's tokens, nats
    exact             bool [n], whether each of its tokens is the most likely one: greedy decoding writes it
    entropy           float32 [n], of the next token, mean over the continuation's tokens, nats
    """

    log_probability: Tensor
    exact: Tensor
    entropy: Tensor


class LabelScorer:
    """Tokenises the examples of a task once, batches them, and scores their labels.

    `batches` is fixed by the records, `batch_size` and `batch_tokens`: examples sorted by length (ties in
    their given order), at most `batch_size` sequences and, if given, at most `batch_tokens` tokens with
    padding to a batch, but never fewer than one example. An example takes one sequence, or one per distinct
    beginning of its labels when they have several tokens.

    model           a transformers causal language model, patched or not
    tokenizer       its tokenizer; it adds what it always adds to a text (a BOS token or nothing)
    task            supplies prompts and labels
    records         examples: mappings with the fields of the prompt, and `label` unless require_labels is
    False
    truncate        shorten a prompt that is longer than the model's context: whole shots go first, the oldest before
                    the others, then the example's own prompt loses its beginning. What the tokenizer or the chat
                    template puts first, the prompt's end and the labels stay whole.
    Errors: ZeroTuningError for no examples, a bad record, labels that the tokenizer cannot tell apart (by their first
    token, with that scoring), a chat without a template, and a prompt that is longer than the model's context; each
    names the example.
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
    ) -> None:
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1):
                raise ZeroTuningError(f"{name} must be a positive integer, got {value!r}")
        self.model = model
        self.task = task
        context = _context(model)
        self.examples = tokenize(
            tokenizer,
            task,
            as_records(records),
            require_labels=require_labels,
            context=context,
            truncate=truncate,
        )
        #: The most labels that an example has: the columns of the scores.
        self.num_labels = max(len(example.labels) for example in self.examples)
        #: Gold labels of all examples in their given order: int64 [N], -1 where an example has none.
        self.labels = torch.tensor([example.label for example in self.examples])
        #: Replays short passes on a GPU, for who makes them many times over.
        self.recorded: RecordedPasses | None = None
        #: What all prompts begin with, while `shared_prefix.behind_prefix` has it read once for all.
        self.prefix: SharedPrefix | None = None
        #: Of each prompt, read once a batch: they do not count toward `batch_tokens`.
        self.tokens_read_once = 0
        self._padding = getattr(tokenizer, "pad_token_id", None) or 0
        self._forward_arguments = forward_arguments(model)
        self._label_ids = sorted({token for e in self.examples for tokens in e.labels for token in tokens})
        self._single_tokens = all(len(tokens) == 1 for e in self.examples for tokens in e.labels)
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self.batches: list[Batch] = self.batches_of(range(len(self.examples)))

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def shared_length(self) -> int:
        """How many tokens all prompts begin with, at least one of each left over."""
        return shared_length(self.examples)

    def batches_of(self, places: Iterable[int], batch_size: int | None = None) -> list[Batch]:
        """Some of the examples, batched like `batches`; `batch_size` in place of the scorer's own if given."""
        groups = self._group(places, batch_size or self._batch_size, self._batch_tokens)
        return [self._batch(indices) for indices in groups]

    def prompt_batch(self, places: Sequence[int]) -> Batch:
        """Some of the examples as one batch of their prompts alone: what generation starts from."""
        return self._joined(list(places), [((),)] * len(places))

    def scores(self, batch: Batch) -> Tensor:
        """Log-probability of each label given that the answer is one of the example's labels: float32 [n, C].

        Each row is `log_probabilities`, with scoring `mean` divided by the labels' numbers of tokens, less a constant
        of that row: exp of it sums to 1 over the example's labels. -inf beyond an example's own number of labels. Of a task with a continuation: its mean
        log-probability per token, [n, 1]. Differentiable when gradients are enabled.
        """
        if self.task.continuation:
            return self.continuations(batch).log_probability[:, None]
        if not self._single_tokens:
            found = self.log_probabilities(batch)
            if self.task.scoring == "mean":
                found = found / self._label_lengths(batch).to(found)
            return torch.log_softmax(found, dim=-1)
        with _output_layer_rows(self.model, self._label_ids) as restricted:
            logits = self._logits(batch, positions=1)[:, -1]
        row_of = {token: row for row, token in enumerate(self._label_ids)} if restricted else None
        return torch.log_softmax(_label_columns(logits, batch, self.num_labels, row_of), dim=-1)

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Log-probability of each label after the prompt, summed over its tokens: float32 [n, C]. With scoring
        `first-token` a label is its first token alone.

        Normalised over the whole vocabulary. -inf beyond an example's own number of labels. Differentiable
        when gradients are enabled.
        """
        positions = max(len(tokens) for example in batch.examples for tokens in example.labels)
        logits = self._logits(batch, positions)
        normalizer = torch.logsumexp(logits, dim=-1)
        # For each token of each label: a sequence that reads what precedes it, the position there, the id.
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

    def _label_lengths(self, batch: Batch) -> Tensor:
        """Tokens of each label, [n, C]; 1 beyond an example's own labels."""
        lengths = [[len(tokens) for tokens in example.labels] for example in batch.examples]
        return torch.tensor([row + [1] * (self.num_labels - len(row)) for row in lengths])

    def continuations(self, batch: Batch) -> Continuations:
        """How the model finds the gold continuations: log-probability, exactness, entropy, each [n]."""
        gold = [example.labels[0] for example in batch.examples]
        longest = max(map(len, gold))
        # Left padding: the last token read is the last but one of the continuation, in every row.
        log_probabilities = torch.log_softmax(self._logits(batch, longest), dim=-1)
        device = log_probabilities.device
        ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in gold], device=device)
        real = torch.tensor([[k >= longest - len(one) for k in range(longest)] for one in gold], device=device)
        lengths = real.sum(dim=-1)
        chosen = log_probabilities.gather(-1, ids[:, :, None]).squeeze(-1).masked_fill(~real, 0.0)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).masked_fill(~real, 0.0)
        exact = ((log_probabilities.argmax(dim=-1) == ids) | ~real).all(dim=-1)
        return Continuations(chosen.sum(dim=-1) / lengths, exact, entropy.sum(dim=-1) / lengths)

    def gather(self, per_batch: Sequence[Tensor]) -> Tensor:
        """One tensor [n, …] for each of `batches`, in their order -> one [N, …] in the examples' order."""
        indices = torch.cat([batch.indices for batch in self.batches])
        joined = torch.cat(list(per_batch))
        return joined[torch.argsort(indices).to(joined.device)]

    def _group(self, places: Iterable[int], batch_size: int, batch_tokens: int | None) -> Iterator[list[int]]:
        """Places of the examples of each batch, in the examples' order of length."""
        group: list[int] = []
        sequences = 0
        for index in sorted(places, key=lambda i: self.examples[i].longest):
            added = len(self.examples[index].beginnings)
            # The longest comes last, so it sets the padded length.
            tokens = (sequences + added) * (self.examples[index].longest - self.tokens_read_once)
            if group and (sequences + added > batch_size or (batch_tokens is not None and tokens > batch_tokens)):
                yield group
                group, sequences = [], 0
            group.append(index)
            sequences += added
        if group:
            yield group

    def _batch(self, indices: list[int]) -> Batch:
        return self._joined(indices, [tuple(self.examples[index].beginnings) for index in indices])

    def _joined(self, indices: list[int], followed_by: Sequence[tuple[Tokens, ...]]) -> Batch:
        """One batch in which each example's prompt stands once before each of the token runs given for it."""
        examples = tuple(self.examples[index] for index in indices)
        sequences: list[Tokens] = []
        rows = []
        for example, beginnings in zip(examples, followed_by, strict=True):
            rows.append((len(sequences), beginnings))
            sequences.extend(example.prompt + beginning for beginning in beginnings)
        length = max(map(len, sequences))
        ids = torch.tensor([(self._padding,) * (length - len(s)) + s for s in sequences])
        mask = torch.tensor([(0,) * (length - len(s)) + (1,) * len(s) for s in sequences])
        return Batch(
            indices=torch.tensor(indices),
            labels=self.labels[indices],
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=-1) - 1).clamp_min(0),
            examples=examples,
            rows=tuple(rows),
        )

    def _logits(self, batch: Batch, positions: int) -> Tensor:
        """Logits at the last `positions` positions of each sequence: float32 (float64 of a float64 model)
        [S, positions, rows of the output layer]."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if "position_ids" in self._forward_arguments:
            inputs["position_ids"] = batch.position_ids
        prefix = self.prefix
        if prefix is not None:
            inputs = prefix.rest_of(inputs)
        device = input_device(self.model)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        options: dict[str, Any] = {}
        if "use_cache" in self._forward_arguments:
            options["use_cache"] = False
        if "logits_to_keep" in self._forward_arguments:
            options["logits_to_keep"] = positions

        def forward(tensors: Mapping[str, Any]) -> Tensor:
            logits: Tensor = self.model(**{**options, **tensors}).logits[:, -positions:]
            return logits.to(torch.promote_types(logits.dtype, torch.float32))

        def whole(tensors: Mapping[str, Tensor]) -> Tensor:
            return forward(tensors if prefix is None else prefix.before(tensors, prefix.read()))

        read_first = 0 if prefix is None else prefix.length
        if self.recorded is not None and self.recorded.takes(inputs["input_ids"], batch.copies, read_first):
            kind = (id(self), positions, read_first)
            replayed = self.recorded.logits(inputs, whole, kind, batch.copies)
            if replayed is not None:
                return replayed
        return forward(inputs if prefix is None else prefix.before(inputs, prefix.kept()))


class _LabelRows(nn.Module):
    """An output layer cut down to the given rows: hidden states [..., d] -> float32 logits [..., len(rows)].

    Computed in float32 (or better) whatever the layer's type: a bfloat16 logit near 20 is only known to 1/16,
    so labels would tie, and so few rows cost nothing.
    """

    def __init__(self, layer: nn.Linear, rows: list[int]) -> None:
        super().__init__()
        index = torch.tensor(rows, device=layer.weight.device)
        # Plain attributes, not parameters: whatever gradient the layer's own weight takes still reaches it.
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.weight = whole_rows(layer.weight, index, layer.out_features).to(dtype)
        self.bias = None if layer.bias is None else whole_rows(layer.bias, index, layer.out_features).to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.weight), self.weight, self.bias)


@contextmanager
def _output_layer_rows(model: nn.Module, rows: list[int]) -> Iterator[bool]:
    """Within it the model computes only these rows of its logits; its own scaling or soft-capping of logits
    still applies, since it comes after the output layer. Yields False, and changes nothing, when the output
    layer is no plain nn.Linear with its weights at hand (adapters, quantised or offloaded layers)."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    place = next((name for name, module in model.named_modules() if module is layer), None)
    if type(layer) is not nn.Linear or not place or layer.weight.is_meta:
        yield False
        return
    parent_name, _, attribute = place.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, attribute, _LabelRows(layer, rows))
    try:
        yield True
    finally:
        setattr(parent, attribute, layer)


def _label_columns(logits: Tensor, batch: Batch, columns: int, row_of: dict[int, int] | None) -> Tensor:
    """Logits [n, rows] of single-token labels -> [n, columns] in each example's order, -inf beyond."""
    ids = [[tokens[0] for tokens in example.labels] for example in batch.examples]
    if row_of is not None:
        ids = [[row_of[token] for token in tokens] for tokens in ids]
    index = torch.tensor([row + [0] * (columns - len(row)) for row in ids], device=logits.device)
    absent = torch.tensor([[c >= len(row) for c in range(columns)] for row in ids], device=logits.device)
    return logits.gather(1, index).masked_fill(absent, -torch.inf)


def _context(model: nn.Module) -> int | None:
    """How many tokens the model can read, None where its config does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def forward_arguments(model: Any) -> set[str]:
    """The names of the arguments of the model's forward; of the model within, where an adapter wraps it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)
