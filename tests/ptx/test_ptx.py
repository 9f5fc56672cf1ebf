"""The PTX that nvcc writes for the decode kernels, inline assembly included, against the float64 reference.

A few small cases of each kernel; tests/simt runs the source of all of them. Nothing here has run on a GPU.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "simt"), str(ROOT / "build_backend")]
import compile_host  # noqa: E402 (needs the line above)
import ptx_machine  # noqa: E402
import ptx_module  # noqa: E402
from emulator import Emulator, decode_params  # noqa: E402
from toolchain import find_cuda  # noqa: E402

from zinit_kernels import dispatch  # noqa: E402
from zinit_kernels.calls import CacheCall  # noqa: E402
from zinit_kernels.testing import CacheCase, check_cache_case  # noqa: E402

DTYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
MANGLED = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}
CASES = [
    CacheCase("whole", heads_q=2, heads_kv=2, seqlens=(0, 17), rotary_dim=32),
    CacheCase("split", heads_q=2, heads_kv=2, seqlens=(40,), num_splits=2, page_size=16, table="indexed"),
    CacheCase("packed", heads_q=4, heads_kv=1, seqlens=(3, 33), seqlen_q=3, num_splits=2, page_size=16),
    CacheCase("window", heads_q=4, heads_kv=2, seqlens=(50,), seqlen_q=2, window=(9, -1), capacity=64),
]


def instantiate(dtype: str) -> str:
    kernels = [f"decode_on_cuda_cores<{dtype}, 64, {rows}>" for rows in (1, 4)] + [f"decode_combine<{dtype}>"]
    if dtype != "float":
        kernels.append(f"decode_on_tensor_cores<{dtype}, 64>")
    return "".join(f"template __global__ void {kernel}(DecodeWork);\n" for kernel in kernels)


def compile_ptx(folder: Path, dtypes: list[str], tree: Path = ROOT) -> dict[str, ptx_module.Entry]:
    cuda, reason = find_cuda()
    if cuda is None or (reason := compile_host.why_not_here()):
        pytest.skip(reason)
    source = folder / "decode.cu"
    header = f'#include "{tree}/csrc/cuda/decode/launch.cuh"\nnamespace zinit::cuda {{\n'
    source.write_text(header + "".join(map(instantiate, dtypes)) + "}\n")
    command = [
        cuda.path / "bin" / "nvcc",
        "-std=c++20",
        "-O3",
        "-lineinfo",
        "-ptx",
        "-arch=compute_80",
        source,
    ]
    subprocess.run([*command, "-o", source.with_suffix(".ptx")], check=True)
    return ptx_module.parse(source.with_suffix(".ptx").read_text())


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    return compile_ptx(tmp_path_factory.mktemp("ptx"), list(DTYPES.values()))


class PtxDecode:
    """zinit::decode_cuda as the launcher would do it, on the interpreter."""

    def __init__(self, entries, emulator):
        self.entries, self.emulator = entries, emulator

    def entry(self, kernel, dtype, *numbers):
        arguments = MANGLED[dtype] + "".join(f"Li{number}E" for number in numbers)
        (found,) = [entry for name, entry in self.entries.items() if f"{kernel}I{arguments}E" in name]
        return found

    def __call__(self, *canonical):
        call = CacheCall(*canonical)
        params, out, lse = decode_params(call)
        batch, tokens, heads_q, head_dim = call.query.shape
        heads_kv = call.key_cache.shape[2]
        workspace = torch.full((batch * heads_q * tokens * 128 * (head_dim + 2),), float("nan"))
        work, (rows, row_blocks, splits, tensor_cores, shared, combine_shared) = self.emulator.plan(
            params, workspace
        )
        memory = ptx_machine.Buffers()
        for tensor in (*call, out, lse, workspace):
            if torch.is_tensor(tensor):
                memory.add(tensor.data_ptr(), tensor.untyped_storage().nbytes())
        dtype = call.query.dtype
        attend = (
            self.entry("decode_on_tensor_cores", dtype, head_dim)
            if tensor_cores
            else self.entry("decode_on_cuda_cores", dtype, head_dim, rows)
        )
        ptx_machine.run(attend, (splits, heads_kv * row_blocks, batch), 128, shared, work, memory)
        if splits > 1:
            grid = (tokens * heads_q // heads_kv, heads_kv, batch)
            ptx_machine.run(self.entry("decode_combine", dtype), grid, 128, combine_shared, work, memory)
        return out, lse


@pytest.fixture
def register(monkeypatch):
    """register(entries): backend="cuda" interprets them, on CPU tensors."""
    emulator = Emulator(compile_host.build("kernels.so", compile_host.ALL))
    library = torch.library.Library("zinit", "IMPL")
    monkeypatch.setattr(dispatch, "_CUDA_UNAVAILABLE", "")
    monkeypatch.setattr(dispatch, "_why_not_on_gpu", lambda call: "")
    yield lambda entries: library.impl("decode_cuda", PtxDecode(entries, emulator), "CPU")
    library._destroy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(entries, register, case, dtype):
    register(entries)
    check_cache_case(case, dtype, "cuda")


BUGS = {  # of the assembly, which the emulator of tests/simt does not see
    "operands_of_the_mma": ("device.cuh", "{%4,%5,%6,%7}, {%8,%9}", "{%4,%5,%6,%7}, {%9,%8}", CASES[2]),
    "load_without_its_predicate": ("device.cuh", "@wanted ld", "ld", CASES[2]),
    "words_of_a_load": ("device.cuh", "{%0, %1, %2, %3}, [%4]", "{%0, %1, %3, %2}, [%4]", CASES[2]),
    "missing_barrier": (
        "decode/finish.cuh",
        "kLog2E);\n  }\n  __syncthreads();\n",
        "kLog2E);\n  }\n",
        CASES[0],
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(register, tmp_path, name):
    file, correct, wrong, case = BUGS[name]
    shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "csrc" / "cuda")
    shutil.copy(ROOT / "csrc" / "params.h", tmp_path / "csrc")
    text = (tmp_path / "csrc" / "cuda" / file).read_text()
    assert correct in text, f"{correct!r} is not in {file} any more: plant the bug elsewhere"
    (tmp_path / "csrc" / "cuda" / file).write_text(text.replace(correct, wrong))
    register(compile_ptx(tmp_path, ["bf16"], tmp_path))
    with pytest.raises((AssertionError, ptx_machine.Fault)):
        check_cache_case(case, torch.bfloat16, "cuda")
