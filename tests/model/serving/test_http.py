"""The HTTP surface as clients see it: the official client, what is asked for, and what is refused."""

import base64
import concurrent.futures
import io
import re
import socket
import threading
import urllib.request

import openai
import pytest
import torch
from PIL import Image
from tiny_serving import ADAPTERS, ASK, LONG, Listening, make_service, text_of

from model.sampling import generate
from model.serving.app import check_name
from model.serving.protocol import read_completion


@pytest.mark.parametrize("name", ["tiny", *ADAPTERS])
def test_the_official_client_gets_what_generate_gives(server, adapters, client, name):
    asked = {"model": name, "prompt": "Say it.", "max_tokens": 12}
    greedy = client.completions.create(**asked, temperature=0)
    assert greedy.choices[0].text == text_of(server.service, adapters, name, "Say it.")
    assert (greedy.usage.prompt_tokens, greedy.usage.completion_tokens) == (8, 12)
    seeded = client.completions.create(**asked, temperature=1.0, seed=5, n=3)
    expected = [text_of(server.service, adapters, name, "Say it.", 5 + i, temperature=1.0) for i in range(3)]
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
    expected = text_of(server.service, adapters, "tall", ids)
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
    whole = text_of(server.service, adapters, "tall", "Say it.", max_tokens=40)
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
    expected = text_of(server.service, adapters, "short", "Say it.")
    other = text_of(server.service, adapters, "short", "And?")
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
    assert without == text_of(server.service, adapters, "sees", ids)
    assert len({*answers.values(), without}) == 3
    assert seeing.source.encoder.images == 2  # the second red one was remembered
    server.wait_until(lambda: server.service.engine.table.used == len(server.service.engine.adapters))


@pytest.mark.parametrize(
    "model, url, sentence",
    [
        ("sees", "https://example.org/cat.png", "must be a data URL .*, since this server fetches nothing"),
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


@pytest.mark.parametrize("name", ["", "a b", "a\n", "é", "x" * 129, "a?b", 'a"', "..", "a/../b", "/", "a//b"])
def test_names_that_cannot_be_asked_for(name):
    from model.errors import UserError

    with pytest.raises(UserError, match="1 to 128 letters"):
        check_name(name)
