"""The earlier name of `sampling`."""

from .choice import choose
from .sampling import generate

__all__ = ["choose", "generate"]
