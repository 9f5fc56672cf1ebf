"""The server as clients see it: the official client, curl, and everything that goes wrong between them and it."""

import base64
import concurrent.futures
import http.client
import io
import json
import logging
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image
from repository import ROOT
from tiny_serving import ADAPTERS, Listening, make_service

from model.llama import Llama
from model.sampling import generate
from model.serving.app import check_name
from model.serving.protocol import read_completion
from model.vision.files import save_adapter


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A base with a tokenizer, and the adapters' files; written by none."""
    folder = tmp_path_factory.mktemp("serving") / "base"
    service, adapters = make_service(folder)
    for name in ADAPTERS:
        save_adapter(folder.parent / f"{name}.safetensors", adapters[name], service.engine.model.config)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The service and its adapters by name."""
    return make_service(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(made):
    return made[1]


@pytest.fixture(scope="module")
def server(made):
    with Listening(made[0], admin_token="token", load=lambda path: made[1][path]) as listening:
        yield listening


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def text_of(server, adapters, name, prompt, seed=0, max_tokens=12, temperature=0.0, eos_ids=None):
    """What `generate` answers this prompt alone."""
    tokenizer, base = server.service.tokenizer, server.service.engine.model
    ids = tokenizer.encode(prompt, eos=False) if isinstance(prompt, str) else prompt
    options = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": 1.0, "seed": seed}
    return tokenizer.decode(generate(base, [ids], adapters[name], eos_ids=eos_ids, **options)[0])


@pytest.mark.parametrize("name", ["tiny", *ADAPTERS])
def test_the_official_client_gets_what_generate_gives(server, adapters, client, name):
    asked = {"model": name, "prompt": "Say it.", "max_tokens": 12}
    greedy = client.completions.create(**asked, temperature=0)
    assert greedy.choices[0].text == text_of(server, adapters, name, "Say it.")
    assert (greedy.usage.prompt_tokens, greedy.usage.completion_tokens) == (8, 12)
    seeded = client.completions.create(**asked, temperature=1.0, seed=5, n=3)
    expected = [text_of(server, adapters, name, "Say it.", 5 + i, temperature=1.0) for i in range(3)]
    assert [choice.text for choice in seeded.choices] == expected and len(set(expected)) == 3
    streamed = ["", "", ""]
    for chunk in client.completions.create(**asked, temperature=1.0, seed=5, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected


def test_models_are_the_base_and_its_adapters(server, client):
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", *ADAPTERS, "sees"]
    assert client.models.retrieve("tall").id == "tall"
    with pytest.raises(openai.NotFoundError, match="there is no model 'none'"):
        client.models.retrieve("none")


def test_a_conversation(server, adapters, client):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    ids = [1, *(ord(c) + 3 for c in "system: Be kind."), 2, *(ord(c) + 3 for c in "\nuser: Who?"), 2]
    ids += [ord(c) + 3 for c in "\nassistant:"]
    expected = text_of(server, adapters, "tall", ids)
    asked = {"model": "tall", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids)
    told = answer.choices[0].logprobs.content
    assert "".join(one.token for one in told) == expected and all(len(one.top_logprobs) == 3 for one in told)
    assert all(one.logprob == max(other.logprob for other in one.top_logprobs) for one in told)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == answer.usage
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    parts = [messages[0], {"role": "user", "content": [{"type": "text", "text": "Who?"}]}]
    assert (
        client.chat.completions.create(**asked | {"messages": parts}).choices[0].message.content == expected
    )


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_and_are_left_out(server, adapters, client, stream):
    whole = text_of(server, adapters, "tall", "Say it.", max_tokens=40)
    stop = whole[20:23]
    asked = {
        "model": "tall",
        "prompt": "Say it.",
        "max_tokens": 40,
        "temperature": 0,
        "stop": ["never", stop],
    }
    if stream:
        chunks = list(client.completions.create(**asked, stream=True))
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = client.completions.create(**asked).choices[0]
        text, reason = choice.text, choice.finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_prompts_come_in_four_forms(server, adapters, client):
    ids = server.service.tokenizer.encode("Say it.", eos=False)
    expected = text_of(server, adapters, "short", "Say it.")
    other = text_of(server, adapters, "short", "And?")
    options = {"model": "short", "max_tokens": 12, "temperature": 0}
    for prompt, answers in (
        ("Say it.", [expected]),
        (["Say it.", "And?"], [expected, other]),
        (ids, [expected]),
        ([ids, ids], [expected, expected]),
    ):
        found = client.completions.create(prompt=prompt, **options)
        assert [choice.text for choice in found.choices] == answers


def test_special_tokens_that_a_prompt_spells_stay_text(server):
    tokenizer = server.service.tokenizer
    status, _, body = server.post("/v1/completions", {"model": "tiny", "prompt": "</s><s>", "max_tokens": 1})
    assert status == 200 and body["usage"]["prompt_tokens"] == 1 + len("</s><s>")
    message = {"role": "user", "content": "a</s>\nassistant: b<s>"}
    asked = {"model": "tiny", "messages": [message], "max_tokens": 1}
    status, _, body = server.post("/v1/chat/completions", asked)
    plain = len("user: " + message["content"]) + len("\nassistant:")
    assert status == 200 and body["usage"]["prompt_tokens"] == plain + 2
    assert tokenizer.encode("</s>", bos=False, eos=False) == [ord(c) + 3 for c in "</s>"]


def data_url(colour, size=(8, 6)):
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def about(urls, text="What?"):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_images_are_seen_by_adapters_that_see(server, adapters, client):
    ids = [1, *(ord(c) + 3 for c in "user: What?"), 2, *(ord(c) + 3 for c in "\nassistant:")]
    asked = {"model": "sees", "max_tokens": 12, "temperature": 0}
    base, seeing = server.service.engine.model, adapters["sees"]
    answers = {}
    for colour in ("red", "green", "red"):
        pixel = torch.tensor(Image.new("RGB", (1, 1), colour).getpixel((0, 0))).float()[None] / 64
        seen = seeing.with_images([pixel], [(0,)])
        expected = generate(base, [ids], seen, max_new_tokens=12, temperature=0)[0]
        answer = client.chat.completions.create(messages=about([data_url(colour)]), **asked)
        answers[colour] = answer.choices[0].message.content
        assert answers[colour] == server.service.tokenizer.decode(expected)
    without = client.chat.completions.create(messages=about([]), **asked).choices[0].message.content
    assert without == text_of(server, adapters, "sees", ids)
    assert len({*answers.values(), without}) == 3
    assert seeing.source.encoder.images == 2  # the second red one was remembered
    server.wait_until(lambda: server.service.engine.table.used == len(server.service.engine.adapters))


@pytest.mark.parametrize(
    "model, url, sentence",
    [
        (
            "sees",
            "https://example.org/cat.png",
            "image 1 must be a data URL .*, since this server fetches nothing",
        ),
        ("sees", "file:///etc/passwd", "must be a data URL"),
        ("sees", "data:image/png;base64,####", "image 1 is not valid base64"),
        ("sees", "data:image/png;base64,aGVsbG8=", "image 1 is no image in a known format"),
        ("tall", data_url("red"), "the model 'tall' takes no images"),
        ("tiny", data_url("red"), "the model 'tiny' takes no images"),
    ],
)
def test_images_that_are_refused(server, model, url, sentence):
    status, _, body = server.post("/v1/chat/completions", {"model": model, "messages": about([url])})
    assert status == 400 and re.search(sentence, body["error"]["message"]), body


ASK = {"model": "tall", "prompt": "x", "max_tokens": 2}


@pytest.mark.parametrize(
    "body, status, sentence",
    [
        (b"", 400, "not valid JSON"),
        (b"\xff\xfe{", 400, "not valid JSON"),
        (b'{"model": "tall", "prompt": "\xff"}', 400, "not valid JSON"),
        (b'{"model": "tall", "prompt": "\\ud800"}', 400, "half a surrogate pair"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"[1]", 400, "must hold a JSON object"),
        (b'{"n": 1, "n": 2}', 400, "says 'n' twice"),
        ({"prompt": "x"}, 400, "model is missing"),
        ({"model": "none", "prompt": "x"}, 404, "there is no model 'none'"),
        ({"model": "tall"}, 400, "prompt is missing"),
        ({**ASK, "prompt": []}, 400, "prompt must be"),
        ({**ASK, "prompt": [1, "x"]}, 400, "prompt must be"),
        ({**ASK, "prompt": [200]}, 400, "outside the model's vocabulary of 131"),
        ({**ASK, "prompt": [-1]}, 400, "outside the model's vocabulary"),
        ({**ASK, "prompt": "x" * 600}, 400, "longer than the model's context of 512"),
        ({**ASK, "prompt": "x" * 505, "max_tokens": 20}, 400, "ask for at most 6 new tokens"),
        ({**ASK, "max_tokens": 0}, 400, "max_tokens must be a whole number from 1"),
        ({**ASK, "max_tokens": True}, 400, "max_tokens must be"),
        ({**ASK, "temperature": -1}, 400, "temperature must be"),
        (b'{"model": "tall", "prompt": "x", "temperature": NaN}', 400, "temperature must be"),
        ({**ASK, "top_p": 0}, 400, "top_p must be"),
        ({**ASK, "n": 129}, 400, "n must be a whole number from 1 to 128"),
        ({**ASK, "prompt": ["x"] * 100, "n": 2}, 400, "may have 128 answers, this one asks for 200"),
        ({**ASK, "seed": 1.5}, 400, "seed must be"),
        ({**ASK, "stop": [""]}, 400, "stop must be"),
        ({**ASK, "stop": ["x"] * 17}, 400, "stop must be"),
        ({**ASK, "logprobs": 21}, 400, "logprobs must be"),
        ({**ASK, "stream": "yes"}, 400, "stream must be true or false"),
        ({**ASK, "presence_penalty": 0.5}, 400, "presence_penalty = 0.5 is not supported"),
        ({**ASK, "tools": [{}]}, 400, "tools = .* is not supported"),
        ({**ASK, "x\x1b": 1}, 400, r"x\\x1b = 1 is not supported"),
    ],
)
def test_what_is_malformed_is_refused_in_openais_form(server, body, status, sentence):
    found, headers, content = server.post("/v1/completions", body)
    error = content["error"]
    assert found == status and re.search(sentence, error["message"]), content
    assert (
        error.keys() == {"message", "type", "param", "code"} and headers["content-type"] == "application/json"
    )
    if "context" in sentence or "at most 6" in sentence:
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "message, sentence",
    [
        ({"role": "tool", "content": "x"}, "role must be one of"),
        ({"role": "user", "content": 5}, "content must be a text or a list of parts"),
        ({"role": "user", "content": [{"type": "audio"}]}, "a part of messages.0..content must be"),
        ({"role": "assistant", "content": "", "tool_calls": [1]}, "tool_calls is not supported"),
        ("x", "messages.0. must be an object"),
    ],
)
def test_messages_that_are_refused(server, message, sentence):
    status, _, body = server.post("/v1/chat/completions", {"model": "tall", "messages": [message]})
    assert status == 400 and re.search(sentence, body["error"]["message"])


def test_fields_that_are_off_are_accepted(server):
    off = {"presence_penalty": 0, "logit_bias": {}, "tools": [], "suffix": None, "echo": False, "user": "me"}
    off |= {"best_of": 1, "response_format": {"type": "text"}}
    assert server.post("/v1/completions", ASK | off)[0] == 200


def test_other_routes_and_methods(server):
    for method, path, status in (
        ("GET", "/v2", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
    ):
        found, _, body = server.post(path, b"", method=method)
        assert found == status and body["error"]["type"] == "invalid_request_error", body


def test_a_body_that_is_too_large_is_not_read(server, monkeypatch):
    monkeypatch.setattr("model.serving.app.LARGEST_BODY", 1000)
    assert server.post("/v1/completions", ASK | {"prompt": "x" * 2000})[0] == 413
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    stream = server.open_stream(ASK)
    stream.close()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
        raw.sendall(head + b"7d0\r\n" + b"x" * 2000 + b"\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_large_body_is_read_while_others_are_answered(server, monkeypatch):
    """To look at millions of token ids takes seconds: not in the thread that answers."""
    begun, answered = threading.Event(), threading.Event()

    def read(body):
        begun.set()
        assert answered.wait(10), "nobody was answered meanwhile"
        return read_completion(body)

    monkeypatch.setattr("model.serving.app.read_completion", read)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        large = pool.submit(server.post, "/v1/completions", ASK | {"user": "x" * 70_000})
        assert begun.wait(60)
        assert server.post("/health", b"", method="GET")[0] == 200
        answered.set()
        assert large.result()[0] == 200


def test_more_answers_than_may_ever_wait_are_refused_for_good(tmp_path):
    service, _ = make_service(tmp_path, max_waiting=4)
    with Listening(service) as server:
        for asked in ({"n": 5}, {"prompt": ["x"] * 5}, {"prompt": ["x"] * 3, "n": 2}):
            status, _, body = server.post("/v1/completions", ASK | asked)
            assert status == 400 and "answers, and 4 may wait" in body["error"]["message"]
        assert server.post("/v1/completions", ASK | {"n": 4})[0] == 200


def test_texts_do_not_wait_for_images(server, adapters, monkeypatch):
    """Many requests whose images are still being encoded leave a thread for a text's prompt."""
    encoder = adapters["sees"].source.encoder
    encode, begun, answered = encoder.encode, threading.Event(), threading.Event()

    def slowly(*images):
        begun.set()
        answered.wait(60)
        return encode(*images)

    monkeypatch.setattr(encoder, "encode", slowly)
    asked = {"model": "sees", "messages": about([data_url("#123456")]), "max_tokens": 1}
    with concurrent.futures.ThreadPoolExecutor(41) as pool:  # asyncio's own threads are at most 32
        seeing = [pool.submit(server.post, "/v1/chat/completions", asked) for _ in range(40)]
        assert begun.wait(60)
        server.wait_until(lambda: server.service._starting == 40)
        text = pool.submit(server.post, "/v1/completions", ASK)
        concurrent.futures.wait([text], timeout=20)
        in_time = text.done()
        answered.set()
        assert in_time and text.result()[0] == 200
        assert [one.result()[0] for one in seeing] == [200] * 40


