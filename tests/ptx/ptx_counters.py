"""What a profiler would count of interpreted kernels: instructions, sectors, bank conflicts, bytes.

Counted per instruction of a warp, as the PTX has them: ptxas removes most of the moves, and a part of the arithmetic.
Requests of memory and products are the same in the machine code. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import collections

import numpy as np

SECTOR, BANKS = 32, 32  # bytes that global memory hands over at least; banks of 4 bytes
PIPES = {
    "mma": "tensor", "wgmma": "tensor", "ex2": "special", "lg2": "special", "rcp": "special", "sqrt": "special",
    "rsqrt": "special", "tanh": "special", "ld": "memory", "st": "memory", "cp": "memory", "ldmatrix": "memory",
    "stmatrix": "memory", "shfl": "memory", "bra": "control", "ret": "control", "bar": "control", "fence": "control",
    "mov": "move",
}  # fmt: skip


class Counters:
    """Of one launch, or several added up.

    pipes: instructions of warps. requests, sectors, useful: of global memory; useful counts bytes. wavefronts, needed:
    passes over shared memory, as they are and without bank conflicts. read, written: bytes of the sectors that are
    touched at all, as if a cache kept everything. conflicts, wasted: by line, the passes and bytes beyond the ideal.
    """

    def __init__(self) -> None:
        self.pipes: collections.Counter[str] = collections.Counter()
        self.requests = self.sectors = self.useful = 0
        self.wavefronts = self.needed = self.barriers = 0
        self.conflicts: collections.Counter[str] = collections.Counter()
        self.wasted: collections.Counter[str] = collections.Counter()
        self._touched: dict[bool, set[int]] = {False: set(), True: set()}

    @property
    def read(self) -> int:
        """Bytes of all sectors that are read."""
        return SECTOR * len(self._touched[False])

    @property
    def written(self) -> int:
        return SECTOR * len(self._touched[True])

    @property
    def efficiency(self) -> float:
        """The bytes that were asked for, as a share of the sectors' bytes."""
        return self.useful / (SECTOR * self.sectors) if self.sectors else 1.0

    def summary(self, lines: int) -> dict[str, object]:
        """All counts; of the source lines, the worst `lines`."""
        return {
            "pipes": dict(self.pipes), "barriers": self.barriers, "requests": self.requests,
            "efficiency": round(self.efficiency, 4), "read": self.read, "written": self.written,
            "passes": self.wavefronts, "passes_needed": self.needed,
            "conflicts": dict(self.conflicts.most_common(lines)), "wasted": dict(self.wasted.most_common(lines)),
        }  # fmt: skip

    def instruction(self, name: str, mask: np.ndarray) -> None:
        warps = int(mask.reshape(-1, 32).any(1).sum())
        kind = name.partition(".")[0]
        waits = kind == "wgmma" and not name.startswith(
            "wgmma.mma_async"
        )  # fences, commits, waits for products
        self.pipes["control" if waits else PIPES.get(kind, "arithmetic")] += warps
        self.barriers += warps * (kind == "bar")

    def shared(self, at: np.ndarray, size: int, lanes: np.ndarray, line: str) -> None:
        """A pass serves 128 bytes: all lanes of a warp, half of them at 8 bytes each, a quarter at 16."""
        together = max(1, min(32, 128 // max(size, 4)))
        words = (at // 4)[:, None] + np.arange(max(size // 4, 1))
        passes = np.repeat(lanes // together, words.shape[1])
        pairs = np.unique(np.stack([passes, words.ravel()]), axis=1)  # lanes that read one word share it
        number, which = np.unique(pairs[0], return_inverse=True)
        by_bank = np.bincount(which * BANKS + pairs[1] % BANKS, minlength=len(number) * BANKS)
        by_bank = by_bank.reshape(-1, BANKS)
        wavefronts = int(by_bank.max(1).sum())
        needed = int((-(-by_bank.sum(1) // BANKS)).sum())
        self.wavefronts += wavefronts
        self.needed += needed
        if wavefronts > needed:
            self.conflicts[line] += wavefronts - needed

    def global_memory(self, at: np.ndarray, size: int, lanes: np.ndarray, writes: bool, line: str) -> None:
        cells = (at // 2)[:, None] + np.arange(size // 2)
        warps = np.repeat(lanes // 32, cells.shape[1])
        key = warps.astype(np.int64) << 50 | cells.ravel()
        useful = 2 * len(np.unique(key))
        sectors = np.unique(np.stack([warps, cells.ravel() * 2 // SECTOR]), axis=1)
        self.requests += len(np.unique(sectors[0]))
        self.sectors += sectors.shape[1]
        self.useful += useful
        if waste := sectors.shape[1] * SECTOR - useful:
            self.wasted[line] += waste
        self._touched[writes].update(sectors[1].tolist())
