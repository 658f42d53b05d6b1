"""MT-Bench's answers against transformers' own generation; resumed and refused files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mt_bench_commands import TOKENS, answer, chat, continued, lines, refusal, turns, write_answers
from transformers import LlamaForCausalLM
from zerotuning.cli.main import main
from zerotuning.mt_bench.questions import load_questions


@pytest.mark.parametrize("scales", [(), ("--scales", "ones")])
def test_untuned_answers_equal_transformers_generation_and_the_second_prompt_holds_the_first_answer(
    place: Path, long_model: Any, tiny_tokenizer: Any, scales: tuple[str, ...]
) -> None:
    assert main(answer(*scales)) == 0
    questions = load_questions()[:4]
    assert [line["question_id"] for line in lines("answers.jsonl")] == [81, 82, 83, 84]
    for question, (first, second) in zip(questions, turns("answers.jsonl"), strict=True):
        assert first == continued(long_model, tiny_tokenizer, chat(question.turns[0]))
        assert second == continued(long_model, tiny_tokenizer, chat(question.turns[0], first, question.turns[1]))


def test_answers_have_fastchats_fields_and_scales_change_them(place: Path) -> None:
    assert main(answer()) == 0
    assert main(answer("--scales", "scales", output="tuned.jsonl")) == 0
    for path, name in (("answers.jsonl", "model"), ("tuned.jsonl", "model+scales")):
        for line in lines(path):
            assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= line.keys()
            assert (line["model_id"], line["choices"][0]["index"]) == (name, 0)
            assert isinstance(line["answer_id"], str)
            assert line["tstamp"] == pytest.approx(time.time(), abs=600)
    assert len({line["answer_id"] for line in lines("answers.jsonl")}) == 4
    assert turns("answers.jsonl") != turns("tuned.jsonl")
    command = [part.replace("--device", "--device-map") for part in answer(output="mapped.jsonl")]
    assert main([*command, "--scales", "scales"]) == 0
    assert turns("mapped.jsonl") == turns("tuned.jsonl")


def test_a_tokenizer_without_template_gets_the_plain_dialogue(
    place: Path, long_model: Any, tiny_tokenizer: Any
) -> None:
    assert main(answer(model="plain", limit=1)) == 0
    one, two = load_questions()[0].turns
    ((first, second),) = turns("answers.jsonl")
    assert first == continued(long_model, tiny_tokenizer, f"User: {one}\n\nAssistant:")
    prompt = f"User: {one}\n\nAssistant: {first}\n\nUser: {two}\n\nAssistant:"
    assert second == continued(long_model, tiny_tokenizer, prompt)


def test_sampling_repeats_by_seed_and_top_k_of_one_is_greedy(place: Path) -> None:
    sampled = ("--temperature", "1.5", "--top-p", "0.95")
    assert main(answer()) == 0
    assert main(answer(*sampled, output="a.jsonl")) == 0
    assert main(answer(*sampled, output="b.jsonl")) == 0
    assert main(answer(*sampled, "--seed", "1", output="c.jsonl")) == 0
    assert main(answer("--temperature", "0.7", "--top-k", "1", output="d.jsonl")) == 0
    assert turns("a.jsonl") == turns("b.jsonl") != turns("c.jsonl")
    assert turns("a.jsonl") != turns("answers.jsonl") == turns("d.jsonl")


def test_a_killed_run_resumes_and_keeps_its_finished_answers(place: Path) -> None:
    sampled = ("--temperature", "1.0")
    assert main(answer(*sampled, output="whole.jsonl", limit=9)) == 0
    command = [sys.executable, "-m", "zerotuning", *answer(*sampled, limit=80)]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not Path("answers.jsonl").exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGKILL)
    finally:
        running.wait(timeout=60)
    assert running.returncode == -signal.SIGKILL
    kept = lines("answers.jsonl")
    assert 0 < len(kept) < 80
    limit = len(kept) + 3
    assert main(answer(*sampled, limit=limit)) == 0
    resumed = lines("answers.jsonl")
    assert resumed[: len(kept)] == kept
    assert len(resumed) == limit
    assert turns("answers.jsonl")[:9] == turns("whole.jsonl")[:limit]


def test_an_interruption_keeps_the_answers_of_earlier_batches(place: Path, monkeypatch: Any, capsys: Any) -> None:
    generate = LlamaForCausalLM.generate
    calls = []

    def interrupted(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the second turn of the second batch
            raise KeyboardInterrupt
        return generate(self, *arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "generate", interrupted)
    assert main(answer(limit=6)) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert [line["question_id"] for line in lines("answers.jsonl")] == [81, 82, 83]
    assert main(answer(limit=6)) == 0
    assert len(calls) == 6  # the resumed command generates only the second batch, both turns
    assert [line["question_id"] for line in lines("answers.jsonl")] == [81, 82, 83, 84, 85, 86]


def test_other_settings_and_finished_files_are_refused(place: Path, capsys: Any) -> None:
    assert main(answer()) == 0
    before = Path("answers.jsonl").read_bytes()
    assert "already holds 4 answers" in refusal(capsys, answer())
    assert "another temperature: 0.0, not 0.5" in refusal(capsys, answer("--temperature", "0.5", limit=9))
    assert "another scales" in refusal(capsys, answer("--scales", "scales", "--model-id", "model", limit=9))
    assert Path("answers.jsonl").read_bytes() == before
    assert main(answer("--overwrite", "--temperature", "0.5")) == 0


def test_answers_end_at_the_models_context_length(
    place: Path, capsys: Any, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    one, two = load_questions()[0].turns
    prompt = len(tiny_tokenizer(chat(one))["input_ids"])

    def shorten(context: int) -> None:
        config = json.loads((place / "model" / "config.json").read_text())
        (place / "model" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))

    shorten(prompt)
    assert f"question 81, turn 1: the prompt has {prompt} tokens" in refusal(capsys, answer(limit=1))
    shorten(prompt + 2)
    assert "question 81, turn 2: the prompt has" in refusal(capsys, answer(limit=1))
    assert not Path("answers.jsonl").exists()
    shorten(4096)
    assert main(answer(limit=1)) == 0
    ((first, _),) = turns("answers.jsonl")
    shorten(len(tiny_tokenizer(chat(one, first, two))["input_ids"]) + 1)
    generate = LlamaForCausalLM.generate
    rooms = []

    def noted(self: Any, *arguments: Any, **named: Any) -> Any:
        rooms.append(named["max_new_tokens"])
        return generate(self, *arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    assert main(answer(limit=1, output="cut.jsonl")) == 0
    assert rooms == [TOKENS, 1]
    assert turns("cut.jsonl")[0][0] == first


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--scales", "nowhere"), "scales folder nowhere does not exist"),
        (("--model", "nowhere/at/all"), "model folder nowhere/at/all does not exist"),
        (("--top-k", "5"), "need a temperature above 0"),
        (("--temperature", "-1"), "must be a number of at least 0"),
        (("--top-p", "1.5", "--temperature", "1"), "must be above 0 and at most 1"),
        (("--output", "no/folder/a.jsonl"), "cannot be written"),
        (("--output", "questions.jsonl"), "was not written by this command"),
        (("--output", "broken.jsonl"), "broken.jsonl:1: not JSON"),
    ],
)
def test_bad_input_to_mt_bench_answer_gets_one_line(place: Path, capsys: Any, more: tuple[str, ...], said: str) -> None:
    write_answers("questions.jsonl")
    Path("broken.jsonl").write_text('{"question_id": 81, "choi', encoding="utf-8")
    assert said in refusal(capsys, answer(*more))
