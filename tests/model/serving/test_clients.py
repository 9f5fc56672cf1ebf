"""Clients that misbehave, and what breaks while they are served: nothing is lost, and nobody else waits."""

import concurrent.futures
import contextlib
import http.client
import json
import logging
import random
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import openai
import pytest
from tiny_serving import ADAPTERS, ASK, LONG, Listening, make_service, text_of

from model.llama import Llama
from model.serving import app, protocol, slow_clients
from model.serving.engine import Engine


@pytest.fixture
def slow_steps(monkeypatch):
    """A long answer takes seconds, so that it cannot end before its client has left."""
    step = Engine.step

    def slow_step(engine):
        time.sleep(0.01)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)


@pytest.mark.parametrize("moment", ["mid-stream", "before the first token", "whole answer"])
def test_a_client_that_hangs_up_gives_its_pages_back(server, slow_steps, moment):
    engine = server.service.engine
    made = engine.counts["ended_cancelled"]
    stream = server.open_stream(LONG)
    if moment == "mid-stream":
        assert stream.recv(100).startswith(b"HTTP/1.1 200")
    elif moment == "before the first token":
        server.wait_until(lambda: server.service.running)
    elif moment == "whole answer":
        stream.close()
        stream = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        data = json.dumps(LONG).encode()
        stream.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        server.wait_until(lambda: engine.scheduler.running)
    stream.close()
    server.wait_until(lambda: engine.counts["ended_cancelled"] > made)
    server.wait_until_all_is_back()


def test_a_client_that_is_killed_gives_its_pages_back(server, slow_steps):
    engine = server.service.engine
    made = engine.counts["ended_cancelled"]
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-d", json.dumps(LONG | {"stream": True})]
    client = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert client.stdout.readline().startswith(b"data: ")
    client.kill()
    client.wait()
    client.stdout.close()
    server.wait_until(lambda: engine.counts["ended_cancelled"] > made)
    server.wait_until_all_is_back()


def test_a_slow_reader_blocks_nobody_and_misses_nothing(server, adapters):
    slow = server.open_stream(LONG | {"max_tokens": 100, "logprobs": 20})
    assert server.post("/v1/completions", ASK)[0] == 200
    server.wait_until(lambda: not server.service.engine.scheduler.running)
    received = b""
    while b"[DONE]" not in received:
        part = slow.recv(1 << 16)
        assert part
        received += part
    slow.close()
    chunks = [json.loads(line[6:]) for line in re.findall(rb"data: \{.*", received)]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == text_of(server.service, adapters, "tall", "x", max_tokens=100, eos_ids=())


HEADER = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("moment", ["at once", "after an answer"])
def test_a_client_that_never_ends_its_header_is_let_go(made, monkeypatch, moment):
    monkeypatch.setattr(slow_clients, "SLOWEST_HEADER", 0.4)
    monkeypatch.setattr(slow_clients, "_LOOK", 0.05)
    with Listening(made[0]) as server, socket.create_connection(("127.0.0.1", server.port), 60) as slow:
        running = server.open_stream(LONG)  # longer than 0.4 s, and nothing to end
        if moment == "after an answer":
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while b'{"status":"ok"}' not in answer:
                answer += slow.recv(1 << 16)
        slow.sendall(HEADER)
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(1 << 16) == b""
        received = b""
        while b"[DONE]" not in received:
            part = running.recv(1 << 16)
            assert part, "an answer was cut"
            received += part
        running.close()


def test_a_client_with_many_short_requests_is_not_slow(made, monkeypatch):
    """Whenever somebody looks its last request is answered, but it is another one each time."""
    monkeypatch.setattr(slow_clients, "SLOWEST_HEADER", 0.3)
    monkeypatch.setattr(slow_clients, "_LOOK", 0.05)
    with Listening(made[0]) as server, socket.create_connection(("127.0.0.1", server.port), 60) as busy:
        stop = time.monotonic() + 1.0
        while time.monotonic() < stop:
            busy.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while b'{"status":"ok"}' not in answer:
                answer += (part := busy.recv(1 << 16))
                assert part, "the connection was ended"


def test_a_body_that_does_not_come_is_a_408(server, monkeypatch):
    monkeypatch.setattr(app, "_SLOWEST_BODY", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), 60) as slow:
        slow.sendall(HEADER + b"Content-Length: 500\r\n\r\n{")
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "what, body",
    [
        ("lists and objects", b'{"prompt": [' + b"[]," * (1 << 18) + b"[]]}"),
        ("names", b"{" + b'"x":1,' * (1 << 18) + b'"prompt":"x"}'),
        ("values", b'{"prompt": [' + b"1," * (1 << 20) + b"1,1]}"),
    ],
    ids=("lists", "names", "values"),
)
def test_a_body_of_too_many_values_is_not_read(server, monkeypatch, what, body):
    """Reading 22 million empty lists takes 1.8 GB, 4 million names 1.2 GB, and nobody else is answered meanwhile."""
    monkeypatch.setattr(protocol, "parse_object", None)
    status, _, answer = server.post("/v1/completions", body)
    assert status == 413 and what in answer["error"]["message"]


