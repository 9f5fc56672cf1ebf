"""Every header of csrc compiles on its own, whatever the files that include it include before."""

import subprocess
import sys
from pathlib import Path

import compile_host as simt
import pytest
import torch
from repository import ROOT

sys.path.insert(0, str(ROOT))
from setup import CPU_ISAS, TORCH_TARGET  # noqa: E402 (needs the line above)

CSRC = ROOT / "csrc"
HEADERS = sorted(str(file.relative_to(CSRC)) for file in CSRC.rglob("*.*") if file.suffix in (".h", ".cuh"))
WITH_TORCH = (
    "arguments.h", "checks.h", "cpu/arguments.h", "cpu/layer_stack.h", "cpu/linear_arguments.h", "cpu/prefill.h",
    "cpu/run_stage.h", "cpu/run_steps.h", "torch_stable.h",
)  # fmt: skip
# on the emulator's types where there are kernels in it
WITH_CUDA = ("cuda/bindings.h", *(name for name in HEADERS if name.endswith(".cuh")))
FLAGS = {  # of headers with nothing in them otherwise
    "cpu/simd_avx2.h": CPU_ISAS["avx2"],
    "cpu/simd_avx512.h": CPU_ISAS["avx512_bf16"],
    "cpu/table.h": ["-DZINIT_KERNEL_TABLE=kGenericKernels", '-DZINIT_ISA_NAME="default"'],
}


@pytest.mark.parametrize("name", HEADERS)
def test_compiles_alone(name):
    if reason := simt.why_not_here():
        pytest.skip(reason)
    flags = list(FLAGS.get(name, []))
    if name in WITH_TORCH or name == "cuda/bindings.h":
        flags += [TORCH_TARGET, f"-isystem{Path(torch.__file__).parent / 'include'}"]
    if name in WITH_CUDA:
        flags += simt.includes() if name.endswith(".cuh") else simt.includes()[1:]
    command = [
        "g++",
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Wno-unknown-pragmas",
        *flags,
        "-x",
        "c++",
        "-",
    ]
    ran = subprocess.run(command, input=f'#include "{CSRC / name}"\n', capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
