"""The choice of a token: the kernel and the tensor operations take the same one."""

import math
from types import SimpleNamespace

import pytest
import torch

from model import choice
from model.choice import choose, times
from model.errors import UserError
from model.serving.request import Sampling
from model.serving.sampler import choose_tokens

CHOOSE = torch.ops.zinit.choose_cpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 16, 100, 5000])
def test_the_kernel_takes_the_token_of_the_tensor_operations(monkeypatch, vocab_size, dtype):
    """Peaked rows and flat ones, with a nucleus of one token and of all."""
    logits = torch.randn(12, vocab_size, generator=torch.Generator().manual_seed(1))
    logits = (logits * torch.logspace(-2, 1.2, 12)[:, None]).to(dtype)
    logits[3, 0] = -torch.inf if vocab_size > 1 else 0
    for temperature in (0, 1e-300, 0.1, 0.8, 1.0, 30.0):
        for top_p in (1e-9, 0.5, 0.75, 0.95, 1.0):
            found = choose(logits, temperature, top_p, generators(12))
            monkeypatch.setattr(choice, "NATIVE", False)
            assert torch.equal(choose(logits, temperature, top_p, generators(12)), found)
            monkeypatch.setattr(choice, "NATIVE", True)
            alone = [choose(row[None], temperature, top_p, generators(1, i)) for i, row in enumerate(logits)]
            assert torch.equal(torch.cat(alone), found)


def splitmix64(state):
    mask = (1 << 64) - 1
    x = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_times_are_exponential_numbers_of_splitmix64(seed):
    found = times(seed, 3000)
    gamma = 0x9E3779B97F4A7C15
    expected = [
        -math.log(((splitmix64((seed + gamma * i) % 2**64) >> 12) + 0.5) * 2.0**-52) for i in range(1, 3001)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-300)
    assert float(found.min()) > 0
    assert abs(float(found.mean()) - 1) < 0.1 and abs(float((found > 1).double().mean()) - 0.368) < 0.03


@pytest.mark.native
def test_drawn_tokens_follow_the_probabilities_of_the_nucleus():
    probabilities = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.2, 0.1])
    logits = probabilities.log().expand(20000, 6).contiguous()
    seeds = torch.arange(20000) * 7919
    drawn = CHOOSE(logits, 1.0, 0.64, seeds).bincount(minlength=6) / 20000
    torch.testing.assert_close(drawn, torch.tensor([0, 40, 0, 25, 0, 0]) / 65, rtol=0, atol=0.015)
    drawn = CHOOSE(logits, 1.0, 1.0, seeds).bincount(minlength=6) / 20000
    torch.testing.assert_close(drawn, probabilities, rtol=0, atol=0.015)
    drawn = CHOOSE(logits, 0.5, 1.0, seeds).bincount(minlength=6) / 20000
    torch.testing.assert_close(drawn, probabilities**2 / (probabilities**2).sum(), rtol=0, atol=0.015)


@pytest.mark.parametrize("native", [pytest.param(True, marks=pytest.mark.native), False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_logits_the_first_is_taken(monkeypatch, dtype, native):
    monkeypatch.setattr(choice, "NATIVE", native)
    logits = torch.randn(4, 5001, generator=torch.Generator().manual_seed(0)).to(dtype)
    for row, places in enumerate(([4000, 70, 900], [5000, 4999], [0, 1], [5000])):
        logits[row, places] = 9.0
    assert choose(logits, 0, 1.0, []).tolist() == [70, 4999, 0, 5000]
    assert choose(logits, 1e-9, 0.2, generators(4)).tolist() == [70, 4999, 0, 5000]


@pytest.mark.native
@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_no_numbers(dtype, temperature):
    logits = torch.zeros(6, 37, dtype=dtype)
    logits[1, 36], logits[2, 0], logits[3, 20] = torch.nan, torch.nan, torch.inf
    logits[4], logits[5, 1:] = -torch.inf, -torch.inf
    assert CHOOSE(logits, temperature, 1.0, torch.arange(6)).lt(0).tolist() == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    with pytest.raises(UserError, match="not numbers"):
        choose(logits, temperature, 1.0, generators(6))


@pytest.mark.parametrize("native", [pytest.param(True, marks=pytest.mark.native), False])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_that_is_no_numbers_leaves_the_others_their_tokens(monkeypatch, temperature, native):
    monkeypatch.setattr(choice, "NATIVE", native)
    logits = torch.zeros(3, 1000) if temperature else torch.randn(3, 1000)
    damaged = logits.index_fill(0, torch.tensor([1]), torch.nan)
    found = []
    for rows in (logits, damaged):
        request = SimpleNamespace(sampling=Sampling(temperature=temperature, top_p=1.0))
        states = [SimpleNamespace(request=request, generator=generator) for generator in generators(3)]
        found.append([choose_tokens(rows, states) for _ in range(4)])
    for good, bad in zip(*found, strict=True):
        assert [bad[0], bad[2]] == [good[0], good[2]]
        assert isinstance(bad[1], UserError) and "not numbers" in str(bad[1])


@pytest.mark.parametrize("native", [pytest.param(True, marks=pytest.mark.native), False])
@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_no_temperature_draws_what_is_impossible_or_all_alike(monkeypatch, top_p, native):
    monkeypatch.setattr(choice, "NATIVE", native)
    logits = torch.tensor([[0.0, -math.inf, 5.0, 1.0]]).expand(60, 4)
    for temperature in (1e37, 1e39, 1e60, 1e300):
        drawn = set(choose(logits, temperature, top_p, generators(60)).tolist())
        assert drawn == ({0, 2, 3} if top_p == 1 else drawn - {1}) and len(drawn) >= 2


@pytest.mark.native
def test_the_operator():
    logits, seeds = torch.randn(3, 40), torch.arange(3)
    torch.library.opcheck(CHOOSE.default, (logits, 0.5, 0.9, seeds))
    for given, message in (
        ((logits[0], 0.5, 0.9, seeds), "logits must have shape \\(B, vocab_size\\)"),
        ((logits.double(), 0.5, 0.9, seeds), "logits must be float32"),
        ((logits[:, ::2], 0.5, 0.9, seeds), "logits must be contiguous"),
        ((logits[:, :0], 0.5, 0.9, seeds), "logits must have 1 to"),
        ((logits, -1.0, 0.9, seeds), "temperature must not be negative"),
        ((logits, math.nan, 0.9, seeds), "temperature must not be negative"),
        ((logits, 0.5, 0.0, seeds), "top_p must be positive"),
        ((logits, 0.5, 0.9, seeds[:2]), "seeds must have shape"),
        ((logits, 0.5, 0.9, seeds.int()), "seeds must be Long"),
    ):
        with pytest.raises(RuntimeError, match=message):
            CHOOSE(*given)
    assert CHOOSE(logits[:0], 0.5, 0.9, seeds[:0]).shape == (0,)
