"""The net itself is tested: each planted bug must be caught, by a wrong value or an error, in one of the schedules."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import compile_host as simt
import pytest
import torch
from emulator import Emulator

from zinit_kernels.testing import CacheCase, check_cache_case

BARRIER = "  __syncthreads();\n"
GROUPED = CacheCase(
    "grouped", heads_q=8, heads_kv=2, seqlens=(0, 17, 100), seqlen_q=2, num_splits=2, page_size=16
)
TWO_ROW_BLOCKS = CacheCase("two_row_blocks", heads_q=20, heads_kv=1, seqlens=(40,))
WITHOUT_KEYS = CacheCase("without_keys", append=False, seqlens=(0, 5), num_splits=2)
SCHEDULES = ("forward", "reverse", "random1", "random2")
ALONE = CacheCase("alone", heads_q=2, heads_kv=2, seqlens=(0, 17, 100), num_splits=2, rotary_dim=32)


class Bug(NamedTuple):
    file: str
    correct: str
    wrong: str
    case: CacheCase = GROUPED


BUGS = {
    "no_barrier_before_states_are_read": Bug("finish.cuh", f"ROWS * 2;\n{BARRIER}", "ROWS * 2;\n"),
    "no_barrier_after_prompt_scores": Bug("finish.cuh", f"kLog2E);\n  }}\n{BARRIER}", "kLog2E);\n  }\n"),
    "no_barrier_after_staging": Bug("tensor_cores.cuh", f"shared);\n{BARRIER}", "shared);\n"),
    "no_barrier_between_turns": Bug("finish.cuh", f"  {BARRIER}  }}\n  const int b", "  }\n  const int b"),
    "one_key_too_many": Bug("work.cuh", "position + w.window_right + 1", "position + w.window_right + 2"),
    "wrong_head_of_the_group": Bug(
        "stage.cuh", "kv_head * w.group + (first + row) % w.group", "(first + row) % w.group * 2 + kv_head"
    ),
    "gate_without_its_activation": Bug("finish.cuh", "w.tanh_gate ? tanhf(raw) : raw", "raw"),
    "one_split_for_all": Bug("combine.cuh", "w.partials[(at + s) * head_dim + d]", "w.partials[at * head_dim + d]"),
    "splits_without_keys_are_read": Bug("combine.cuh", "states[2 * s + 1] == 0.f ? 0.f : ", "", WITHOUT_KEYS),
    "new_keys_from_the_cache": Bug(
        "work.cuh", "if (key >= s.length) return {-1, key - s.length};", "", TWO_ROW_BLOCKS
    ),
    "slot_of_another_page": Bug("work.cuh", "{max(page_of(w, s.index, page), 0), key - page", "{0, key - page"),
    "appended_in_no_split": Bug("work.cuh", "split == w.splits - 1", "split == w.splits"),
    "values_from_the_keys": Bug("stage.cuh", "shared.new_values[i] = value;", "shared.new_values[i] = key;", ALONE),
    "keys_not_rotated": Bug("stage.cuh", "kv_head, token), d, position);", "kv_head, token), d, 0);", ALONE),
    "shuffle_in_a_branch": Bug(
        "cuda_cores.cuh", "    float weights[ROWS][kUnroll];\n",
        "    float weights[ROWS][kUnroll];\n    if (first + lane_group >= share.end) continue;\n", ALONE,
    ),
    "values_of_other_keys": Bug("tensor_cores.cuh", "quarter * 2 + i % 2 + i / 2 * 8", "quarter * 4 + i"),
    "dimensions_out_of_order": Bug("tensor_cores.cuh", "j % 2 ? 0x7632 : 0x5410", "j % 2 ? 0x5410 : 0x7632"),
    "no_shared_memory": Bug("launch.cuh", "dim3(kThreads), shared_bytes, stream", "dim3(kThreads), 0, stream"),
}  # fmt: skip


def replace(folder: Path, name: str, pattern: str, wrong: str) -> None:
    file = folder / "csrc" / "cuda" / "decode" / name
    text, found = re.subn(pattern, lambda match: wrong, file.read_text(), flags=re.DOTALL)
    assert found == 1, f"{pattern!r} stands {found} times in {name}: plant the bug elsewhere"
    file.write_text(text)


def copy_with(bug: Bug, folder: Path) -> None:
    """The kernels' sources with the bug."""
    shutil.copytree(simt.ROOT / "csrc" / "cuda", folder / "csrc" / "cuda")
    shutil.copy(simt.ROOT / "csrc" / "params.h", folder / "csrc")
    replace(folder, bug.file, re.escape(bug.correct), bug.wrong)


