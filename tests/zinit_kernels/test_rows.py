"""What a training step computes between its matrix products: the kernels against PyTorch in float64."""

import pytest
import torch

from zinit_kernels import rows

pytestmark = pytest.mark.native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 5, 16, 100, 2048]
# of a result, times its largest size: one rounding to the dtype, or two
UNIT = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def near(actual, expected, dtype, units=2.0):
    """Within so many roundings of the exact result, element by element."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    assert (error <= units * UNIT[dtype] * (expected.abs() + 0.05 * expected.abs().max())).all(), error.max()


def numbers(*shape, dtype, scale=1.0):
    return (scale * torch.randn(*shape)).to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_its_gradient(dtype, width):
    x, weight = numbers(3, 7, width, dtype=dtype, scale=3), numbers(width, dtype=dtype)
    grad, eps = numbers(3, 7, width, dtype=dtype), 1e-5
    exact = x.double().requires_grad_()
    expected = exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    out, rstd = rows.rms_norm(x, weight, eps)
    assert rstd.shape == (3, 7, 1) and rstd.dtype == torch.float32
    near(out, expected.detach(), dtype)
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    found = rows.rms_norm_backward(grad, x, weight, rstd)
    if width > 1:  # of a single number the gradient is what rounding leaves
        near(found, wanted, dtype)
    with_float_weight = rows.rms_norm_backward(grad, x, weight.float(), rstd)
    assert torch.equal(with_float_weight, found)


@pytest.mark.parametrize("count", [1, 15, 40_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_its_gradients(dtype, count):
    gate, up, grad = (numbers(count, dtype=dtype, scale=scale) for scale in (4, 1, 1))
    if count > 1:
        gate[0] = -30
    exact = [t.double().requires_grad_() for t in (gate, up)]
    expected = torch.nn.functional.silu(exact[0]) * exact[1]
    near(rows.swiglu(gate, up), expected.detach(), dtype)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for found, right in zip(rows.swiglu_backward(grad, gate, up), wanted, strict=True):
        near(found, right, dtype)


@pytest.mark.parametrize("leading", [(13,), (2, 13)])
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 10), (4, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_forwards_and_back(dtype, heads, dim, leading):
    x, angles = numbers(*leading, heads, dim, dtype=dtype), torch.randn(13, 1, dim // 2)
    first, second = x.double().chunk(2, -1)
    for backwards in (False, True):
        sign = -1 if backwards else 1
        cos, sin = angles.double().cos(), sign * angles.double().sin()
        expected = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        near(rows.rotate(x, angles.cos(), angles.sin(), backwards), expected, dtype)
    # as memory lies in attention's gradients, heads first
    turned = x.transpose(-2, -3).contiguous().transpose(-2, -3)
    assert torch.equal(
        rows.rotate(turned, angles.cos(), angles.sin()), rows.rotate(x, angles.cos(), angles.sin())
    )


def test_every_row_has_its_own_angles():
    """A table of [B, T]: as for the rows of a paged cache."""
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 4)
    found = rows.rotate(x, angles.cos(), angles.sin())
    for b in range(2):
        assert torch.equal(found[b], rows.rotate(x[b], angles[b].cos(), angles[b].sin()))


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 32, 131, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_and_its_gradient(dtype, vocabulary):
    logits, targets = numbers(9, vocabulary, dtype=dtype, scale=5), torch.randint(vocabulary, (9,))
    targets[0], targets[1] = 0, vocabulary - 1
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    kept = logits.clone()
    loss = rows.cross_entropy_(logits, targets, wants_gradient=False)
    near(loss, expected.detach(), torch.float32, units=5)
    assert torch.equal(logits, kept)
    assert torch.equal(rows.cross_entropy_(logits, targets, wants_gradient=True), loss)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    if vocabulary > 1:
        near(logits, wanted, dtype)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value):
    """A run stops at such a loss; to hide it would let it into the adapter."""
    for column in (0, 20, 130):
        logits, targets = torch.randn(3, 131), torch.tensor([3, 4, 5])
        logits[1, column] = value
        loss = rows.cross_entropy_(logits, targets, wants_gradient=True)
        assert loss.isfinite().tolist() == [True, False, True]
    hidden = torch.full((2, 131), -torch.inf)
    hidden[:, 7] = 3.0
    assert rows.cross_entropy_(hidden, torch.tensor([7, 7]), wants_gradient=True).tolist() == [0.0, 0.0]
    assert hidden.abs().max() == 0


def test_pytorch_computes_the_same(monkeypatch):
    """Where there are no kernels: of these sizes, both are the same to rounding."""
    x, weight, up = torch.randn(6, 40), torch.randn(40), torch.randn(6, 40)
    cos = torch.randn(6, 1, 10)
    targets = torch.randint(40, (6,))

    def everything():
        logits = 3 * x
        out, rstd = rows.rms_norm(x, weight, 1e-5)
        return [
            out, rstd, rows.rms_norm_backward(up, x, weight, rstd), rows.swiglu(x, up),
            *rows.swiglu_backward(up, x, x), rows.rotate(x.view(6, 2, 20), cos, cos),
            rows.cross_entropy_(logits, targets, True), logits,
        ]  # fmt: skip

    ours = everything()
    monkeypatch.setattr(rows, "NATIVE", False)
    for mine, theirs in zip(ours, everything(), strict=True):
        torch.testing.assert_close(mine, theirs)


ROWS = torch.ops.zinit
GOOD = {
    "rms_norm": lambda: dict(x=torch.randn(3, 8), weight=torch.randn(8), eps=1e-5),
    "rms_norm_backward": lambda: dict(
        grad=torch.randn(3, 8), x=torch.randn(3, 8), weight=torch.randn(8), rstd=torch.rand(3, 1)
    ),
    "swiglu": lambda: dict(gate=torch.randn(3, 8), up=torch.randn(3, 8)),
    "swiglu_backward": lambda: dict(
        grad=torch.randn(3, 8), gate=torch.randn(3, 8), up=torch.randn(3, 8)
    ),
    "rotate": lambda: dict(
        x=torch.randn(3, 2, 8), cos=torch.randn(3, 4), sin=torch.randn(3, 4), backwards=False
    ),
    "cross_entropy": lambda: dict(
        logits=torch.randn(3, 8), targets=torch.tensor([0, 7, 3]), wants_gradient=True
    ),
}  # fmt: skip
WRONG = {
    "rms_norm, long weight": ("rms_norm", dict(weight=torch.randn(9)), "weight must have shape"),
    "rms_norm, dtype": ("rms_norm", dict(weight=torch.randn(8).half()), "weight must be"),
    "rms_norm, strided": ("rms_norm", dict(x=torch.randn(8, 3).T), "x must be contiguous"),
    "rms_norm, scalar": ("rms_norm", dict(x=torch.tensor(1.0)), "x must have rows"),
    "norm gradient, rows": ("rms_norm_backward", dict(rstd=torch.rand(2)), "rstd must have one element"),
    "norm gradient, shape": ("rms_norm_backward", dict(grad=torch.randn(3, 9)), "grad must have the shape of x"),
    "swiglu, shape": ("swiglu", dict(up=torch.randn(8, 3)), "up must have the shape of gate"),
    "swiglu, dtype": ("swiglu", dict(up=torch.randn(3, 8).half()), "up must have the dtype of gate"),
    "swiglu, float64": ("swiglu", dict(gate=torch.randn(3, 8).double()), "gate must be float32"),
    "rotate, odd": ("rotate", dict(x=torch.randn(3, 2, 7)), "an even number"),
    "rotate, rows": ("rotate", dict(x=torch.randn(4, 2, 8)), "must be a multiple of the 3 rows"),
    "rotate, sin": ("rotate", dict(sin=torch.randn(2, 4)), "sin must have shape"),
    "cross_entropy, target": (
        "cross_entropy", dict(targets=torch.tensor([0, 8, 0])), r"targets\[1\] must lie in 0 .. 7, got 8"
    ),
    "cross_entropy, negative": ("cross_entropy", dict(targets=torch.tensor([-100, 0, 0])), "got -100"),
    "cross_entropy, number": ("cross_entropy", dict(targets=torch.tensor([0])), "targets must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_by_name(case):
    operator, change, message = WRONG[case]
    with pytest.raises(RuntimeError, match=message):
        getattr(ROWS, f"{operator}_cpu")(**(GOOD[operator]() | change))


@pytest.mark.parametrize("operator", GOOD)
def test_the_operators_keep_what_their_schemas_say(operator):
    overload = getattr(ROWS, f"{operator}_cpu").default
    torch.library.opcheck(
        overload, tuple(GOOD[operator]().values()), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("operator", GOOD)
def test_nothing_is_nothing(operator):
    """No rows: a share of a batch may have none."""
    given = {
        name: t[:0] if isinstance(t, torch.Tensor) and len(t) == 3 else t
        for name, t in GOOD[operator]().items()
    }
    found = getattr(ROWS, f"{operator}_cpu")(**given)
    assert all(t.numel() == 0 for t in (found if isinstance(found, tuple) else (found,)))


def test_threads_change_no_bit():
    before = torch.get_num_threads()
    x, up = torch.randn(50, 3000), torch.randn(50, 3000)
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            logits = x.clone()
            found.append([
                rows.rms_norm(x, up[0], 1e-5)[0], rows.swiglu(x, up), *rows.swiglu_backward(up, x, up),
                rows.cross_entropy_(logits, torch.arange(50), True), logits,
            ])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, four) for one, four in zip(*found, strict=True))
