"""`python -m model.serve` as a program: its lines, its exit, and what it refuses."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from repository import ROOT
from tiny_serving import ADAPTERS, ASK, LONG, make_service, text_of

from model.vision.files import save_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a base with a tokenizer, with the adapters' files beside it, and the same as a service."""
    folder = tmp_path_factory.mktemp("serving") / "base"
    service, adapters = make_service(folder)
    for name in ADAPTERS:
        save_adapter(folder.parent / f"{name}.safetensors", adapters[name], service.engine.model.config)
    return folder, service, adapters


@pytest.fixture(scope="module")
def base_folder(made):
    return made[0]


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


def test_the_program_answers_curl_and_drains_at_sigterm(made, tmp_path):
    """SIGTERM under load: streams are finished, new requests are told to go elsewhere, and it exits with 0."""
    base_folder, service, adapters = made
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
        expected = text_of(service, adapters, "tall", "x", max_tokens=150, eos_ids=())
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
