"""A number only after the check: every provider is judged against the float64 reference on a small sibling."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from zinit_kernels.testing import GRADIENTS, Case, Inputs, check_function

from .conditions import why_failed
from .problem import Problem
from .providers import Provider
from .shapes import Shape

# How many times eager PyTorch's error is allowed. Ours is judged by the rule of the tests; others round in other
# places than the formula does, and are asked to be right, not to be as exact.
OURS, OTHERS = 2.0, 8.0


def why_wrong(provider: Provider, problem: Problem, backward: bool) -> str:
    """ "" where a provider's output, and its gradients if asked, are right on a sibling of the problem."""
    shape = replace(problem.shape.sibling(), name="sibling")
    return verdict(provider, shape, problem.dtype, problem.device, problem.layout, backward)


@cache
def verdict(
    provider: Provider, shape: Shape, dtype: torch.dtype, device: torch.device, layout: str, backward: bool
) -> str:
    """Many shapes have the same sibling: it is judged once."""
    case = Case(
        shape.name,
        batch=shape.batch,
        heads_q=shape.heads_q,
        heads_kv=shape.heads_kv,
        seqlens_q=(shape.seqlen_q,),
        seqlens_k=(shape.seqlen_k,),
        head_dim=shape.head_dim,
        prompt_length=shape.prompt_length,
        causal=shape.causal and shape.seqlen_q > 1,
        table="shared" if provider.prompted else "none",
    )

    def run(inputs: Inputs) -> tuple[Tensor, None]:
        tensors = [inputs.tensors[name] for name in GRADIENTS]
        if not backward:
            tensors = [None if t is None else t.detach() for t in tensors]
        if not provider.prompted:  # a floor looks at the first three alone
            tensors[3:] = [tensors[1][:1, :, :0], tensors[1][:1, :, :0], None]
        if layout == "token-major":
            tensors[1:3] = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[1:3]]
        out = provider.prepare(Problem(shape, *tensors, layout))()
        return out if provider.heads_first else out.transpose(1, 2), None

    factor = OURS if provider.name.startswith("zinit") else OTHERS
    try:
        check_function(run, case, dtype, 1, backward, device.type, factor)
    except AssertionError as error:
        return f"wrong result: {error}"
    except Exception as error:  # any: a kernel that raises is red, and the others go on
        return why_failed(error)
    return ""
