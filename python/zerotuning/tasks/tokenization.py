"""Prompts and labels as token ids: special tokens, chat templates, and prompts shortened to the model's context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import Record
from zerotuning.tasks.prompts import Prompt
from zerotuning.tasks.task import Task

Tokens = tuple[int, ...]

#: Number of tokens that a generated answer may have beyond the longest label: space, or another tokenization.
SPARE_TOKENS = 4


@dataclass(frozen=True)
class TokenizedPrompt:
    """One example as token ids.

    Attributes:
        prompt: The prompt's tokens.
        labels: For each label the tokens that follow the prompt.
        label: The index of the gold label, -1 where the example has none.
        origin: The name of the example in error messages.
    """

    prompt: Tokens
    labels: tuple[Tokens, ...]
    label: int
    origin: str

    @property
    def beginnings(self) -> list[Tokens]:
        """The token runs that the model must read after the prompt to score every label.

        The runs are the labels without their last tokens, less every run that begins another run. With single-token
        labels only, the result is one empty run.
        """
        runs = list(dict.fromkeys(tokens[:-1] for tokens in self.labels))
        return [run for run in runs if not any(other != run and other[: len(run)] == run for other in runs)]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence that the model reads for this example."""
        return len(self.prompt) + max(len(tokens) for tokens in self.labels) - 1


def tokenize(
    tokenizer: Any,
    task: Task,
    records: Sequence[Record],
    *,
    require_labels: bool = True,
    context: int | None = None,
    truncate: bool = False,
) -> list[TokenizedPrompt]:
    """The examples as token ids.

    Args:
        tokenizer: The model's tokenizer.
        task: Supplies prompts and labels.
        records: The examples, at least one.
        require_labels: Whether an example without its label is an error.
        context: The most tokens of prompt and label (or of prompt and generated answer); None for no limit.
        truncate: Shorten a prompt that is longer than `context`, as LabelScorer describes.

    Raises:
        ZeroTuningError: There are no examples; a record is bad; the tokenizer cannot distinguish two labels; a chat has
            no template; prompt and label are longer than `context`. The error names the example.
    """
    if not records:
        raise ZeroTuningError(f"task {task.name!r} was given no examples")
    prompts = [task.render(record, require_label=require_labels) for record in records]
    origins = [record.origin for record in records]
    prompt_tokenizer = _PromptTokenizer(tokenizer, task)
    examples = list(prompt_tokenizer.tokenize(prompts, origins))
    if context is None:
        return examples
    for place, example in enumerate(examples):
        if prompt_tokenizer.tokens_needed(example) <= context:
            continue
        shorter = prompt_tokenizer.shortened(prompts[place], example.origin, context) if truncate else None
        if shorter is None:
            raise ZeroTuningError(
                f"{example.origin}: prompt and label have {prompt_tokenizer.tokens_needed(example)} tokens,"
                f" more than the model's context of {context}"
            )
        examples[place] = shorter
    return examples


def shared_length(examples: Sequence[TokenizedPrompt]) -> int:
    """Number of tokens that all prompts begin with; at least one more token of each prompt follows."""
    shortest = min(len(example.prompt) for example in examples) - 1
    first = examples[0].prompt
    for place in range(shortest):
        if any(example.prompt[place] != first[place] for example in examples):
            return place
    return shortest


