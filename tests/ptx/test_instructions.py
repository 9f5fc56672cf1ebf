"""The interpreter's instructions against values that were computed by hand or by a plain formula."""

import numpy as np
import ptx_machine
import ptx_module
import ptx_warpgroup
import pytest

THREADS = 128


def run(
    code: str,
    registers: str = "",
    inputs: dict[str, np.ndarray] | None = None,
    shared: int = 0,
    words: int = 1,
):
    """`code` for 128 threads, whose first registers hold `inputs` by thread; %o0, ... by thread as they are at the end.

    The address of global memory is in %out, that of shared memory in %shared, the thread in %t.
    """
    inputs = inputs or {}
    given = np.stack([np.ascontiguousarray(v).view(np.uint32) for v in inputs.values()]) if inputs else None
    result = np.zeros((THREADS, words), np.uint32)
    loads = "".join(f"ld.global.b32 {name}, [%in+{4 * THREADS * i}];\n" for i, name in enumerate(inputs))
    outs = "".join(f"st.global.b32 [%out+{4 * i}], %o{i};\n" for i in range(words))
    declared = "".join(f".reg .b32 {name};\n" for name in inputs)
    text = f"""
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 in,
	.param .u64 .ptr .global .align 1 out
)
.reqntid {THREADS}
{{
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %t; .reg .b32 %shared; .reg .b32 %r<80>; .reg .b32 %o<{words}>;
.reg .b64 %in; .reg .b64 %out; .reg .b64 %d<8>;
{declared}{registers}
ld.param.b64 %in, [in];
ld.param.b64 %out, [out];
mov.b32 %shared, global_smem;
mov.u32 %t, %tid.x;
mad.wide.u32 %in, %t, 4, %in;
mad.wide.u32 %out, %t, {4 * words}, %out;
{loads}{code}
{outs}ret;
}}
"""
    (entry,) = ptx_module.parse(text.replace("; .reg", ";\n.reg")).values()
    memory = ptx_machine.Buffers()
    addresses = [0, result.ctypes.data]
    memory.add(result.ctypes.data, result.nbytes)
    if given is not None:
        addresses[0] = given.ctypes.data
        memory.add(given.ctypes.data, given.nbytes)
    ptx_machine.run(entry, (1, 1, 1), THREADS, shared, entry.pack(addresses), memory)
    return result


def bits(*values, dtype=np.uint32):
    """One value for every thread, or these for the first threads and the last for all others."""
    array = np.array(values, dtype)
    return np.concatenate([array, np.full(THREADS - len(array), array[-1], dtype)])


