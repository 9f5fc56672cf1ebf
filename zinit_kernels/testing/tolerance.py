"""The one tolerance rule.

The error of a kernel against the float64 reference may be at most twice that of the same formula in eager PyTorch
at the kernel's dtype, plus one rounding unit: of the dtype at the size of the result, and of float32 at the size
of the terms that are summed (`magnitude.magnitudes`).
"""

import torch
from torch import Tensor


def assert_within_eager_error(
    name: str,
    actual: Tensor,
    eager: Tensor,
    oracle: Tensor,
    dtype: torch.dtype,
    terms: float = 0.0,
    factor: float = 2.0,
) -> None:
    """Asserts the rule at the top of this file for the largest absolute error; `terms` comes from `magnitudes`."""
    assert actual.shape == oracle.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    )
    if oracle.numel() == 0:
        return
    hollow = oracle == float("-inf")
    assert torch.equal(actual == float("-inf"), hollow), f"{name}: -inf in other places than the reference"
    actual, eager, oracle = (t.double().masked_fill(hollow, 0) for t in (actual, eager, oracle))
    assert torch.isfinite(actual).all(), (
        f"{name}: {(~torch.isfinite(actual)).sum()} of {actual.numel()} values not finite"
    )
    error, allowed = (actual - oracle).abs(), (eager - oracle).abs().max().item()
    rounding = torch.finfo(dtype).eps * oracle.abs().max().item() + torch.finfo(torch.float32).eps * terms
    worst = error.max().item()
    assert worst <= factor * allowed + rounding, (
        f"{name}: error {worst:.3e} at {tuple(int(i) for i in (error == worst).nonzero()[0])}, "
        f"allowed {factor:g} x {allowed:.3e} (eager) + {rounding:.3e} (rounding)"
    )
