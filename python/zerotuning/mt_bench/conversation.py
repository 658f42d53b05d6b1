"""The text of a dialogue that a model continues: by the tokenizer's chat template, or plain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zerotuning.errors import ZeroTuningError
from zerotuning.models.inspection import context_length

#: Without a chat template: "User: …\n\nAssistant: …\n\nUser: …\n\nAssistant:".
USER, ASSISTANT, BREAK = "User:", "Assistant:", "\n\n"


class Conversation:
    """Prompts and answers of one tokenizer.

    With a chat template the prompt is the template's text, special tokens included, up to the assistant's next turn.
    Without a chat template the prompt is plain text after the tokenizer's special tokens: "User:" or "Assistant:"
    before each turn and an empty line between turns. An answer then ends where the model itself writes "User:".

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.templated = bool(getattr(tokenizer, "chat_template", None))

    def prompt(self, questions: Sequence[str], answers: Sequence[str]) -> str:
        """The text before the next answer.

        Args:
            questions: The user's turns, 1 to n.
            answers: The assistant's turns, 1 to n − 1.
        """
        if self.templated:
            messages = []
            for index, question in enumerate(questions):
                messages.append({"role": "user", "content": question})
                messages += [{"role": "assistant", "content": answer} for answer in answers[index : index + 1]]
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return text
        parts = []
        for index, question in enumerate(questions):
            parts.append(f"{USER} {question}")
            parts.append(ASSISTANT if index >= len(answers) else f"{ASSISTANT} {answers[index]}")
        return BREAK.join(parts)

    def prompt_tokens(self, text: str) -> list[int]:
        """Token ids of a prompt; a chat template's text already has its special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self.templated)["input_ids"]
        return ids

    def answer_tokens(self, answer: str) -> list[int]:
        """Token ids of an answer as it stands behind its prompt."""
        text = answer if self.templated else f" {answer}"
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def answer(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens and surrounding space."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        if not self.templated:
            text = text.split(f"{BREAK}{USER}", 1)[0]
        return text.strip()


def tokens_left(model: Any, prompt: Sequence[int], place: str) -> int | None:
    """How many tokens the model's context leaves after a prompt; None for a model without a limit.

    Args:
        model: A transformers model.
        prompt: Token ids.
        place: What the prompt is of, such as "question 81, turn 1", for the error.

    Raises:
        ZeroTuningError: The prompt leaves no token.
    """
    context = context_length(model)
    if context is None:
        return None
    if len(prompt) >= context:
        raise ZeroTuningError(
            f"{place}: the prompt has {len(prompt)} tokens, which leaves no room in the model's context of {context};"
            " answers made with a smaller max_new_tokens shorten the prompt"
        )
    return context - len(prompt)
