"""A tiny base with a few unlike adapters, and an engine for them."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from pathlib import Path

import torch
from tiny_runs import make_base, write_tokenizer

from model.adapter import LlamaAdapter
from model.config import AdapterConfig, LlamaConfig
from model.llama import Llama
from model.sampling import generate
from model.serving.engine import Engine
from model.serving.request import Sampling
from model.serving.worker import EngineThread

# prompts in a layer, adapted layers, activation of the gates
ADAPTERS = {"tall": (10, None, "tanh"), "short": (5, 1, "tanh"), "identity": (4, 3, "identity")}


def make_adapter(model: LlamaConfig, seed: int, length=10, layers=None, activation="tanh") -> LlamaAdapter:
    """An adapter whose gates are far from 0."""
    generator = torch.Generator().manual_seed(seed)
    adapter = LlamaAdapter(model, AdapterConfig(length, layers, activation), generator)
    with torch.no_grad():
        adapter.gates.normal_(generator=generator)
    return adapter.requires_grad_(False)


def make_adapters(model: LlamaConfig) -> dict[str, LlamaAdapter]:
    return {name: make_adapter(model, seed, *shape) for seed, (name, shape) in enumerate(ADAPTERS.items())}


def make_engine(**options) -> tuple[Engine, dict[str | None, LlamaAdapter | None]]:
    """An engine, and its adapters by name; None is the base."""
    base = make_base()
    engine = Engine(base, **{"cache_tokens": 4096, "max_running": 8, "chunk": 32} | options)
    adapters = make_adapters(base.config)
    for name, adapter in adapters.items():
        engine.add_adapter(name, adapter)
    return engine, {None: None, **adapters}


def alone(base: Llama, prompt, adapter, sampling: Sampling) -> list[list[int]]:
    """What `generate` answers this prompt alone, for each choice."""
    return [
        generate(
            base, [prompt], adapter, max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
            top_p=sampling.top_p, seed=sampling.seed + choice, eos_ids=sampling.eos_ids,
        )[0]
        for choice in range(sampling.choices)
    ]  # fmt: skip


def random_prompts(count: int, longest: int = 120, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, 131, (length,), generator=generator).tolist() for length in lengths]


class Listener:
    """Keeps what a request is told."""

    def __init__(self):
        self.tokens: dict[int, list[int]] = {}
        self.logprobs = []
        self.ends = {}

    def __call__(self, event):
        if hasattr(event, "token"):
            self.tokens.setdefault(event.choice, []).append(event.token)
            self.logprobs.append(event.logprobs)
        else:
            self.ends[event.choice] = (event.reason, event.error)


def run(engine: Engine, most: int = 10_000) -> int:
    """Steps until there is nothing to do; how many."""
    for step in range(most):
        if not engine.step():
            return step
    raise AssertionError(f"not done after {most} steps")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class StandInEncoder:
    """An image's feature is its mean colour: what an encoder is to the server, without its library."""

    fingerprint = "stand-in"

    def __init__(self):
        self.images = 0

    def feature_size(self, config):
        return 3

    def encode(self, images, config):
        self.images += len(images)
        return [torch.tensor(image.resize((1, 1)).getpixel((0, 0))).float()[None] / 64 for image in images]


def seeing_adapter(model: LlamaConfig):
    """An adapter with a visual part, whose prompts an image changes much."""
    from model.vision.adapter import VisualAdapter
    from model.vision.config import FeatureConfig, VisualConfig
    from model.vision.features import Features

    generator = torch.Generator().manual_seed(7)
    visual = VisualConfig("bottleneck", 3, 8, standardise=False)
    adapter = VisualAdapter(model, AdapterConfig(10), visual, FeatureConfig(), generator)
    with torch.no_grad():
        adapter.gates.normal_(generator=generator)
        for parameter in adapter.projection.parameters():
            parameter.normal_(generator=generator)
    adapter.source = Features(StandInEncoder(), adapter.feature_config)
    return adapter.requires_grad_(False)


def make_service(path: Path, **options):
    """A service of a tiny base with a chat template, its adapters, and one that sees."""
    from model.loading import load_base, save_base
    from model.serving.service import Service
    from model.tokenizer import load_tokenizer

    save_base(make_base(), path)
    write_tokenizer(path)
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE})
    )
    base = load_base(path).freeze()
    engine = Engine(base, **{"cache_tokens": 8192, "max_running": 8, "chunk": 32} | options)
    service = Service(engine, load_tokenizer(path), "tiny")
    adapters = {**make_adapters(base.config), "sees": seeing_adapter(base.config)}
    for name, adapter in adapters.items():
        service.add_adapter(name, adapter)
    return service, {"tiny": None, **adapters}


class Listening:
    """An application on a free port of this machine, in a thread of this process."""

    def __init__(self, service, **options):
        import uvicorn

        from model.serving.app import create_app
        from model.serving.server import Server, listen

        self.service = service
        app = create_app(service, **options)
        self._server = Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
        self._socket = listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._engine = EngineThread(service.engine)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self):
        self._engine.start()
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(30)
        self._engine.stop()
        self._socket.close()

    def post(self, path, body, headers=None, method="POST"):
        """Status, headers and content of a response; body: bytes, or what becomes JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            content = response.read()
            return response.status, dict(response.getheaders()), json.loads(content) if content else None

    def open_stream(self, body):
        """A socket on which a streamed answer comes, after its first bytes."""
        stream = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        data = json.dumps(body | {"stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        stream.sendall(head.encode() + data)
        return stream

    def wait_until(self, condition, seconds=60.0):
        stop = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < stop, "it does not come to be"
            time.sleep(0.01)

    def wait_until_all_is_back(self):
        """No request runs, and every page is available."""
        engine = self.service.engine
        self.wait_until(
            lambda: not self.service.running and not engine.scheduler.running and not engine.waiting
        )
        self.wait_until(lambda: engine.pool.available == engine.pool.num_pages)


# a short request, and one that runs until its client leaves
ASK = {"model": "tall", "prompt": "x", "max_tokens": 2}
LONG = {"model": "tall", "prompt": "x", "max_tokens": 500, "temperature": 0, "ignore_eos": True}


def text_of(service, adapters, name, prompt, seed=0, max_tokens=12, temperature=0.0, eos_ids=None):
    """What `generate` answers this prompt alone."""
    tokenizer, base = service.tokenizer, service.engine.model
    ids = tokenizer.encode(prompt, eos=False) if isinstance(prompt, str) else prompt
    options = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": 1.0, "seed": seed}
    return tokenizer.decode(generate(base, [ids], adapters[name], eos_ids=eos_ids, **options)[0])
