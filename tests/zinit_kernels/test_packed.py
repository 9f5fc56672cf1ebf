"""Linear layers of a few rows, plain and packed: against float64, of odd sizes, on every instruction set."""

import os
import subprocess
import sys

import pytest
import torch
from repository import search_path
from small_linear import DTYPES, SCHEMES, SIZES, check_plain, check_scheme

from zinit_kernels.packed import PackedEmbedding, PackedLinear, PackedWeight, Scheme, linear, pack, quantise

pytestmark = pytest.mark.native


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_products(dtype, rows, columns):
    check_plain(dtype, rows, columns)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: "-".join(map(str, scheme)))
@pytest.mark.parametrize("rows, columns", SIZES)
def test_packed_products(scheme, rows, columns):
    check_scheme(scheme, rows, columns)


PROGRAM = """
import torch
import small_linear
small_linear.check_all()
print(torch.ops.zinit.cpu_capability())
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability):
    folder = os.path.dirname(sys.modules["small_linear"].__file__)
    environment = {
        **os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": search_path(folder), "ZINIT_POISON_OUTPUTS": "1",
    }  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    if ran.stdout.strip() != capability:
        pytest.skip(f"this machine has no {capability}: ran {ran.stdout}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    x, weight = torch.randn(32, 200).to(dtype), torch.randn(37, 200).to(dtype)
    packed = quantise(weight, 4)
    for multiply in (lambda x: linear(x, weight), packed.multiply):
        together = multiply(x)
        for count in (1, 2, 3, 5, 8, 13):
            assert torch.equal(multiply(x[:count]), together[:count])


def test_quantised_numbers_are_the_nearest():
    weight = torch.randn(40, 256)
    for group in (32, 64, 128):
        packed = quantise(weight, 8, group)
        step = weight.unflatten(1, (-1, group)).abs().amax(-1) / 127
        error = (packed.unpack(torch.float32) - weight).unflatten(1, (-1, group)).abs().amax(-1)
        assert (error <= 0.502 * step + 127 * step * 2**-11).all()
    of_4_bits = quantise(weight, 4)
    assert (of_4_bits.unpack(torch.float32) - weight).square().mean().sqrt() < 0.1
    assert quantise(torch.zeros(3, 32), 4).unpack(torch.float32).eq(0).all()
    assert quantise(weight, 8).scheme.group == 128 and quantise(weight[:, :192], 8).scheme.group == 64


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: "-".join(map(str, scheme)))
def test_kernel_and_pytorch_unpack_alike(scheme):
    _, packed = check_scheme(scheme, 37, 100)
    assert torch.equal(packed.unpack(torch.float32), packed._unpack_plainly(torch.float32, None))
    indices = torch.tensor([[36, 0, 5], [5, 17, 16]])
    rows = packed.unpack(torch.bfloat16, indices)
    assert torch.equal(rows, packed.unpack(torch.bfloat16)[indices])
    codes, scales, mins = packed.parts()
    again = pack(codes, scales, mins, scheme[0], 100)
    assert torch.equal(again.data, packed.data) and again[1:] == packed[1:]


def test_gradients_pass_through_a_packed_weight():
    weight = torch.randn(48, 64, dtype=torch.float32)
    layer = PackedLinear(quantise(weight, 8), torch.float32)
    assert not list(layer.parameters())
    for rows in (3, 70):
        x = torch.randn(rows, 64, requires_grad=True)
        out = layer(x)
        expected = x @ layer.packed.unpack(torch.float32).T
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=3e-3)  # 16-bit activations
        grad = torch.randn_like(out)
        torch.testing.assert_close(
            *(torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (out, expected))
        )


def test_embedding():
    table = torch.randn(50, 64)
    embedding = PackedEmbedding(quantise(table, 8), torch.bfloat16)
    tokens = torch.tensor([[3, 49, 3], [0, 1, 2]])
    out = embedding(tokens)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 3, 64)
    assert (out.float() - table[tokens]).abs().max() < 0.05


def test_activations_that_are_no_numbers_reach_the_result():
    packed = quantise(torch.randn(20, 64), 8)
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 64)
        x[1, 40] = value
        out = packed.multiply(x)
        assert out[0].isfinite().all() and out[1].isnan().all()
    assert packed.multiply(torch.full((1, 64), 1e-38)).eq(0).all()


def test_activations_are_rounded_to_16_bits():
    """Of a group with one large number, the small ones keep their precision against the large one's 65278 steps."""
    packed = quantise(torch.eye(32), 8)
    x = torch.full((1, 32), 1e-3)
    x[0, 7] = 100.0
    error = (packed.multiply(x) - x * packed.unpack(torch.float32).diagonal()).abs().max()
    assert error <= 100 / 65278 * 1.01


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": torch.ones(2, 3, 64)}, "input must have 2 dimensions"),
        (
            {"input": torch.ones(2, 64, dtype=torch.float64)},
            "input must be float32, bfloat16 or float16, got Double",
        ),
        ({"input": torch.ones(2, 0)}, "must have 1 to 2\\^28 columns"),
        ({"input": torch.ones(64, 2).T}, "input must be contiguous"),
        ({"weight": torch.ones(16, 63)}, "weight must have shape \\(16, 64\\)"),
        ({"weight": torch.ones(16, 64).bfloat16()}, "weight must be Float, got BFloat16"),
        ({"weight": torch.ones(64, 16).T}, "weight must be contiguous"),
        ({"rows": -1}, "at most 2\\^28 rows, got -1"),
        ({"scheme": 8}, "scheme must be 0"),
        ({"scheme": 8 + 16 + 256 * 32}, "scheme must be 0"),
        ({"scheme": 4 + 256 * 48}, "scheme must be 0"),
        ({"scheme": 4 + 256 * 32}, "weight must have shape \\(1, 576\\)"),
        ({"scheme": 4 + 256 * 32, "weight": torch.ones(1, 576)}, "weight must be Byte, got Float"),
    ],
)
def test_the_operator_refuses(change, message):
    given = {"input": torch.ones(2, 64), "weight": torch.ones(16, 64), "rows": 16, "scheme": 0} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.zinit.linear_cpu(*given.values())


