"""No figure without a check: every provider is compared with the float64 reference on a small sibling of its shape."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from zinit_kernels.testing import GRADIENTS, Case, Inputs, check_function

from .machine import why_failed
from .problem import Problem, Provider, Shape

# How many times the error of eager PyTorch is allowed. This package is held to the tests' rule. Others round at other
# places than the formula does; they must be right, not equally exact.
ALLOWED_OURS, ALLOWED_OTHERS = 2.0, 8.0


def why_wrong(provider: Provider, problem: Problem, backward: bool) -> str:
    """Why a provider's output is wrong on a sibling of the problem, or its gradients where asked; "" if it is right."""
    return _verdict(
        provider, problem.shape.sibling(), problem.dtype, problem.device, problem.layout, backward
    )


@cache  # many shapes have the same sibling
def _verdict(
    provider: Provider, shape: Shape, dtype: torch.dtype, device: torch.device, layout: str, backward: bool
) -> str:
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
        if not provider.prompted:  # plain attention reads the first three only
            tensors[3:] = [tensors[1][:1, :, :0], tensors[1][:1, :, :0], None]
        if layout == "token-major":
            tensors[1:3] = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[1:3]]
        out = provider.prepare(Problem(shape, *tensors, layout))()
        return out if provider.heads_first else out.transpose(1, 2), None

    factor = ALLOWED_OURS if provider.name.startswith("zinit") else ALLOWED_OTHERS
    try:
        check_function(run, case, dtype, 1, backward, device.type, factor)
    except AssertionError as error:
        return f"wrong result: {error}"
    except Exception as error:  # any: a kernel that raises gets no figure, and the others go on
        return why_failed(error)
    return ""
