"""MT-Bench: answers against transformers' own generation, the judge against a local stand-in server, the proxy by hand."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zerotuning.cli.main import main
from zerotuning.errors import ZeroTuningError
from zerotuning.mt_bench.judge import rating
from zerotuning.mt_bench.questions import load_questions
from zerotuning.patching.head_scales import HeadScales

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENS = 6


@pytest.fixture
def long_model(tiny_tokenizer: Any) -> Any:
    """A random Llama whose context holds MT-Bench's dialogues in a byte's vocabulary."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: Any, long_model: Any, tiny_tokenizer: Any) -> Path:
    """The current folder, with model/ (which has a chat template), plain/ (which has none) and scales/."""
    for name, template in (("model", TEMPLATE), ("plain", None)):
        long_model.save_pretrained(tmp_path / name)
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    HeadScales([[20.0, 0.05, 10.0, 0.1], [0.1, 30.0, 5.0, 0.02]]).save_pretrained(tmp_path / "scales")
    HeadScales.ones(2, 4).save_pretrained(tmp_path / "ones")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


def answer(*more: str, model: str = "model", output: str = "answers.jsonl", limit: int = 4) -> list[str]:
    command = ["mt-bench", "answer", "--model", model, "--dtype", "float32", "--device", "cpu", "--limit", str(limit)]
    return [*command, "--max-new-tokens", str(TOKENS), "--batch-size", "3", "--output", output, *more]


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def turns(path: str | Path) -> list[list[str]]:
    return [line["choices"][0]["turns"] for line in lines(path)]


def chat(*texts: str) -> str:
    """A dialogue as the template has it, written out."""
    roles = ("user", "assistant")
    return "".join(f"<{roles[index % 2]}>{text}<end>" for index, text in enumerate(texts)) + "<assistant>"


def continued(model: Any, tokenizer: Any, prompt: str) -> str:
    """What transformers' own attention generates after an unpadded prompt."""
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


# Answers.


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


def test_a_killed_run_resumes_and_its_answers_stay(place: Path) -> None:
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


def test_an_interrupted_batch_leaves_those_before_it(place: Path, monkeypatch: Any, capsys: Any) -> None:
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
    assert len(calls) == 6  # the second batch alone, both turns
    assert [line["question_id"] for line in lines("answers.jsonl")] == [81, 82, 83, 84, 85, 86]


def test_other_settings_and_finished_files_are_refused(place: Path, capsys: Any) -> None:
    assert main(answer()) == 0
    before = Path("answers.jsonl").read_bytes()
    assert "already holds 4 answers" in refusal(capsys, answer())
    assert "another temperature: 0.0, not 0.5" in refusal(capsys, answer("--temperature", "0.5", limit=9))
    assert "another scales" in refusal(capsys, answer("--scales", "scales", "--model-id", "model", limit=9))
    assert Path("answers.jsonl").read_bytes() == before
    assert main(answer("--overwrite", "--temperature", "0.5")) == 0


def test_answers_end_where_the_context_does(place: Path, capsys: Any, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    one, two = load_questions()[0].turns
    prompt = len(tiny_tokenizer(chat(one))["input_ids"])

    def shorten(context: int) -> None:
        config = json.loads((place / "model" / "config.json").read_text())
        (place / "model" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))

    shorten(prompt)
    assert f"question 81, turn 1: the prompt takes {prompt} tokens" in refusal(capsys, answer(limit=1))
    shorten(prompt + 2)
    assert "question 81, turn 2: the prompt takes" in refusal(capsys, answer(limit=1))
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
def test_bad_input_to_answer_is_one_line(place: Path, capsys: Any, more: tuple[str, ...], said: str) -> None:
    write_answers("questions.jsonl")
    Path("broken.jsonl").write_text('{"question_id": 81, "choi', encoding="utf-8")
    assert said in refusal(capsys, answer(*more))


# The judge.


