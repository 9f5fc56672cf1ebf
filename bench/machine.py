"""The machine that figures are measured on: its name, its software, and the most that it can compute and read.

A CPU's limits are measured by `roofs.cpp`, a loop of multiply-adds and a loop of loads, which is compiled for the
instruction set that torch uses when the first of them is needed.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch", "triton", "transformers", "peft", "litgpt", "flash_attn", "flashinfer-python", "xformers", "liger-kernel"
)  # fmt: skip
SETTINGS = ("ZINIT_AUTOTUNE", "ZINIT_PROOF")  # environment variables that change which kernel runs
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
FLAGS = {
    "AVX512": ["-march=native"],
    "AVX2": ["-mavx2", "-mfma"],
    "DEFAULT": [],
}  # by torch's instruction set
ITERATIONS = 400_000  # of the multiply-add loop: about 2 ms
READ_BYTES = 256 << 20  # at least, so that starting the threads costs less than 2 % of a call


def chip(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model name; with family and model number where the name itself holds no number.

    A virtual machine may report only "AMD EPYC". That is a Zen 4 on one host and a Zen 5 on another, and their
    vector units differ by a factor of two.
    """
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        found.setdefault(name.strip(), value.strip())
    name = found.get("model name", "unknown CPU").partition(" @ ")[0]  # the part after "@" is a clock rate
    is_unique = re.search(r"\d", name) or "cpu family" not in found
    return name if is_unique else f"{name} family {found['cpu family']} model {found['model']}"


def folder_name(chip: str) -> str:
    """The chip's folder under bench/results: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions of the installed libraries, and of CUDA where there is a GPU."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
    return found


def commit() -> str:
    """The checkout's commit; "-dirty" is appended where code that runs differs from it.

    Ledgers and pages may differ. A copy without history (on a rented GPU, say) reads ZINIT_COMMIT instead.
    """
    git = ["git", "-C", str(ROOT)]
    found = output([*git, "rev-parse", "--short=10", "HEAD"])
    pages = [f":!{path}" for path in ("bench/results", "docs", "*.md")]
    changed = output([*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *pages])
    return f"{found}{'-dirty' if changed else ''}" if found else os.environ.get("ZINIT_COMMIT", "unknown")


def output(command: list[str]) -> str:
    """The standard output of a command; "" where it fails or does not exist."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def conditions(device: torch.device) -> dict[str, object]:
    """The conditions of one run, as its ledger keeps them."""
    return {
        "chip": chip(device),
        "device": device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "versions": versions(),
        "load": round(
            os.getloadavg()[0], 2
        ),  # of the last minute; above the thread count, others were working
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def same_conditions(facts: Mapping[str, object]) -> str:
    """A key that two runs share when they measured the same code on the same machine."""
    names = ("chip", "instructions", "commit", "versions", "malloc", "settings")
    return json.dumps([facts.get(name) for name in names], sort_keys=True)


def why_missing(*modules: str) -> str:
    """Which of these modules cannot be imported; "" where all can."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


def why_failed(error: Exception) -> str:
    """The error's class and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def matrix_product(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Callable[[], object], float]:
    """A square torch.mm, and its floating-point operations. A reference, not a limit: kernels may be faster."""
    size = MATRIX_SIZE[torch.device(device).type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b), 2.0 * size**3


def plain_read(*tensors: Tensor) -> Callable[[], object]:
    """Reads every byte once by a torch reduction on all threads.

    As int64: a sum in bfloat16 would be limited by arithmetic. A reduction has a fixed cost, so that a small cache
    can be read faster than this; `peak_read` has none.
    """
    words = [tensor.flatten().view(torch.int64) for tensor in tensors]
    return lambda: [word.amax() for word in words]


def device_copy(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """Moves `num_bytes` through the device's memory: half of them are read, half are written."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compile_roofs(folder: Path) -> Path | None:
    """Compiles `roofs.cpp` into the folder; None where there is no C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    flags = FLAGS.get(torch.backends.cpu.get_cpu_capability(), ["-march=native"])
    library = folder / "roofs.so"
    command = [compiler, "-std=c++20", "-O3", *flags, "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, str(ROOT / "bench" / "roofs.cpp"), "-o", str(library)], check=True)
    return library


@cache
def roofs() -> ctypes.CDLL | None:
    """The loops of `roofs.cpp`; None where there is no C++ compiler."""
    with tempfile.TemporaryDirectory() as folder:
        library = compile_roofs(Path(folder))
        if library is None:
            return None
        found = ctypes.CDLL(str(library))
    for name in ("zinit_roof_float32", "zinit_roof_bfloat16"):
        getattr(found, name).argtypes = [ctypes.c_int64, ctypes.c_int]
        getattr(found, name).restype = ctypes.c_double
    found.zinit_roof_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    found.zinit_roof_read.restype = ctypes.c_double
    return found


def peak_arithmetic(dtype: torch.dtype) -> tuple[Callable[[], object], float] | None:
    """Multiply-adds from registers on all of torch's threads, and their floating-point operations per call.

    This is the limit of any kernel that uses the same instructions: fused multiply-adds in float32, and for bfloat16
    the dot product of AVX-512 BF16 where the CPU has it. float16 is computed in float32. None without a compiler.
    """
    library, threads = roofs(), torch.get_num_threads()
    if library is None:
        return None
    loop = library.zinit_roof_bfloat16 if dtype == torch.bfloat16 else library.zinit_roof_float32
    if not loop(1, threads):  # the CPU has no bfloat16 arithmetic
        loop = library.zinit_roof_float32
    return partial(loop, ITERATIONS, threads), loop(ITERATIONS, threads)


def peak_read(num_bytes: int) -> tuple[Callable[[], object], float] | None:
    """Reads a buffer of `num_bytes` on all of torch's threads, often enough to fill 2 ms, and the bytes per call.

    Each thread reads the same part in every pass, so a buffer that fits into the caches is read from them.
    """
    library, threads = roofs(), torch.get_num_threads()
    if library is None:
        return None
    buffer = torch.ones(num_bytes + 64, dtype=torch.uint8)
    offset = -buffer.data_ptr() % 64
    passes = max(1, READ_BYTES // num_bytes)

    def run() -> float:
        return float(library.zinit_roof_read(buffer.data_ptr() + offset, num_bytes, passes, threads))

    return run, run()
