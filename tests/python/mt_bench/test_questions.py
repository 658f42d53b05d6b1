"""Files of answers that `mt-bench judge` and `mt-bench proxy` refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mt_bench_commands import judge, proxy, refusal


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question_id": 7}, "answers.jsonl:1: question_id must be one of MT-Bench's, 81 to 160, got 7"),
        ({"question_id": 81}, "answers.jsonl:1: model_id must be a string"),
        ({"question_id": 81, "model_id": "m"}, "answers.jsonl:1: choices[0].turns is missing"),
        ({"question_id": 81, "model_id": "m", "choices": [{"turns": ["one"]}]}, "turns must be two strings"),
        (
            {"question_id": 81, "model_id": "m", "choices": [{"turns": ["one", "\ud800"]}]},
            r"answers.jsonl:1: choices[0].turns holds '\ud800', half of a surrogate pair",
        ),
        ({"question_id": 81, "model_id": "\udc00"}, r"model_id holds '\udc00', half of a surrogate pair"),
        ([1], "a line must be a JSON object"),
    ],
)
@pytest.mark.parametrize("part", ["judge", "proxy"])
def test_malformed_answers_files_are_refused_with_one_line(
    place: Path, capsys: Any, part: str, record: Any, said: str
) -> None:
    Path("answers.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    # The command reads the file before it imports the openai package.
    command = judge("http://127.0.0.1:9/v1") if part == "judge" else proxy()
    assert said in refusal(capsys, command)


def test_a_missing_answers_file_is_refused_with_one_line(place: Path, capsys: Any) -> None:
    assert "answers.jsonl does not exist" in refusal(capsys, judge("http://127.0.0.1:9/v1"))
    assert "answers.jsonl does not exist" in refusal(capsys, proxy())