def test_an_adapter_is_loaded_and_dropped_while_it_is_in_use(server, adapters, client):
    bearer = {"Authorization": "Bearer token"}
    status, _, body = server.post("/admin/adapters", {"name": "new", "path": "short"}, bearer)
    assert status == 201 and "new" in body["adapters"]
    text, dropped = "", False
    stream = client.completions.create(
        model="new", prompt="x", max_tokens=60, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    for chunk in stream:
        text += chunk.choices[0].text
        if not dropped:
            dropped = server.post("/admin/adapters/new", b"", bearer, "DELETE")[0] == 200
    assert dropped and text == text_of(server.service, adapters, "short", "x", max_tokens=60, eos_ids=())
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="new", prompt="x")
    for path, body, headers, method, expected in (
        ("/admin/adapters/new", b"", bearer, "DELETE", 404),
        ("/admin/adapters", {"name": "a b", "path": "short"}, bearer, "POST", 400),
        ("/admin/adapters", {"name": "tiny", "path": "short"}, bearer, "POST", 400),
        ("/admin/adapters", {"name": "tall", "path": "short"}, bearer, "POST", 400),
        ("/admin/adapters", {"name": "x"}, bearer, "POST", 400),
        ("/admin/adapters", {"name": "x", "path": "short"}, {}, "POST", 401),
        ("/admin/adapters", b"", {"Authorization": "Bearer tokens"}, "GET", 401),
    ):
        assert server.post(path, body, headers, method)[0] == expected, (path, body)
    assert server.service.engine.adapters == [*ADAPTERS, "sees"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_exception_inside_a_step_is_one_requests(server, adapters, client, monkeypatch, caplog, stream):
    forward = Llama.hidden_states

    def hidden_states(self, tokens, *args, **options):
        if (tokens == ord("!") + 3).any() and threading.current_thread().name == "engine":
            raise RuntimeError("an exception inside a step")
        return forward(self, tokens, *args, **options)

    expected = text_of(server.service, adapters, "tall", "y")
    monkeypatch.setattr(Llama, "hidden_states", hidden_states)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, caplog.at_level(logging.ERROR):
        other = pool.submit(client.completions.create, model="tall", prompt="y", max_tokens=12, temperature=0)
        with pytest.raises(openai.APIError, match="the server's log has the cause as error") as raised:
            list(client.completions.create(model="tall", prompt="bad!", max_tokens=5, stream=stream))
        assert other.result().choices[0].text == expected
    number = re.search(r"error (\w{8})", str(raised.value))[1]
    assert any(number in record.message and record.exc_info for record in caplog.records)
    server.wait_until_all_is_back()


def fuzzed(chance, count):
    """Bodies that are nearly right, and others that are not at all."""
    values = [
        None, True, -1, 0, 1, 2**63, 1e308, "", "x", "\x00\x1b", [], [[]], {}, {"a": [1]}, [None], "tall", -0.5,
        [1] * 50, "x" * 2000, [["x"]], [{"role": "user", "content": "x"}], [{"role": "user"}], [{"role": []}],
        {"include_usage": 1},
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}],
    ]  # fmt: skip
    names = ["model", "prompt", "messages", "n", "seed", "stop", "stream", "logprobs", "temperature", "top_p"]
    names += [
        "best_of",
        "max_tokens",
        "stream_options",
        "top_logprobs",
        "logit_bias",
        "echo",
        "suffix",
        "\U0001f600",
        "tools",
        "",
    ]
    for _ in range(count):
        body = {"model": chance.choice(["tall", "sees", "tiny"]), "prompt": "x", "max_tokens": 1}
        for _ in range(chance.randrange(1, 4)):
            body[chance.choice(names)] = chance.choice(values)
        data = bytearray(json.dumps(body).encode())
        if chance.random() < 0.5:
            for _ in range(chance.randrange(1, 4)):
                place = chance.randrange(len(data))
                change = chance.randrange(3)
                if change == 0:
                    data[place] = chance.randrange(256)
                elif change == 1:
                    del data[place:]
                    data += b"}"
                else:
                    data[place:place] = chance.choice(
                        [b"{", b'"', b"\\u", b"\xf0\x9f", b",", b"1e999", b"null"]
                    )
        yield bytes(data)


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS"))


def test_no_part_of_an_answer_waits_for_the_one_before(server):
    """Nagle's algorithm would hold the body of a response, and a token of a stream, for 40 ms."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        assert connection.getresponse().read() is not None
        connections = list(server._server.server_state.connections)
        sockets = [one.transport.get_extra_info("socket") for one in connections]
        assert sockets and all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets)


def test_malformed_bodies_are_refused_and_cost_nothing(tmp_path, caplog):
    """Every response is a refusal or an answer; no memory stays behind, no request, no page."""
    service, _ = make_service(tmp_path, cache_tokens=48)  # answers without a limit are short
    with Listening(service) as server:
        fuzz(server, caplog)


def fuzz(server, caplog):
    chance, seen, at_half = random.Random(0), set(), 0
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for place, body in enumerate(fuzzed(chance, 1000)):
        route = chance.choice(["/v1/completions", "/v1/chat/completions"])
        connection.request("POST", route, body)
        response = connection.getresponse()
        content = response.read()
        seen.add(response.status)
        assert response.status in (200, 400, 404), (body, content)
        if response.status != 200:
            assert json.loads(content)["error"]["message"], body
        if place == 500:
            at_half = resident()
    connection.close()
    assert seen == {200, 400, 404} and not [r for r in caplog.records if r.levelno >= logging.ERROR]
    server.wait_until_all_is_back()
    assert resident() - at_half < 24, "MiB, after the second half"
