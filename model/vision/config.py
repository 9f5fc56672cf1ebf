"""The configuration of an adapter's visual part: what is taken from the encoder, and how it becomes prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zinit_kernels.console import shown

from ..errors import UserError

TOKENS = ("class", "mean", "all", "patches")
MOST_BLOCKS = 128
LARGEST = 1 << 16  # of every size here; CLIP's and DINOv2's widest are 1664 and 1536


@dataclass(frozen=True)
class FeatureConfig:
    """What is taken of an image from its encoder: a matrix [T, M * D], of M layers of width D.

    layers: hidden states, 0 the embedding and n the n-th layer's output, side by side along the channels; negative ones
    count from the last. tokens: "class", the class token (T = 1), "mean", the mean of all tokens (T = 1; SigLIP has
    no class token), "all" tokens, or the "patches" without the class token. projected: CLIP's last norm and projection,
    applied to every token of the last layer, as LLaMA-Adapter V2 does.
    channel_order "bgr" swaps red and blue, as the published V2 checkpoints were trained.
    """

    layers: tuple[int, ...] = (-1,)
    tokens: str = "class"
    projected: bool = False
    channel_order: str = "rgb"

    def __post_init__(self) -> None:
        if not self.layers or not all(type(layer) is int and abs(layer) < LARGEST for layer in self.layers):
            raise UserError(f"layers must be whole numbers, at least one, got {shown(self.layers)}.")
        if type(self.projected) is not bool:
            raise UserError(f"projected must be true or false, got {shown(self.projected)}.")
        if self.tokens not in TOKENS:
            raise UserError(f"tokens must be one of {', '.join(TOKENS)}, got {shown(self.tokens)}.")
        if self.channel_order not in ("rgb", "bgr"):
            raise UserError(f"channel_order must be rgb or bgr, got {shown(self.channel_order)}.")
        if self.projected and self.layers != (-1,):
            raise UserError(f"only the last layer can be projected, got the layers {shown(self.layers)}.")


@dataclass(frozen=True)
class VisualConfig:
    """The visual part of an adapter.

    kind "bottleneck" is the paper's (equations 9 and 10 of arXiv 2303.16199): Linear(feature_size -> width), SiLU,
    Linear(width -> C), one vector an image, added to all prompts of all adapted layers. kind "queries" is that of the
    released LLaMA-Adapter V2: Linear and LayerNorm over the image's tokens, `num_queries` learned tokens before them,
    `blocks` transformer blocks of `width`, and a Linear and LayerNorm that make C of each learned token; one vector for
    each prompt.
    """

    kind: str = "bottleneck"
    feature_size: int = 768  # M * D: a token's width as it comes from the encoder
    width: int = 64
    blocks: int = 0
    heads: int = 1
    mlp_ratio: float = 4.0
    # The statistics of the features are taken from the training images, and features are standardised with them
    standardise: bool = False
    # The published V2 checkpoints saw a blank image with every record that has none
    blank_image: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("bottleneck", "queries"):
            raise UserError(f"kind must be bottleneck or queries, got {shown(self.kind)}.")
        for name, least, most in (
            ("feature_size", 1, LARGEST),
            ("width", 1, LARGEST),
            ("blocks", 0, MOST_BLOCKS),
            ("heads", 1, LARGEST),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise UserError(f"{name} must be a whole number from {least} to {most}, got {shown(value)}.")
        for name in ("standardise", "blank_image"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name} must be true or false, got {shown(getattr(self, name))}.")
        is_number = type(self.mlp_ratio) in (int, float)
        if not is_number or self.mlp_ratio * self.width < 1 or not self.mlp_ratio < MOST_BLOCKS:
            raise UserError(
                f"mlp_ratio must be a number that gives 1 to {MOST_BLOCKS} widths, got {shown(self.mlp_ratio)}."
            )
        if self.kind == "queries" and self.width % self.heads:
            raise UserError(f"width {self.width} must be a multiple of the {self.heads} heads.")


def to_json(config: Any) -> str:
    """A configuration as a line of JSON, for a file's metadata."""
    return json.dumps(asdict(config), sort_keys=True)


def from_json(kind: type, content: Mapping[str, Any], where: str) -> Any:
    """The configuration of class `kind` in a parsed object. Raises UserError for fields that it does not have."""
    fields = set(kind.__dataclass_fields__)
    if unknown := sorted(content.keys() - fields):
        raise UserError(f"{where} has the unknown field {shown(unknown[0])}.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    return kind(**values)
