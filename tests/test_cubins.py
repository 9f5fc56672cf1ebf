"""What nvcc makes of the CUDA kernels, without a GPU: no spills, registers and shared memory within written budgets.

A kernel's budget follows from how many of its blocks a multiprocessor must hold for enough loads to be in flight.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))
import kernel_facts  # noqa: E402 (needs the line above)
from toolchain import find_cuda  # noqa: E402

ARCHS = (80, 90, 100, 120)
DTYPES = ("bf16", "fp16", "fp32")
HEAD_DIMS = (64, 80, 96, 128, 256)
REGISTERS = 65536  # of a multiprocessor
THREADS = 128
BLOCKS = {  # kernel -> blocks that must fit into a multiprocessor's registers
    "decode_combine": 8,
    "decode_on_cuda_cores, 1 row": 3,
    "decode_on_cuda_cores, 4 rows": 2,
    "decode_on_tensor_cores": 2,
}


def compile_one(cuda: Path, dtype: str, arch: int, folder: Path) -> list[dict]:
    source = ROOT / "csrc" / "cuda" / "decode" / f"decode_{dtype}.cu"
    command = [
        cuda / "bin" / "nvcc", "-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v",
        "-o", folder / f"{dtype}_{arch}.cubin", source,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = []
    for row in kernel_facts.parse(result.stderr):
        name, rest = re.search(r"(decode_[a-z_]*[a-z])I(.*)", row["kernel"]).groups()
        numbers = [int(number) for number in re.findall(r"Li(\d+)E", rest)]
        if name == "decode_on_cuda_cores":
            name += f", {numbers[1]} row{'s' * (numbers[1] > 1)}"
        rows.append(
            {**row, "kernel": name, "dtype": dtype, "head_dim": numbers[0] if numbers else 0, "arch": arch}
        )
    return rows


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    cuda, reason = find_cuda()
    if cuda is None or shutil.which("g++") is None:
        pytest.skip(reason or "g++, which nvcc needs, is not here")
    folder = tmp_path_factory.mktemp("cubins")
    pairs = [
        (dtype, arch) for arch in ARCHS for dtype in DTYPES if dtype != "fp16" or arch == 90
    ]  # bf16's twin
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: compile_one(cuda.path, *pair, folder), pairs))
    return [row for rows in found for row in rows]


def test_no_spills_and_registers_within_budget(kernels):
    table = {}
    for row in kernels:
        key = row["kernel"], row["head_dim"] or "any", row["dtype"]
        table.setdefault(key, {})[row["arch"]] = row["registers"]
    print("\nregisters" + "".join(f" sm_{arch}" for arch in ARCHS))
    for (kernel, head_dim, dtype), found in sorted(table.items(), key=str):
        print(f"{kernel}, D {head_dim}, {dtype}: " + " ".join(str(found.get(arch, "-")) for arch in ARCHS))
    on_cuda_cores, on_tensor_cores = 2 * len(HEAD_DIMS), len(HEAD_DIMS)
    half, single = 1 + on_cuda_cores + on_tensor_cores, 1 + on_cuda_cores
    assert len(kernels) == len(ARCHS) * (half + single) + half
    for row in kernels:
        assert row["stack"] == 0 and row["spilled"] == 0, f"spills: {row}"
        assert row["registers"] <= REGISTERS // THREADS // BLOCKS[row["kernel"]], f"over its budget: {row}"
