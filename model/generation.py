"""The earlier name of `sampling`."""

from .sampling import choose, generate

__all__ = ["choose", "generate"]
