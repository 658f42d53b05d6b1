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

#: The score of a judgment that failed or holds no rating, and the text of one that failed, as FastChat has them.
NO_SCORE = -1
FAILED = "$ERROR$"
#: The environment variable that holds the key, unless the user names another.
API_KEY = "OPENAI_API_KEY"

_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


class Judge:
    """A chat model that is asked through the `openai` client, which also tries again.

    Args:
        base_url: of the endpoint, such as http://localhost:8000/v1.
        model: the name that the endpoint knows it by.
        api_key_env: the environment variable that holds the key (None: OPENAI_API_KEY where set; local servers need none).
        max_tokens, temperature: of a judgment.
        timeout: seconds a request may take.

    Raises:
        ZeroTuningError: the package openai is missing, the variable is not set, base_url is no URL.
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
        """The judgment's text; FAILED where the endpoint answered with an error, or not in time, to the last try.

        Errors: ZeroTuningError where no further judgment could succeed: nothing listens there, the key is refused, the
        endpoint does not know the model or the address.
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
            raise ZeroTuningError(f"the judge {self.model} at {self.base_url} refuses: {error}") from error
        except (
            self.openai.APIError,
            AttributeError,
            IndexError,
            TypeError,
        ):  # another error status, or no chat completion
            return FAILED


class JudgmentFile:
    """A file of judgments that is written anew, whole, after each; failed requests are made again on resuming.

    Raises:
        ZeroTuningError: the file holds judgments of another judge, of other answers or prompts, all that are asked for,
            or something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        judge_model: str,
        answers: Sequence[Answer],
        prompts: JudgePrompts,
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = check_result_file(path)
        self.judge_model = judge_model
        self.asked = {
            (answer.question.question_id, turn): (answer, prompts.prompt(answer, turn))
            for turn in range(1, TURNS + 1)
            for answer in answers
        }
        self.judgments: dict[tuple[int, int], Mapping[str, Any]] = {}
        if self.path.exists() and not overwrite:
            for record in read_examples(self.path):
                self._keep(record)
            if not self.missing:
                raise ZeroTuningError(
                    f"output {self.path} already holds {len(self.judgments)} judgments, all that were asked for:"
                    " choose another file or overwrite it"
                )

    def _keep(self, record: Record) -> None:
        place = (record.get("question_id"), record.get("turn"))
        if place not in self.asked or not isinstance(record.get("judgment"), str):
            raise ZeroTuningError(f"output {record.origin} is no judgment of these answers; choose another file")
        answer, prompt = self.asked[place]  # type: ignore[index]
        made_of = (record.get("model"), record.get("judge"), record.get("user_prompt"))
        if made_of != (answer.model_id, [self.judge_model, prompt.name], prompt.user):
            raise ZeroTuningError(
                f"output {record.origin} was judged by another model or prompt, or is of other answers:"
                " choose another file or overwrite it"
            )
        if record["judgment"] != FAILED:
            self.judgments[place] = record  # type: ignore[index]

    @property
    def missing(self) -> list[tuple[int, int]]:
        return [place for place in self.asked if place not in self.judgments]

    def add(self, place: tuple[int, int], judgment: str) -> None:
        """One judgment, and the file written with it."""
        answer, prompt = self.asked[place]
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
        order = [other for other in self.asked if other in self.judgments]
        write_json_lines_atomically(self.path, [self.judgments[other] for other in order])


def rating(judgment: str) -> float:
    """The number in [[…]], or else in […]; NO_SCORE where there is none, as FastChat reads it."""
    for pattern in _RATINGS:
        found = pattern.search(judgment)
        if found:
            value = float(found[1])
            return int(value) if value.is_integer() else value
    return NO_SCORE


def judge_answers(judge: Judge, file: JudgmentFile, *, progress: bool = False) -> Path:
    """Asks for every judgment that the file has not, first turns first, and keeps each at once."""
    hidden = not (progress and sys.stderr.isatty())
    for place in tqdm(file.missing, desc="judging", unit=" answers", disable=hidden, leave=False):
        file.add(place, judge.ask(file.asked[place][1]))
    return file.path


def summarise(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Means of a judgment file's scores by turn and category, without those that have none, and how many have none.

    failures counts judgments without a score: requests that failed and texts without a rating.
    """
    categories = {question.question_id: question.category for question in load_questions()}
    records = read_examples(path)
    scored = [record for record in records if record["score"] != NO_SCORE]
    rows = [(record["turn"], categories[record["question_id"]], {"score": record["score"]}) for record in scored]
    return {"judgments": len(records), "failures": len(records) - len(scored), **means(rows)}


def without_reference(answers: Sequence[Answer], prompts: JudgePrompts) -> int:
    """How many answers FastChat would have judged beside a reference answer that is not at hand."""
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