def plant(bug: Bug, folder: Path) -> Emulator:
    """The bfloat16 kernels with the bug, for head_dim 64 alone, beside the other files as they are."""
    library = simt.build("kernels.so", simt.ALL)
    copy_with(bug, folder)
    replace(
        folder,
        "launch.cuh",
        r"switch \(w.head_dim\) \{.*?\n  \}\n",
        "launch_attention<T, 64>(w, plan, stream);\n",
    )
    objects = [
        str(library.parent / f"{source}.o") for source in [*simt.ALL, *simt.RUNTIME] if "bf16" not in source
    ]
    source = folder / "csrc" / "cuda" / "decode" / "decode_bf16.cu"
    flags = [*simt.CFLAGS, "-Wno-error", "-O1", *simt.includes()]
    subprocess.run(
        ["g++", *flags, "-x", "c++", "-c", source, "-o", folder / "bug.o"], check=True, capture_output=True
    )
    subprocess.run(["g++", "-shared", *objects, folder / "bug.o", "-o", folder / "bug.so"], check=True)
    return Emulator(folder / "bug.so")


@pytest.fixture(scope="module")
def planted(emulator, tmp_path_factory):
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda name: plant(BUGS[name], tmp_path_factory.mktemp(name)), BUGS)
        return dict(zip(BUGS, built, strict=True))


def caught(case: CacheCase, schedule: str, monkeypatch) -> bool:
    monkeypatch.setenv("SIMT_SCHEDULE", schedule)
    try:
        check_cache_case(case, torch.bfloat16, "cuda")
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("name", BUGS)
def test_is_caught(planted, register, monkeypatch, name):
    register(planted[name])
    assert any(caught(BUGS[name].case, schedule, monkeypatch) for schedule in SCHEDULES)


@pytest.mark.parametrize("case", [GROUPED, ALONE, TWO_ROW_BLOCKS, WITHOUT_KEYS], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_bug_nothing_is_caught(cuda, monkeypatch, case, schedule):
    assert not caught(case, schedule, monkeypatch)


SANITIZED = {  # caught whatever the values are
    "thread": Bug("finish.cuh", f"kLog2E);\n  }}\n{BARRIER}", "kLog2E);\n  }\n"),
    "address": Bug(
        "launch.cuh", "dim3(kThreads), shared_bytes, stream", "dim3(kThreads), shared_bytes - 16, stream"
    ),
}


@pytest.mark.parametrize("sanitizer", SANITIZED)
def test_the_sanitizers_catch_theirs(tmp_path, sanitizer):
    if reason := simt.why_not_here():
        pytest.skip(reason)
    copy_with(SANITIZED[sanitizer], tmp_path)
    (tmp_path / simt.HERE).mkdir(parents=True)
    driver = shutil.copy(simt.ROOT / simt.HERE / "check_decode.cpp", tmp_path / simt.HERE)
    flags, defines = simt.SANITIZERS[sanitizer]
    objects = []
    for source, own in ((driver, flags), *((simt.ROOT / name, ["-O2"]) for name in simt.RUNTIME)):
        objects.append(tmp_path / f"{Path(source).stem}.o")
        command = [
            "g++",
            *simt.CFLAGS,
            *own,
            *defines,
            *simt.includes(),
            "-x",
            "c++",
            "-c",
            source,
            "-o",
            objects[-1],
        ]
        subprocess.run(command, check=True)
    subprocess.run(["g++", *flags, *objects, "-o", tmp_path / "check"], check=True)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    ran = subprocess.run([tmp_path / "check"], capture_output=True, text=True, env=environment)
    assert ran.returncode != 0
    assert {"thread": "data race", "address": "heap-buffer-overflow"}[sanitizer] in ran.stderr
