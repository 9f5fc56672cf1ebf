"""Speeds that others have published, to compare projections with. H100 SXM; H200 has the same multiprocessors.

All figures are TFLOP/s by flash-attention's count: 4 B H T^2 D operations forward, half of it under a causal mask, and
2.5 times as many backward.
"""

from __future__ import annotations

from ..problem import Shape

# cuDNN 9 forward, causal, head dimension 128, by T: flash-attention's assets/flash3_fp16_fwd.png (July 2024)
CUDNN_FORWARD = {512: 315, 1024: 410, 2048: 484, 4096: 518, 8192: 529}
# Causal backward, head dimension 128. At 8k cuDNN (flash-attention pull request 1893); shorter ones of
# FlashAttention-3 (meta-pytorch/tritonbench pull request 1267), because none of cuDNN was found.
BACKWARD = {1024: 182, 2048: 316, 4096: 444, 8192: 470}
CHIPS = ("h100", "h200")


def attention_flops(shape: Shape, backward: bool = False) -> float:
    """By flash-attention's count, without prompts."""
    forward = 4.0 * shape.batch * shape.heads_q * shape.seqlen_q * shape.seqlen_k * shape.head_dim
    return forward * (0.5 if shape.causal else 1.0) * (2.5 if backward else 1.0)


def sdpa_seconds(shape: Shape, backward: bool, chip: str) -> float | None:
    """Of the fastest plain attention of the same sizes; None where no figure was found."""
    rates = BACKWARD if backward else CUDNN_FORWARD
    known = chip in CHIPS and shape.head_dim == 128 and shape.causal and shape.seqlen_q == shape.seqlen_k
    rate = rates.get(shape.seqlen_q) if known else None
    return attention_flops(shape, backward) / (1e12 * rate) if rate else None
