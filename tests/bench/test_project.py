"""The projection: chips, reading machine code, the schedule, and the blocks of a launch, by hand; one kernel whole."""

import importlib.util
import itertools

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from bench.__main__ import main
from bench.problem import DECODE, prefill
from bench.project import command, launches, model, schedule, tutorial
from bench.project.chips import CHIPS, COPY_SHARE
from bench.project.machine_code import Code, Instruction, loops, parse
from zinit_kernels.backends.triton import configs

H100, A100 = CHIPS["h100"], CHIPS["a100"]
LISTING = """
        /*24f0*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], RZ, !UPT ;   /* 0x00e00000045879f0 */
                                                                                         /* 0x000fe2000c7018ff */
        /*3230*/                   MUFU.EX2 R244, R244 ;                                 /* 0x000000f400f47308 */
                                                                                         /* 0x000e620000000800 */
        /*3250*/                   MUFU.EX2 R250, R250 ;                                 /* 0x000000fa00fa7308 */
                                                                                         /* 0x000eb00000000800 */
        /*3db0*/              @!P3 BRA 0x3230 ;                                          /* 0xffffffe000f4b947 */
                                                                                         /* 0x000fea000383ffff */
"""


@pytest.mark.parametrize(
    ("name", "teraflops"), {"h100": 989.4, "h200": 989.4, "a100": 312, "l40s": 362, "rtx4090": 165.2}.items()
)
def test_the_chips_have_their_published_peaks(name, teraflops):
    chip = CHIPS[name]
    assert chip.tensor_peak / 1e12 == pytest.approx(teraflops, rel=0.015)
    assert chip.shared_memory >= configs.SHARED_MEMORY[chip.arch]
    assert (
        chip.dram_bandwidth * COPY_SHARE
        < chip.l2_bandwidth
        < chip.multiprocessors * chip.clock * model.L2_PORT
    )
    assert chip.l2_latency < chip.dram_latency


def test_machine_code_is_read_with_its_scheduling():
    product, first, second, branch = code = parse(LISTING)
    assert (product.kind, product.stall, product.sets, product.waits) == ("HGMMA", 1, None, 0)
    assert (first.stall, first.sets, first.frees) == (1, 1, None)
    assert (second.stall, second.sets) == (8, 2)
    assert (branch.guard, branch.operands, branch.stall) == ("@!P3", "0x3230", 5)
    assert loops(code) == [[first, second, branch]]


def instruction(name, operands="", stall=1, sets=None, waits=0, guard="", address=0):
    return Instruction(address, guard, name, operands, stall, sets, None, waits)


