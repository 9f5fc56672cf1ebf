"""Checks with NaN and infinity behind a mask, and with numbers below 2^-126, for the public functions."""

import torch

from zinit_kernels import zero_init_attention, zero_init_attention_with_kvcache

NAN, INF = float("nan"), float("inf")
MASKS = {  # keyword arguments; whether query i sees key j of T = S
    "causal": ({"is_causal": True}, lambda i, j: j <= i),
    "window": ({"window_size": (9, 3)}, lambda i, j: (j >= i - 9) & (j <= i + 3)),
    "causal window": ({"is_causal": True, "window_size": (5, -1)}, lambda i, j: (j <= i) & (j >= i - 5)),
}


def visibility(mask: str, tokens: int) -> torch.Tensor:
    """[T, S] bool"""
    i, j = torch.meshgrid(torch.arange(tokens), torch.arange(tokens), indexing="ij")
    return MASKS[mask][1](i, j)


def tensors(dtype: torch.dtype, tokens: int, head_dim: int = 64) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"query": (1, 4, tokens), "key": (1, 2, tokens), "value": (1, 2, tokens), "grad": (1, 4, tokens)}
    given = {name: torch.randn(*shape, head_dim).to(dtype) for name, shape in shapes.items()}
    prompts = {name: torch.randn(1, 2, 3, head_dim).to(dtype) for name in ("prompt_key", "prompt_value")}
    return {**given, **prompts, "gate": torch.tensor([0.4, 0.0, -1.0, 0.7])}


def forward(given: dict[str, torch.Tensor], mask: str, backend: str, **options) -> torch.Tensor:
    names = ("query", "key", "value", "prompt_key", "prompt_value", "gate")
    return zero_init_attention(*(given[name] for name in names), backend=backend, **MASKS[mask][0], **options)


def check_hidden_values(
    backend: str, dtype: torch.dtype, mask: str, number: float, exact: bool = True
) -> None:
    """A value that is not finite reaches the queries that see it, in its own column, and nothing else. exact: the rest
    keeps its bits."""
    tokens, key, column = 70, 37, 5
    given = tensors(dtype, tokens)
    sees = visibility(mask, tokens)[:, key]
    clean = forward(given, mask, backend)
    given["value"][0, 1, key, column] = number
    out = forward(given, mask, backend)
    touched = torch.zeros(out.shape, dtype=torch.bool)
    touched[:, 2:, sees, column] = True  # two query heads for a key head
    assert (out[touched].isnan() if number != number else out[touched] == number).all()
    same(out[~touched], clean[~touched], exact)


def same(actual: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    tolerance = 0.0 if exact else 8 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_hidden_in_backward(dtype: torch.dtype, mask: str, where: str) -> None:
    """A NaN in one row of an input reaches the gradients that depend on it, through what the mask lets pass."""
    tokens, row = 70, 37
    sees = visibility(mask, tokens)

    def gradients(given):
        leaves = {name: given[name].clone().requires_grad_() for name in ("query", "key", "value")}
        out = forward({**given, **leaves}, mask, "cpu")
        return dict(zip(leaves, torch.autograd.grad(out, leaves.values(), given["grad"]), strict=True))

    given = tensors(dtype, tokens)
    clean = gradients(given)
    given[where][0, -1, row, 3] = NAN
    found = gradients(given)
    if where in ("query", "grad"):
        rows, keys = torch.arange(tokens) == row, sees[row]
    else:
        rows = sees[:, row]
        keys = (sees & rows[:, None]).any(0)
    for name, reached in (("query", rows), ("key", keys), ("value", keys)):
        # a query of NaN moves the rounding of its neighbours' exponents
        same(found[name][:, :, ~reached], clean[name][:, :, ~reached], exact=where != "query")
    assert found["query"][0, -1, rows].isnan().any()


def cache_call(dtype: torch.dtype, tokens: int, window: tuple[int, int], length: int = 43) -> dict:
    torch.manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, 64).to(dtype)

    return {
        "q": tensor(2, tokens, 8), "k_cache": tensor(2, 64, 2), "v_cache": tensor(2, 64, 2), "k": tensor(2, tokens, 2),
        "v": tensor(2, tokens, 2), "prompt_k": tensor(1, 3, 2), "prompt_v": tensor(1, 3, 2),
        "gate": torch.full((8,), 0.5), "causal": True, "window_size": window,
        "cache_seqlens": torch.tensor([length, length - 20], dtype=torch.int32),
    }  # fmt: skip


def check_hidden_in_cache(
    backend: str, dtype: torch.dtype, tokens: int, splits: int, window: tuple[int, int], number: float
) -> None:
    """The same for new queries against a cache, where the last of several new values is hidden from the others."""
    calls = [cache_call(dtype, tokens, window) for _ in range(2)]
    calls[1]["v"][0, -1, 0, 7] = number
    clean, out = (zero_init_attention_with_kvcache(**c, num_splits=splits, backend=backend) for c in calls)
    touched = torch.zeros(out.shape, dtype=torch.bool)
    touched[0, -1, :4, 7] = True  # four query heads for a key head
    assert (out[touched].isnan() if number != number else out[touched] == number).all()
    same(out[~touched], clean[~touched], exact=False)


def check_tiny_values(dtype: torch.dtype, size: float) -> None:
    """Values near and below the smallest normal number come out with the precision that the dtype has there."""
    given = tensors(dtype, 40)
    for name in ("value", "prompt_value"):
        given[name] *= size
    call = cache_call(dtype, 2, (-1, -1))
    for name in ("v", "v_cache", "prompt_v"):
        call[name] *= size
    wide = {
        name: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in call.items()
    }
    pairs = (
        (
            forward(given, "causal", "cpu"),
            forward({n: t.double() for n, t in given.items()}, "causal", "reference"),
        ),
        (
            zero_init_attention_with_kvcache(**call, num_splits=2, backend="cpu"),
            zero_init_attention_with_kvcache(**wide, backend="reference"),
        ),
    )
    limits = torch.finfo(dtype)
    for out, expected in pairs:
        step = (expected.abs() * limits.eps).clamp(min=limits.smallest_normal * limits.eps)
        assert ((out.double() - expected).abs() <= 2 * step).all()
