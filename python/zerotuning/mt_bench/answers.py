"""Answers to MT-Bench's questions, both turns, generated into a file in FastChat's format that can be resumed."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zerotuning.errors import ZeroTuningError
from zerotuning.evaluation.generation import generate_tokens
from zerotuning.files import write_json_lines_atomically
from zerotuning.mt_bench.conversation import Conversation, tokens_left
from zerotuning.mt_bench.questions import TURNS, Answer, Question, load_questions, parse_answers
from zerotuning.output import check_result_file
from zerotuning.patching.head_scales import HeadScales
from zerotuning.tasks.examples import read_examples


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded: greedily at temperature 0, else by sampling.

    Attributes:
        temperature: Divides the logits.
        top_p: Nucleus sampling: only the likeliest tokens that together have this probability, in (0, 1].
        top_k: Only that many of the likeliest tokens; 0: all.
        seed: Of the sampling; the same seed and batch size give the same answers on the same machine.
        max_new_tokens: The most tokens of each turn's answer.
        batch_size: Questions that are answered together.

    Raises:
        ZeroTuningError: A value is outside its range, or top_p or top_k are given for greedy decoding.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_new_tokens: int = 1024
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ZeroTuningError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ZeroTuningError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0 or self.max_new_tokens < 1 or self.batch_size < 1:
            raise ZeroTuningError(
                f"top_k must be at least 0, max_new_tokens and batch_size at least 1,"
                f" got {self.top_k}, {self.max_new_tokens}, {self.batch_size}"
            )
        if not self.sampling and (self.top_p < 1 or self.top_k > 0):
            raise ZeroTuningError("top_p and top_k restrict sampling: they need a temperature above 0")

    @property
    def sampling(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature > 0

    def settings(self) -> dict[str, Any]:
        """The settings that change answers: without sampling neither the seed nor the batch size."""
        settings = asdict(self)
        if not self.sampling:
            settings = {name: settings[name] for name in ("temperature", "max_new_tokens")}
        return settings

    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`; None overrides the value in the model's generation_config."""
        if not self.sampling:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


