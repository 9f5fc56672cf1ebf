"""What nvcc makes of the CUDA kernels, without a GPU: no spills, registers and shared memory within written budgets.

A kernel's budget follows from how many of its blocks a multiprocessor must hold for enough loads to be in flight.
"""

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import kernel_facts
import pytest
from repository import ROOT
from toolchain import find_cuda  # noqa: E402

SOURCES = {  # what is compiled -> for which chips: fp16 is bf16's twin, and float32 was the one to spill on sm_120
    "decode/decode_bf16": (80, 90, 100),
    "decode/decode_fp32": (120,),
    "prefill/prefill_bf16": (80, 90, 100, 120),
    "prompt/prompt": (90,),
}
HEAD_DIMS = (64, 80, 96, 128, 256)
REGISTERS = 65536  # of a multiprocessor
THREADS = 128
BLOCKS = {  # kernel -> blocks that must fit into a multiprocessor's registers
    "zinit_decode_combine": 8,
    "zinit_decode_cuda_cores, 1 row": 3,
    "zinit_decode_cuda_cores, 4 rows": 2,
    "zinit_decode_tensor_cores": 2,
    "zinit_prefill": 2,
    "zinit_append": 8,
    "zinit_add_prompts": 2,
}
KERNELS = {  # of one source
    "decode/decode_bf16": 1 + 3 * len(HEAD_DIMS),
    "decode/decode_fp32": 1 + 2 * len(HEAD_DIMS),
    "prefill/prefill_bf16": 1 + len(HEAD_DIMS),
    "prompt/prompt": 2 * len(HEAD_DIMS),
}


def compile_one(cuda: Path, source: str, arch: int, folder: Path) -> list[dict]:
    cubin = folder / f"{Path(source).name}_{arch}.cubin"
    command = [
        cuda / "bin" / "nvcc", "-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v",
        "-o", cubin, ROOT / "csrc" / "cuda" / f"{source}.cu",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = []
    for row in kernel_facts.parse(result.stderr):
        name, rest = re.search(r"cuda\d+([a-z_]*[a-z])I(.*)", row["kernel"]).groups()
        numbers = [int(number) for number in re.findall(r"Li(\d+)E", rest)]
        dtype = {"f": "fp32", "1": "bf16", "6": "fp16"}[rest[0]]
        if name == "zinit_decode_cuda_cores":
            name += f", {numbers[1]} row{'s' * (numbers[1] > 1)}"
        rows.append(
            {
                **row, "kernel": name, "dtype": dtype, "head_dim": numbers[0] if numbers else 0, "arch": arch,
                "symbol": row["kernel"], "cubin": cubin,
            }
        )  # fmt: skip
    assert len(rows) == KERNELS[source], [row["kernel"] for row in rows]
    return rows


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    cuda, reason = find_cuda()
    if cuda is None or shutil.which("g++") is None:
        pytest.skip(reason or "g++, which nvcc needs, is not here")
    folder = tmp_path_factory.mktemp("cubins")
    pairs = [(source, arch) for source, archs in SOURCES.items() for arch in archs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: compile_one(cuda.path, *pair, folder), pairs))
    return [row for rows in found for row in rows]


def test_no_spills_and_registers_within_budget(kernels):
    table = {}
    for row in kernels:
        key = row["kernel"], row["head_dim"] or "any", row["dtype"]
        table.setdefault(key, {})[row["arch"]] = row["registers"]
    archs = sorted({row["arch"] for row in kernels})
    print("\nregisters" + "".join(f" sm_{arch}" for arch in archs))
    for (kernel, head_dim, dtype), found in sorted(table.items(), key=str):
        print(f"{kernel}, D {head_dim}, {dtype}: " + " ".join(str(found.get(arch, "-")) for arch in archs))
    for row in kernels:
        assert row["stack"] == 0 and row["spilled"] == 0, f"spills: {row}"
        assert row["registers"] <= REGISTERS // THREADS // BLOCKS[row["kernel"]], f"over its budget: {row}"


@cache
def instructions(cubin: Path, symbol: str) -> list[str]:
    """The machine code of a kernel."""
    triton = importlib.util.find_spec("triton")
    program = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else Path()
    if not program.is_file():
        pytest.skip("cuobjdump is not here: pip install triton")
    command = [program, "-sass", "-fun", symbol, cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)


def test_the_loads_of_a_tile_are_on_their_way_together(kernels):
    """Not so where each is predicated: ptxas took the keys out of their registers before it asked for the values."""
    for row in kernels:
        kernel, head_dim = row["kernel"], row["head_dim"]
        if "_cores" not in kernel or (kernel, head_dim) == ("zinit_decode_tensor_cores", 256):
            continue  # the latter's come in pieces, for want of registers
        of_a_lane = 8 if "cuda_cores" in kernel else 2 * -(-head_dim // 32) + 4 * -(-head_dim // 64)
        code = instructions(row["cubin"], row["symbol"])
        at = [i for i, instruction in enumerate(code) if re.search(r"\bLDG?\.E\S*\.128", instruction)]
        span = at[of_a_lane - 1] - at[0]
        print(f"{kernel}, D {head_dim}, sm_{row['arch']}: {of_a_lane} loads within {span} instructions")
        assert span <= 8 * of_a_lane, row


def test_the_combination_begins_while_the_splits_end_and_waits_for_them(kernels):
    """On sm_90 and newer; what waits for nothing there must not be launched behind another."""
    for row in kernels:
        if not row["kernel"].startswith("zinit_decode"):
            continue
        code = instructions(row["cubin"], row["symbol"])
        waits = [i for i, instruction in enumerate(code) if "ACQBULK" in instruction]
        lets_begin = any("PREEXIT" in instruction for instruction in code)
        if row["kernel"] != "zinit_decode_combine" or row["arch"] < 90:
            assert not waits and lets_begin == (
                row["kernel"] != "zinit_decode_combine" and row["arch"] >= 90
            ), row
            continue
        writes = [i for i, instruction in enumerate(code) if re.search(r"\bSTG?\.E", instruction)]
        assert len(waits) == 1 and waits[0] < writes[0] and not lets_begin, row
