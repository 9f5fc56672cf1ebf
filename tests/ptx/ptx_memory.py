"""Global and shared memory of blocks that run side by side: contents, bounds, races, copies on their way.

Threads of a block are ordered by barriers alone, blocks not at all. A copy of cp.async is on its way from the
instruction on until its thread has waited for it: whoever touches its target before then is told. The same holds for
whoever writes what a product of a warpgroup (wgmma) still reads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from ptx_module import TYPES, names

PARAMETERS, SHARED = 0x10, 0x1000  # where these memories begin; global addresses are those of the process
SPACES = ("param", "shared", "global")  # an access that names none is generic: its address tells
CELL = 2  # bytes that a shadow knows apart
WORDS = {
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
    16: np.uint64,
}  # what an access of so many bytes is made of

# A tag is one access: block + 1, barriers of the block passed, barriers of the warp passed, thread.
THREADS = SEVERAL = 2047
WARP_EPOCH, EPOCH, BLOCK = 11, 27, 47


class Fault(Exception):
    pass


class Buffers:
    """Global memory: the buffers of this process that a kernel may touch, and who touched them in this launch."""

    def __init__(self) -> None:
        self.starts = np.zeros(0, np.int64)
        self.bytes: list[np.ndarray] = []
        self.shadows: list[Shadow] = []

    def add(self, address: int, size: int) -> None:
        if size == 0 or address in self.starts:
            return
        at = int(np.searchsorted(self.starts, address))
        self.starts = np.insert(self.starts, at, address)
        self.bytes.insert(at, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))
        self.shadows.insert(at, Shadow(size))

    def new_launch(self) -> None:
        self.shadows = [Shadow(len(buffer)) for buffer in self.bytes]


class Shadow:
    """For each cell the tags of its last writer and its last reader; 0: nobody."""

    def __init__(self, size: int) -> None:
        self.writer, self.reader = (np.zeros(-(-size // CELL), np.int64) for _ in range(2))

    def access(self, cells: np.ndarray, tags: np.ndarray, writes: bool) -> str:
        """Notes accesses to cells [lanes, n] by tags [lanes]; a description of the first race, or ''."""
        mine = tags[:, None]
        for kind, shadow in (("wrote", self.writer), ("read", self.reader))[: 2 if writes else 1]:
            other = shadow[cells]
            together = (other >> EPOCH) == (mine >> EPOCH)
            foreign = ((other >> BLOCK) != (mine >> BLOCK)) & (other != 0)
            if (together & (other != mine)).any() or foreign.any():
                race = foreign | (together & ~_ordered(other, mine))
                if race.any():
                    return _describe(race, other, mine, kind, writes)
        if writes:
            self.writer[cells] = mine
            return ""
        before = self.reader[cells]
        several = ((before >> EPOCH) == (mine >> EPOCH)) & ((before & THREADS) != (mine & THREADS))
        tagged = np.where(several, mine | SEVERAL, mine)
        self.reader[cells] = tagged
        lost = self.reader[cells] != tagged  # two lanes of this instruction read one cell
        if lost.any():
            self.reader[cells[lost]] |= SEVERAL
        return ""


def _ordered(other: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Whether accesses that no barrier of the block parts are of one thread, or parted by a barrier of the warp."""
    one, two = other & THREADS, mine & THREADS
    of_warp = (one != SEVERAL) & (one >> 5 == two >> 5)
    passed = (other >> WARP_EPOCH & 0xFFFF) != (mine >> WARP_EPOCH & 0xFFFF)
    return ((one == two) & (one != SEVERAL)) | (of_warp & passed)


def _describe(race, other, mine, kind: str, writes: bool) -> str:
    lane, column = np.unravel_index(int(race.argmax()), race.shape)
    theirs, verb = int(other[lane, column]), "writes" if writes else "reads"
    thread = theirs & THREADS
    who = "several threads" if thread == SEVERAL else f"thread {thread}"
    return f"race: thread {int(mine[lane, 0]) & THREADS} {verb} what {who} of block {(theirs >> BLOCK) - 1} {kind}"


@dataclass
class Copy:
    """Copies by cp.async that are on their way, of the lanes `lanes`."""

    lanes: np.ndarray
    to: np.ndarray
    source: np.ndarray
    size: int
    reads: np.ndarray  # whether the bytes come from the source; else they are zeros
    group: np.ndarray

    def part(self, chosen: np.ndarray) -> Copy:
        return Copy(
            self.lanes[chosen],
            self.to[chosen],
            self.source[chosen],
            self.size,
            self.reads[chosen],
            self.group[chosen],
        )


