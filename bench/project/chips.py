"""What is published of NVIDIA chips, in one table.

Multiprocessors, clocks, peak rates, memory bandwidth, L2 and shared memory sizes are NVIDIA's: the whitepapers of A100
(v1.0), H100 (v1.04) and Ada GPUs (v2.1), the data sheets of H200 and L40S, and the CUDA C++ Programming Guide (tables
"Arithmetic Instructions" and "Technical Specifications per Compute Capability"). The rest was measured by others:

* Latency of L2 and of memory without load, and mma.sync's share of the peak on Hopper: Luo et al., "Benchmarking and
  Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", arXiv:2402.13499.
* Clock under load: a dense product reaches 788 of 989 TFLOP/s on an H200 with random data, because of the power limit.
  A100 keeps its clock under load (chipsandcheese.com, July 2023). For Ada that is assumed.
* A copy's share of the memory bandwidth: 4.3 of 4.8 TB/s on an H200, taken for all chips.
* L2 bandwidth of A100: 4.2 TB/s (github.com/RRZE-HPC/gpu-benches, issue 13). No figure was found for Ada, so A100's
  bytes per cycle and multiprocessor are taken. Hopper's is fitted: at 4.5 TB/s the projection of Triton's tutorial
  meets its published speeds (`tutorial`).

Blackwell is missing: its products run from tensor memory (tcgen05), which `schedule` does not model.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Rates are of the whole chip per second, or of one multiprocessor per cycle where the name says so."""

    name: str
    arch: int  # 10 * major + minor
    multiprocessors: int
    clock: float  # Hz, for which the tensor peak is stated
    loaded_clock: float  # share of the clock that is left while the tensor cores are always busy
    tensor_flops_per_cycle: int  # bfloat16 and float16 with float32 sums, dense
    mma_share: float  # of that, by mma.sync
    fma_lanes: int  # float32 multiply-adds per cycle
    alu_lanes: int  # comparisons, logic, conversions per cycle
    special_lanes: int  # exponentials, reciprocals per cycle
    registers: int
    shared_memory: int  # bytes, of all blocks together
    threads: int
    blocks: int
    dram_bandwidth: float  # bytes/s
    dram_latency: float  # cycles
    l2_bandwidth: float  # bytes/s
    l2_latency: float  # cycles
    l2_bytes: int

    @property
    def tensor_peak(self) -> float:
        """FLOP/s."""
        return self.tensor_flops_per_cycle * self.multiprocessors * self.clock

    @property
    def l2_bytes_per_cycle(self) -> float:
        """Of one multiprocessor."""
        return self.l2_bandwidth / self.multiprocessors / self.clock


COPY_SHARE = 4.3 / 4.8
LAUNCH_SECONDS = 2e-6  # an empty kernel in a graph, from its start to the next one's
RESERVED_SHARED_MEMORY = 1024  # bytes of each block that the driver takes

_H100 = Chip(
    "h100", arch=90, multiprocessors=132, clock=1.83e9, loaded_clock=788 / 989, tensor_flops_per_cycle=4096,
    mma_share=0.63, fma_lanes=128, alu_lanes=64, special_lanes=16, registers=65536, shared_memory=228 << 10,
    threads=2048, blocks=32, dram_bandwidth=3.35e12, dram_latency=479, l2_bandwidth=4.5e12, l2_latency=263,
    l2_bytes=50 << 20,
)  # fmt: skip
_A100 = Chip(
    "a100", arch=80, multiprocessors=108, clock=1.41e9, loaded_clock=1.0, tensor_flops_per_cycle=2048, mma_share=1.0,
    fma_lanes=64, alu_lanes=64, special_lanes=16, registers=65536, shared_memory=164 << 10, threads=2048, blocks=32,
    dram_bandwidth=2.039e12, dram_latency=466, l2_bandwidth=4.2e12, l2_latency=262, l2_bytes=40 << 20,
)  # fmt: skip
_L40S = Chip(
    "l40s", arch=89, multiprocessors=142, clock=2.52e9, loaded_clock=1.0, tensor_flops_per_cycle=1024, mma_share=1.0,
    fma_lanes=128, alu_lanes=64, special_lanes=16, registers=65536, shared_memory=100 << 10, threads=1536, blocks=24,
    dram_bandwidth=0.864e12, dram_latency=542, l2_bandwidth=27.6 * 142 * 2.52e9, l2_latency=273, l2_bytes=96 << 20,
)  # fmt: skip
_RTX_4090 = _L40S._replace(
    name="rtx4090", multiprocessors=128, tensor_flops_per_cycle=512, dram_bandwidth=1.008e12,
    l2_bandwidth=27.6 * 128 * 2.52e9, l2_bytes=72 << 20,
)  # fmt: skip
CHIPS = {
    chip.name: chip
    for chip in (_H100, _H100._replace(name="h200", dram_bandwidth=4.8e12), _A100, _L40S, _RTX_4090)
}

# the kernels whose tiles can be compared, and the benchmark's mode that runs them
TILED = {"forward": "forward", "grad_key_value": "backward", "grad_query": "backward", "decode": "decode"}
