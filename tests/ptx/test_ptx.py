"""The PTX that nvcc writes for the CUDA kernels, inline assembly included, against the float64 reference.

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
from emulator import Emulator, as_prefill, decode_params, prefill_params, prompt_params  # noqa: E402
from toolchain import find_cuda  # noqa: E402

from zinit_kernels import prompt_attention_  # noqa: E402
from zinit_kernels.backends import cuda, fused  # noqa: E402
from zinit_kernels.call import CacheCall, Call, PromptCall  # noqa: E402
from zinit_kernels.testing import CacheCase, Case, check_cache_case, check_case, make_inputs  # noqa: E402

DTYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
MANGLED = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}
CASES = [  # of the cache function
    CacheCase("whole", heads_q=2, heads_kv=2, seqlens=(0, 17), rotary_dim=32),
    CacheCase("split", heads_q=2, heads_kv=2, seqlens=(40,), num_splits=2, page_size=16, table="indexed"),
    CacheCase("packed", heads_q=4, heads_kv=1, seqlens=(3, 33), seqlen_q=3, num_splits=2, page_size=16),
    CacheCase("window", heads_q=4, heads_kv=2, seqlens=(50,), seqlen_q=2, window=(9, -1), capacity=64),
]
LONG_CASES = [  # of the cache function: append, then prefill
    CacheCase(
        "chunk", heads_q=1, heads_kv=1, seqlens=(0, 20), seqlen_q=17, page_size=16, rotary_dim=32, capacity=48
    ),
]
WHOLE_CASES = [
    Case("causal", batch=1, heads_q=2, heads_kv=1, seqlens_q=(70,)),
    Case("window", batch=1, heads_q=1, heads_kv=1, seqlens_q=(140,), window=(20, -1)),
    Case("packed", packed=True, heads_q=1, heads_kv=1, seqlens_q=(0, 17, 1), table="indexed", gate="per_row"),
    Case("padded", batch=2, heads_q=1, heads_kv=1, seqlens_q=(20,), mask="padding", prompt_length=70),
]


KERNELS = {  # part of csrc/cuda -> its kernels, and what they are told; float32 has the first part's alone
    "decode": {
        "zinit_decode_cuda_cores<{}, 64, 1>": "DecodeWork",
        "zinit_decode_cuda_cores<{}, 64, 4>": "DecodeWork",
        "zinit_decode_combine<{}>": "DecodeWork",
        "zinit_decode_tensor_cores<{}, 64>": "DecodeWork",
    },
    "prefill": {"zinit_prefill<{}, 64>": "PrefillWork", "zinit_append<{}>": "CacheWork"},
    "prompt": {"zinit_add_prompts<{}, 64>": "PromptWork"},
}


def compile_ptx(
    folder: Path, dtypes: list[str], parts=KERNELS, tree: Path = ROOT
) -> dict[str, ptx_module.Entry]:
    cuda, reason = find_cuda()
    if cuda is None or (reason := compile_host.why_not_here()):
        pytest.skip(reason)
    lines = [f'#include "{tree}/csrc/cuda/{part}/launch.cuh"' for part in parts] + ["namespace zinit::cuda {"]
    for dtype in dtypes:
        for part in parts:
            for kernel, work in KERNELS[part].items():
                if dtype != "float" or (part == "decode" and "tensor" not in kernel):
                    lines.append(f"template __global__ void {kernel.format(dtype)}({work});")
    source = folder / "kernels.cu"
    source.write_text("\n".join([*lines, "}\n"]))
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


class PtxKernels:
    """The operators of csrc/cuda as their launchers would run them, on the interpreter."""

    def __init__(self, entries, emulator):
        self.entries, self.emulator = entries, emulator

    def run(self, kernel, dtype, numbers, grid, shared, work, tensors):
        arguments = MANGLED[dtype] + "".join(f"Li{number}E" for number in numbers)
        (entry,) = [entry for name, entry in self.entries.items() if f"{kernel}I{arguments}E" in name]
        memory = ptx_machine.Buffers()
        for tensor in tensors:
            if torch.is_tensor(tensor):
                memory.add(tensor.data_ptr(), tensor.untyped_storage().nbytes())
        ptx_machine.run(entry, grid, 128, shared, work, memory)

    def decode(self, *canonical):
        call = CacheCall(*canonical)
        params, out, lse = decode_params(call)
        batch, tokens, heads_q, head_dim = call.query.shape
        heads_kv, dtype = call.key_cache.shape[2], call.query.dtype
        if tokens > cuda.MAX_DECODE_TOKENS:
            tensors = (*call, out, lse)
            params = as_prefill(params)
            work, (_, blocks, _) = self.emulator.prefill_plan(params)
            self.run("zinit_append", dtype, (), (blocks, heads_kv, batch), 0, work, tensors)
            self.prefill(params, dtype, (heads_q, batch), tensors)
            return out, lse
        workspace = torch.full((batch * heads_q * tokens * 128 * (head_dim + 2),), float("nan"))
        work, (rows, row_blocks, splits, tensor_cores, shared, combine_shared) = self.emulator.plan(
            params, workspace
        )
        tensors = (*call, out, lse, workspace)
        kernel, numbers = "zinit_decode_cuda_cores", (head_dim, rows)
        if tensor_cores:
            kernel, numbers = "zinit_decode_tensor_cores", (head_dim,)
        self.run(kernel, dtype, numbers, (splits, heads_kv * row_blocks, batch), shared, work, tensors)
        if splits > 1:
            grid = (tokens * heads_q // heads_kv, heads_kv, batch)
            self.run("zinit_decode_combine", dtype, (), grid, combine_shared, work, tensors)
        return out, lse

    def prefill(self, params, dtype, columns, tensors):
        work, (blocks, _, shared) = self.emulator.prefill_plan(params)
        self.run("zinit_prefill", dtype, (64,), (blocks, *columns), shared, work, tensors)

    def forward(self, *canonical):
        call = Call(*canonical)
        params, out, lse = prefill_params(call)
        self.prefill(params, call.query.dtype, (call.query.shape[1], call.batch_size), (*call, out, lse))
        return out, lse

    def add_prompt_branch(self, *arguments):
        query = PromptCall(*arguments).query
        work, (blocks, shared) = self.emulator.prompt_plan(prompt_params(*arguments))
        grid = (blocks, query.shape[1], query.shape[0])
        self.run("zinit_add_prompts", query.dtype, (64,), grid, shared, work, arguments)


@pytest.fixture
def register(monkeypatch):
    """register(entries): backend="cuda" interprets them, on CPU tensors."""
    emulator = Emulator(compile_host.build("kernels.so", compile_host.ALL))
    library = torch.library.Library("zinit", "IMPL")
    monkeypatch.setattr(cuda, "UNAVAILABLE", "")
    monkeypatch.setattr(fused, "why_not_on_gpu", lambda call: "")

    def implement(entries):
        kernels = PtxKernels(entries, emulator)
        library.impl("decode_cuda", kernels.decode, "CPU")
        library.impl("forward_cuda", kernels.forward, "CPU")
        library.impl("prompt_cuda", kernels.add_prompt_branch, "CPU")

    yield implement
    library._destroy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(entries, register, case, dtype):
    register(entries)
    check_cache_case(case, dtype, "cuda")


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [*LONG_CASES, *WHOLE_CASES], ids=str)
def test_prefill_against_the_reference(entries, register, case, dtype):
    register(entries)
    check(case, dtype)


def check(case, dtype):
    if isinstance(case, CacheCase):
        return check_cache_case(case, dtype, "cuda")
    with torch.no_grad():
        check_case(case, dtype, "cuda", backward=False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_prompt_branch_alone(entries, register, dtype):
    """Added to the output without it, it is the whole call."""
    register(entries)
    inputs = make_inputs(Case("branch", batch=2, heads_q=2, heads_kv=1, seqlens_q=(20,)), dtype)
    query, _, _, prompt_key, prompt_value, gate = inputs.tensors.values()
    with torch.no_grad():
        expected = inputs.call("reference")[0].transpose(1, 2)
        inputs.tensors.update(prompt_key=None, prompt_value=None, gate=None)
        out = inputs.call("reference")[0].transpose(1, 2).contiguous()
        tables = (table.transpose(1, 2) for table in (prompt_key, prompt_value))
        prompt_attention_(out, query.transpose(1, 2), *tables, gate, backend="cuda")
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


BUGS = {  # of the assembly, which the emulator of tests/simt does not see
    "operands_of_the_mma": ("device.cuh", "{%4,%5,%6,%7}, {%8,%9}", "{%4,%5,%6,%7}, {%9,%8}", CASES[2]),
    "words_of_a_load": ("device.cuh", "{%0, %1, %2, %3}, [%4]", "{%0, %1, %3, %2}, [%4]", CASES[2]),
    "missing_barrier": (
        "decode/finish.cuh",
        "  });\n  __syncthreads();\n  for (int row",
        "  });\n  for (int row",
        CASES[0],
    ),
    "matrices_not_transposed": ("device.cuh", "x4.trans.shared", "x4.shared", WHOLE_CASES[0]),
    "copy_without_its_size": ("device.cuh", '"r"(wanted ? 16 : 0)', '"r"(16)', WHOLE_CASES[3]),
    "wait_for_nothing": ("device.cuh", "wait_group %0", "wait_group 9", WHOLE_CASES[0]),
    "no_barrier_between_tiles": (
        "prefill/kernel.cuh",
        "__syncthreads();  // this tile",
        "// this tile",
        WHOLE_CASES[0],
    ),
    "no_barrier_of_the_warp": ("tiles/tile.cuh", "__syncwarp();\n  constexpr", "constexpr", WHOLE_CASES[0]),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(register, tmp_path, name):
    file, correct, wrong, case = BUGS[name]
    shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "csrc" / "cuda")
    shutil.copy(ROOT / "csrc" / "params.h", tmp_path / "csrc")
    text = (tmp_path / "csrc" / "cuda" / file).read_text()
    assert correct in text, f"{correct!r} is not in {file} any more: plant the bug elsewhere"
    (tmp_path / "csrc" / "cuda" / file).write_text(text.replace(correct, wrong))
    parts = ["prefill"] if isinstance(case, Case) else ["decode"]
    register(compile_ptx(tmp_path, ["bf16"], parts, tmp_path))
    with pytest.raises((AssertionError, ptx_machine.Fault)):
        check(case, torch.bfloat16)