ONE_VALUE = {  # instruction on %a and %b, what they hold, what it gives
    "bfe.u32 %o0, %a, 4, 8": (0x12345678, 0, 0x67),
    "bfe.s32 %o0, %a, 24, 1": (0x01000000, 0, 0xFFFFFFFF),
    "bfe.s32 %o0, %a, 8, 8": (0x00008000, 0, 0xFFFFFF80),
    "bfe.u32 %o0, %a, 28, 8": (0xF0000000, 0, 0xF),
    "shf.l.wrap.b32 %o0, %a, %b, 7": (0x80000000, 0x1, 0xC0),
    "shf.r.wrap.b32 %o0, %a, %b, 4": (0x10, 0x5, 0x50000001),
    "min.relu.s32 %o0, %a, %b": (0xFFFFFFFB, 7, 0),  # -5
    "max.relu.s32 %o0, %a, %b": (0xFFFFFFFB, 7, 7),
    "neg.s32 %o0, %a": (5, 0, 0xFFFFFFFB),
    "shr.s32 %o0, %a, 40": (0x80000000, 0, 0xFFFFFFFF),
    "shl.b32 %o0, %a, 32": (1, 0, 0),
    "div.s32 %o0, %a, %b": (0xFFFFFFF9, 2, 0xFFFFFFFD),  # -7 / 2 = -3
    "rem.s32 %o0, %a, %b": (0xFFFFFFF9, 2, 0xFFFFFFFF),
    "mul.hi.u32 %o0, %a, %b": (0x80000000, 6, 3),
    "prmt.b32 %o0, %a, %b, 0x5410": (0x33221100, 0x77665544, 0x55441100),
    "cvt.rn.bf16x2.f32 %o0, %a, %b": (0x3F800000, 0xC0000000, 0x3F80C000),  # 1 above -2
    "cvt.rn.f16x2.f32 %o0, %a, %b": (0x3F800000, 0xC0000000, 0x3C00C000),
    "cvt.rzi.s32.f32 %o0, %a": (0xC02CCCCD, 0, 0xFFFFFFFE),  # -2.7
    "cvt.rzi.s32.f32 %o0, %b": (0, 0x7FC00000, 0),  # NaN
    "cvt.rzi.s32.f32 %o0, %a ": (0x7F800000, 0, 0x7FFFFFFF),  # infinity
    "cvt.rn.f32.s32 %o0, %a": (0xFFFFFFFF, 0, 0xBF800000),
    "max.f32 %o0, %a, %b": (0x7FC00000, 0x3F800000, 0x3F800000),  # NaN and 1
    "ex2.approx.ftz.f32 %o0, %a": (0xC3000000, 0, 0),  # 2^-128 is flushed
    "ex2.approx.f32 %o0, %a": (0x40400000, 0, 0x41000000),  # 8
    "rsqrt.approx.ftz.f32 %o0, %a": (0x40800000, 0, 0x3F000000),  # 1 / 2
    "fma.rn.f32 %o0, %a, %a, %b": (0x3F800003, 0xBF800000, 0x35400002),  # (1 + 3 e)^2 - 1 = 6 e + 9 e^2, rounded once
    "add.bf16x2 %o0, %a, %b": (0x3F804000, 0x3F803F80, 0x40004040),  # (1, 2) + (1, 1)
    "mul.f16x2 %o0, %a, %b": (0x3C004000, 0x40004000, 0x40004400),
    "neg.bf16x2 %o0, %a": (0x3F80BF80, 0, 0xBF803F80),
}  # fmt: skip


@pytest.mark.parametrize("instruction", ONE_VALUE)
def test_one_value(instruction):
    a, b, expected = ONE_VALUE[instruction]
    found = run(f"{instruction.strip()};", inputs={"%a": bits(a), "%b": bits(b)})
    assert {hex(word) for word in found[:, 0]} == {hex(expected)}


PREDICATES = {  # comparison of %a and %b -> what it says of them: (a, b, expected)
    "setp.lt.f32": (1.0, 2.0, True), "setp.num.f32": (1.0, np.nan, False), "setp.nan.f32": (1.0, np.nan, True),
    "setp.neu.f32": (np.nan, 1.0, True), "setp.ne.f32": (np.nan, 1.0, False), "setp.geu.f32": (1.0, 2.0, False),
}  # fmt: skip


@pytest.mark.parametrize("comparison", PREDICATES)
def test_comparisons_of_a_nan(comparison):
    a, b, expected = PREDICATES[comparison]
    inputs = {"%a": bits(a, dtype=np.float32), "%b": bits(b, dtype=np.float32)}
    found = run(f"{comparison} %p1, %a, %b;\nselp.b32 %o0, 1, 0, %p1;", inputs=inputs)
    assert (found == expected).all()


def test_a_comparison_of_two_halves_sets_two_predicates():
    """0x7FC0 is NaN in bf16; the first predicate is that of the lower half."""
    inputs = {"%a": bits(0x7FC03F80), "%b": bits(0x7FC03F80)}
    code = "setp.eq.bf16x2 %p1|%p2, %a, %b;\nselp.b32 %o0, 1, 0, %p1;\nselp.b32 %o1, 1, 0, %p2;"
    assert (run(code, inputs=inputs, words=2) == [1, 0]).all()


