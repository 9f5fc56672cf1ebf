"""Compiles csrc/cuda with a plain C++ compiler against the emulator in this folder: without torch, without nvcc."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))
from toolchain import find_cuda  # noqa: E402 (needs the line above)

HERE = "tests/simt"
KERNELS = [
    *(f"csrc/cuda/decode/{name}.cu" for name in ("decode", "decode_bf16", "decode_fp16", "decode_fp32")),
    *(f"csrc/cuda/prefill/{name}.cu" for name in ("prefill", "prefill_bf16", "prefill_fp16")),
    "csrc/cuda/prompt/prompt.cu",
]
ENTRY_POINTS = [f"{HERE}/entry_points.cpp", f"{HERE}/selftest.cu"]
ALL = [*KERNELS, *ENTRY_POINTS]
# never instrumented: it is not what is judged
RUNTIME = [f"{HERE}/{name}.cpp" for name in ("simt_rt", "simt_mma", "simt_copies")]

CFLAGS = [
    "-std=c++20",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
]
SANITIZERS = {
    "plain": (["-O2"], []),
    "address": (["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], ["-DSIMT_ASAN=1"]),
    "thread": (["-O1", "-fsanitize=thread"], ["-DSIMT_TSAN=1"]),
}


def why_not_here() -> str:
    """The reason why nothing can be emulated; '' where it can."""
    return "g++ is not here" if shutil.which("g++") is None else find_cuda()[1]


def includes() -> list[str]:
    cuda, reason = find_cuda()
    assert cuda is not None, reason
    return [f"-I{ROOT / HERE}", f"-isystem{cuda.path / 'include'}"]


def build(target: str, sources: list[str], sanitizer: str = "plain") -> Path:
    """Compile `sources` and the emulator into build/simt-.../target; incremental."""
    folder = ROOT / "build" / f"simt-{sanitizer}"
    folder.mkdir(parents=True, exist_ok=True)
    flags, defines = SANITIZERS[sanitizer]
    shared = target.endswith(".so")
    lines = [
        "rule compile",
        "  command = g++ -MMD -MF $out.d $flags -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ {' '.join(flags[1:])} {'-shared' if shared else ''} $in -o $out",
    ]
    objects = []
    for source in [*sources, *RUNTIME]:
        objects.append(f"{source}.o")
        own = ["-O2", *defines] if source in RUNTIME else [*flags, *defines]
        lines += [
            f"build {source}.o: compile {ROOT / source}",
            f"  flags = {' '.join([*CFLAGS, *own, *includes()])}",
        ]
    lines.append(f"build {target}: link {' '.join(objects)}")
    graph = folder / f"{target}.ninja"
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
    command = [*ninja, "-C", str(folder), "-f", graph.name, "-j", os.environ.get("MAX_JOBS", "2"), target]
    with (folder / "lock").open("w") as lock:  # one test process builds, the others find it built
        fcntl.flock(lock, fcntl.LOCK_EX)
        graph.write_text("\n".join(lines) + "\n")
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / target
