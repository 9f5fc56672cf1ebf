"""Labelled images: class folders, lists of files, or idx files (MNIST's and Fashion-MNIST's format)."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.vision.images import read_image
from zinit_kernels.console import shown

from ..reading import check_fields, json_object
from ..shared import UserError, read_text

LAYOUT = (
    "a folder, or several of them, with train/CLASS/* and test/CLASS/* (and val/CLASS/*); or train800.txt, val200.txt "
    "and test.txt with lines `PATH LABEL`; or CoOp's split_zhou_*.json and the images it names; or "
    "train-images-idx3-ubyte[.gz] and the three files beside it"
)
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
_LISTS = {"train": ("train800.txt", "train.txt"), "val": ("val200.txt", "val.txt"), "test": ("test.txt",)}
MOST_CLASSES = 100_000  # ImageNet-21k has 21,843
_IDX = {"train": "train", "test": "t10k"}


class Images:
    """Images and their labels, 0 to the number of classes. Files are read when they are wanted, and resized then."""

    def __init__(self, sources: Sequence[Path] | np.ndarray, labels: Sequence[int]):
        self.sources, self.labels = sources, torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, row: int, size: int) -> Tensor:
        """uint8 [3, size, size]: resized to a square, without a crop, as VTAB's protocol has it.

        Files are read by `read_image`: upright, and what is transparent on white. Raises UserError for a file that is
        no image.
        """
        source = self.sources[row]
        if isinstance(source, Path):
            image = read_image(source, convert=True)
        else:
            image = Image.fromarray(source).convert("RGB")
        resized = image.resize((size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    def chosen(self, rows: Sequence[int]) -> Images:
        """These rows alone."""
        sources = (
            self.sources[np.array(rows)]
            if isinstance(self.sources, np.ndarray)
            else [self.sources[r] for r in rows]
        )
        return Images(sources, self.labels[torch.tensor(rows, dtype=torch.int64)].tolist())


class ImageSet(NamedTuple):
    """A data set; validation is None where the folder has none of its own."""

    name: str
    classes: list[str]
    train: Images
    validation: Images | None
    test: Images

    def fingerprint(self) -> str:
        """Of the names, sizes and labels of the files, or of the images themselves where they are in one file."""
        found = hashlib.sha256(" ".join(self.classes).encode("utf-8", "surrogateescape"))
        for images in (self.train, self.validation, self.test):
            if images is None:
                continue
            found.update(str(images.labels.tolist()).encode())
            if isinstance(images.sources, np.ndarray):
                found.update(images.sources.tobytes())
            else:
                names = (f"{path.parent.name}/{path.name} {path.stat().st_size}\n" for path in images.sources)
                found.update("".join(names).encode("utf-8", "surrogateescape"))
        return found.hexdigest()[:16]


def find_sets(folder: Path) -> list[Path]:
    """The folders of data sets: this one, or those in it. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; the data are {LAYOUT}.")
    found = (
        [folder]
        if _kind(folder)
        else [path for path in sorted(folder.iterdir()) if path.is_dir() and _kind(path)]
    )
    if not found:
        raise UserError(f"{folder} holds no data set; the data are {LAYOUT}.")
    return found


def _kind(folder: Path) -> str:
    if any((folder / f"train-images-idx3-ubyte{end}").is_file() for end in ("", ".gz")):
        return "idx"
    if any((folder / name).is_file() for name in _LISTS["train"]):
        return "lists"
    if any(folder.glob("split_zhou_*.json")):
        return "zhou"
    return "folders" if (folder / "train").is_dir() else ""


def read_set(folder: Path) -> ImageSet:
    """The data set of a folder. Raises UserError for a missing file, a label that cannot be, or an empty class."""
    readers = {"idx": _read_idx, "lists": _read_lists, "zhou": _read_zhou, "folders": _read_folders}
    read = readers[_kind(folder)]
    parts, classes = read(folder)
    return ImageSet(folder.name, classes, parts["train"], parts.get("val"), parts["test"])


def _read_folders(folder: Path) -> tuple[dict[str, Images], list[str]]:
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if len(classes) < 2:
        raise UserError(
            f"{folder / 'train'} must hold a folder for each of at least 2 classes, it has {len(classes)}."
        )
    parts = {}
    for part in ("train", "val", "test"):
        place = folder / part
        if not place.is_dir():
            if part == "val":
                continue
            raise UserError(f"there is no {place}; the data are {LAYOUT}.")
        strange = sorted(path.name for path in place.iterdir() if path.is_dir() and path.name not in classes)
        if strange:
            raise UserError(f"{place} holds the class {strange[0]!r}, which train/ does not.")
        files, labels = [], []
        for label, name in enumerate(classes):
            own = sorted(path for path in (place / name).glob("*") if path.suffix.lower() in _SUFFIXES)
            if not own and part == "train":
                raise UserError(f"{place / name} holds no images.")
            files += own
            labels += [label] * len(own)
        if not files:
            raise UserError(f"{place} holds no images.")
        parts[part] = Images(files, labels)
    return parts, classes


