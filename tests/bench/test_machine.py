"""The limits of a machine, and the work that is counted: both are what they are called."""

import shutil
import subprocess
import time
from functools import partial

import pytest
import torch

from bench import machine
from bench.problem import Shape


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(7, 7), (3, 9), (1, 5)])
def test_pairs_are_counted_as_the_mask_leaves_them(causal, seqlen_q, seqlen_k):
    shape = Shape("", 1, 1, 1, 8, seqlen_q, seqlen_k, 10, causal)
    seen = torch.ones(seqlen_q, seqlen_k)
    seen = seen.tril(seqlen_k - seqlen_q) if causal else seen
    assert shape.pairs == seen.sum() + seqlen_q * 10
    assert shape.flops("forward") == 4 * 8 * shape.pairs


def test_the_limits_of_a_cpu_are_measured_as_they_are_counted():
    """Four times the work takes more than twice the CPU time: the compiler has left nothing out."""

    def cpu_seconds(call):
        times = []
        for _ in range(5):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return min(times)

    library, threads = machine.roofs(), torch.get_num_threads()
    for loop in (library.zinit_roof_float32, library.zinit_roof_bfloat16):
        if not loop(1, 1):
            continue
        assert loop(400, 2) == 2 * loop(400, 1) == 4 * loop(200, 1) > 0
        assert cpu_seconds(lambda loop=loop: loop(800_000, 1)) > 2 * cpu_seconds(
            lambda loop=loop: loop(200_000, 1)
        )
    small, large = (machine.peak_read(n) for n in (1 << 20, 1 << 28))
    assert small[1] == large[1] == 1 << 28  # a small buffer is read until as many bytes were
    data = torch.ones(1 << 20, dtype=torch.uint8).data_ptr()
    once, often = (partial(library.zinit_roof_read, data, 1 << 20, passes, 1) for passes in (200, 800))
    assert cpu_seconds(often) > 2 * cpu_seconds(once)
    assert machine.peak_arithmetic(torch.float16)[1] == library.zinit_roof_float32(
        machine.ITERATIONS, threads
    )


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="x86 with FMA")
def test_the_limit_loop_keeps_its_sums_apart(tmp_path):
    """Equal sums would be merged into one, and the peak would be many times too high."""
    code = subprocess.run(
        ["objdump", "-d", machine.compile_roofs(tmp_path)], capture_output=True, text=True, check=True
    )
    assert code.stdout.count("vfmadd") >= 12