@pytest.mark.parametrize(
    "mode, other, source",
    [("bfly", 3, lambda i: i ^ 3), ("idx", 5, lambda i: 5), ("up", 1, lambda i: max(i - 1, 0))],
)
def test_shuffles(mode, other, source):
    found = run(f"shfl.sync.{mode}.b32 %o0, %t, {other}, 31, -1;")
    assert found[:, 0].tolist() == [32 * (t // 32) + source(t % 32) for t in range(THREADS)]


def test_a_lane_elsewhere_is_a_fault():
    code = "setp.lt.u32 %p1, %t, 5;\n@%p1 shfl.sync.bfly.b32 %o0, %t, 1, 31, -1;"
    with pytest.raises(ptx_machine.Fault, match="some of its lanes elsewhere"):
        run(code)


# Shared memory


def test_loads_of_matrices_against_the_layout():
    """Matrix i holds 64 i + 8 row + column; lane 4 g + p gets the elements 2 p and 2 p + 1 of row g."""
    fill = (
        "mad.lo.u32 %r0, %t, 4, %shared;\nshl.b32 %r1, %t, 1;\nadd.u32 %r2, %r1, 1;\nshl.b32 %r2, %r2, 16;\n"
    )
    fill += "or.b32 %r1, %r1, %r2;\nst.shared.b32 [%r0], %r1;\nbar.sync 0;\n"
    rows = "and.b32 %r3, %t, 31;\nmad.lo.u32 %r3, %r3, 16, %shared;\n"
    lane = np.arange(THREADS) % 32
    g, p = lane // 4, lane % 4
    straight = run(
        fill + rows + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%o0, %o1, %o2, %o3}, [%r3];",
        shared=512,
        words=4,
    )
    turned = run(
        fill + rows + "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%o0, %o1}, [%r3];", shared=512, words=2
    )
    for i in range(4):
        first = 64 * i + 8 * g + 2 * p
        assert (straight[:, i] == first | first + 1 << 16).all()
    for i in range(2):
        first = 64 * i + 8 * (2 * p) + g
        assert (turned[:, i] == first | first + 8 << 16).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_a_stored_matrix_is_loaded_again(trans):
    """By the first warp; stmatrix is the inverse of ldmatrix, which the test above knows."""
    code = f"""setp.lt.u32 %p1, %t, 32;
and.b32 %r3, %t, 31;
mad.lo.u32 %r3, %r3, 16, %shared;
add.u32 %r4, %t, 1000;
@%p1 stmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 [%r3], {{%t, %r4}};
bar.sync 0;
@%p1 ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%o0, %o1}}, [%r3];"""
    found = run(code, shared=512, words=2)[:32]
    assert (found == np.arange(32)[:, None] + [0, 1000]).all()


COPY = "mad.lo.u32 %r0, %t, 4, %shared;\nadd.u64 %d0, %in, 0;\ncp.async.ca.shared.global [%r0], [%d0], 4, {size};\n"
COPY += "cp.async.commit_group;\n"
READ = "xor.b32 %r1, %t, 1;\nmad.lo.u32 %r1, %r1, 4, %shared;\nld.shared.b32 %o0, [%r1];"


def test_copies_land_at_the_wait_and_fill_with_zeros():
    size = "mov.b32 %r5, 4;\nsetp.lt.u32 %p1, %t, 64;\nselp.b32 %r5, %r5, 0, %p1;\n"
    code = size + COPY.format(size="%r5") + "cp.async.wait_group 0;\nbar.sync 0;\n" + READ
    found = run(code, inputs={"%a": np.arange(THREADS, dtype=np.uint32) + 7}, shared=512)[:, 0]
    copied = np.where(np.arange(THREADS) < 64, np.arange(THREADS) + 7, 0)
    assert (found == copied[np.arange(THREADS) ^ 1]).all()


@pytest.mark.parametrize(
    "wait, message",
    [
        ("bar.sync 0;\n", "a copy is on its way"),
        ("cp.async.wait_group 1;\nbar.sync 0;\n", "a copy is on its way"),
        ("cp.async.wait_group 0;\n", "race"),
    ],
)
def test_a_copy_that_is_not_waited_for(wait, message):
    code = COPY.format(size=4) + wait + READ
    with pytest.raises(ptx_machine.Fault, match=message):
        run(code, inputs={"%a": bits(1)}, shared=512)


@pytest.mark.parametrize("code", ["ld.global.b32 %o0, [%out+{}];", "st.global.b32 [%out+{}], %t;"])
def test_global_memory_has_bounds(code):
    run(code.format(0))
    with pytest.raises(ptx_machine.Fault, match="out of bounds"):
        run(code.format(4))


def test_two_threads_that_write_one_word():
    with pytest.raises(ptx_machine.Fault, match="different values"):
        run("st.shared.b32 [%shared], %t;", shared=16)


# Products of warpgroups


def descriptor(start: int, leading: int, stride: int, mode: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def test_addresses_of_a_descriptor_by_hand():
    """128 bytes a row: row r of a pattern of eight keeps its 16-byte piece c at piece c xor r."""
    (at,) = ptx_warpgroup.addresses(np.array([descriptor(0x2000, 16, 1024, 1)], np.uint64), 16, False)
    assert at[0, 0] == 0x2000 and at[0, 9] == 0x2000 + 16 + 2
    assert at[3, 0] == 0x2000 + 3 * 128 + (0 ^ 3) * 16
    assert at[3, 8] == 0x2000 + 3 * 128 + (1 ^ 3) * 16
    assert at[13, 1] == 0x2000 + 1024 + 5 * 128 + (0 ^ 5) * 16 + 2
    # advanced by 32 bytes, as the next 16 columns are: the address tells the row, not the start
    (at,) = ptx_warpgroup.addresses(np.array([descriptor(0x2020, 16, 1024, 1)], np.uint64), 16, False)
    assert at[3, 0] == 0x2000 + 3 * 128 + (2 ^ 3) * 16
    # transposed: 64 neighbours of a row together, eight k a pattern, the next 64 at the leading offset
    (at,) = ptx_warpgroup.addresses(np.array([descriptor(0x2000, 4096, 1024, 1)], np.uint64), 128, True)
    assert at[9, 0] == 0x2000 + 16 + 2
    assert at[9, 2] == 0x2000 + 2 * 128 + (1 ^ 2) * 16 + 2
    assert at[64, 0] == 0x2000 + 4096
    assert at[0, 11] == 0x2000 + 1024 + 3 * 128 + (0 ^ 3) * 16
    # 64 bytes a row: two rows in 128 bytes, so that the number of the pair is taken; none: no exchange
    (at,) = ptx_warpgroup.addresses(np.array([descriptor(0x2000, 16, 512, 2)], np.uint64), 16, False)
    assert at[5, 8] == 0x2000 + 5 * 64 + (1 ^ 2) * 16
    (at,) = ptx_warpgroup.addresses(np.array([descriptor(0x2000, 256, 128, 0)], np.uint64), 16, False)
    assert at[9, 9] == 0x2000 + 128 + 16 + 256 + 2


WRITE = """mad.lo.u32 %r0, %t, 16, %shared;
st.shared.v4.b32 [%r0], {%a, %b, %c, %d};
"""
FENCED = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
OPERANDS = """cvt.u64.u32 %d0, %shared;
shr.u64 %d0, %d0, 4;
or.b64 %d1, %d0, {left};
add.u64 %d2, %d0, 64;
or.b64 %d2, %d2, {right};
"""
START = "mov.b32 %o0, 0f3F800000;\nmov.b32 %o1, 0f3F800000;\nmov.b32 %o2, 0;\nmov.b32 %o3, 0;\nmov.pred %p1, -1;\n"
MULTIPLY = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%o0,%o1,%o2,%o3}}, %d1, %d2, %p1, 1, 1, 0, {turned};
wgmma.commit_group.sync.aligned;
"""
FENCE = "wgmma.fence.sync.aligned;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"


def product(code: str, turned: int = 0):
    """What `code` makes of 64 x 16 and 8 x 16 numbers in shared memory, not swizzled, and the right answer."""
    random = np.random.default_rng(0)
    left, right = (random.integers(-4, 5, shape).astype(np.float32) for shape in ((64, 16), (8, 16)))
    memory = np.zeros(THREADS * 8, np.uint16)
    for row in range(64):  # core matrices of 8 rows of 16 bytes: eight for k < 8, eight for the others
        for k in range(16):
            memory[row // 8 * 64 + k // 8 * 512 + row % 8 * 8 + k % 8] = to_bf16(left[row, k])
    more = np.zeros(THREADS * 8, np.uint16)
    for row in range(8):
        for k in range(16):
            place = k // 8 * 64 + k % 8 * 8 + row if turned else k // 8 * 64 + row * 8 + k % 8
            more[place] = to_bf16(right[row, k])
    words = np.concatenate([memory, more]).view(np.uint32).reshape(2, THREADS, 4)
    inputs = {name: np.ascontiguousarray(words[0, :, i]) for i, name in enumerate(("%a", "%b", "%c", "%d"))}
    inputs |= {name: np.ascontiguousarray(words[1, :, i]) for i, name in enumerate(("%e", "%f", "%g", "%h"))}
    second = "st.shared.v4.b32 [%r0+2048], {%e, %f, %g, %h};\n"
    text = (
        code.replace("WRITE", WRITE + second)
        .replace(
            "OPERANDS", OPERANDS.format(left=descriptor(0, 1024, 128, 0), right=descriptor(0, 128, 128, 0))
        )
        .replace("add.u64 %d2, %d0, 64", "add.u64 %d2, %d0, 128")
    )
    found = run(text, inputs=inputs, shared=4096, words=4).view(np.float32)
    lane, warp = np.arange(THREADS) % 32, np.arange(THREADS) // 32
    expected = left @ right.T
    got = np.zeros_like(expected)
    for i in range(4):
        got[16 * warp + lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = found[:, i]
    expected[lane[:32] // 4 + 16 * np.arange(4)[:, None], :] += (
        1  # the accumulator of rows 0 to 7 of each warp was 1
    )
    return got, expected


def to_bf16(number: float) -> int:
    return int(np.float32(number).view(np.uint32)) >> 16


RIGHT = "WRITE" + FENCED + "OPERANDS" + START + FENCE + MULTIPLY.format(turned=0) + WAIT


@pytest.mark.parametrize("turned", [0, 1])
def test_a_product_of_a_warpgroup(turned):
    code = RIGHT.replace(MULTIPLY.format(turned=0), MULTIPLY.format(turned=turned))
    got, expected = product(code, turned)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (RIGHT.replace(WAIT, ""), "which a product in flight uses"),
        (RIGHT.replace(WAIT, "wgmma.wait_group.sync.aligned 1;\n"), "which a product in flight uses"),
        (RIGHT.replace(FENCE, ""), "without a fence before the first"),
        (RIGHT + START + MULTIPLY.format(turned=0) + WAIT, "without a fence after an access"),
        (RIGHT.replace(FENCED, "bar.sync 0;\n"), "without fence.proxy.async"),
        (RIGHT.replace(FENCED, "bar.sync 0;\n").replace(WAIT, FENCED + WAIT), "without fence.proxy.async"),
        (RIGHT.replace(FENCED, "fence.proxy.async.shared::cta;\n"), "race"),
        (RIGHT.replace(WAIT, "bar.sync 0;\nst.shared.b32 [%r0], %t;\n" + WAIT), "a product in flight reads"),
        (RIGHT.replace("OPERANDS", "OPERANDScvt.u64.u32 %d1, %t;\n"), "different descriptors"),
    ],
    ids=[
        "no wait", "waits for too few", "no fence", "no second fence", "no proxy fence", "proxy fence too late",
        "no barrier", "overwritten", "not uniform",
    ],
)  # fmt: skip
def test_a_product_without_what_it_needs(wrong, message):
    assert wrong != RIGHT
    with pytest.raises(ptx_machine.Fault, match=message):
        product(wrong)


def test_a_proxy_fence_of_the_readers_behind_the_barrier_will_do():
    got, expected = product(RIGHT.replace(FENCED, "bar.sync 0;\nfence.proxy.async.shared::cta;\n"))
    np.testing.assert_array_equal(got, expected)