def _read_lists(folder: Path) -> tuple[dict[str, Images], list[str]]:
    parts = {}
    for part, names in _LISTS.items():
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            if part == "val":
                continue
            raise UserError(f"there is no {folder / names[-1]}; the data are {LAYOUT}.")
        files, labels = [], []
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            name, _, label = line.strip().rpartition(" ")
            if not name or not re.fullmatch("[0-9]{1,9}", label) or int(label) > MOST_CLASSES:
                raise UserError(
                    f"{path}, line {number}: expected `PATH LABEL`, a label up to {MOST_CLASSES}, got {shown(line)}."
                )
            file = folder / name if (folder / name).is_file() else folder / "images" / name
            if not file.is_file():
                raise UserError(f"{path}, line {number}: there is no {folder / name}.")
            files.append(file)
            labels.append(int(label))
        if not files:
            raise UserError(f"{path} names no images.")
        parts[part] = Images(files, labels)
    count = int(parts["train"].labels.max()) + 1
    for part, images in parts.items():
        if int(images.labels.max()) >= count:
            raise UserError(f"{folder}: the {part} images have the label {int(images.labels.max())}, and training "
                            f"images only 0 to {count - 1}.")  # fmt: skip
    return parts, [str(label) for label in range(count)]


def _read_zhou(folder: Path) -> tuple[dict[str, Images], list[str]]:
    """CoOp's splits: lists of [path, label, class name]; the images are in the folder or in one of its folders."""
    (path, *more) = sorted(folder.glob("split_zhou_*.json"))
    if more:
        raise UserError(f"{folder} holds {path.name} and {more[0].name}: leave one of them there.")
    content = json_object(path)
    check_fields(content, {"train": list, "val": list, "test": list}, str(path))
    places = [folder, *sorted(place for place in folder.iterdir() if place.is_dir())]
    names: dict[int, str] = {}
    parts = {}
    for part in ("train", "val", "test"):
        files, labels = [], []
        for number, row in enumerate(content[part], 1):
            is_row = (
                isinstance(row, list)
                and [type(value) for value in row] == [str, int, str]
                and 0 <= row[1] <= MOST_CLASSES
            )
            if not is_row or names.setdefault(row[1], row[2]) != row[2]:
                raise UserError(
                    f"{path}, {part} {number}: expected [path, label, class], with one name a label, got {shown(row)}."
                )
            file = next((place / row[0] for place in places if (place / row[0]).is_file()), None)
            if file is None:
                raise UserError(
                    f"{path}, {part} {number}: there is no {row[0]} in {folder} or a folder of it."
                )
            files.append(file)
            labels.append(row[1])
        if files:
            parts[part] = Images(files, labels)
        elif part != "val":
            raise UserError(f"{path} names no {part} images.")
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{path}: the labels must be 0 to {len(names) - 1}, there is {max(names)}.")
    return parts, [names[label] for label in range(len(names))]


def _read_idx(folder: Path) -> tuple[dict[str, Images], list[str]]:
    parts = {}
    for part, start in _IDX.items():
        images = _idx_array(folder, f"{start}-images-idx3-ubyte", 3)
        labels = _idx_array(folder, f"{start}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise UserError(f"{folder}: {len(images)} {part} images and {len(labels)} labels.")
        parts[part] = Images(images, labels.tolist())
    count = int(max(images.labels.max() for images in parts.values())) + 1
    path = folder / "classes.txt"
    names = read_text(path).split() if path.is_file() else [str(label) for label in range(count)]
    if len(names) != count:
        raise UserError(f"{path} names {len(names)} classes, and there are {count} labels.")
    return parts, names


def _idx_array(folder: Path, name: str, dimensions: int) -> np.ndarray:
    path = next((folder / f"{name}{end}" for end in ("", ".gz") if (folder / f"{name}{end}").is_file()), None)
    if path is None:
        raise UserError(f"there is no {folder / name}[.gz]; the data are {LAYOUT}.")
    try:
        content = path.read_bytes()
        content = gzip.GzipFile(fileobj=io.BytesIO(content)).read() if path.suffix == ".gz" else content
    except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise UserError(f"{path} cannot be unpacked ({error}).") from error
    header = 4 * (1 + dimensions)
    magic, *shape = np.frombuffer(content[:header], ">u4") if len(content) >= header else [0]
    if magic == 0x0800 + dimensions and 0 in shape:
        raise UserError(f"{path} holds no numbers: its shape is {' x '.join(map(str, shape))}.")
    if magic != 0x0800 + dimensions or len(content) != header + math.prod(map(int, shape)):
        raise UserError(f"{path} is no idx file of bytes with {dimensions} dimensions, or it is cut short.")
    return np.frombuffer(content, np.uint8, offset=header).reshape([int(length) for length in shape])
