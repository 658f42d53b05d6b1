"""MT-Bench's answers generated, both turns, into a file in FastChat's format that grows and resumes."""

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
from zerotuning.files import write_json_lines_atomically
from zerotuning.models.device_maps import input_device
from zerotuning.mt_bench.conversation import Conversation
from zerotuning.mt_bench.questions import TURNS, Answer, Question, load_questions, parse_answers
from zerotuning.output import check_result_file
from zerotuning.patching.head_scales import HeadScales
from zerotuning.tasks.examples import read_examples


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: greedily at temperature 0, else sampled.

    temperature      divides the logits
    top_p            nucleus: the likeliest tokens that together have this probability, in (0, 1]
    top_k            the so many likeliest tokens; 0: all
    seed             of the draws; the same seed and batch size give the same answers on the same machine
    max_new_tokens   of each turn
    batch_size       questions answered together
    Errors: ZeroTuningError for a value outside its range, top_p or top_k with greedy decoding.
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
            raise ZeroTuningError("top_p and top_k choose among sampled tokens: they need a temperature above 0")

    @property
    def sampling(self) -> bool:
        return self.temperature > 0

    def settings(self) -> dict[str, Any]:
        """What makes answers others: without sampling, neither seed nor batch size."""
        found = asdict(self)
        if not self.sampling:
            found = {name: found[name] for name in ("temperature", "max_new_tokens")}
        return found

    def arguments(self) -> dict[str, Any]:
        """For transformers' `generate`; None puts out what a model's own generation_config says."""
        if not self.sampling:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


class AnswerFile:
    """A file of answers that is written anew, whole, after every batch; lines carry the settings they were made with.

    Args:
        path: the file; unfinished with the same settings, it is gone on with.
        settings: what must be equal for that.
        questions: those to be answered.
        overwrite: start anew whatever the file holds.

    Raises:
        ZeroTuningError: answers of other settings or another kind of file; all questions answered; no place to write.
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
            self._continue(parse_answers(read_examples(self.path)))

    def _continue(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            made_with = answer.record.get("settings")
            if not isinstance(made_with, dict):
                raise ZeroTuningError(f"output {self.path} was not written by this command; choose another file")
            for name, value in self.settings.items():
                if made_with.get(name) != value:
                    raise ZeroTuningError(
                        f"output {self.path} holds answers with another {name}: {made_with.get(name)!r}, not {value!r};"
                        " run that command again, choose another file or overwrite it"
                    )
        self.answers = {answer.question.question_id: answer.record for answer in answers}
        if not self.missing:
            raise ZeroTuningError(
                f"output {self.path} already holds {len(answers)} answers, all that were asked for:"
                " choose another file or overwrite it"
            )

    @property
    def missing(self) -> list[Question]:
        return [question for question in self.questions if question.question_id not in self.answers]

    def add(self, model_id: str, turns: Mapping[int, Sequence[str]]) -> None:
        """Answers of a batch, by question, and the file written with them."""
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
    """What a line of the file says of how it was made; scales by their SHA-256."""
    gamma = None if scales is None else hashlib.sha256(scales.gamma.numpy().tobytes()).hexdigest()
    return {"model": model_name, "model_id": model_id, "scales": gamma, "dtype": dtype, **decoding.settings()}


def answer_questions(
    model: Any, tokenizer: Any, file: AnswerFile, decoding: Decoding, *, progress: bool = False
) -> Path:
    """Generates both turns of every question that the file has not, batch by batch.

    model, tokenizer   a transformers causal language model as it stands, scaled or not; the second prompt holds the
                       first answer (see conversation.py)
    progress           draw a bar on stderr, if that is a terminal
    An answer ends at the model's own end of turn, after max_new_tokens, or where the model's context ends.
    Errors: ZeroTuningError for a prompt that leaves no room in the context; what was answered stays in the file.
    """
    hidden = not (progress and sys.stderr.isatty())
    missing = {question.question_id for question in file.missing}
    with tqdm(total=len(missing), desc="MT-Bench", unit=" questions", disable=hidden, leave=False) as bar:
        for batch in _batches(load_questions(), decoding.batch_size):
            chosen = [question for question in batch if question.question_id in missing]
            if chosen:
                file.add(file.settings["model_id"], _both_turns(model, tokenizer, chosen, decoding))
                bar.update(len(chosen))
    return file.path


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    """Always the same groups, so that a resumed run draws what an uninterrupted one does."""
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def _both_turns(
    model: Any, tokenizer: Any, questions: Sequence[Question], decoding: Decoding
) -> dict[int, tuple[str, ...]]:
    conversation = Conversation(tokenizer)
    said: list[tuple[str, ...]] = [() for _ in questions]
    for turn in range(TURNS):
        prompts = []
        for question, answers in zip(questions, said, strict=True):
            text = conversation.prompt(question.turns[: turn + 1], answers)
            prompts.append(conversation.prompt_tokens(text))
        rooms = [
            _room(model, prompt, decoding, question, turn) for question, prompt in zip(questions, prompts, strict=True)
        ]
        found: dict[int, list[int]] = {}
        for group in _same_room(rooms, decoding.max_new_tokens):
            with _drawn_from(model, f"{decoding.seed}, {questions[group[0]].question_id}, {turn}"):
                ids = _generate(model, tokenizer, [prompts[i] for i in group], rooms[group[0]], decoding)
            found.update(zip(group, ids, strict=True))
        said = [(*answers, conversation.answer(found[index])) for index, answers in enumerate(said)]
    return {question.question_id: answers for question, answers in zip(questions, said, strict=True)}


def _room(model: Any, prompt: Sequence[int], decoding: Decoding, question: Question, turn: int) -> int:
    """How many tokens may follow the prompt."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context <= 0:
        return decoding.max_new_tokens
    if len(prompt) >= context:
        raise ZeroTuningError(
            f"question {question.question_id}, turn {turn + 1}: the prompt takes {len(prompt)} tokens, which leaves no room"
            f" in the model's context of {context}; a smaller max_new_tokens shortens the first answer"
        )
    return min(decoding.max_new_tokens, context - len(prompt))


def _same_room(rooms: Sequence[int], full: int) -> list[list[int]]:
    """Places in the batch that are generated together: those with all their room, and each of the others alone."""
    together = [index for index, room in enumerate(rooms) if room == full]
    return ([together] if together else []) + [[index] for index, room in enumerate(rooms) if room < full]


@contextmanager
def _drawn_from(model: Any, source: str) -> Iterator[None]:
    """Within it torch draws from a seed of its own; afterwards it goes on as before."""
    seed = int.from_bytes(hashlib.sha256(source.encode()).digest()[:7], "big")
    devices = sorted({weight.device for weight in model.parameters() if weight.is_cuda}, key=str)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], room: int, decoding: Decoding
) -> list[list[int]]:
    """The tokens that follow each prompt, up to and without the end of the turn."""
    length = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[padding] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids.to(input_device(model)),
        attention_mask=mask.to(input_device(model)),
        max_new_tokens=room,
        pad_token_id=padding,
        **decoding.arguments(),
    )
    ends = _end_tokens(model, tokenizer)
    return [_until(row, ends) for row in output[:, length:].tolist()]


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    found = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return {end for end in (*found, tokenizer.eos_token_id) if end is not None}


def _until(ids: Sequence[int], ends: set[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in ends:
            return list(ids[:place])
    return list(ids)
