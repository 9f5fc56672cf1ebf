"""The same cases on every instruction set of this machine: it is chosen once per process, so each gets its own."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.native
PROGRAM = """
import torch
from zinit_kernels.testing import CACHE_CASES, CASES, check_cache_case, check_case
failed = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for case, check in [(c, check_case) for c in CASES] + [(c, check_cache_case) for c in CACHE_CASES]:
        try:
            check(case, dtype, "cpu")
        except AssertionError as error:
            failed.append(f"{case.name} {dtype}: {error}")
print(torch.ops.zinit.cpu_capability(), len(failed), "failed", *failed, sep="\\n")
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_case(capability):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    path, count, *failures = ran.stdout.splitlines()
    if path != capability:
        pytest.skip(f"this machine has no {capability}: ran {path}")
    assert count == "0", "\n".join(failures)
