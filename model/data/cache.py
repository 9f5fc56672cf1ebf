"""Tokenised data on disk: made once for a file, a tokenizer and a template, and then memory-mapped.

    samples = cached(directory, key, map(encoder, read_source(path)), encoder, path)
    samples[17]                     # a Sample, read from the disk

A folder has the tokens of all samples one after the other, and where each one begins. Neither the records nor the
tokens are ever in memory together, so both may be larger than it: what a run keeps is 8 bytes a sample. The order of an
epoch is a function of its number, so a resumed run goes on exactly where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import note, warn
from ..run_folder import held, make_directory, write_file, writing
from .encoding import Encoder
from .samples import EncodingReport, Sample
from .views import SampleSequence, sample_digest

_VERSION = 2  # of the files and of how records become samples: another one makes the cache again
_FILES = {"tokens": "<i4", "offsets": "<i8", "answers": "<i4", "answer_offsets": "<i8", "digests": "<u8"}
_CHUNK = 1 << 20
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "config.json",
)  # fmt: skip
_GGUF_HEAD = 64 << 20  # bytes: a GGUF file has its tokenizer at the beginning


class CachedSamples(SampleSequence):
    """The samples of one file, on disk. Slices are lists."""

    def __init__(self, directory: Path):
        self.directory = directory
        about = json.loads((directory / "about.json").read_text())
        self.num_records, self.report = about["num_records"], EncodingReport(*about["report"])
        self.unended = about["unended"]
        self._arrays = {}
        for name, dtype in _FILES.items():
            size = about["sizes"][name]
            if (directory / name).stat().st_size != size * np.dtype(dtype).itemsize:
                raise ValueError(f"{name} has another size than it was written with")
            self._arrays[name] = np.memmap(directory / name, dtype, "r") if size else np.zeros(0, dtype)
        _check_sums(about, self._arrays)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64, without reading them."""
        return np.diff(self._arrays["offsets"])

    @property
    def digests(self) -> np.ndarray:
        """`sample_digest` of each sample."""
        return self._arrays["digests"]

    def __len__(self) -> int:
        return len(self._arrays["offsets"]) - 1

    def _at(self, place: int) -> Sample:
        parts = self._arrays
        first, last = parts["offsets"][place : place + 2]
        tokens = parts["tokens"][first:last].tolist()
        first, last = parts["answer_offsets"][place : place + 2]
        spans = [tuple(span) for span in parts["answers"][first:last].reshape(-1, 2).tolist()]
        # one answer that goes to the end is written as its beginning, and needs no span
        whole = len(spans) == 1 and spans[0][1] == 0
        return Sample(tokens, spans[0][0], (), () if whole else tuple(spans))


class Key(NamedTuple):
    """What a cache depends on."""

    data: str  # SHA-256 of the file's content
    tokenizer: str
    template: str  # its name, and the chat template's text
    max_seq_len: int
    strict: bool

    @property
    def name(self) -> str:
        """The folder's name."""
        return hashlib.sha256(repr((_VERSION, *self)).encode()).hexdigest()[:32]


def cached(
    directory: str | Path, key: Key, samples: Iterable[Sample | None], encoder: Encoder, about: str
) -> CachedSamples:
    """The samples, which are read only if the cache does not have them; None is a record that is left out. about: the
    data, for messages.

    A second process that wants the same ones at once waits for the first.
    """
    directory = make_directory(directory)
    place = directory / key.name
    with held(directory, wait=True):
        if place.exists():
            try:
                return CachedSamples(place)
            except (
                FileNotFoundError,
                ValueError,
                KeyError,
                TypeError,
            ) as error:  # no other OSError is damage
                warn(f"the cache of {about} in {place} is damaged ({error}): it is made again.")
                shutil.rmtree(place)
        part = directory / f".{key.name}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        with writing(part):
            part.mkdir()
            try:
                num_samples = _write(part, samples, encoder)
                os.replace(part, place)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        note(f"{about}: {num_samples} samples are kept in {place}.")
        return CachedSamples(place)


def _check_sums(about: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where the content is not what was written. Caches of before November 2026 have no sums.

    A changed token would be trained on without a word. CRC-32 reads 4 GB a second; the SHA-256 of the data file, which
    finds the cache, takes longer.
    """
    sums = about.pop("sums", None)
    if sums is None:
        return
    for name, array in arrays.items():
        if _sum(memoryview(array).cast("B") if len(array) else b"") != sums[name]:
            raise ValueError(f"{name} has another content than it was written with")
    if _sum(json.dumps(about).encode()) != sums["about"]:
        raise ValueError("about.json has another content than it was written with")


def _sum(content: bytes | memoryview, before: int = 0) -> int:
    """CRC-32, a piece at a time: what is mapped is then never in memory as a whole."""
    for first in range(0, len(content), _CHUNK):
        before = zlib.crc32(content[first : first + _CHUNK], before)
    return before


def _write(directory: Path, samples: Iterable[Sample | None], encoder: Encoder) -> int:
    sizes, sums = dict.fromkeys(_FILES, 0), dict.fromkeys(_FILES, 0)
    num_records = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(directory / name, "wb")) for name in _FILES}

        def add(name: str, values: Sequence[int]) -> None:
            content = np.asarray(values, _FILES[name]).tobytes()
            files[name].write(content)
            sums[name] = _sum(content, sums[name])
            sizes[name] += len(values)

        add("offsets", [0])
        add("answer_offsets", [0])
        for sample in samples:
            num_records += 1
            if sample is None:
                continue
            add("tokens", sample.tokens)
            add(
                "answers",
                [number for span in sample.answers or ((sample.prompt_length, 0),) for number in span],
            )
            add("offsets", [sizes["tokens"]])
            add("answer_offsets", [sizes["answers"]])
            add("digests", [sample_digest(sample)])
        for file in files.values():  # before the file that says that they are whole
            file.flush()
            os.fsync(file.fileno())
    facts = {
        "sizes": sizes,
        "num_records": num_records,
        "report": list(encoder.report),
        "unended": encoder.unended,
    }
    sums["about"] = _sum(json.dumps(facts).encode())
    write_file(directory / "about.json", (json.dumps(facts | {"sums": sums}) + "\n").encode())
    return sizes["offsets"] - 1


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            continue
        digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
        with open(file, "rb") as content:
            while block := content.read(_CHUNK):
                digest.update(block)
    return digest.hexdigest()


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of the files that make a folder's tokenizer, and of the libraries that read them."""
    import sentencepiece
    import tokenizers

    digest = hashlib.sha256(f"{tokenizers.__version__} {sentencepiece.__version__}".encode())
    files = (
        [path] if path.is_file() else [path / name for name in _TOKENIZER_FILES] + sorted(path.glob("*.gguf"))
    )
    for file in files:
        if file.is_file():
            with open(file, "rb") as content:
                head = content.read(_GGUF_HEAD)
            digest.update(f"{file.name} {file.stat().st_size} {len(head)}\n".encode() + head)
    return digest.hexdigest()
