"""The same cases on every instruction set of this machine: it is chosen once per process, so each gets its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import special_numbers
from repository import search_path

pytestmark = pytest.mark.native
PROGRAM = """
import torch
import special_numbers as special
from zinit_kernels.testing import CACHE_CASES, CASES, SINK_CACHE_CASES, SINK_CASES, check_cache_case, check_case
failed = []

def run(name, check, *arguments):
    try:
        check(*arguments)
    except AssertionError as error:
        failed.append(f"{name}: {error}")

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    cases = [(c, check_case) for c in (*CASES, *SINK_CASES)]
    for case, check in cases + [(c, check_cache_case) for c in (*CACHE_CASES, *SINK_CACHE_CASES)]:
        run(f"{case.name} {dtype}", check, case, dtype, "cpu")
    for mask in special.MASKS:
        run(f"hidden {mask} {dtype}", special.check_hidden_values, "cpu", dtype, mask, special.INF)
        for where in ("query", "key", "value", "grad"):
            run(f"hidden {where} {mask} {dtype}", special.check_hidden_in_backward, dtype, mask, where)
    for tokens, splits, window in ((1, 1, (-1, -1)), (5, 2, (3, -1))):
        arguments = ("cpu", dtype, tokens, splits, window, special.NAN)
        run(f"hidden in a cache {dtype}", special.check_hidden_in_cache, *arguments)
run("tiny", special.check_tiny_values, torch.bfloat16, 1e-39)
print(torch.ops.zinit.cpu_capability(), len(failed), "failed", *failed, sep="\\n")
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_case(capability):
    environment = {
        **os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": search_path(Path(special_numbers.__file__).parent),
    }  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    path, count, *failures = ran.stdout.splitlines()
    if path != capability:
        pytest.skip(f"this machine has no {capability}: ran {path}")
    assert count == "0", "\n".join(failures)
