"""Commands of MT-Bench, their files and their dialogues, which several test files share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zerotuning.cli.main import main

TOKENS = 6


def answer(*more: str, model: str = "model", output: str = "answers.jsonl", limit: int = 4) -> list[str]:
    command = ["mt-bench", "answer", "--model", model, "--dtype", "float32", "--device", "cpu", "--limit", str(limit)]
    return [*command, "--max-new-tokens", str(TOKENS), "--batch-size", "3", "--output", output, *more]


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def turns(path: str | Path) -> list[list[str]]:
    return [line["choices"][0]["turns"] for line in lines(path)]


def chat(*texts: str) -> str:
    """Return a dialogue in the format of the model's chat template."""
    roles = ("user", "assistant")
    return "".join(f"<{roles[index % 2]}>{text}<end>" for index, text in enumerate(texts)) + "<assistant>"


def continued(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return the text that transformers' own attention generates after an unpadded prompt."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True).strip()


def refusal(capsys: Any, command: list[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.strip().splitlines()
    return line


def write_answers(path: str = "answers.jsonl", ids: tuple[int, ...] = (81, 111)) -> None:
    """Answers as FastChat would have written them: to a question on writing and one on math."""
    records = [
        {
            "question_id": number,
            "answer_id": f"x{number}",
            "model_id": "someone",
            "choices": [{"index": 0, "turns": [f"first {{answer}} {number}", f"second {number}"]}],
            "tstamp": 1.5,
        }
        for number in ids
    ]
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def judge(url: str, *more: str, output: str = "judged.jsonl") -> list[str]:
    command = ["mt-bench", "judge", "--answers", "answers.jsonl", "--base-url", url, "--judge-model", "referee"]
    return [*command, "--output", output, *more]


def proxy(*more: str) -> list[str]:
    command = ["mt-bench", "proxy", "--answers", "answers.jsonl", "--model", "model", "--dtype", "float32"]
    return [*command, "--device", "cpu", *more]
