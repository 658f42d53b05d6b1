"""MT-Bench's judge against a local server that speaks the OpenAI protocol."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mt_bench_commands import judge, lines, refusal, write_answers
from zerotuning.cli.main import main
from zerotuning.mt_bench.judge import rating
from zerotuning.mt_bench.questions import load_questions


class StandIn(ThreadingHTTPServer):
    """Serves /v1/chat/completions on 127.0.0.1: records each request and responds with the result of `reply`."""

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


def test_judgments_before_a_server_error_are_kept_and_the_command_resumes(server: StandIn, capsys: Any) -> None:
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


def test_an_unreachable_judge_gets_one_line(place: Path, capsys: Any, monkeypatch: Any) -> None:
    pytest.importorskip("openai")
    write_answers()
    monkeypatch.setattr("openai._constants.INITIAL_RETRY_DELAY", 0.0)
    assert "cannot connect to the judge at http://127.0.0.1:9/v1" in refusal(capsys, judge("http://127.0.0.1:9/v1"))
    assert "must start with http" in refusal(capsys, judge("localhost"))
    unset = judge("http://127.0.0.1:9/v1", "--api-key-env", "NOT_SET_ANYWHERE")
    assert "NOT_SET_ANYWHERE, which should hold the API key, is not set" in refusal(capsys, unset)
    assert not Path("judged.jsonl").exists()


def test_a_missing_openai_package_is_an_error_that_names_the_extra(place: Path, capsys: Any, monkeypatch: Any) -> None:
    write_answers()
    monkeypatch.setitem(sys.modules, "openai", None)
    assert 'pip install "zerotuning[mt-bench]"' in refusal(capsys, judge("http://127.0.0.1:9/v1"))
