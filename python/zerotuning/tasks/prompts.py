"""What a model reads before a label: solved examples (shots), then the example's own prompt; as text or as a chat."""

from __future__ import annotations

from dataclasses import dataclass

#: How a label is scored: by the log-probability of all its tokens, of its tokens on average, of its first token, or by
#: whether the text that the model writes begins with it.
SCORINGS = ("sum", "mean", "first-token", "generate")
#: Solved examples that may stand before a prompt.
MOST_SHOTS = 16
#: Between a solved example and what follows it.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Shot:
    """A solved example: its prompt, and the label or continuation that answers it, both as its task writes them."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """An example made ready for a model.

    own      the example's own prompt
    labels   what may follow; of a task with a continuation that is the only one
    label    the index of the right one, None where the example has none
    shots    solved examples that stand before it
    chat     whether a chat template turns it into text: `own` is the user's last turn, shots are earlier turns
    """

    own: str
    labels: tuple[str, ...]
    label: int | None
    shots: tuple[Shot, ...] = ()
    chat: bool = False

    @property
    def text(self) -> str:
        """All that stands before the label; of a chat the last user turn, as only a tokenizer can write the rest."""
        if self.chat:
            return self.own
        return "".join(shot.prompt + shot.answer + SEPARATOR for shot in self.shots) + self.own

    @property
    def messages(self) -> list[dict[str, str]]:
        """A chat's turns, as chat templates take them."""
        turns = []
        for shot in self.shots:
            turns.append({"role": "user", "content": shot.prompt})
            turns.append({"role": "assistant", "content": shot.answer.strip()})
        return [*turns, {"role": "user", "content": self.own}]
