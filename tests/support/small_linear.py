"""Products of a few rows with a weight, against float64."""

import torch

from zinit_kernels.packed import PackedWeight, linear, pack, quantise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = [
    (8, 32, False),
    (8, 64, False),
    (8, 128, False),
    (4, 32, False),
    (4, 128, False),
    (4, 32, True),
    (4, 64, True),
]
# Rows and columns of the weight. Two rows of activations of 6000 columns no longer fit where one does.
SIZES = [(1, 1), (16, 32), (37, 100), (50, 576), (130, 33), (3, 1000), (21, 6000)]
ROWS = (0, 1, 2, 3, 4, 5, 8, 11, 16, 32, 33)
MANY_ROWS = (300, 100)  # more than a block of a prompt's pass; only the second for large weights
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def exactly(x, weight):
    """The product in float64, and the sum of its terms' sizes, against which rounding is measured."""
    x, weight = x.double(), weight.double()
    return x @ weight.T, (x.abs() @ weight.abs().T).clamp_min(1e-30)


def guarded(tensor):
    """The same numbers in memory that begins and ends with NaN."""
    padded = torch.full((tensor.numel() + 128,), float("nan"), dtype=tensor.dtype)
    inside = padded[64:-64].view(tensor.shape)
    return inside.copy_(tensor)


def check_plain(dtype, rows, columns):
    generator = torch.Generator().manual_seed(0)
    weight = guarded(torch.randn(rows, columns, generator=generator).to(dtype))
    for count in ROWS:
        x = guarded(torch.randn(count, columns, generator=generator).to(dtype))
        expected, size = exactly(x, weight)
        out = torch.ops.zinit.linear_cpu(x, weight, rows, 0)
        assert out.dtype == dtype and out.shape == (count, rows)
        assert ((out.double() - expected).abs() <= ROUNDING[dtype] * size).all(), (
            dtype,
            rows,
            columns,
            count,
        )
        assert torch.equal(linear(x, weight)[:32], out[:32]) or count > 32
        assert torch.equal(torch.ops.zinit.linear_cpu(x[:1], weight, rows, 0), out[:1])


def some_packed(scheme, rows, columns, generator):
    bits, group, has_min = scheme
    if not has_min:
        return quantise(torch.randn(rows, columns, generator=generator), bits, group)
    groups = -(-columns // group)
    codes = torch.randint(16, (rows, groups * group), generator=generator, dtype=torch.uint8)
    scales, mins = torch.randn(2, rows, groups, generator=generator).half()
    return pack(codes, scales, mins, bits, columns)


def check_scheme(scheme, rows, columns) -> tuple[torch.Tensor, PackedWeight]:
    """Activations of 16 bits lose 1 / 65278 of a group's largest; the weights take part with their exact values."""
    generator = torch.Generator().manual_seed(0)
    packed = some_packed(scheme, rows, columns, generator)
    weight = packed.unpack(torch.float32)
    for dtype in DTYPES:
        for count in (*ROWS, 50, *MANY_ROWS[rows * columns >= 5000 :]):
            x = guarded(torch.randn(count, columns, generator=generator).to(dtype))
            expected, size = exactly(x, weight)
            out = torch.ops.zinit.linear_cpu(x, packed.data, rows, packed.scheme.number)
            rounded = x.double().abs().amax(-1, keepdim=True) / 65278 * weight.double().abs().sum(-1)
            bound = 1.01 * rounded + ROUNDING[dtype] * size
            assert ((out.double() - expected).abs() <= bound).all(), (scheme, rows, columns, count, dtype)
            # the same bits, whatever the other rows are; above 32 they may come from another kernel
            fewer = min(count, 1 if count <= 32 else 33)
            first = torch.ops.zinit.linear_cpu(x[:fewer], packed.data, rows, packed.scheme.number)
            assert torch.equal(first, out[:fewer]), (scheme, rows, columns, count, dtype)
    return weight, packed


def check_all():
    for rows, columns in SIZES:
        for dtype in DTYPES:
            check_plain(dtype, rows, columns)
        for scheme in SCHEMES:
            check_scheme(scheme, rows, columns)