LONG = {"model": "tall", "prompt": "x", "max_tokens": 500, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize("moment", ["mid-stream", "before the first token", "whole answer"])
def test_a_client_that_hangs_up_gives_its_pages_back(server, moment):
    engine = server.service.engine
    made = engine.counts["ended_cancelled"]
    stream = server.open_stream(LONG)
    if moment == "mid-stream":
        assert stream.recv(100).startswith(b"HTTP/1.1 200")
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


def test_a_client_that_is_killed_gives_its_pages_back(server):
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
    assert text == text_of(server, adapters, "tall", "x", max_tokens=100, eos_ids=())


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
    assert dropped and text == text_of(server, adapters, "short", "x", max_tokens=60, eos_ids=())
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


def test_keys_are_asked_for_where_there_are_some_and_a_full_queue_says_so(tmp_path):
    service, _ = make_service(tmp_path, max_running=1, max_waiting=2)
    with Listening(service, api_keys=["secret", "other"]) as server:
        bearer = {"Authorization": "Bearer other"}
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic other"}):
            status, _, body = server.post("/v1/completions", ASK, headers)
            assert status == 401 and body["error"]["code"] == "invalid_api_key"
            assert server.post("/v1/models", b"", headers, "GET")[0] == 401
        assert server.post("/v1/completions", ASK, bearer)[0] == 200
        assert (
            server.post("/admin/adapters", b"", bearer, "GET")[0] == 404
        )  # without a token there are no such routes
        assert server.post("/health", b"", method="GET")[0] == 200
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            asked = LONG | {"max_tokens": 10}
            found = list(pool.map(lambda _: server.post("/v1/completions", asked, bearer), range(12)))
        statuses = [status for status, _, _ in found]
        assert set(statuses) == {200, 429} and statuses.count(429) >= 1
        refused = next(one for one in found if one[0] == 429)
        assert 1 <= int({k.lower(): v for k, v in refused[1].items()}["retry-after"]) <= 60
        assert refused[2]["error"]["type"] == "rate_limit_error"
        server.wait_until_all_is_back()
        service.draining = True
        status, headers, body = server.post("/v1/completions", ASK, bearer)
        assert status == 503 and "retry-after" in {name.lower() for name in headers}
        assert server.post("/health", b"", method="GET")[0] == 503


@pytest.mark.parametrize("stream", [False, True])
def test_an_exception_inside_a_step_is_one_requests(server, adapters, client, monkeypatch, caplog, stream):
    forward = Llama.hidden_states

    def hidden_states(self, tokens, *args, **options):
        if (tokens == ord("!") + 3).any() and threading.current_thread().name == "engine":
            raise RuntimeError("an exception inside a step")
        return forward(self, tokens, *args, **options)

    expected = text_of(server, adapters, "tall", "y")
    monkeypatch.setattr(Llama, "hidden_states", hidden_states)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, caplog.at_level(logging.ERROR):
        other = pool.submit(client.completions.create, model="tall", prompt="y", max_tokens=12, temperature=0)
        with pytest.raises(openai.APIError, match="the server's log has the cause as error") as raised:
            list(client.completions.create(model="tall", prompt="bad!", max_tokens=5, stream=stream))
        assert other.result().choices[0].text == expected
    number = re.search(r"error (\w{8})", str(raised.value))[1]
    assert any(number in record.message and record.exc_info for record in caplog.records)
    server.wait_until_all_is_back()


def test_metrics_are_prometheus_text(server):
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = response.read().decode()
    line = re.compile(r'(# (HELP|TYPE) zinit_\w+ .+|zinit_\w+(\{(\w+="[^"]*",?)+\})? -?[\d.e+]+)')
    assert all(line.fullmatch(one) for one in text.splitlines())
    for name in (
        "requests_waiting 0",
        "requests_running 0",
        'new_tokens_total{adapter="tall"}',
        "tokens_per_second",
    ):
        assert f"zinit_{name}" in text


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


@pytest.mark.parametrize("name", ["", "a b", "a\n", "é", "x" * 129, "a?b", 'a"', "..", "a/../b", "/", "a//b"])
def test_names_that_cannot_be_asked_for(name):
    from model.errors import UserError

    with pytest.raises(UserError, match="1 to 128 letters"):
        check_name(name)


def start(folder, *options):
    """The program in a process of its own, and its address."""
    named = [
        word for name in ADAPTERS for word in ("--adapter", f"{name}={folder.parent / name}.safetensors")
    ]
    command = [
        sys.executable,
        "-m",
        "model.serve",
        "--base",
        str(folder),
        *named,
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    line = process.stderr.readline()
    assert "serving base, tall, short, identity on http://127.0.0.1:" in line, line + process.stderr.read()
    return process, re.search(r"http://\S+?(?=/v1)", line)[0]


def test_the_program_answers_curl_and_drains_at_sigterm(server, adapters, base_folder, tmp_path):
    """SIGTERM under load: streams are finished, new requests are told to go elsewhere, and it exits with 0."""
    process, url = start(base_folder)

    def curl(*words):
        return subprocess.run(["curl", "-s", *words], capture_output=True, text=True, timeout=120).stdout

    with process:
        assert json.loads(curl(f"{url}/health")) == {"status": "ok"}
        assert [m["id"] for m in json.loads(curl(f"{url}/v1/models"))["data"]] == ["base", *ADAPTERS]
        found = curl("-o", str(tmp_path / "x"), "-w", "%{http_code}", f"{url}/v1/completions", "-d", "{")
        assert found == "400"
        body = json.dumps(LONG | {"stream": True, "max_tokens": 150})
        streams = [
            subprocess.Popen(
                ["curl", "-sN", f"{url}/v1/completions", "-d", body], stdout=subprocess.PIPE, text=True
            )
            for _ in range(3)
        ]
        firsts = [stream.stdout.readline() for stream in streams]
        process.send_signal(signal.SIGTERM)
        assert "draining" in process.stderr.readline()
        refused = curl("-w", "%{http_code}", f"{url}/v1/completions", "-d", json.dumps(ASK))
        assert refused.endswith("503") and "shutting down" in refused
        expected = text_of(server, adapters, "tall", "x", max_tokens=150, eos_ids=())
        for first, stream in zip(firsts, streams, strict=True):
            said = first + stream.stdout.read()
            stream.stdout.close()
            assert stream.wait() == 0
            chunks = [json.loads(line[6:]) for line in re.findall(r"data: \{.*", said)]
            assert "".join(c["choices"][0]["text"] for c in chunks) == expected
            assert said.rstrip().endswith("data: [DONE]")
        assert process.wait(60) == 0


def test_a_request_that_never_comes_to_its_end_does_not_hold_up_the_end(base_folder):
    """Half a body at SIGTERM: its client may have gone long ago."""
    process, url = start(base_folder)
    with process, socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        assert json.load(urllib.request.urlopen(f"{url}/health", timeout=60)) == {"status": "ok"}
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(45) == 0
        finally:
            process.kill()
        said = process.stderr.read()
        assert said.count("\n") == 1 and "draining: 0 requests" in said


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--adapter", "x"], "--adapter must be NAME=FILE, got 'x'"),
        (["--adapter", "a b=x"], "1 to 128 letters"),
        (["--adapter", "x=/nowhere"], "/nowhere"),
        (["--port", "70000"], "--port must lie in 0 .. 65535"),
        (["--host", "203.0.113.1", "--port", "0"], "203.0.113.1, port 0, cannot be listened on"),
        (["--api-key", ""], "--api-key must not be empty"),
        (["--admin-token", ""], "--admin-token must not be empty"),
        (["--chunk", "0"], "chunk must be at least 1"),
        (["--cache-tokens", "3"], "the cache must hold at least 16 tokens"),
        (["--backend", "foo"], "--backend foo"),
        (["--adapter", "base={tall}"], "'base' is the name of the base"),
        (["--adapter", "x={tall}", "--adapter", "x={tall}"], "there is an adapter 'x' already"),
    ],
)
def test_the_program_refuses_in_one_sentence(base_folder, capsys, options, sentence):
    from model.errors import run_program
    from model.serve import main

    options = [option.format(tall=base_folder.parent / "tall.safetensors") for option in options]
    if "--cache-tokens" not in options:
        options += ["--cache-tokens", "1024"]
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: main(["--base", str(base_folder), "--device", "cpu", *options]))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in told and told.count("\n") == 1, told
