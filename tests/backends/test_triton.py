"""The Triton backend where there is no GPU: compiled ahead of time, refused with a reason. backends/triton/: run."""

import ast
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from repository import ROOT, search_path

from zinit_kernels import explain, zero_init_attention

NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
CHIPS = (80, 90, 100)


def run(*command, interpret, **environment):
    """A process of its own: the interpreter replaces triton's functions for all that runs beside it."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(ROOT)} | (
        {"TRITON_INTERPRET": "1"} if interpret else {}
    )
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env)


@NEEDS_TRITON
@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_compile_within_the_chip(chip, tmp_path):
    """No spills at head dimensions up to 128, shared memory that fits, warpgroup products on Hopper."""
    result = run(
        "tests/backends/compile_triton.py", str(chip), interpret=False, TRITON_CACHE_DIR=str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 33
    for kernel in kernels:
        print(kernel)
        assert kernel["shared"] <= kernel["limit"], kernel
        if kernel["head_dim"] <= 128:
            assert kernel["spills"] == 0 and kernel["local"] == 0, kernel
        assert kernel["late_registers"] == 0, kernel
        if kernel["kernel"] in ("decode", "extend"):
            assert kernel["shared"] <= kernel["estimate"], kernel
        # dK and dV of 256 dimensions take tiles of 32 keys, too small for warpgroup products: larger ones spill
        too_small = kernel["kernel"] == "grad_key_value" and kernel["head_dim"] == 256
        if chip == 90 and kernel["kernel"] in ("forward", "grad_key_value", "grad_query") and not too_small:
            assert kernel["wgmma"] > 0, kernel


@NEEDS_TRITON
def test_registers_of_products_are_written_before_their_fence(tmp_path):
    """With a window the PTX has 240 instructions between a fence and its product; the machine code must have none."""
    chosen = (
        "--kernels",
        "forward,grad_key_value",
        "--masks",
        "window",
        "--head-dims",
        "64",
    )
    script = "tests/backends/compile_triton.py"
    result = run(script, "90", *chosen, interpret=False, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel["wgmma"] > 0 and kernel["late_registers"] == 0, kernel


@NEEDS_TRITON
def test_a_register_written_behind_the_fence_is_counted():
    file = ROOT / "tests" / "backends" / "compile_triton.py"
    specification = importlib.util.spec_from_file_location("compile_triton", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    count_late_registers = module.count_late_registers
    first, second = (
        "HGMMA.64x64x16.F32.BF16 R24, R132, gdesc[UR28].tnspB, R24",
        "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT",
    )
    write, arrive = "F2FP.BF16.F32.PACK_AB R134, R201, R230", "WARPGROUP.ARRIVE"
    assert count_late_registers([write, arrive, first, second]) == 0
    assert count_late_registers([arrive, write, first, second]) == 1  # the left operand is R132 to R135
    assert (
        count_late_registers([arrive, "FMUL R55, R1, R2", first, second]) == 1
    )  # and the accumulator R24 to R55
    assert count_late_registers([arrive, "FMUL R56, R134, R2", "STS [R24], R134", first, second]) == 0


@NEEDS_TRITON
@pytest.mark.parametrize("chip", (89, 120))
def test_large_tiles_fit_chips_with_99_kilobytes(chip, tmp_path):
    """RTX 40 and Blackwell RTX, whose shared memory is the smallest: not the safe tile, and without spills.

    The forward of sm_120 has 14 spill instructions outside its loops, which a program executes once. The tiles without
    them, 128 x 16 and 32 x 32 in two stages, take 1.4 and 1.7 times the instructions in the loop.
    """
    from zinit_kernels.backends.triton import configs

    chosen = ("--kernels", "forward,grad_key_value", "--head-dims", "128")
    script = "tests/backends/compile_triton.py"
    result = run(script, str(chip), *chosen, interpret=False, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert [kernel["kernel"] for kernel in kernels] == ["forward", "grad_key_value"]
    for kernel in kernels:
        few = 16 if (chip, kernel["kernel"]) == (120, "forward") else 0
        assert kernel["shared"] <= kernel["limit"] and kernel["spills"] <= few, kernel
        assert kernel["loop_spills"] == kernel["local"] == 0, kernel
        assert tuple(kernel["config"]) != configs.SAFE, kernel


def test_no_kernel_function_returns_none():
    """Triton 3.6, which torch 2.11 comes with, compiles no call of a function that returns None as a value."""
    folder = ROOT / "zinit_kernels" / "backends" / "triton"
    found = [
        f"{path.name}:{node.lineno} {function.name}"
        for path in sorted(folder.glob("*.py"))
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        and any(ast.unparse(d) == "triton.jit" for d in function.decorator_list)
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant) and node.value.value is None
    ]
    assert not found


@NEEDS_TRITON
def test_float32_compiles_without_spills_and_its_memory_is_foreseen(tmp_path):
    """With 128 prompts of 256 dimensions too: that call is refused because backward does not fit."""
    result = run(
        "tests/backends/compile_triton.py", "90", "--float32", interpret=False, TRITON_CACHE_DIR=str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 21
    for kernel in kernels:
        fits = kernel["shared"] <= kernel["limit"]
        assert fits == (kernel["estimate"] <= kernel["limit"]) and (fits or kernel["block_p"] == 128), kernel
        if kernel["block_p"] == 16:
            assert kernel["spills"] < (1 if kernel["head_dim"] <= 128 else 300), kernel
    assert {k["kernel"] for k in kernels if k["shared"] > k["limit"]} == {"partial_sums", "grad_query"}


@pytest.mark.parametrize(
    "head_dim, prompts, itemsize, arch, forward, backward",
    [
        (256, 128, 2, 90, True, True), (256, 128, 4, 90, True, False), (128, 128, 4, 90, True, True),
        (128, 128, 4, 86, True, False), (256, 128, 4, 86, False, False), (256, 10, 4, 86, True, True),
        (256, 128, 4, 0, True, True),
    ],
)  # fmt: skip
def test_prompts_that_no_tile_holds_are_refused(head_dim, prompts, itemsize, arch, forward, backward):
    from zinit_kernels.backends.triton import configs

    for wants_gradients, fits in ((False, forward), (True, backward)):
        reason = configs.why_too_large(head_dim, prompts, itemsize, arch, False, wants_gradients)
        assert ("KB of shared memory" in reason) != fits, reason


@NEEDS_TRITON
def test_every_choice_fits_its_chip_and_the_safe_one_fits_every_chip():
    from zinit_kernels.backends.triton import configs

    stages = ("forward", "prompt_gradients", "grad_key_value", "grad_query", "decode", "combine")
    for stage in stages:
        for block_d in (16, 32, 64, 128, 256):
            for block_p in (16, 128):
                for chip, limit in configs.SHARED_MEMORY.items():
                    config = configs.choose(stage, block_d, block_p, 2, chip)
                    if config != configs.safe(stage):
                        assert configs.shared_memory(stage, config, block_d, block_p, 2) <= limit
                    candidates = configs.candidates(stage, block_d, block_p, 2, chip)
                    assert candidates[0] == config and len(set(candidates)) == len(candidates) <= 8
                    for other in candidates[1:]:
                        assert configs.shared_memory(stage, other, block_d, block_p, 2) <= limit
                assert configs.choose(stage, block_d, block_p, 4, 90) == configs.FLOAT32
    for stage, block_d in itertools.product(
        ("decode", "extend"), (64, 128, 256)
    ):  # 99 KB are enough for them
        assert configs.choose(stage, block_d, 128, 2, 89) == configs.choose(stage, block_d, 128, 2, 80)
    assert configs.choose("forward", 128, 16, 2, 90)[:4] == (128, 64, 8, 3)
    assert configs.choose("forward", 128, 16, 2, 80)[:4] == (128, 32, 8, 3)
    assert configs.choose("forward", 128, 16, 2, 0) == configs.SAFE


def test_named_on_cpu_it_says_what_it_takes():
    script = (
        "import torch, zinit_kernels as z\n"
        "q = torch.randn(1, 2, 5, 16)\n"
        "print(z.explain(q, q, q, q[:, :, :3], q[:, :, :3], 0.5)['triton'])\n"
        "z.zero_init_attention(q, q, q, q[:, :, :3], q[:, :, :3], 0.5, backend='triton')\n"
    )
    result = run("-c", script, interpret=False)
    reason = "the tensors are on cpu" if importlib.util.find_spec("triton") else "triton is not installed"
    assert reason in result.stdout and re.search(
        f"ValueError: backend 'triton' cannot run.*{reason}", result.stderr
    )


@NEEDS_TRITON
def test_interpreted_it_refuses_what_no_fused_kernel_takes():
    script = (
        "import torch, zinit_kernels as z\n"
        "for dtype, dim in ((torch.float32, 16), (torch.float64, 16), (torch.float32, 300)):\n"
        "    q = torch.randn(1, 2, 5, dim, dtype=dtype)\n"
        "    print(z.explain(q, q, q, q[:, :, :3], q[:, :, :3], 0.5)['triton'])\n"
        "q, mask = q[..., :16], torch.randn(5, 5)\n"
        "print(z.explain(q, q, q, None, None, None, attn_mask=mask)['triton'])\n"
    )
    lines = run("-c", script, interpret=True).stdout.splitlines()
    assert lines[0] == "usable"
    for line, word in zip(
        lines[1:], ("float64", "head_dim must be 1 to 256, got 300", "attn_mask"), strict=True
    ):
        assert word in line


def test_importing_and_computing_on_cpu_imports_no_triton():
    script = (
        "import sys, torch\n"
        "before = {name for name in sys.modules if name.split('.')[0] == 'triton'}\n"
        "import zinit_kernels as z\n"
        "q = torch.randn(1, 2, 5, 16)\n"
        "z.zero_init_attention(q, q, q, q[:, :, :3], q[:, :, :3], 0.5)\n"
        "z.explain(q, q, q, q[:, :, :3], q[:, :, :3], 0.5)\n"
        "assert before == {name for name in sys.modules if name.split('.')[0] == 'triton'}\n"
    )
    result = run("-c", script, interpret=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "sm_75"), ((8, 0), "usable"), ((12, 0), "usable")]
)
def test_chips_by_capability(monkeypatch, tmp_path, capability, expected):
    """Of a chip that is not here: the choice looks at device and capability, and counts on the trial."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from zinit_kernels import proof
    from zinit_kernels.backends import fused, triton

    monkeypatch.setenv("ZINIT_CACHE", str(tmp_path))
    monkeypatch.setattr(proof, "_stores", {})
    monkeypatch.setattr(triton, "UNAVAILABLE", "")
    monkeypatch.setattr(fused, "_chips", {})
    major, minor = capability
    chip = SimpleNamespace(major=major, minor=minor, name="Tesla T4", multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: chip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (torch.empty(1, 2, 5, 16, device="cuda") for _ in range(3))
        explanation = explain(query, key, value, None, None, None)
    assert expected in explanation["triton"]
    assert explanation.selected == ("triton" if expected == "usable" else "composed")


def test_fake_tensors_of_a_device_that_is_not_there():
    """FakeTensorMode makes them on machines without a GPU, to plan models for one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with FakeTensorMode():
        query = torch.empty(1, 2, 5, 16, device="cuda")
        assert zero_init_attention(query, query, query).device.type == "cuda"
        assert "torch finds no NVIDIA GPU" in explain(query, query, query)["triton"]


def test_auto_takes_no_interpreter():
    """TRITON_INTERPRET=1 makes the kernels runnable on the CPU, not preferred."""
    script = (
        "import torch, zinit_kernels as z\n"
        "q = torch.randn(1, 2, 5, 16)\n"
        "print(z.explain(q, q, q, None, None, None).selected)\n"
    )
    assert run("-c", script, interpret=True).stdout.strip() in ("cpu", "composed")
