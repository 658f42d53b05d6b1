"""Prompts and labels as token ids: special tokens, chat templates, and what is cut where the context is too short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zerotuning.errors import ZeroTuningError
from zerotuning.tasks.examples import Record
from zerotuning.tasks.prompts import Prompt
from zerotuning.tasks.task import Task

Tokens = tuple[int, ...]

#: Tokens that a written answer may take beyond the longest label's: space before it, another spelling of it.
SPARE_TOKENS = 4


@dataclass(frozen=True)
class TokenizedPrompt:
    """One example as token ids: its prompt, and for each of its labels the tokens that follow the prompt."""

    prompt: Tokens
    labels: tuple[Tokens, ...]
    label: int
    origin: str

    @property
    def beginnings(self) -> list[Tokens]:
        """What the model must read after the prompt to score every label: the labels without their last
        tokens, less those that another one starts with. One empty beginning when all labels are single
        tokens."""
        beginnings = list(dict.fromkeys(tokens[:-1] for tokens in self.labels))
        return [one for one in beginnings if not any(other != one and other[: len(one)] == one for other in beginnings)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model reads for this example."""
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
    """The examples as token ids: what LabelScorer, which documents the arguments, works with.

    context   tokens that the model can read of prompt and label (or what it writes in the label's place); None: any
    """
    if not records:
        raise ZeroTuningError(f"task {task.name!r} was given no examples")
    prompts = [task.render(record, require_label=require_labels) for record in records]
    origins = [record.origin for record in records]
    reader = _Reader(tokenizer, task)
    examples = list(reader.read(prompts, origins))
    if context is None:
        return examples
    for place, example in enumerate(examples):
        if reader.needed(example) <= context:
            continue
        shorter = reader.shortened(prompts[place], example.origin, context) if truncate else None
        if shorter is None:
            raise ZeroTuningError(
                f"{example.origin}: prompt and label take {reader.needed(example)} tokens,"
                f" more than the model's context of {context}"
            )
        examples[place] = shorter
    return examples


def shared_length(examples: Sequence[TokenizedPrompt]) -> int:
    """How many tokens all prompts begin with, at least one of each left over."""
    shortest = min(len(example.prompt) for example in examples) - 1
    first = examples[0].prompt
    for place in range(shortest):
        if any(example.prompt[place] != first[place] for example in examples):
            return place
    return shortest


class _Reader:
    """Turns prompts of one task into tokens."""

    def __init__(self, tokenizer: Any, task: Task) -> None:
        self._tokenizer, self._task = tokenizer, task
        self._alone = _LabelsAlone(tokenizer)
        # A chat template writes the special tokens into its text, all of them.
        self._appended = 0 if task.chat else tokens_after_text(tokenizer)

    def needed(self, example: TokenizedPrompt) -> int:
        """Tokens of the longest sequence that the model reads for an example."""
        spare = SPARE_TOKENS if self._task.scoring == "generate" else 0
        return example.longest + spare

    def read(self, prompts: Sequence[Prompt], origins: Sequence[str]) -> Iterator[TokenizedPrompt]:
        beginnings = [chat_text(self._tokenizer, prompt) if prompt.chat else prompt.text for prompt in prompts]
        texts = [
            text + label for prompt, text in zip(prompts, beginnings, strict=True) for label in ("", *prompt.labels)
        ]
        ids = self._tokenizer(texts, add_special_tokens=not self._task.chat)["input_ids"]
        tokens = iter([tuple(one[: len(one) - self._appended]) for one in ids])
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
        """The prompt with as few shots and characters gone as makes it fit; None where nothing does."""

        def fitting(changed: Prompt) -> TokenizedPrompt | None:
            (found,) = self.read([changed], [origin])
            return found if self.needed(found) <= context else None

        for gone in range(1, len(prompt.shots) + 1):
            found = fitting(replace(prompt, shots=prompt.shots[gone:]))
            if found is not None:
                return found
        alone = replace(prompt, shots=())
        # By halving the characters to cut; at least one stays.
        fits, low, high = None, 1, len(prompt.own) - 1
        while low <= high:
            middle = (low + high) // 2
            found = fitting(replace(alone, own=prompt.own[middle:]))
            if found is None:
                low = middle + 1
            else:
                fits, high = found, middle - 1
        return fits

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
    """A written answer is compared with labels whatever its case and the space around it."""
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

    Templates that let a model think first (Qwen3's) are asked not to: a label must be able to follow at once.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ZeroTuningError(f"chat needs a tokenizer with a chat template, {name} has none")
    try:
        text = tokenizer.apply_chat_template(
            prompt.messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # a template is a program of its own, that raises what it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ZeroTuningError(f"the chat template of {name} refuses the prompt: {reason}") from error
    assert isinstance(text, str)
    return text


def tokens_after_text(tokenizer: Any) -> int:
    """How many tokens the tokenizer appends to a text, such as an end-of-text token: no label may follow."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for before in range(len(whole) - len(plain) + 1):
        if plain and whole[before : before + len(plain)] == plain:
            return len(whole) - before - len(plain)
    return 0


class _LabelsAlone:
    """Tokens of labels by themselves, without special tokens, each worked out once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, Tokens] = {}

    def __getitem__(self, label: str) -> Tokens:
        if label not in self._known:
            self._known[label] = tuple(self._tokenizer(label, add_special_tokens=False)["input_ids"])
        return self._known[label]


def _label_tokens(prompt: Tokens, both: Tokens, alone: _LabelsAlone, label: str) -> Tokens:
    """The tokens of `label` after the prompt.

    Prompt and label are tokenised as one text, since that is what the model was trained on, and the label is
    what comes after the prompt's tokens. Where the tokenizer merges across the border ("Answer: " + "A" has
    one token " A"), the prompt's tokens no longer begin the text's, and the label is tokenised alone: the
    prompt must be the same for all labels.
    """
    if both[: len(prompt)] == prompt and len(both) > len(prompt):
        return both[len(prompt) :]
    return alone[label]
