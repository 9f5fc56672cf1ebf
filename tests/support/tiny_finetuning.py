"""Tiny transformers checkpoints in folders, with a tokenizer, and data for each fine-tuning command."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
import tokenizers  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_transformers import MODELS, VOCABULARY  # noqa: E402

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,:?"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
assert len(WORDS) <= VOCABULARY


def write_model(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "BERT":
        model = model.bert
    model.save_pretrained(folder)
    if name not in ("ViT", "DINOv2"):
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A token for every character: "cab" is c ##a ##b."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        eos_token="[SEP]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    fast.save_pretrained(folder)


def write_ner(folder: Path) -> Path:
    """Words with an x are a PER of one or two words."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for part, count in (("train", 24), ("dev", 8), ("test", 8)):
        lines = ["-DOCSTART- O", ""]
        for _ in range(count):
            before = "O"
            for _ in range(draw.randint(2, 5)):
                word = "".join(draw.choices("abx", k=3))
                tag = "O" if "x" not in word else "I-PER" if before != "O" else "B-PER"
                lines, before = [*lines, f"{word}\t{tag}"], tag
            lines.append("")
        (folder / f"toy_{part}.conll").write_text("\n".join(lines))
    return folder


def write_srl(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "dev", "test-wsj", "test-brown"):
        (folder / f"{part}.txt").write_text("1 a b c ||| B-A0 B-V B-A1\n2 d e f g ||| B-A0 I-A0 B-V O\n" * 3)
    return folder


def write_squad(folder: Path, unanswerable: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)

    def article(start: int) -> dict:
        words = [f"w{start + n}x" for n in range(12)]
        context, qas = " ".join(words), []
        for n, word in enumerate(words[:3]):
            answers = [{"text": word, "answer_start": context.index(word)}]
            if unanswerable and n == 2:
                answers = []
            qas.append({"id": f"{start}/{n}", "question": f"what is {n}?", "answers": answers})
            if unanswerable:
                qas[-1]["is_impossible"] = not answers
        return {"title": "t", "paragraphs": [{"context": context, "qas": qas}]}

    (folder / "train-v1.1.json").write_text(json.dumps({"data": [article(10), article(30), article(50)]}))
    (folder / "dev-v1.1.json").write_text(json.dumps({"data": [article(70)]}))
    return folder


def colours(folder: Path, each: int, seed: int, classes=("blue", "green", "red", "white")) -> None:
    draw = np.random.default_rng(seed)
    for n, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(each):
            pixels = draw.integers(0, 60, (10, 12, 3))
            pixels[..., 2 - n if n < 3 else slice(None)] += 190
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{k}.png")


def write_folders(folder: Path) -> Path:
    colours(folder / "train", 6, 0)
    colours(folder / "test", 3, 1)
    return folder


def write_lists(folder: Path) -> Path:
    """The same images as `write_folders`, by lists."""
    write_folders(folder / "images")
    for part, file in (("train", "train800.txt"), ("test", "test.txt")):
        found = sorted((folder / "images" / part).glob("*/*.png"))
        names = sorted({path.parent.name for path in found})
        lines = [f"{part}/{path.parent.name}/{path.name} {names.index(path.parent.name)}" for path in found]
        (folder / file).write_text("\n".join(lines) + "\n")
    return folder


def write_zhou(folder: Path) -> Path:
    """The same images as `write_folders`, by CoOp's split file, which has validation images of its own."""
    write_folders(folder / "jpg")
    content: dict[str, list] = {"train": [], "val": [], "test": []}
    for part in ("train", "test"):
        found = sorted((folder / "jpg" / part).glob("*/*.png"))
        names = sorted({path.parent.name for path in found})
        for path in found:
            held_out = part == "train" and path.stem == "5"
            row = [f"{part}/{path.parent.name}/{path.name}", names.index(path.parent.name), path.parent.name]
            content["val" if held_out else part].append(row)
    (folder / "split_zhou_Colours.json").write_text(json.dumps(content))
    return folder


def write_idx(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for start, count in (("train", 20), ("t10k", 8)):
        labels = np.arange(count, dtype=np.uint8) % 4
        images = np.stack([np.full((5, 6), 60 * label, np.uint8) for label in labels])
        for name, array in ((f"{start}-images-idx3-ubyte", images), (f"{start}-labels-idx1-ubyte", labels)):
            header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
            content = header + array.tobytes()
            with gzip.open(folder / f"{name}.gz", "wb") as file:
                file.write(content)
    return folder


def write_records(path: Path) -> Path:
    lines = [{"instruction": f"say {n}", "input": "", "output": f"{n} is {n * n}"} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path