FMA, MAXIMUM, EXP2 = instruction("FFMA"), instruction("FMNMX"), instruction("MUFU.EX2")
OFF = instruction("LDS", guard="@!PT")
PRODUCT = instruction("HGMMA.64x64x16.F32", "R24, R120, gdesc[UR4], R24, gsb0")
FROM_SHARED = instruction("HGMMA.64x32x16.F32", "R24, gdesc[UR4], R24, gsb0")
WAIT = instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
LOAD, USE = instruction("LDS.128", sets=0), instruction("FADD", waits=1)
SCHEDULES = {  # (loop, warps, blocks, cycles of an iteration)
    "one multiply-add per cycle": ([FMA] * 10, 1, 1, 10),
    "of two warps": ([FMA] * 10, 2, 1, 20),
    "comparisons at half the rate": ([MAXIMUM] * 10, 1, 1, 20),
    "exponentials at an eighth": ([EXP2] * 10, 1, 1, 80),
    "two pipes side by side": ([EXP2, *[FMA] * 7] * 4, 1, 1, 32),
    "stalls": ([instruction("FFMA", stall=5)] * 4, 1, 1, 20),
    "stalls are hidden by another warp": ([instruction("FFMA", stall=2)] * 4, 2, 1, 8),
    "16 bytes a lane are four passes for four schedulers": ([instruction("LDS.128")] * 3, 1, 1, 48),
    "an instruction that is off takes no pass": ([OFF] * 4, 1, 1, 4),
    "a result is waited for": ([LOAD, USE], 1, 1, 1 + 29 + 16),
    "a product is waited for": ([PRODUCT, WAIT, FMA], 1, 1, 32 + 32 + 2),
    "products of two blocks fill the tensor core": ([PRODUCT, PRODUCT, PRODUCT, WAIT, FMA], 1, 2, 6 * 32),
    "a small product waits for its operands": ([FROM_SHARED] * 4 + [WAIT], 1, 2, 8 * 24),
    "without the wait the products alone count": ([PRODUCT, FMA], 1, 1, 32),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_cycles_of_a_loop(name):
    loop, warps, blocks, expected = SCHEDULES[name]
    found = schedule.cycles_per_iteration(loop, H100, warps, blocks, 300)
    assert found == pytest.approx(expected, abs=1.5)


def test_a_barrier_holds_the_warps_of_a_block():
    """The exponentials of both warps take 4 x 8 cycles, the last one is issued 8 earlier, and then both wait."""
    barrier = instruction("BAR.SYNC", "0x0")
    found = schedule.cycles_per_iteration([EXP2, EXP2, barrier], H100, 2, 1, 300)
    assert found == pytest.approx(32 - 8 + 1 + schedule.BARRIER, abs=1)
    assert schedule.cycles_per_iteration([EXP2, EXP2], H100, 2, 1, 300) == pytest.approx(32, abs=1)


def test_the_rates_are_those_of_the_chip():
    assert schedule.cycles_per_iteration([FMA] * 8, A100, 1, 1, 300) == pytest.approx(16, abs=1)  # 16 lanes
    product = instruction("HMMA.16816.F32.BF16", "R4, R8, R10, R4")
    assert schedule.product_cycles(product, A100) == 8
    assert schedule.product_cycles(product, H100) == pytest.approx(4 / H100.mma_share)
    wide = instruction("HGMMA.64x128x16.F32", "R24, R120, gdesc[UR4], R24")
    assert schedule.product_cycles(wide, H100) == 64
    units = model.unit_cycles([wide, FMA, EXP2, EXP2, LOAD], H100)
    assert units == {"tensor": 64, "issue": 5, "fma": 1, "alu": 0, "special": 16, "shared": 16}


def test_blocks_go_to_the_first_multiprocessor_with_room():
    assert model.deal([10.0] * 4, 2, 1, 1.0) == pytest.approx(20)
    assert model.deal([10.0] * 5, 2, 1, 1.0) == pytest.approx(30)
    assert model.deal([1.0, 1.0, 9.0], 2, 1, 1.0) == pytest.approx(10)  # the long one last
    assert model.deal([9.0, 1.0, 1.0], 2, 1, 1.0) == pytest.approx(9)
    # two at a time, each as fast as alone only where alone: 900 in pairs, then 300 at twice the speed
    paired = model.deal([900.0, 900.0, 300.0], 1, 2, 2.0)
    assert paired == pytest.approx(900 + 300 / 2, rel=0.15)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "chip", "blocks"),
    [(255, 8, 0, "h100", 1), (128, 8, 0, "h100", 2), (129, 8, 0, "h100", 1), (64, 4, 100 << 10, "h100", 2),
     (64, 4, 100 << 10, "a100", 1), (32, 4, 0, "l40s", 12), (32, 1, 120 << 10, "l40s", 0)],
)  # fmt: skip
def test_occupancy(registers, warps, shared, chip, blocks):
    kernel = model.Kernel("any", Code([], registers, 0), warps, shared, ())
    assert model.occupancy(kernel, CHIPS[chip]) == blocks


def test_code_that_a_branch_skips_with_a_loop_is_not_run():
    """The second loop runs again what held NaN: it and what leads to it are left out of the code that runs once."""
    place = itertools.count(0, 16)

    def add(name, operands="", guard=""):
        return instruction(name, operands, guard=guard, address=next(place))

    code = [
        add("FFMA"),
        *(add("HMMA.16816"), add("BRA", "0x10", "@P0")),  # at 0x10: the loop that runs
        add("BRA", "0x70", "@!P1"),  # at 0x30: over the other loop
        add("FMUL"),
        *(add("HMMA.16816"), add("BRA", "0x50", "@P0")),
        add("FADD"),
        add("EXIT"),
    ]
    kernel = model.Kernel("any", Code(code, 32, 0), 4, 0, (0,))
    assert [i.kind for i in model.straight_code(kernel)] == ["FFMA", "BRA", "FADD", "EXIT"]
    both = kernel._replace(loops=(0, 1))
    assert [i.kind for i in model.straight_code(both)] == ["FFMA", "BRA", "FMUL", "FADD", "EXIT"]


