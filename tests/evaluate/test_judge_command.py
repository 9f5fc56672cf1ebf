"""The pairwise judge against a server on this machine: both orders, retries, resuming, and what is refused."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from evaluate_program import run

from evaluate import chat_server, judge_command


class Judge:
    """A server that answers by `rule`, a function of the body; an exception's number is the status."""

    def __init__(self):
        self.bodies, self.keys, self.rule = [], [], lambda body: "5 5"
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.bodies.append(body)
                judge.keys.append(self.headers.get("Authorization"))
                found = judge.rule(body) if self.path == "/v1/chat/completions" else 404
                status = found if isinstance(found, int) else 200
                answer = (
                    {"choices": [{"message": {"content": found}}]} if status == 200 else {"error": "no more"}
                )
                content = found if isinstance(found, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(chat_server.ChatServer.__init__, "__defaults__", (10.0, 0.001))
    judge = Judge()
    thread = threading.Thread(target=judge.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield judge
    judge.server.shutdown()
    judge.server.server_close()
    thread.join()


@pytest.fixture
def files(tmp_path):
    questions = [
        {"question_id": n, "category": kind, "turns": [f"What is {n}?", "And then?"]}
        for n, kind in enumerate(["generic", "math", "coding", "generic"], 1)
    ]
    ours = [{"id": str(n), "answer": "good " * (5 - n)} for n in range(1, 5)]
    theirs = [{"question_id": n, "choices": [{"turns": ["good good", "x"]}]} for n in range(1, 5)]
    for name, rows in (("question", questions), ("ours", [{"run": {}}, *ours]), ("theirs", theirs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def command(files, server, *more, out="out"):
    given = {"questions": "question.jsonl", "ours": "ours.jsonl", "theirs": "theirs.jsonl", "out": out}
    words = [word for name, path in given.items() for word in (f"--{name}", files / path)]
    return ["judge", *words, "--endpoint", server.address, "--judge", "tiny", *more]


def by_length(body):
    """Prefers the answer with more words, whatever its place."""
    text = body["messages"][1]["content"]
    first, second = (
        len(text.split(f"[The {place} answer]\n")[1].split("\n[End of")[0].split())
        for place in ("first", "second")
    )
    return f"{min(first + 4, 10)} {min(second + 4, 10)}\nBy length."


def test_both_orders_are_asked_and_the_verdicts_kept(files, server, capsys, monkeypatch):
    server.rule = by_length
    monkeypatch.setenv("MY_KEY", "secret")
    assert run(*command(files, server, "--key-variable", "MY_KEY")) == 0
    assert len(server.bodies) == 8 and set(server.keys) == {"Bearer secret"}
    assert {(body["model"], body["temperature"]) for body in server.bodies} == {("tiny", 0)}
    result = json.loads((files / "out" / "result.json").read_text())
    assert result["tables"][0]["rows"][-1] == ["all", 2, 1, 1, 4]  # 4, 3, 2 and 1 words against 2
    lines = (files / "out" / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 9 and "secret" not in "".join(lines)
    asked = {line["id"]: line["answer"] for line in map(json.loads, lines[1:])}
    assert asked["1/ours first"].startswith("8 6") and asked["1/theirs first"].startswith("6 8")
    prompts = [body["messages"][1]["content"] for body in server.bodies]
    assert sum(judge_command.CRITERIA["math"] in text for text in prompts) == 2
    assert run(*command(files, server, "--key-variable", "MY_KEY")) == 0 and len(server.bodies) == 8
    capsys.readouterr()
    server.rule = lambda body: "[[A]]"  # always the first
    assert run(*command(files, server, "--form", "marks", out="marks")) == 0
    assert json.loads((files / "marks" / "result.json").read_text())["tables"][0]["rows"][-1] == [
        "all",
        0,
        4,
        0,
        4,
    ]
    server.rule = lambda body: "I cannot say."
    assert run(*command(files, server, out="unread")) == 0
    assert "4 of 4 pairs have a verdict that no rule reads" in capsys.readouterr().out


def test_a_busy_server_is_asked_again_and_a_dead_one_resumed(files, server, capsys):
    busy = iter([429, 503])
    server.rule = lambda body: next(busy, "8 7")
    assert run(*command(files, server, "--batch-size", 1)) == 0
    assert len(server.bodies) == 10
    answered = iter(["8 7"] * 3)
    server.rule = lambda body: next(answered, 500)
    assert run(*command(files, server, "--batch-size", 1, out="dead")) == 2
    assert "answered 500 Internal Server Error" in capsys.readouterr().err
    assert len((files / "dead" / "verdicts.jsonl").read_text().splitlines()) == 4
    server.bodies.clear()
    server.rule = lambda body: "8 7"
    assert run(*command(files, server, "--batch-size", 1, out="dead")) == 0
    assert len(server.bodies) == 5, "what was judged is not judged again"
    judged = []
    server.rule = lambda body: (
        400 if "[[A]]" in body["messages"][1]["content"] and len(judged) > 2 else judged.append(0) or "[[C]]"
    )
    assert run(*command(files, server, "--batch-size", 8, "--form", "marks", out="one")) == 2
    assert len((files / "one" / "verdicts.jsonl").read_text().splitlines()) == 1 + len(judged), (
        "none of a batch is lost"
    )


def test_what_is_wrong_is_one_sentence(files, server, capsys):
    short = files / "short.jsonl"
    short.write_text('{"question_id": 1, "text": "x"}\n')
    twice = files / "twice.jsonl"
    twice.write_text('{"question_id": 1, "text": "x"}\n' * 2)
    odd = files / "odd.jsonl"
    odd.write_text('{"question_id": 1}\n')
    words = command(files, server)

    def with_(option, value):
        place = words.index(option)
        return [*words[: place + 1], value, *words[place + 2 :]]

    server.rule = lambda body: 401
    cases = [
        (words, 'answered 401 Unauthorized: {"error": "no more"}'),
        (with_("--endpoint", "http://127.0.0.1:9/v1"), "cannot be reached"),
        (with_("--endpoint", "localhost"), "must be an address"),
        (with_("--endpoint", "http://local host/v1"), "must be an address"),
        (with_("--endpoint", "http://localhost:x/v1"), "must be an address"),
        (with_("--endpoint", "http://[::1/v1"), "must be an address"),
        (with_("--endpoint", "http://a\nb/v1"), "must be an address"),
        (with_("--endpoint", "file:///etc/passwd"), "must be an address"),
        (with_("--theirs", short), "no answer to 3 of 4 questions, the first is 2"),
        (with_("--theirs", twice), "the id '1' is there twice"),
        (with_("--theirs", odd), "expected the field answer"),
        (with_("--theirs", files / "none"), "there is no"),
        (with_("--questions", files), None),
        ([*words, "--batch-size", "0"], "--batch-size must be at least 1"),
    ]
    for given, said in cases:
        if said is not None:
            assert run(*given) == 2, given
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    server.rule = lambda body: b"<html>"
    assert run(*words) == 2 and "is no OpenAI-compatible server" in capsys.readouterr().err
    server.rule = lambda body: "8 7"
    assert run(*words) == 0
    assert run(*with_("--judge", "other")) == 2
    assert "another run: its judge is" in capsys.readouterr().err
