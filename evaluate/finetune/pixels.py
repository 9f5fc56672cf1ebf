"""Images as a checkpoint wants them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..shared import UserError
from .checkpoint import call
from .image_sets import Images

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEFAULT_SIZE = 224
_EVALUATED_AT_ONCE = 64


class Pixels:
    """Batches of images at one size, normalised with the checkpoint's mean and deviation (ImageNet's if it has none).

    Training images are kept in memory as bytes; test images are read anew each time.
    """

    def __init__(self, base: Path, size: int):
        self.size = size
        mean, deviation = _normalisation(base)
        self.mean, self.deviation = (torch.tensor(v).view(3, 1, 1) for v in (mean, deviation))
        self._kept: dict[tuple[int, int], Tensor] = {}

    def batch(self, images: Images, rows: list[int], keep: bool) -> Tensor:
        """float32 [N, 3, size, size]."""
        found = []
        for row in rows:
            key = (id(images), row)
            pixels = self._kept[key] if key in self._kept else images.pixels(row, self.size)
            if keep:
                self._kept[key] = pixels
            found.append(pixels)
        return (torch.stack(found).float() / 255 - self.mean) / self.deviation


def forward(model: Any, pixels: Tensor, **inputs: Any) -> Any:
    """The model's outputs; position embeddings are interpolated where the images have another size than its own."""
    config = getattr(model.config, "vision_config", model.config)
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if takes and getattr(config, "image_size", None) != pixels.shape[-1]:
        inputs["interpolate_pos_encoding"] = True
    return call(model, {"pixel_values": pixels, **inputs})


def accuracy(model: Any, pixels: Pixels, images: Images, keep: bool = False) -> float:
    """Top-1, in percent."""
    right = 0
    for first in range(0, len(images), _EVALUATED_AT_ONCE):
        rows = list(range(first, min(first + _EVALUATED_AT_ONCE, len(images))))
        found = forward(model, pixels.batch(images, rows, keep)).logits.argmax(-1).cpu()
        right += int((found == images.labels[rows]).sum())
    return 100 * right / len(images)


def _normalisation(base: Path) -> tuple[Any, Any]:
    path = base / "preprocessor_config.json"
    if not path.is_file():
        return IMAGENET
    try:
        content = json.loads(path.read_bytes())
        mean, deviation = content.get("image_mean", IMAGENET[0]), content.get("image_std", IMAGENET[1])
        valid = all(len(v) == 3 and all(isinstance(x, int | float) for x in v) for v in (mean, deviation))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    if not valid or not all(deviation):
        raise UserError(
            f"{path}: image_mean and image_std must be three numbers each, got {mean} and {deviation}."
        )
    return mean, deviation