class AnswerFile:
    """A file of answers that is rewritten as a whole after every batch; each line has the settings of its answers.

    Args:
        path: The file. If it has answers to some of the questions with the same settings, the other questions are
            added.
        settings: Of the answers, by name.
        questions: The questions to answer.
        overwrite: Start with no answers, whatever the file holds.

    Raises:
        ZeroTuningError: The file holds answers with other settings, answers to all questions, or something else; or the
            file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        questions: Sequence[Question],
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = check_result_file(path)
        self.settings = dict(settings)
        self.questions = list(questions)
        self.answers: dict[int, Mapping[str, Any]] = {}
        if self.path.exists() and not overwrite:
            self._resume(parse_answers(read_examples(self.path)))

    def _resume(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            saved_settings = answer.record.get("settings")
            if not isinstance(saved_settings, dict):
                raise ZeroTuningError(f"output {self.path} was not written by this command; choose another file")
            for name, value in self.settings.items():
                if saved_settings.get(name) != value:
                    raise ZeroTuningError(
                        f"output {self.path} holds answers with another {name}: {saved_settings.get(name)!r}, "
                        f"not {value!r}; run that command again, choose another file or overwrite it"
                    )
        self.answers = {answer.question.question_id: answer.record for answer in answers}
        if not self.missing:
            raise ZeroTuningError(
                f"output {self.path} already holds {len(answers)} answers, all that were requested:"
                " choose another file or overwrite it"
            )

    @property
    def missing(self) -> list[Question]:
        """The questions without an answer."""
        return [question for question in self.questions if question.question_id not in self.answers]

    def add(self, model_id: str, turns: Mapping[int, Sequence[str]]) -> None:
        """Add answers, both turns by question id, and rewrite the file."""
        for number, texts in turns.items():
            self.answers[number] = {
                "question_id": number,
                "answer_id": uuid.uuid4().hex,
                "model_id": model_id,
                "choices": [{"index": 0, "turns": list(texts)}],
                "tstamp": time.time(),
                "settings": self.settings,
            }
        write_json_lines_atomically(self.path, [self.answers[number] for number in sorted(self.answers)])


def answer_settings(
    model_name: str, model_id: str, scales: HeadScales | None, dtype: str | None, decoding: Decoding
) -> dict[str, Any]:
    """The settings in a line of an answer file; head scales are named by their SHA-256."""
    gamma = None if scales is None else hashlib.sha256(scales.gamma.numpy().tobytes()).hexdigest()
    return {"model": model_name, "model_id": model_id, "scales": gamma, "dtype": dtype, **decoding.settings()}


def answer_questions(
    model: Any, tokenizer: Any, file: AnswerFile, decoding: Decoding, *, progress: bool = False
) -> Path:
    """Generate both turns of every question that the file lacks, batch by batch.

    An answer ends with the model's end-of-turn token, after max_new_tokens, or at the end of the model's context.

    Args:
        model: A transformers causal language model as it stands, scaled or not.
        tokenizer: Its tokenizer.
        file: Receives the answers.
        decoding: How tokens are chosen.
        progress: Draw a bar on stderr, if stderr is a terminal.

    Returns:
        The file's path.

    Raises:
        ZeroTuningError: A prompt leaves no room in the model's context; the answers so far stay in the file.
    """
    no_bar = not (progress and sys.stderr.isatty())
    missing = {question.question_id for question in file.missing}
    with tqdm(total=len(missing), desc="MT-Bench", unit=" questions", disable=no_bar, leave=False) as bar:
        for batch in _batches(load_questions(), decoding.batch_size):
            chosen = [question for question in batch if question.question_id in missing]
            if chosen:
                file.add(file.settings["model_id"], _both_turns(model, tokenizer, chosen, decoding))
                bar.update(len(chosen))
    return file.path


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    """Yield the same groups in every run: a resumed run then samples the same tokens as an uninterrupted run."""
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def _both_turns(
    model: Any, tokenizer: Any, questions: Sequence[Question], decoding: Decoding
) -> dict[int, tuple[str, ...]]:
    conversation = Conversation(tokenizer)
    answered: list[tuple[str, ...]] = [() for _ in questions]
    for turn in range(TURNS):
        prompts = []
        for question, answers in zip(questions, answered, strict=True):
            text = conversation.prompt(question.turns[: turn + 1], answers)
            prompts.append(conversation.prompt_tokens(text))
        limits = [
            _token_limit(model, prompt, decoding, question, turn)
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        tokens: dict[int, list[int]] = {}
        for group in _groups_of_one_limit(limits, decoding.max_new_tokens):
            with _seeded(model, f"{decoding.seed}, {questions[group[0]].question_id}, {turn}"):
                ids = _generate(model, tokenizer, [prompts[i] for i in group], limits[group[0]], decoding)
            tokens.update(zip(group, ids, strict=True))
        answered = [(*answers, conversation.answer(tokens[index])) for index, answers in enumerate(answered)]
    return {question.question_id: answers for question, answers in zip(questions, answered, strict=True)}


def _token_limit(model: Any, prompt: Sequence[int], decoding: Decoding, question: Question, turn: int) -> int:
    """Return how many tokens may follow the prompt."""
    left = tokens_left(model, prompt, f"question {question.question_id}, turn {turn + 1}")
    return decoding.max_new_tokens if left is None else min(decoding.max_new_tokens, left)


def _groups_of_one_limit(limits: Sequence[int], full: int) -> list[list[int]]:
    """Return the batch indices that are generated together: those with the full limit; each of the others alone."""
    together = [index for index, limit in enumerate(limits) if limit == full]
    return ([together] if together else []) + [[index] for index, limit in enumerate(limits) if limit < full]


@contextmanager
def _seeded(model: Any, source: str) -> Iterator[None]:
    """Within the context torch's generators start from the source's hash; afterwards they continue as before."""
    seed = int.from_bytes(hashlib.sha256(source.encode()).digest()[:7], "big")
    devices = sorted({weight.device for weight in model.parameters() if weight.is_cuda}, key=str)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, decoding: Decoding
) -> list[list[int]]:
    """The tokens that follow each prompt, up to the end-of-turn token, which is left out."""
    tokens = generate_tokens(model, tokenizer, prompts, max_new_tokens, **decoding.arguments())
    ends = _end_tokens(model, tokenizer)
    return [_cut_at(row, ends) for row in tokens.tolist()]


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    of_model = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return {end for end in (*of_model, tokenizer.eos_token_id) if end is not None}


def _cut_at(ids: Sequence[int], ends: set[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in ends:
            return list(ids[:place])
    return list(ids)
