"""From an image's features to what is added to the prompts: the paper's bottleneck, and the queries of V2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import VisualConfig


class Standardise(nn.Module):
    """(x - mean) / std of each channel, as the training images had them; the identity until `fit`.

    Hidden states have a few channels that are large and the same for every image, and the rest is what differs.
    """

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    @torch.no_grad()
    def fit(self, features: Sequence[Tensor]) -> None:
        """Takes the statistics of the tokens of these images."""
        tokens = torch.cat([feature.float() for feature in features])
        self.mean.copy_(tokens.mean(0))
        self.scale.copy_(1 / tokens.std(0, correction=0).clamp_min(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


class Bottleneck(nn.Module):
    """Equations 9 and 10: one vector [1, C] of an image, which every prompt of every adapted layer gets.

    An image has one token, its global features. The vectors of several images are averaged. 561,216 parameters for six
    layers of 768 channels, a width of 64 and C = 4096.
    """

    def __init__(self, config: VisualConfig, hidden_size: int):
        super().__init__()
        self.down = nn.Linear(config.feature_size, config.width)
        self.up = nn.Linear(config.width, hidden_size)

    def forward(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """[S, T, feature_size] -> [S, 1, C]; padding [S, T] is True where a set of images has no token."""
        projected = self.up(F.silu(self.down(features)))
        if padding is None:
            return projected.mean(1, keepdim=True)
        kept = ~padding[..., None]
        return (projected * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)


class Block(nn.Module):
    """A pre-norm transformer block, as in a ViT: x + attention(norm x), then x + MLP(norm x) with GELU."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = (
            nn.Linear(width, int(mlp_ratio * width)),
            nn.Linear(int(mlp_ratio * width), width),
        )

    def forward(self, x: Tensor, mask: Tensor | None, num_kept: int | None = None) -> Tensor:
        """x [S, T, W]; mask bool [S, 1, 1, T], True = attend. num_kept: only the first tokens are wanted."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x[:, :num_kept]
        attended = F.scaled_dot_product_attention(query[:, :, :num_kept], key, value, mask)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Queries(nn.Module):
    """LLaMA-Adapter V2's: learned tokens look at the image's tokens, and each makes one vector [C] for one prompt.

    X = [queries, LayerNorm(Linear(F))] goes through the blocks, and LayerNorm(Linear(X[:, :Q])) is added to the
    prompts of every adapted layer. Tokens of several images stand one behind the other.
    """

    def __init__(self, config: VisualConfig, hidden_size: int, num_queries: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_queries, config.width))
        nn.init.normal_(self.query)
        self.tokens = nn.Linear(config.feature_size, config.width)
        self.tokens_norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.blocks)
        )
        self.out = nn.Linear(config.width, hidden_size)
        self.out_norm = nn.LayerNorm(hidden_size)

    def forward(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """[S, T, feature_size] -> [S, Q, C]; padding [S, T] is True where a set of images has no token."""
        tokens = self.tokens_norm(self.tokens(features))
        num_queries = len(self.query)
        x = torch.cat([self.query.expand(len(tokens), -1, -1), tokens], 1)
        mask = None
        if padding is not None:
            mask = F.pad(~padding, (num_queries, 0), value=True)[:, None, None]
        for index, block in enumerate(self.blocks):
            x = block(x, mask, num_queries if index == len(self.blocks) - 1 else None)
        return self.out_norm(self.out(x[:, :num_queries]))


def make_projection(config: VisualConfig, hidden_size: int, prompt_length: int) -> Bottleneck | Queries:
    """The projection that the configuration names."""
    if config.kind == "bottleneck":
        return Bottleneck(config, hidden_size)
    return Queries(config, hidden_size, prompt_length)