class Memory:
    """What the lanes of `blocks` (a `ptx_machine.Blocks`) can address."""

    def __init__(self, blocks, shared: int, argument: bytes, buffers: Buffers) -> None:
        self.blocks, self.buffers = blocks, buffers
        self.shared_size = shared = -(-shared // 16) * 16
        self.shared = np.full(blocks.count * shared, 0xFF, np.uint8)
        cells = len(self.shared) // CELL
        self.shared_shadow = Shadow(len(self.shared))
        self.arriving = np.zeros(cells, np.int16)  # cells that copies are on their way to
        self.multiplied = np.zeros(cells, np.int16)  # cells that products in flight read
        self.parameters = np.frombuffer(argument + bytes(16), np.uint8)
        self.copies: list[Copy] = []
        self.groups = np.zeros(blocks.lanes, int)  # committed
        # for the proxy fence: when each cell was written, as a count of the writes
        self.writes, self.written_at = 0, np.zeros(cells, np.int64)

    def addresses(self, operand: str, lanes: np.ndarray) -> np.ndarray:
        base, _, offset = operand[1:-1].partition("+")
        return self.blocks.value(base.strip(), "u64")[lanes].astype(np.int64) + int(offset or 0)

    def access(
        self, space: str, at: np.ndarray, size: int, lanes: np.ndarray, values: np.ndarray | None = None
    ) -> np.ndarray:
        """Bytes [lanes, size] at the addresses, by one instruction; writes `values` where there are any."""
        if (at % size).any():
            self.blocks.fault(f"{space} access of {size} bytes is misaligned")
        if space == "param":
            return self.parameters[(at - PARAMETERS)[:, None] + np.arange(size)]
        if space == "shared":
            self._count_shared(at, size, lanes)
            return self._shared(at, size, lanes, values)
        if space == "generic":
            inside = (at >= SHARED) & (at < SHARED + self.shared_size)
            if inside.all():
                return self.access("shared", at, size, lanes, values)
            if inside.any():
                result = np.zeros((len(at), size), np.uint8)
                for where, chosen in (("shared", inside), ("global", ~inside)):
                    part = None if values is None else values[chosen]
                    result[chosen] = self.access(where, at[chosen], size, lanes[chosen], part)
                return result
        self._count_global(at, size, lanes, values is not None)
        return self._global(at, size, lanes, values)

    def _count_shared(self, at: np.ndarray, size: int, lanes: np.ndarray) -> None:
        if self.blocks.counters:
            self.blocks.counters.shared(at, size, lanes, self.blocks.line)

    def _count_global(self, at: np.ndarray, size: int, lanes: np.ndarray, writes: bool) -> None:
        if self.blocks.counters and len(at):
            self.blocks.counters.global_memory(at, size, lanes, writes, self.blocks.line)

    def _global(self, at, size, lanes, values):
        which = np.searchsorted(self.buffers.starts, at, side="right") - 1
        first = int(which[0])
        if (which == first).all():
            return self._in_buffer(first, at, size, lanes, values)
        result = np.zeros((len(at), size), np.uint8)
        for i in np.unique(which):
            chosen = which == i
            part = None if values is None else values[chosen]
            result[chosen] = self._in_buffer(int(i), at[chosen], size, lanes[chosen], part)
        return result

    def _in_buffer(self, which, at, size, lanes, values):
        self._require_inside(which, at, size)
        content = self.buffers.bytes[which]
        offset = at - self.buffers.starts[which]
        return self._touch("global", content, self.buffers.shadows[which], offset, size, lanes, values)

    def _require_inside(self, which: int, at: np.ndarray, size: int) -> None:
        start = self.buffers.starts[which] if which >= 0 else 0
        if which < 0 or (at < start).any() or (at + size > start + len(self.buffers.bytes[which])).any():
            self.blocks.fault(f"global access of {size} bytes out of bounds")

    def shared_offsets(self, at: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        """Where addresses [lanes, ...] of shared memory lie in the array of all blocks."""
        inside = at - SHARED
        if (inside < 0).any() or (inside + size > self.shared_size).any():
            self.blocks.fault(f"shared access of {size} bytes out of bounds")
        first = self.blocks.block_numbers[lanes] * self.shared_size
        return inside + first.reshape(-1, *[1] * (at.ndim - 1))

    def _shared(self, at, size, lanes, values):
        offset = self.shared_offsets(at, size, lanes)
        cells = _cells(offset, size)
        if self.arriving.any() and self.arriving[cells].any():
            self.blocks.fault("shared memory race: it touches what a copy is on its way to")
        if values is not None:
            if self.multiplied[cells].any():
                self.blocks.fault("shared memory race: it writes what a product in flight reads")
            self.writes += 1
            self.written_at[cells] = self.writes
        return self._touch("shared", self.shared, self.shared_shadow, offset, size, lanes, values)

    def _touch(self, space, content, shadow, offset, size, lanes, values):
        if race := shadow.access(_cells(offset, size), self.blocks.tags()[lanes], values is not None):
            self.blocks.fault(f"{space} memory {race}")
        word = np.dtype(WORDS.get(size, np.uint8))
        words = content[: len(content) // word.itemsize * word.itemsize].view(word)
        at = (offset // word.itemsize)[:, None] + np.arange(size // word.itemsize)
        if values is None:
            return np.ascontiguousarray(words[at]).view(np.uint8)
        wanted = np.ascontiguousarray(values).view(word)
        words[at] = wanted
        if (words[at] != wanted).any():
            self.blocks.fault(f"{space} memory race: two threads write different values in one instruction")
        return values

    # cp.async

    def begin_copies(self, to, source, size, read_size, lanes) -> None:
        """The bytes land at the wait; from now on nobody may touch their target."""
        if not np.isin(read_size, (0, size)).all():
            raise NotImplementedError("a copy that is filled up with zeros in part")
        cells = _cells(self.shared_offsets(to, size, lanes), size)
        if self.arriving[cells].any() or self.multiplied[cells].any():
            self.blocks.fault("shared memory race: a copy begins over what another one, or a product, uses")
        if race := self.shared_shadow.access(cells, self.blocks.tags()[lanes], True):
            self.blocks.fault(f"shared memory race: a copy begins over what is in use ({race})")
        reads = read_size == size
        self._count_shared(to, size, lanes)
        self._count_global(source[reads], size, lanes[reads], False)
        which = np.searchsorted(self.buffers.starts, source[reads], side="right") - 1
        for i in np.unique(which):
            self._require_inside(int(i), source[reads][which == i], size)
        self.arriving[cells] = 1
        self.copies.append(Copy(lanes, to, source, size, reads, self.groups[lanes]))

    def commit_copies(self, mask: np.ndarray) -> None:
        self.groups[mask] += 1

    def wait_for_copies(self, mask: np.ndarray, left: int) -> None:
        """Lands the copies of all but the last `left` groups that these lanes committed."""
        copies, self.copies = self.copies, []
        for copy in copies:
            landing = mask[copy.lanes] & (copy.group + left < self.groups[copy.lanes])
            if not landing.all():
                self.copies.append(copy.part(~landing))
            if landing.any():
                self._land(copy.part(landing))

    def _land(self, copy: Copy) -> None:
        values = np.zeros((len(copy.lanes), copy.size), np.uint8)
        if copy.reads.any():
            values[copy.reads] = self._global(
                copy.source[copy.reads], copy.size, copy.lanes[copy.reads], None
            )
        self.arriving[_cells(self.shared_offsets(copy.to, copy.size, copy.lanes), copy.size)] = 0
        self._shared(copy.to, copy.size, copy.lanes, values)


def _cells(offset: np.ndarray, size: int) -> np.ndarray:
    if size < CELL:
        raise NotImplementedError("accesses of single bytes")
    return (offset // CELL)[:, None] + np.arange(size // CELL)


# Instructions


def load(blocks, suffixes, operands, mask):
    registers, kind, lanes = names(operands[0]), suffixes[-1], np.flatnonzero(mask)
    itemsize = np.dtype(TYPES[kind]).itemsize
    space = suffixes[0] if suffixes[0] in SPACES else "generic"
    at = blocks.memory.addresses(operands[1], lanes)
    found = blocks.memory.access(space, at, itemsize * len(registers), lanes)
    for column, name in zip(found.view(TYPES[kind]).T, registers, strict=True):
        value = np.zeros(blocks.lanes, TYPES[kind])
        value[mask] = column
        blocks.assign(name, value, mask)


def store(blocks, suffixes, operands, mask):
    lanes = np.flatnonzero(mask)
    space = suffixes[0] if suffixes[0] in SPACES else "generic"
    columns = [blocks.value(name, suffixes[-1])[mask] for name in names(operands[1])]
    values = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
    at = blocks.memory.addresses(operands[0], lanes)
    blocks.memory.access(space, at, values.shape[1], lanes, values)


def copy_async(blocks, suffixes, operands, mask):
    memory = blocks.memory
    if suffixes[1] == "commit_group":
        return memory.commit_copies(mask)
    if suffixes[1] in ("wait_group", "wait_all"):
        return memory.wait_for_copies(mask, int(operands[0], 0) if operands else 0)
    lanes, size = np.flatnonzero(mask), int(operands[2], 0)
    to, source = (memory.addresses(operand, lanes) for operand in operands[:2])
    read_size = np.full(len(lanes), size)
    if len(operands) > 3:
        read_size = blocks.value(operands[3], "u32")[lanes].astype(int)
    if suffixes[1] not in ("ca", "cg"):
        raise NotImplementedError(f"cp.{'.'.join(suffixes)}")
    if (to % size).any() or (source[read_size > 0] % size).any():
        blocks.fault(f"a copy of {size} bytes is misaligned")
    memory.begin_copies(to, source, size, read_size, lanes)


OPERATIONS = {"ld": load, "st": store, "cp": copy_async}