LENGTHS = ((1, 70), (64, 64), (100, 100), (100, 163))
SIZES = [(*lengths, *tile) for lengths in LENGTHS for tile in ((16, 32), (32, 16))]


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize(("queries", "keys", "rows", "columns"), SIZES)
def test_tiles_are_those_that_are_seen(queries, keys, rows, columns, causal):
    """By hand: a tile is looked at if some query sees some key of it, and full if every query sees every key."""

    def sees(query, key):
        return key < keys and (not causal or key <= query + keys - queries)

    for start in range(0, queries, rows):
        position = start + keys - queries
        masked, full = launches.visible_tiles(position, keys, causal, rows, columns)
        tile_rows = range(start, start + rows)  # behind the last query too: the kernel computes them
        tiles = [range(first, first + columns) for first in range(0, keys, columns)]
        seen = [t for t in tiles if any(sees(q, k) for q in tile_rows for k in t)]
        whole = [t for t in tiles if all(sees(q, k) for q in tile_rows for k in t)]
        assert (masked + full, full) == (len(seen), len(whole))


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (128, 128), (64, 160), (100, 100)])
def test_tiles_of_queries_are_those_that_see(queries, keys):
    rows, columns = 32, 16
    for start in range(0, keys, rows):
        position = start - (keys - queries)
        trips = launches.seeing_tiles(position, queries, True, rows, columns)
        tiles = [range(first, min(first + columns, queries)) for first in range(0, queries, columns)]
        seen = [t for t in tiles if any(q >= position + row for q in t for row in range(rows))]
        assert sum(trips) == len(seen), (start, trips)
    assert launches.seeing_tiles(0, 100, False, rows, columns) == (1, 6)


def test_a_launch_does_the_work_of_its_call():
    """Each of the blocks' tiles is counted once: together the upper triangle, with what the diagonal tiles waste."""
    shape = prefill("LLaMA-7B", 2, 1024)
    found = launches.forward(shape, H100, configs.Config(128, 64, 8, 3))
    tiles = sum(masked + full for masked, full in found.trips)
    assert tiles == 2 * 32 * sum(2 * (block + 1) for block in range(8))
    assert found.trips[0] == (2, 14)  # the last queries first
    assert found.dram_bytes == pytest.approx(4 * 2 * 1024 * 4096 * 2, rel=0.01)
    assert len(launches.launches("decode", command.shapes_of("decode")[0], H100)) == 2  # one stream is split


def test_one_kernel_on_the_command_line(capsys):
    assert main(["project", "--chip", "h200", "--mode", "forward", "--shape", "B 2, T 8192"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count(command.LABEL) == 2
    assert "Triton forward, T = 8192: TFLOP/s" in out and "T = 512" not in out
    assert main(["project", "--chip", "a100", "--mode", "forward", "--shape", "CLIP"]) == 0
    assert "targets" not in capsys.readouterr().out  # they are stated for H200


def test_a_better_kernel_is_projected_as_faster():
    """Half the exponentials, or no barrier: the projection sees a change of the machine code."""
    shape = prefill("LLaMA-7B", 2, 2048)
    launch = launches.forward(shape, H100)
    before = model.project(launch, H100)
    assert 0.2 < launch.flops / before.seconds / H100.tensor_peak < 0.7
    slower = launch.kernel.code._replace(
        instructions=[i._replace(stall=min(15, 2 * i.stall)) for i in launch.kernel.code.instructions]
    )
    after = model.project(launch._replace(kernel=launch.kernel._replace(code=slower)), H100)
    assert after.seconds > 1.1 * before.seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "b300"], "invalid choice"),
        (["--tutorial", "/nowhere/06-fused-attention.py"], "is not a Python file"),
        (["--tutorial", __file__], "has no _attn_fwd"),
    ],
)
def test_what_cannot_be_projected_is_refused(arguments, message, capsys):
    try:
        code = main(["project", *arguments])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("projected", "code"), [(400.0, 0), (440.0, 1), (320.0, 1)])
def test_the_validation_fails_beyond_its_tolerance(projected, code, monkeypatch, capsys, tmp_path):
    series = tutorial.SERIES[0]._replace(rates={2048: 380})
    found = [tutorial.Check(series, 2048, rate, series.tiles[0]) for rate in (380.0, projected)]
    monkeypatch.setattr(tutorial, "checks", lambda path, chips: found)
    assert main(["project", "--tutorial", str(tmp_path)]) == code
    assert f"{100 * (projected / 380 - 1):+.0f} %" in capsys.readouterr().out


@pytest.mark.parametrize("shape", DECODE["cuda"][:2], ids=lambda shape: shape.name)
def test_no_other_number_of_splits_is_projected_to_be_much_faster(shape):
    chip = CHIPS["h200"]
    chosen = launches.splits_of(shape, chip, launches.tile_of("decode", shape, chip))

    def seconds(splits):
        parts = launches.decode(shape, chip, splits=splits), launches.combine(shape, chip, splits)
        return sum(model.project(part, chip).seconds for part in parts)

    assert seconds(chosen) < 1.02 * min(seconds(chosen // 2), seconds(2 * chosen))
