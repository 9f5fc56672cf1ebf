"""Serves one base and many adapters at once, over the OpenAI protocol.

python -m model.serve --base DIR --adapter colours=out/colours --adapter poems=out/poems --port 8000
python -m model.serve --base DIR --adapter sees=out/sees --encoder DIR
ZINIT_ADMIN_TOKEN=... python -m model.serve --base DIR
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from zinit_kernels.console import Parser

from .errors import UserError, program_name, run_program
from .huge_pages import use_huge_pages
from .llama import Adapter, Llama
from .loading import DTYPES, default_device, load_base, open_device
from .program import program
from .quantised import add_option as add_quantise_option
from .serving.engine import Engine
from .serving.request import Sampling
from .serving.service import Service
from .tokenizer import load_tokenizer
from .vision.adapter import VisualAdapter
from .vision.encoders import Encoder, load_encoder
from .vision.files import open_adapter
from .vision.options import add_encoder_options, check_options, source_of


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program_name("serve"),
        description="Serves a LLaMA and its adapters over the OpenAI protocol. A request's model is an adapter's name, "
        "or the base's.",
    )
    default = "(default: %(default)s)"
    # fmt: off
    models = parser.add_argument_group("models")
    models.add_argument("--base", type=Path, required=True, metavar="DIR",
                        help="checkpoint folder, Hugging Face's or Meta's, or a GGUF file")
    models.add_argument("--name", help="the base's name in requests (default: that of its folder or file)")
    models.add_argument("--adapter", action="append", default=[], metavar="NAME=FILE",
                        help="an adapter's file, or a folder that holds one, and its name; may be repeated")
    models.add_argument("--prompt-length", type=int, help="of official-v1 adapters, whose files do not say")
    models.add_argument("--gate-activation", choices=("tanh", "identity"),
                        help="of the adapters' gates (default: as their files say)")
    models.add_argument("--dtype", choices=DTYPES, help="of the base's weights (default: the files')")
    add_quantise_option(models)
    models.add_argument("--device", default=default_device(), help=default)
    models.add_argument("--backend", default="auto", help=f"of the attention kernels {default}")
    add_encoder_options(parser.add_argument_group("images"))

    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help=f"the address to listen on; 0.0.0.0 is all {default}")
    server.add_argument("--port", type=int, default=8000, help=f"0 takes a free one {default}")
    server.add_argument("--api-key", action="append", default=[], metavar="KEY", help="clients must send one of "
                        "these; may be repeated (default: ZINIT_API_KEY, or open to all)")
    server.add_argument("--admin-token", metavar="TOKEN", help="opens the routes that load and drop adapters to "
                        "whoever sends it (default: ZINIT_ADMIN_TOKEN, or closed)")
    server.add_argument("--drain-seconds", type=float, default=60.0,
                        help=f"after SIGTERM, how long requests that run may take {default}")

    engine = parser.add_argument_group("engine")
    engine.add_argument("--max-running", type=int, default=64, help=f"answers that are computed at once {default}")
    engine.add_argument("--max-waiting", type=int, default=1024,
                        help=f"answers that may wait; beyond that, clients are told to come again {default}")
    engine.add_argument("--chunk", type=int, default=256, help="tokens of prompts in one step: more answers long "
                        f"prompts sooner, fewer keep the others' tokens coming {default}")
    engine.add_argument("--cache-tokens", type=int, help="tokens of all prompts and answers that are kept at once "
                        "(default: what 2 GiB hold, at least one context)")
    # fmt: on
    return parser


@program("lower --cache-tokens, or take --dtype bfloat16")
def main(command_line: list[str] | None = None) -> None:
    """The program. Everything is read and checked before it listens."""
    arguments = _parser().parse_args(command_line)
    app, server = _web()
    _check(arguments, app.check_name)
    files = [_named(text, app.check_name) for text in arguments.adapter]
    device = open_device(arguments.device)
    model = load_base(arguments.base, DTYPES.get(arguments.dtype), device, arguments.quantise).freeze()
    model.set_backend(arguments.backend)
    use_huge_pages(model)
    tokenizer = load_tokenizer(arguments.base).check_vocabulary(model.config.vocab_size)
    engine = Engine(
        model,
        cache_tokens=arguments.cache_tokens,
        max_running=arguments.max_running,
        chunk=arguments.chunk,
        max_waiting=arguments.max_waiting,
        eos_ids={*model.config.eos_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])},
    )
    _try_backend(engine, arguments.backend)
    encoder = None if arguments.encoder is None else load_encoder(arguments.encoder, device=device)
    service = Service(engine, tokenizer, arguments.name or base_name(arguments.base))

    def load(path: str) -> Adapter:
        return _load(arguments, Path(path), model, encoder)

    for name, path in files:
        service.add_adapter(name, load(path))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    application = app.create_app(
        service,
        api_keys=arguments.api_key or list(filter(None, [os.environ.get("ZINIT_API_KEY")])),
        admin_token=arguments.admin_token or os.environ.get("ZINIT_ADMIN_TOKEN") or None,
        load=load,
    )
    server.serve(application, service, arguments.host, arguments.port, arguments.drain_seconds)


def base_name(path: Path) -> str:
    """What a base is called unless told: its folder's or file's name, as far as a request can say it."""
    name = path.resolve().name.removesuffix(".gguf")
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)
    return kept[:128] or "base"


def _web() -> tuple[ModuleType, ModuleType]:
    """FastAPI's and uvicorn's side, which come with an extra. Raises UserError without them."""
    try:
        from .serving import app, server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise UserError(
            f"serving needs {error.name}, which is not installed: pip install 'zinit-kernels[serve]'."
        ) from None
    return app, server


def _check(arguments: argparse.Namespace, check_name: Callable[[str], None]) -> None:
    check_options(arguments)
    if not 0 <= arguments.port < 1 << 16:
        raise UserError(f"--port must lie in 0 .. 65535, got {arguments.port}.")
    if arguments.images is not None:
        raise UserError(
            "--images is the folder of images that a file names: requests bring theirs with them."
        )
    if not 0 <= arguments.drain_seconds < 1e6:
        raise UserError(f"--drain-seconds must not be negative, got {arguments.drain_seconds}.")
    for option, value in (("--api-key", key) for key in arguments.api_key):
        if not value:
            raise UserError(f"{option} must not be empty: everybody could send it.")
    if arguments.admin_token == "":
        raise UserError("--admin-token must not be empty: everybody could send it.")
    if arguments.name is not None:
        check_name(arguments.name)


def _named(text: str, check_name: Callable[[str], None]) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise UserError(f"--adapter must be NAME=FILE, got {text!r}.")
    check_name(name)
    return name, path


def _load(arguments: argparse.Namespace, path: Path, model: Llama, encoder: Encoder | None) -> Adapter:
    base, adapter = open_adapter(path, model, arguments.prompt_length, arguments.gate_activation)
    if base is not model:
        raise UserError(
            f"{path} is a published LLaMA-Adapter V2, which changes the base's own layers: it cannot share a base with "
            "others. Answer with it by `generate`."
        )
    if encoder is not None and isinstance(adapter, VisualAdapter):
        adapter.source = source_of(arguments, adapter, encoder)
    return adapter.requires_grad_(False).to(model.device)


def _try_backend(engine: Engine, backend: str) -> None:
    """Two tokens, so that a backend that cannot run is refused before anybody is served."""
    try:
        engine.generate([[0]], [None], Sampling(max_new_tokens=2, temperature=0, eos_ids=()))
    except ValueError as error:
        raise UserError(f"--backend {backend}: {error}.") from error


if __name__ == "__main__":
    run_program(main)