class _PromptTokenizer:
    """Tokenizes the prompts of one task."""

    def __init__(self, tokenizer: Any, task: Task) -> None:
        self._tokenizer, self._task = tokenizer, task
        self._alone = _LabelsWithoutPrompt(tokenizer)
        # The text of a chat template contains all special tokens already.
        self._num_appended = 0 if task.chat else tokens_after_text(tokenizer)

    def tokens_needed(self, example: TokenizedPrompt) -> int:
        """Tokens of the longest sequence that the model reads or generates for an example."""
        spare = SPARE_TOKENS if self._task.scoring == "generate" else 0
        return example.longest + spare

    def tokenize(self, prompts: Sequence[Prompt], origins: Sequence[str]) -> Iterator[TokenizedPrompt]:
        """The prompts as token ids; `origins` names the prompts in error messages."""
        before_label = [chat_text(self._tokenizer, prompt) if prompt.chat else prompt.text for prompt in prompts]
        texts = [
            text + label for prompt, text in zip(prompts, before_label, strict=True) for label in ("", *prompt.labels)
        ]
        ids = self._tokenizer(texts, add_special_tokens=not self._task.chat)["input_ids"]
        tokens = iter([tuple(one[: len(one) - self._num_appended]) for one in ids])
        for prompt, origin in zip(prompts, origins, strict=True):
            prompt_tokens = next(tokens)
            joined = [next(tokens) for _ in prompt.labels]
            if not prompt_tokens:
                raise ZeroTuningError(f"{origin}: the prompt has no tokens, got {prompt.text!r}")
            labels = tuple(
                _label_tokens(prompt_tokens, both, self._alone, label)
                for label, both in zip(prompt.labels, joined, strict=True)
            )
            if self._task.scoring == "first-token":
                labels = tuple(one[:1] for one in labels)
            if self._task.scoring == "generate":
                _check_texts_differ(prompt, origin)
            else:
                self._check_labels_differ(prompt, labels, origin)
            yield TokenizedPrompt(prompt_tokens, labels, -1 if prompt.label is None else prompt.label, origin)

    def shortened(self, prompt: Prompt, origin: str, context: int) -> TokenizedPrompt | None:
        """The prompt that fits the context with the fewest shots and characters removed; None where no prompt fits."""

        def tokenized_if_short(changed: Prompt) -> TokenizedPrompt | None:
            (tokenized,) = self.tokenize([changed], [origin])
            return tokenized if self.tokens_needed(tokenized) <= context else None

        for removed in range(1, len(prompt.shots) + 1):
            tokenized = tokenized_if_short(replace(prompt, shots=prompt.shots[removed:]))
            if tokenized is not None:
                return tokenized
        alone = replace(prompt, shots=())
        # Bisection of the number of characters to cut; at least one character stays.
        longest, low, high = None, 1, len(prompt.own) - 1
        while low <= high:
            middle = (low + high) // 2
            tokenized = tokenized_if_short(replace(alone, own=prompt.own[middle:]))
            if tokenized is None:
                low = middle + 1
            else:
                longest, high = tokenized, middle - 1
        return longest

    def _check_labels_differ(self, prompt: Prompt, labels: tuple[Tokens, ...], origin: str) -> None:
        seen: dict[Tokens, str] = {}
        for text, tokens in zip(prompt.labels, labels, strict=True):
            if not tokens:
                raise ZeroTuningError(f"{origin}: the tokenizer gives no token for label {text!r}")
            if tokens in seen and self._task.scoring == "first-token":
                raise ZeroTuningError(
                    f"{origin}: labels {seen[tokens]!r} and {text!r} begin with the same token ({tokens[0]}):"
                    " scoring first-token cannot tell them apart"
                )
            if tokens in seen:
                raise ZeroTuningError(
                    f"{origin}: the tokenizer cannot tell labels {seen[tokens]!r} and {text!r} apart:"
                    f" both are tokens {list(tokens)}"
                )
            seen[tokens] = text


def _check_texts_differ(prompt: Prompt, origin: str) -> None:
    """Raise an error for labels that are equal up to case and surrounding space, as generated answers are compared."""
    seen: dict[str, str] = {}
    for label in prompt.labels:
        other = seen.setdefault(label.strip().casefold(), label)
        if other != label:
            raise ZeroTuningError(
                f"{origin}: labels {other!r} and {label!r} differ by case or surrounding space only:"
                " scoring generate cannot tell them apart"
            )


def chat_text(tokenizer: Any, prompt: Prompt) -> str:
    """The prompt's turns in the tokenizer's chat template, up to where the model's answer begins.

    Thinking before the answer, which some templates allow (Qwen3's), is disabled: the label must follow at once.

    Raises:
        ZeroTuningError: The tokenizer has no chat template, or its template refuses the prompt.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ZeroTuningError(f"chat needs a tokenizer with a chat template, {name} has none")
    try:
        text = tokenizer.apply_chat_template(
            prompt.messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # a template is a program, which may raise any error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ZeroTuningError(f"the chat template of {name} refuses the prompt: {reason}") from error
    assert isinstance(text, str)
    return text


def tokens_after_text(tokenizer: Any) -> int:
    """Number of tokens that the tokenizer appends to a text, such as an end-of-text token; no label may follow."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for before in range(len(whole) - len(plain) + 1):
        if plain and whole[before : before + len(plain)] == plain:
            return len(whole) - before - len(plain)
    return 0


class _LabelsWithoutPrompt:
    """Tokens of labels by themselves, without special tokens, each label tokenized once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens_of: dict[str, Tokens] = {}

    def __getitem__(self, label: str) -> Tokens:
        if label not in self._tokens_of:
            self._tokens_of[label] = tuple(self._tokenizer(label, add_special_tokens=False)["input_ids"])
        return self._tokens_of[label]


def _label_tokens(prompt: Tokens, both: Tokens, alone: _LabelsWithoutPrompt, label: str) -> Tokens:
    """The tokens of `label` after the prompt.

    Prompt and label are tokenized as one text, as in the model's training data, and the label's tokens are the tokens
    after the prompt's. Where the tokenizer merges across the border ("Answer: " + "A" has one token " A"), the text's
    tokens do not begin with the prompt's. The label is then tokenized alone: all labels need the same prompt.
    """
    if both[: len(prompt)] == prompt and len(both) > len(prompt):
        return both[len(prompt) :]
    return alone[label]