class StandIn(ThreadingHTTPServer):
    """Speaks /v1/chat/completions on 127.0.0.1: notes each request and answers as `reply` says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.reply: Any = lambda request, number: (200, "A fair answer. Rating: [[7]]")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(request)
        server.keys.append(self.headers["Authorization"])
        server.paths.append(self.path)
        status, text = server.reply(request, len(server.requests))
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        good = {"id": "1", "object": "chat.completion", "created": 1, "model": request["model"], "choices": [message]}
        body = json.dumps(good if status == 200 else {"error": {"message": text}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(place: Path) -> Iterator[StandIn]:
    pytest.importorskip("openai")
    stand_in = StandIn()
    thread = threading.Thread(target=stand_in.serve_forever, daemon=True)
    thread.start()
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()
    thread.join(timeout=10)


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


def test_judgments_have_fastchats_fields_and_every_turn_is_shown_to_the_judge(
    server: StandIn, capsys: Any, monkeypatch: Any
) -> None:
    write_answers()
    monkeypatch.setenv("A_KEY", "secret")
    server.reply = lambda request, number: (200, f"Well. Rating: [[{number + 0.5}]]")
    assert main(judge(server.url, "--api-key-env", "A_KEY")) == 0
    found = lines("judged.jsonl")
    assert [(line["question_id"], line["turn"], line["score"]) for line in found] == [
        (81, 1, 1.5),
        (111, 1, 2.5),
        (81, 2, 3.5),
        (111, 2, 4.5),
    ]
    one, two = load_questions()[0].turns
    for line, request in zip(found, server.requests, strict=True):
        assert line.keys() == {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
        assert (line["model"], line["judge"][0]) == ("someone", "referee")
        assert [message["role"] for message in request["messages"]] == ["system", "user"]
        assert request["messages"][1]["content"] == line["user_prompt"]
        assert (request["model"], request["temperature"]) == ("referee", 0)
    assert one in found[0]["user_prompt"]
    assert "first {answer} 81" in found[0]["user_prompt"]  # braces in an answer are text
    assert two not in found[0]["user_prompt"]
    for text in (one, two, "first {answer} 81", "second 81"):
        assert text in found[2]["user_prompt"]
    assert server.keys == ["Bearer secret"] * 4
    assert server.paths == ["/v1/chat/completions"] * 4
    said = capsys.readouterr().out
    assert "secret" not in said + Path("judged.jsonl").read_text(encoding="utf-8")
    rows = {line.split()[0]: line.split()[-1] for line in said.splitlines() if line.startswith("  ")}
    assert (rows["all"], rows["writing"], rows["math"]) == ("3.0000", "2.5000", "3.5000")
    assert "0 without a score" in said
    assert "2 answers on math" not in said
    assert "1 answers on math, reasoning and coding were judged without a reference" in said


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[5]]", 5),
        ("[[8.5]] then [[2]]", 8.5),
        ("Rating: [6]", 6),
        ("ten out of ten", -1),
        ("[[high]]", -1),
        ("", -1),
    ],
)
def test_ratings_are_read_as_fastchat_reads_them(text: str, score: float) -> None:
    assert rating(text) == score


def test_unparsable_and_failed_judgments_count_as_failures_and_only_failed_requests_are_made_again(
    server: StandIn, capsys: Any
) -> None:
    write_answers()
    replies = {1: (200, "no number"), 2: (400, "too long"), 3: (200, "[[4]]"), 4: (200, "[[8]]")}
    server.reply = lambda request, number: replies[number]
    assert main(judge(server.url)) == 0
    assert [line["score"] for line in lines("judged.jsonl")] == [-1, -1, 4, 8]
    said = capsys.readouterr().out
    assert "2 without a score" in said
    assert [line.split()[1:] for line in said.splitlines() if line.startswith("  all")] == [["2", "6.0000"]]
    server.reply = lambda request, number: (200, "[[9]]")
    assert main(judge(server.url)) == 0
    assert len(server.requests) == 5
    assert [line["score"] for line in lines("judged.jsonl")] == [-1, 9, 4, 8]


def test_the_client_tries_again_after_a_server_error(server: StandIn) -> None:
    write_answers(ids=(81,))
    server.reply = lambda request, number: (503, "busy") if number == 1 else (200, "[[3]]")
    assert main(judge(server.url)) == 0
    assert [line["score"] for line in lines("judged.jsonl")] == [3, 3]
    assert len(server.requests) == 3


def test_a_judge_that_goes_away_leaves_what_was_judged_and_the_command_resumes(server: StandIn, capsys: Any) -> None:
    write_answers()
    server.reply = lambda request, number: (401, "no such key") if number == 3 else (200, "[[2]]")
    assert "no such key" in refusal(capsys, judge(server.url))
    kept = lines("judged.jsonl")
    assert len(kept) == 2
    assert main(judge(server.url)) == 0
    assert lines("judged.jsonl")[:2] == kept
    assert len(server.requests) == 5
    assert "already holds 4 judgments" in refusal(capsys, judge(server.url))
    assert "judged by another model or prompt" in refusal(capsys, [*judge(server.url), "--judge-model", "other"])


def test_prompts_and_references_come_from_files_in_fastchats_format(server: StandIn) -> None:
    write_answers()
    Path("references.jsonl").write_text(
        json.dumps({"question_id": 111, "model_id": "r", "choices": [{"index": 0, "turns": ["it is 7", "it is 8"]}]}),
        encoding="utf-8",
    )
    pieces = {
        "single-v1": "Q {question} A {answer}",
        "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
        "single-math-v1": "R {ref_answer_1} A {answer}",
        "single-math-v1-multi-turn": "R {ref_answer_1} R {ref_answer_2} A {answer_1} A {answer_2}",
    }
    records = [{"name": "pair-v2", "system_prompt": "", "prompt_template": ""}]
    records += [{"name": k, "system_prompt": "be fair", "prompt_template": v} for k, v in pieces.items()]
    Path("prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    assert main(judge(server.url, "--prompts", "prompts.jsonl", "--references", "references.jsonl")) == 0
    found = {(line["question_id"], line["turn"]): line for line in lines("judged.jsonl")}
    assert found[111, 1]["user_prompt"] == "R it is 7 A first {answer} 111"
    assert found[111, 2]["user_prompt"] == "R it is 7 R it is 8 A first {answer} 111 A second 111"
    assert found[81, 1]["user_prompt"] == f"Q {load_questions()[0].turns[0]} A first {{answer}} 81"
    assert found[111, 1]["judge"] == ["referee", "single-math-v1"]
    assert found[81, 2]["judge"] == ["referee", "single-v1-multi-turn"]


def test_a_judge_that_cannot_be_reached_is_one_line(place: Path, capsys: Any, monkeypatch: Any) -> None:
    pytest.importorskip("openai")
    write_answers()
    monkeypatch.setattr("openai._constants.INITIAL_RETRY_DELAY", 0.0)
    assert "cannot connect to the judge at http://127.0.0.1:9/v1" in refusal(capsys, judge("http://127.0.0.1:9/v1"))
    assert "must start with http" in refusal(capsys, judge("localhost"))
    unset = judge("http://127.0.0.1:9/v1", "--api-key-env", "NOT_SET_ANYWHERE")
    assert "NOT_SET_ANYWHERE, which should hold the API key, is not set" in refusal(capsys, unset)
    assert not Path("judged.jsonl").exists()


def test_a_missing_client_names_the_extra(place: Path, capsys: Any, monkeypatch: Any) -> None:
    write_answers()
    monkeypatch.setitem(sys.modules, "openai", None)
    assert 'pip install "zerotuning[mt-bench]"' in refusal(capsys, judge("http://127.0.0.1:9/v1"))


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
def test_answers_of_another_shape_are_one_line(place: Path, capsys: Any, part: str, record: Any, said: str) -> None:
    Path("answers.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    # Read before the client is looked for.
    command = judge("http://127.0.0.1:9/v1") if part == "judge" else proxy()
    assert said in refusal(capsys, command)


def test_a_missing_answers_file_is_one_line(place: Path, capsys: Any) -> None:
    assert "answers.jsonl does not exist" in refusal(capsys, judge("http://127.0.0.1:9/v1"))
    assert "answers.jsonl does not exist" in refusal(capsys, proxy())


# The proxy.


def proxy(*more: str) -> list[str]:
    command = ["mt-bench", "proxy", "--answers", "answers.jsonl", "--model", "model", "--dtype", "float32"]
    return [*command, "--device", "cpu", *more]


def by_hand(model: Any, tokenizer: Any, prompt: str, text: str) -> tuple[float, float]:
    """Mean log-probability and entropy, one forward pass a token."""
    ids = tokenizer(prompt)["input_ids"]
    logs, entropies = [], []
    for token in tokenizer(text)["input_ids"]:
        shares = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), dim=-1).tolist()
        logs.append(math.log(shares[token]))
        entropies.append(-sum(share * math.log(share) for share in shares if share > 0))
        ids.append(token)
    return fmean(logs), fmean(entropies)


@torch.no_grad()
def test_the_proxy_is_named_one_and_equals_one_pass_a_token(
    place: Path, long_model: Any, tiny_tokenizer: Any, capsys: Any
) -> None:
    write_answers()
    assert main(proxy("--output", "proxy.json")) == 0
    assert capsys.readouterr().out.startswith("Proxy: ")
    found = json.loads(Path("proxy.json").read_text(encoding="utf-8"))
    assert "a proxy, no judgment of quality" in found["proxy"]
    figures = {}
    for number in (81, 111):
        one, two = load_questions()[number - 81].turns
        first, second = f"first {{answer}} {number}", f"second {number}"
        figures[number, 1] = by_hand(long_model, tiny_tokenizer, chat(one), first)
        figures[number, 2] = by_hand(long_model, tiny_tokenizer, chat(one, first, two), second)
    for index, name in enumerate(("log_likelihood", "entropy")):
        mean = {place: pair[index] for place, pair in figures.items()}
        assert found["mean"][name] == pytest.approx(fmean(mean.values()), abs=1e-4)
        assert found["turns"]["2"][name] == pytest.approx(fmean((mean[81, 2], mean[111, 2])), abs=1e-4)
        assert found["categories"]["math"][name] == pytest.approx(fmean((mean[111, 1], mean[111, 2])), abs=1e-4)
    assert (found["answers"], found["empty"], found["cut"]) == (4, 0, 0)


def test_a_proxy_that_cannot_be_written_was_printed(place: Path, capsys: Any, monkeypatch: Any) -> None:
    def full(*arguments: Any) -> None:
        raise ZeroTuningError("cannot write proxy.json: No space left on device")

    write_answers(ids=(81,))
    monkeypatch.setattr("zerotuning.files.write_json_atomically", full)
    assert main(proxy("--output", "proxy.json")) == 2
    assert capsys.readouterr().out.startswith("Proxy: ")


def test_the_proxy_under_scales_differs_and_empty_answers_are_counted(place: Path) -> None:
    write_answers(ids=(81,))
    record = {"question_id": 82, "model_id": "someone", "choices": [{"turns": ["", "words"]}]}
    with open("answers.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    assert main(proxy("--output", "untuned.json")) == 0
    assert main(proxy("--scales", "scales", "--output", "tuned.json")) == 0
    untuned, tuned = (json.loads(Path(f"{name}.json").read_text(encoding="utf-8")) for name in ("untuned", "tuned"))
    assert (untuned["answers"], untuned["empty"]) == (3, 1)
    assert abs(untuned["mean"]["log_likelihood"] - tuned["mean"]["log_likelihood"]) > 1e-3
