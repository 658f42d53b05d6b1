"""How a dialogue becomes the text that a model continues: by the tokenizer's chat template, or plainly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Without a chat template: "User: …\n\nAssistant: …\n\nUser: …\n\nAssistant:".
USER, ASSISTANT, BREAK = "User:", "Assistant:", "\n\n"


class Conversation:
    """Prompts of one tokenizer.

    With a chat template the prompt is the template's text, special tokens included, up to where the assistant speaks. Without
    one it is plain text, "User:" and "Assistant:" in front of the turns and an empty line between, after the tokenizer's
    own special tokens; an answer then ends where the model writes a "User:" of its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.templated = bool(getattr(tokenizer, "chat_template", None))

    def prompt(self, questions: Sequence[str], answers: Sequence[str]) -> str:
        """The text before the next answer: questions 1 to n and answers 1 to n − 1."""
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
        """Token ids of a prompt; a template brings its own special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self.templated)["input_ids"]
        return ids

    def answer_tokens(self, answer: str) -> list[int]:
        """Token ids of an answer as it follows its prompt."""
        text = answer if self.templated else f" {answer}"
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def answer(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens and surrounding space."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        if not self.templated:
            text = text.split(f"{BREAK}{USER}", 1)[0]
        return text.strip()
