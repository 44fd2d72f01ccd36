"""The judge against a server on loopback: what is sent, how a score is read, what is tried again and what fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from framework.environments.judge import Judge
from framework.errors import ConfigError, EnvironmentFailure


class Server(BaseHTTPRequestHandler):
    """Answers the n-th request with the n-th reply: a status, or the text of a chat completion."""

    replies: Sequence[int | str]
    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        reply = self.replies[len(self.seen) - 1]
        text = json.dumps({"choices": [{"message": {"content": reply}}]}) if isinstance(reply, str) else "no"
        self.send_response(200 if isinstance(reply, str) else reply)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serve(*replies: int | str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL, and every request as it comes."""
    seen: list[dict[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Replies", (Server,), {"replies": replies, "seen": seen}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def judge(url: str, **args: Any) -> Judge:
    return Judge(url=url, model="judge-1", wait_s=0.01, **args)


def test_question_reference_and_answer_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k")
    with serve("Fine.\nScore: 7") as (url, seen):
        assert judge(url, api_key_env="JUDGE_KEY")("four", question="2+2?", answer="4", level=3) == 0.7
    (request,) = seen
    assert (request["path"], request["key"], request["model"]) == ("/v1/chat/completions", "Bearer k", "judge-1")
    assert request["temperature"] == 0.0
    assert request["messages"][1]["content"] == ("Question:\n2+2?\n\nReference answer:\n4\n\nAnswer to grade:\nfour")


@pytest.mark.parametrize(
    ("text", "score"),
    [("Score: 10", 1.0), ("score: **2.5**", 0.25), ("Score: 3 at first.\nScore: 8", 0.8), ("SCORE : 0", 0.0)],
)
def test_the_last_score_counts(text: str, score: float) -> None:
    with serve(text) as (url, _):
        assert judge(url)("x", question="?") == score


def test_a_busy_server_and_an_answer_without_a_score_are_tried_again() -> None:
    with serve(503, 429, "I cannot say.", "Score: 4") as (url, seen):
        assert judge(url, attempts=4)("x", question="?") == 0.4
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("replies", "attempts", "num_requests", "message"),
    [
        ([500, 500, "Score: 5"], 2, 2, "failed 2 times: status 500"),
        (["Score: 11", "none"], 2, 2, "no 'Score: <0 to 10>' in its answer: 'none'"),
        ([401, "Score: 5"], 4, 1, "refuses: status 401"),
    ],
)
def test_a_judge_that_gives_no_score_fails(
    replies: list[int | str], attempts: int, num_requests: int, message: str
) -> None:
    with serve(*replies) as (url, seen), pytest.raises(EnvironmentFailure, match=message):
        judge(url, attempts=attempts)("x", question="?")
    assert len(seen) == num_requests


def test_a_server_that_is_not_there_fails() -> None:
    with pytest.raises(
        EnvironmentFailure, match=r"judge-1 at http://127\.0\.0\.1:9/v1/chat/completions failed 2 times"
    ):
        judge("http://127.0.0.1:9/v1", attempts=2)("x", question="?")


def test_a_url_must_be_one() -> None:
    with pytest.raises(ConfigError, match=r"reward_args\.url='localhost': must begin with http"):
        judge("localhost")
