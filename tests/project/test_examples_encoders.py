"""The encoder examples, the quick way; each asserts by itself that at step 0 the adapted model is the frozen one."""

import os
import re
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
