"""Answers scored from 1 to 10 by a model behind an OpenAI-compatible endpoint, in FastChat's judgment format."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_json_lines_atomically
from zerotuning.mt_bench.judge_prompts import REFERENCE_CATEGORIES, JudgePrompt, JudgePrompts
from zerotuning.mt_bench.means import means
from zerotuning.mt_bench.questions import TURNS, Answer, load_questions
from zerotuning.output import check_result_file
from zerotuning.tasks.examples import Record, read_examples

#: FastChat's score of a judgment that failed or has no rating, and its text of a judgment that failed.
NO_SCORE = -1
FAILED = "$ERROR$"
#: The environment variable with the key, unless the user names another.
API_KEY = "OPENAI_API_KEY"

_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


class Judge:
    """A chat model behind an endpoint; the `openai` client sends the requests and retries them.

    Args:
        base_url: Of the endpoint, such as http://localhost:8000/v1.
        model: The model's name at the endpoint.
        api_key_env: The environment variable with the key. Default: OPENAI_API_KEY, if it is set; local servers need
            none.
        max_tokens: The most tokens of a judgment.
        temperature: Of the judgment's sampling.
        timeout: The most seconds of a request.

    Raises:
        ZeroTuningError: The package openai is missing, the environment variable is not set, or base_url is no URL.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        max_tokens: int = 2048,
        temperature: float = 0.0,
        timeout: float = 600.0,
    ) -> None:
        self.openai = _openai()
        if not base_url.startswith(("http://", "https://")):
            raise ZeroTuningError(f"base URL must start with http:// or https://, got {base_url!r}")
        key = os.environ.get(api_key_env or API_KEY)
        if api_key_env is not None and not key:
            raise ZeroTuningError(f"the environment variable {api_key_env}, which should hold the API key, is not set")
        self.base_url, self.model = base_url, model
        self.options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        self.client: Any = self.openai.OpenAI(base_url=base_url, api_key=key or "none", timeout=timeout)

    def ask(self, prompt: JudgePrompt) -> str:
        """Request one judgment.

        Returns:
            The judgment's text; FAILED where the last retry ended with an error status or a timeout.

        Raises:
            ZeroTuningError: No further judgment could succeed: no server listens at the address, the key is refused, or
                the endpoint has no such model.
        """
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        try:
            reply = self.client.chat.completions.create(model=self.model, messages=messages, **self.options)
            return str(reply.choices[0].message.content or "")
        except (self.openai.APITimeoutError, self.openai.InternalServerError, self.openai.RateLimitError):
            return FAILED
        except self.openai.APIConnectionError as error:
            raise ZeroTuningError(
                f"cannot connect to the judge at {self.base_url}: {error.__cause__ or error}"
            ) from error
        except (
            self.openai.AuthenticationError,
            self.openai.PermissionDeniedError,
            self.openai.NotFoundError,
        ) as error:
            raise ZeroTuningError(f"the judge {self.model} at {self.base_url} refuses the request: {error}") from error
        except (
            self.openai.APIError,
            AttributeError,
            IndexError,
            TypeError,
        ):  # another error status, or no chat completion
            return FAILED


class JudgmentFile:
    """A file of judgments that is rewritten as a whole after each judgment; a resumed run repeats failed requests.

    Args:
        path: The file.
        judge_model: The judge's name.
        answers: The answers to judge, both turns of each.
        templates: Templates of prompts, and reference answers.
        overwrite: Start with no judgments, whatever the file holds.

    Raises:
        ZeroTuningError: The file holds judgments of another judge, of other answers or prompts, all requested
            judgments, or something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        judge_model: str,
        answers: Sequence[Answer],
        templates: JudgePrompts,
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = check_result_file(path)
        self.judge_model = judge_model
        self.prompts = {
            (answer.question.question_id, turn): (answer, templates.prompt(answer, turn))
            for turn in range(1, TURNS + 1)
            for answer in answers
        }
        self.judgments: dict[tuple[int, int], Mapping[str, Any]] = {}
        if self.path.exists() and not overwrite:
            for record in read_examples(self.path):
                self._resume(record)
            if not self.missing:
                raise ZeroTuningError(
                    f"output {self.path} already holds {len(self.judgments)} judgments, all that were requested:"
                    " choose another file or overwrite it"
                )

    def _resume(self, record: Record) -> None:
        place = (record.get("question_id"), record.get("turn"))
        if place not in self.prompts or not isinstance(record.get("judgment"), str):
            raise ZeroTuningError(f"output {record.origin} is no judgment of these answers; choose another file")
        answer, prompt = self.prompts[place]  # type: ignore[index]
        saved_request = (record.get("model"), record.get("judge"), record.get("user_prompt"))
        if saved_request != (answer.model_id, [self.judge_model, prompt.name], prompt.user):
            raise ZeroTuningError(
                f"output {record.origin} was judged by another model or prompt, or is of other answers:"
                " choose another file or overwrite it"
            )
        if record["judgment"] != FAILED:
            self.judgments[place] = record  # type: ignore[index]

    @property
    def missing(self) -> list[tuple[int, int]]:
        """(question id, turn) of each answer without a judgment."""
        return [place for place in self.prompts if place not in self.judgments]

    def add(self, place: tuple[int, int], judgment: str) -> None:
        """Add the judgment of one answer, (question id, turn), and rewrite the file."""
        answer, prompt = self.prompts[place]
        self.judgments[place] = {
            "question_id": place[0],
            "model": answer.model_id,
            "judge": [self.judge_model, prompt.name],
            "user_prompt": prompt.user,
            "judgment": judgment,
            "score": rating(judgment),
            "turn": place[1],
            "tstamp": time.time(),
        }
        order = [other for other in self.prompts if other in self.judgments]
        write_json_lines_atomically(self.path, [self.judgments[other] for other in order])


def rating(judgment: str) -> float:
    """The number in [[…]], or else in […], as FastChat reads it; NO_SCORE where there is none."""
    for pattern in _RATINGS:
        match = pattern.search(judgment)
        if match:
            value = float(match[1])
            return int(value) if value.is_integer() else value
    return NO_SCORE


def judge_answers(judge: Judge, file: JudgmentFile, *, progress: bool = False) -> Path:
    """Request every judgment that the file lacks, first turns first, and write each judgment at once."""
    no_bar = not (progress and sys.stderr.isatty())
    for place in tqdm(file.missing, desc="judging", unit=" answers", disable=no_bar, leave=False):
        file.add(place, judge.ask(file.prompts[place][1]))
    return file.path


def summarise(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Average a judgment file's scores by turn and category.

    Returns:
        "judgments", their number; "failures", the number of judgments without a score (failed requests and texts
        without a rating), which are left out of the means; and the means of `means`.
    """
    categories = {question.question_id: question.category for question in load_questions()}
    records = read_examples(path)
    scored = [record for record in records if record["score"] != NO_SCORE]
    rows = [(record["turn"], categories[record["question_id"]], {"score": record["score"]}) for record in scored]
    return {"judgments": len(records), "failures": len(records) - len(scored), **means(rows)}


def without_reference(answers: Sequence[Answer], prompts: JudgePrompts) -> int:
    """The number of answers that FastChat judges beside a reference answer, and that have none here."""
    wanted = [answer for answer in answers if answer.question.category in REFERENCE_CATEGORIES]
    return sum(prompts.reference(answer) is None for answer in wanted)


def _openai() -> ModuleType:
    try:
        import openai
    except ImportError as error:
        raise ZeroTuningError(
            f'judging needs the package openai ({error}): pip install "zerotuning[mt-bench]"'
        ) from error
    return openai
