"""The `zinit` command: one name for the programs of this package.

    zinit check                                        what this machine can run, and whether it is right
    zinit tune                                         times the backends on an NVIDIA GPU, for backend="auto"
    zinit inspect ADAPTER                              what an adapter file holds, layer by layer
    zinit convert ADAPTER OUT --to FORMAT              an adapter file in another format
    zinit train --base DIR --data FILE --out DIR       train an adapter on instruction data
    zinit generate --base DIR --adapter FILE --instruction "..."    answer with a LLaMA and an adapter
    zinit serve --base DIR --adapter NAME=FILE         many adapters of one base at once, over the OpenAI protocol
    zinit demo                                         train a small base and an adapter, without any download
    zinit evaluate NAME ...                            the benchmarks of the paper, by their official rules

`zinit PROGRAM --help` lists a program's options. train, generate and demo need pip install 'zinit-kernels[model]',
serve needs 'zinit-kernels[serve]', and evaluate needs 'zinit-kernels[evaluate]'. The benchmarks of speed are not
installed: in a checkout, python -m bench.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__
from .console import InputError, run, shown

OWN = ("check", "tune", "inspect", "convert")
MODEL = ("train", "generate", "serve", "demo")
EVALUATE = ("evaluate",)
# what may be missing -> the extra that has it
NEEDS = {
    **dict.fromkeys(("tokenizers", "sentencepiece", "rich", "matplotlib"), "model"),
    **dict.fromkeys(("transformers", "PIL"), "vision"),
    **dict.fromkeys(("fastapi", "uvicorn"), "serve"),
    "peft": "evaluate",
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the program named first, with the arguments behind it, and exits with its status."""
    run(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"zinit_kernels {__version__}")
        return 0
    if name not in OWN + MODEL + EVALUATE:
        raise InputError(
            f"zinit has no program {shown(name)}; it has {', '.join(OWN + MODEL + EVALUATE)} (zinit --help)"
        )
    try:
        return importlib.import_module(_module(name)).main(rest)
    except ModuleNotFoundError as error:
        if error.name not in NEEDS:
            raise
        extra = name if name in EVALUATE else NEEDS[error.name]
        pip = f"{sys.executable} -m pip install 'zinit-kernels[{extra}]'"
        raise InputError(f"zinit {name} needs {error.name}: {pip}") from None


def _module(name: str) -> str:
    """The module of a program."""
    if name in OWN:
        return f"zinit_kernels.{name}"
    return f"{_package('evaluate')}.__main__" if name in EVALUATE else f"{_package('model')}.{name}"


def _package(folder: str) -> str:
    """zinit_kernels.model (or evaluate) where this is installed; in a checkout that is not, the folder of that name."""
    is_bare_checkout = (Path(__file__).resolve().parent.parent / folder / "__init__.py").is_file()
    is_installed = importlib.util.find_spec(f"zinit_kernels.{folder}") is not None
    return folder if is_bare_checkout and not is_installed else f"zinit_kernels.{folder}"
