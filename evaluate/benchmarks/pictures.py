"""Where a benchmark's images are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..question import Picture


def picture(folder: Path, name: str, places: Sequence[str] = ("images", "")) -> Picture:
    """The image of that name in the first of these places that has it; in the first one where none does."""
    candidates = [folder / place / name for place in places]
    path = next((path for path in candidates if path.is_file()), candidates[0])
    return Picture(name, path)
