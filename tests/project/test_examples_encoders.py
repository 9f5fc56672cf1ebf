"""The encoder examples, the quick way; each asserts by itself that at step 0 the adapted model is the frozen one."""

import gzip
import json
import os
import random
import re
import runpy
import subprocess
import sys

import pytest
from repository import ROOT, search_path

pytest.importorskip("transformers")
pytest.importorskip("sklearn")


def table(script: str) -> dict[str, list[float]]:
    """The rows that the script prints: name -> numbers, shares as fractions."""
    environment = os.environ | {
        "PYTHONPATH": search_path(ROOT), "OMP_NUM_THREADS": "1", "ZINIT_POISON_OUTPUTS": "0",
        "PYTHONIOENCODING": "utf-8",
    }  # fmt: skip
    command = [sys.executable, ROOT / "examples" / script, "--quick"]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=300, env=environment, cwd=ROOT / "tests"
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^│ (\S.*?) +│(.*)│$", done.stdout, re.MULTILINE)
    return {
        name: [float(n.replace(",", "")) / (100 if p else 1) for n, p in re.findall(r"([\d,.]+)(%?)", rest)]
        for name, rest in rows
    }


def test_vit_digits():
    rows = table("vit_digits.py")
    trained, adapted = rows["zero-init prompts and probe"]
    assert trained == 4 * (10 * 64 + 4) + 64 * 10 + 10
    assert adapted > rows["no pointer: frozen base"][1] + 0.1
    assert {"linear probe", "VPT-deep and probe"} < rows.keys()


def test_roberta_tagging():
    rows = table("roberta_tagging.py")
    trained, nouns, sentences = rows["zero-init prompts and head"]
    assert trained == 4 * (10 * 64 + 4) + 64 * 3 + 3
    _, nouns_before, sentences_before = rows["linear head"]
    assert nouns > nouns_before + 0.05 and sentences > sentences_before + 0.1


def test_clip_base_to_novel():
    rows = table("clip_base_to_novel.py")
    _, *before = rows["frozen base"]
    trained, *adapted = rows["zero-init prompts, vision"]
    assert trained == 3 * (10 * 64 + 4)
    assert rows["zero-init prompts, vision and text"][0] == 2 * trained
    base, novel, mean = adapted
    assert base > before[0] and mean > before[2] + 0.1
    assert abs(mean - 2 * base * novel / (base + novel)) < 0.01


def test_small_clip_can_be_adapted(tmp_path):
    """The example's checkpoint and data are what base-to-novel reads."""
    data, out = tmp_path / "fashion-mnist", tmp_path / "out"
    data.mkdir()
    chance = random.Random(0)
    for part, count in (("train", 240), ("t10k", 40)):
        pictures = chance.randbytes(count * 28 * 28)
        labels = bytes(place % 10 for place in range(count))
        for kind, content, shape in (
            ("images-idx3", pictures, (2051, count, 28, 28)),
            ("labels-idx1", labels, (2049, count)),
        ):
            head = b"".join(number.to_bytes(4, "big") for number in shape)
            (data / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + content))
    runpy.run_path(str(ROOT / "examples" / "small_clip.py"))["main"](data, out, 140)
    command = [
        "--base", str(out / "clip"), "--data", str(out / "fashion-mnist"), "--out", str(tmp_path / "run"),
        "--methods", "frozen,zero-init", "--steps", "1", "--seeds", "1", "--shots", "2", "--image-size", "28",
        "--learning-rates", "zero-init=0.01",
    ]  # fmt: skip
    from evaluate.finetune import base_to_novel

    base_to_novel.main(command)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["tables"][-1]["rows"][0][0] == "frozen" and len(result["tables"][-1]["rows"]) == 2
