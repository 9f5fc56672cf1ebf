"""NaN and infinity that the mask hides, and numbers below 2^-126, on the CPU kernels.

`test_instruction_sets.py` runs the same checks on every instruction set, `simt/` on the CUDA kernels.
"""

import pytest
import special_numbers
import torch
from special_numbers import INF, MASKS, NAN

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.native


@pytest.mark.parametrize("number", [NAN, -INF])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hidden_value_reaches_nothing(dtype, mask, number):
    special_numbers.check_hidden_values("cpu", dtype, mask, number)


@pytest.mark.parametrize("where", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_hidden_reaches_a_gradient(dtype, mask, where):
    special_numbers.check_hidden_in_backward(dtype, mask, where)


@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize(
    "tokens, splits, window", [(1, 1, (-1, -1)), (1, 1, (8, -1)), (5, 1, (-1, -1)), (5, 2, (3, -1))]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hidden_value_of_a_cache_reaches_nothing(dtype, tokens, splits, window, number):
    special_numbers.check_hidden_in_cache("cpu", dtype, tokens, splits, window, number)


@pytest.mark.parametrize("size", [1e-39, 2e-38, 1e-34])
def test_tiny_values_keep_their_precision(size):
    special_numbers.check_tiny_values(torch.bfloat16, size)


def test_a_key_that_padding_hides_from_all_gets_no_gradient_from_a_nan():
    given = special_numbers.tensors(torch.float32, 20)
    key, value = (given[name].requires_grad_() for name in ("key", "value"))
    given["query"][0, 0, 11] = NAN
    padding = torch.ones(1, 20, dtype=torch.bool)
    padding[0, 5] = False
    names = ("prompt_key", "prompt_value", "gate")
    out = special_numbers.zero_init_attention(
        given["query"], key, value, *(given[name] for name in names), attn_mask=padding, backend="cpu"
    )
    grads = torch.autograd.grad(out, (key, value), given["grad"])
    assert all((grad[:, :, 5] == 0).all() and grad[:, 0, 6].isnan().any() for grad in grads)


@pytest.mark.parametrize("tokens", [3, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_key_without_weight_gets_no_gradient(dtype, tokens):
    """Its score is -inf for every query, and 0 * inf in a lane that has none: an odd number of queries leaves one."""
    given = special_numbers.tensors(dtype, tokens)
    given["query"][..., 5] = -given["query"][..., 5].abs() - 0.1
    given["key"][:, :, 2, 5] = INF
    key, value = (given[name].requires_grad_() for name in ("key", "value"))
    out = special_numbers.zero_init_attention(given["query"], key, value, backend="cpu")
    grads = torch.autograd.grad(out, (key, value), given["grad"])
    assert all(grad.isfinite().all() and (grad[:, :, 2] == 0).all() and grad[:, :, 1].any() for grad in grads)
