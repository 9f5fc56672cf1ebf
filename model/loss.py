"""The cross-entropy of the answers. The logits of only a few hundred tokens are in memory at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zinit_kernels import rows

IGNORE = -100  # the target of a token that does not count in the loss
# 262 tokens of a 32,000-word vocabulary at a time: 16 MiB of bfloat16, 32 MiB of float32. Twice as many take
# the same time; half as many take 1.12x in float32.
_CHUNK_LOGITS = 1 << 23


def answer_loss(hidden: Tensor, targets: Tensor, output_weight: Tensor, reduction: str = "mean") -> Tensor:
    """-log p(target) over the tokens whose target is not IGNORE, a float32 scalar.

    hidden: [..., C], the normalised hidden states. targets: int64 [...], the token that follows each one.
    output_weight: [vocab_size, C]. reduction: "mean" or "sum"; the mean over no target is 0. Only tokens with a target
    are projected to logits.
    """
    wanted = (targets != IGNORE).flatten().nonzero().squeeze(-1)
    rows = hidden.flatten(0, -2).index_select(0, wanted)
    total = _LinearCrossEntropy.apply(rows, output_weight, targets.flatten()[wanted])
    return total / max(len(wanted), 1) if reduction == "mean" else total


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_i logsumexp(W h_i) - (W h_i)[target_i], chunk by chunk. The forward pass computes the gradients too, so no
    logits are saved: dh_i = W^T (softmax(W h_i) - onehot_i).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = max(_CHUNK_LOGITS // weight.shape[0], 1)
        for start in range(0, len(hidden), chunk):
            part = hidden[start : start + chunk]
            logits = torch.nn.functional.linear(part, weight)
            target = targets[start : start + chunk]
            total += rows.cross_entropy_(logits, target, wants_hidden or wants_weight).sum()
            grad_logits = logits  # in place
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = grad_logits @ weight.to(grad_logits.dtype)
            if grad_weight is not None:
                grad_weight += grad_logits.T @ part
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *(None if saved is None else saved * grad for saved in ctx.saved_tensors), None
