"""The command of one benchmark: read its questions, ask, score, and print the figures beside the quoted ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from zinit_kernels.console import Parser, shown, warn

from . import models
from .answers import ANSWERS, answers_in, digest
from .asking import Interrupted, ask
from .lines import RESULT, write_result
from .question import Benchmark, Item, Table
from .shared import (
    DTYPES,
    UserError,
    command_name,
    default_device,
    json_values,
    make_directory,
    messages,
    program,
    read_text,
    refuse_unwritable,
)
from .tables import as_json, show, with_quoted

INTERRUPTED = 130  # what a shell reports for Ctrl-C


def add_model_options(parser: Parser) -> None:
    """Options of every command that asks a model."""
    parser.add_argument("--base", type=Path, help="folder of the base model, Hugging Face's or Meta's")
    parser.add_argument(
        "--adapter", type=Path, help="an adapter's file or folder; without it the base answers"
    )
    parser.add_argument(
        "--encoder", type=Path, help="folder of the image encoder that the adapter was trained with"
    )
    parser.add_argument(
        "--feature-cache", type=Path, help="folder for the features of images (default: in memory)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="questions asked at once (default: 8)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the base's")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")


def _parser(benchmark: Benchmark) -> Parser:
    parser = Parser(
        prog=command_name(benchmark.name),
        description=f"{benchmark.about}. --data: {benchmark.layout}.",
    )
    parser.add_argument("--data", type=Path, help="folder of the benchmark's files")
    parser.add_argument(
        "--out", type=Path, help="folder for the answers and figures; the same command goes on there"
    )
    parser.add_argument(
        "--answers", type=Path, help="score these answers instead of asking a model; --out keeps the figures"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=benchmark.max_new_tokens,
        help="of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--template",
        help=f"the prompt that the adapter was trained with, such as 'Question: {models.QUESTION} Answer:' "
        "(default: Alpaca's)",
    )
    parser.add_argument(
        "--answer-after",
        metavar="TEXT",
        help="the answer is what stands behind the last TEXT, for a model that says something else first",
    )
    add_model_options(parser)
    return parser


def run(benchmark: Benchmark, arguments: Sequence[str]) -> None:
    """The command. After Ctrl-C it exits with status 130."""
    guard = program("lower --batch-size or --max-new-tokens, or take --dtype bfloat16")
    guard(partial(_run, benchmark))(list(arguments))


def _run(benchmark: Benchmark, arguments: Sequence[str]) -> None:
    options = _parser(benchmark).parse_args(arguments)
    if options.answers is not None:
        items, answers = _given(benchmark, options.data, options.answers)
        tables = _tables(benchmark, items, answers)
        if options.out is not None:
            _write_new(
                options.out, as_json(tables, {"benchmark": benchmark.name, "questions": digest(items)})
            )
        show(tables)
        return
    for name in ("data", "base", "out"):
        if getattr(options, name) is None:
            raise UserError(
                f"--{name} is missing: name --data, --base and --out, or --answers to score answers."
            )
    for name in ("batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
    for name in ("encoder", "feature_cache"):
        needs = "adapter" if name == "encoder" else "encoder"
        if getattr(options, name) is not None and getattr(options, needs) is None:
            raise UserError(f"--{name.replace('_', '-')} belongs to --{needs}, which was not given.")
    if options.template is not None and models.QUESTION not in options.template:
        raise UserError(
            f"--template needs {models.QUESTION} where the question stands, got {shown(options.template)}."
        )
    if options.answer_after == "":
        raise UserError(
            "--answer-after is empty: name the text that stands before the answer, or leave it out."
        )
    wording = models.Wording(benchmark.brief, options.template, options.answer_after)
    items = _questions(benchmark, options.data)
    asked = {
        "benchmark": benchmark.name,
        "model": models.identity(options.base, options.adapter, options.encoder),
        "max_new_tokens": options.max_new_tokens,
        "dtype": options.dtype or "the base's",
        **wording.asked(),
    }

    def load() -> Any:
        _check_pictures(items)
        return models.load(
            options.base,
            options.adapter,
            options.max_new_tokens,
            wording,
            options.dtype,
            options.device,
            options.encoder,
            options.feature_cache,
        )

    try:
        answers = ask(items, options.out, asked, load, options.batch_size)
    except Interrupted as stopped:
        messages().print(f"interrupted: {stopped}; the same command goes on from there.")
        sys.exit(INTERRUPTED)
    tables = _tables(benchmark, items, answers)
    write_result(options.out, as_json(tables, asked))
    show(tables)


def _write_new(out: Path, content: bytes) -> None:
    """The figures of somebody's answers, into a folder that has none."""
    refuse_unwritable(out)
    make_directory(out)
    path = out / RESULT
    if path.exists() and path.read_bytes() != content:
        raise UserError(f"{path} holds other figures: name another folder for --out.")
    write_result(out, content)


def _questions(benchmark: Benchmark, data: Path) -> list[Item]:
    if not data.exists():
        raise UserError(f"there is no {data}; the data of this benchmark are {benchmark.layout}.")
    return benchmark.read(data)


def _tables(benchmark: Benchmark, items: Sequence[Item], answers: Mapping[str, str]) -> list[Table]:
    summary, *details = benchmark.tables(items, answers)
    return [*details, with_quoted(summary, benchmark.quoted)]


def _check_pictures(items: Sequence[Item]) -> None:
    """Before the model is loaded: an image that is missing would end the run in its middle."""
    for item in items:
        for picture in item.pictures:
            if picture.path is not None and not picture.path.is_file():
                raise UserError(f"question {item.id}: there is no image {picture.path}.")


def _given(benchmark: Benchmark, data: Path | None, path: Path) -> tuple[list[Item], dict[str, str]]:
    """The questions and somebody's answers: in this package's form, or in the benchmark's own."""
    if path.is_dir() and not (path / ANSWERS).is_file():
        if benchmark.foreign is None:
            raise UserError(
                f"{path} is a folder without {ANSWERS}: --answers takes that file, or a folder with it."
            )
        return benchmark.foreign(path)
    if data is None:
        raise UserError("--data is missing: the questions that these answers belong to.")
    path = path / ANSWERS if path.is_dir() else path
    entries = list(json_values(read_text(path), path))
    headers = [entry["run"] for _, entry in entries if _is_header(entry)]
    answers = answers_in(path, [entry for entry in entries if not _is_header(entry[1])])
    items = _questions(benchmark, data)
    _check_headers(headers, benchmark, items, data, path)
    if missing := [item.id for item in items if item.id not in answers]:
        raise UserError(
            f"{path} has no answer to {len(missing)} of {len(items)} questions, the first is {missing[0]}."
        )
    if strange := answers.keys() - {item.id for item in items}:
        raise UserError(f"{path} answers {min(strange)}, which is no question of {data}.")
    return items, answers


def _check_headers(
    headers: Sequence[Any], benchmark: Benchmark, items: Sequence[Item], data: Path, path: Path
) -> None:
    """Raises UserError for answers to another benchmark, whose ids may be the same; warns of other questions."""
    for run in headers:
        told = run if isinstance(run, dict) else {}
        if told.get("benchmark", benchmark.name) != benchmark.name:
            raise UserError(f"{path} has answers to {shown(told['benchmark'])}, not to {benchmark.name}.")
        if told.get("questions") not in (None, digest(items)):
            warn(
                f"{path} answers other questions than those of {data}, or the same with other images: the figures may "
                "mean nothing."
            )


def _is_header(entry: object) -> bool:
    return isinstance(entry, dict) and entry.keys() == {"run"}
