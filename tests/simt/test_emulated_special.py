"""NaN and infinity that the mask hides, on the emulated CUDA kernels."""

import pytest
import special_numbers
import torch
from orders import in_all_orders
from special_numbers import INF, MASKS, NAN

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("number", [NAN, -INF])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_hidden_value_reaches_nothing_in_prefill(cuda, dtype, mask, number):
    special_numbers.check_hidden_values("cuda", dtype, mask, number, exact=False)


@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize(
    "tokens, splits, window",
    [
        (1, 1, (-1, -1)),
        (1, 1, (8, -1)),
        (5, 1, (-1, -1)),
        (5, 2, (3, -1)),
        (20, 1, (-1, -1)),
        (20, 1, (7, -1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_hidden_value_of_a_cache_reaches_nothing(cuda, dtype, tokens, splits, window, number):
    if dtype == torch.float32 and tokens > 16:
        return  # refused: the tensor cores take halves
    special_numbers.check_hidden_in_cache("cuda", dtype, tokens, splits, window, number)


@pytest.mark.parametrize("tokens", [5, 20])
def test_the_order_of_threads_changes_no_bit_of_what_is_repeated(cuda, monkeypatch, tokens):
    def run():
        call = special_numbers.cache_call(torch.bfloat16, tokens, (-1, -1))
        call["v"][0, -1, 0, 7] = NAN
        return special_numbers.zero_init_attention_with_kvcache(**call, backend="cuda", return_lse=True)

    assert in_all_orders(monkeypatch, run)