def test_unpacking_refuses_rows_that_there_are_not():
    packed = quantise(torch.ones(20, 64), 8)
    for index in (-1, 20):
        with pytest.raises(RuntimeError, match="indices\\[1\\] must lie in 0 .. 19"):
            packed.unpack(torch.float32, torch.tensor([0, index]))
    with pytest.raises(RuntimeError, match="must name a packed weight"):
        torch.ops.zinit.unpack_cpu(torch.ones(2, 3), 2, 3, 0, None, torch.ones(1))


@pytest.mark.parametrize("bits, group", [(3, 32), (4, 16), (8, 0)])
def test_schemes_that_there_are_not(bits, group):
    with pytest.raises(ValueError, match="a weight is quantised to 8 bits"):
        quantise(torch.ones(4, 64), bits, group)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_weights_that_cannot_be_quantised(value):
    with pytest.raises(ValueError, match="must be finite and below"):
        quantise(torch.full((4, 64), value), 4)


def test_opcheck():
    packed = quantise(torch.randn(20, 64), 4)
    x = torch.randn(3, 64)
    torch.library.opcheck(torch.ops.zinit.linear_cpu.default, (x, packed.data, 20, packed.scheme.number))
    arguments = (packed.data, 20, 64, packed.scheme.number, torch.tensor([1, 2]), x)
    torch.library.opcheck(torch.ops.zinit.unpack_cpu.default, arguments)


def test_the_scheme_is_that_of_the_kernels():
    """Sizes in `packed.py` and `linear_work.h`: a panel of another size is refused."""
    for bits, group, has_min in SCHEMES:
        scheme = Scheme(bits, group, has_min)
        for columns in (1, 32, 33, 576):
            data = torch.zeros(2, scheme.panel_bytes(columns), dtype=torch.uint8)
            PackedWeight(data, 17, columns, scheme).unpack(torch.float32)
            with pytest.raises(RuntimeError, match="weight must have shape"):
                PackedWeight(data[:, 1:].contiguous(), 17, columns, scheme).unpack(torch.float32)
