"""From records about images to records to train on: every image is read and encoded before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import UserError, warn
from ..records import Record
from .adapter import VisualAdapter
from .features import Features
from .images import ImageError
from .records import Found

_STATISTICS = 2000  # images that the features' mean and deviation are taken from


def encode_images(
    found: Sequence[Found],
    features: Features,
    skip: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """The records, once all their images are encoded. report: is told how many of how many images are done.

    Raises UserError for an image that is missing or damaged, naming the record and its line. skip: such records are
    left out, and a warning counts them.
    """
    places: dict[str, str] = {}  # image -> the first record about it
    for record, where in found:
        for path in record.images:
            places.setdefault(path, where)
    bad: dict[str, str] = {}
    for done, (path, where) in enumerate(places.items(), 1):
        try:
            features.of([path])
        except ImageError as error:
            said = f"{where}: {str(error).rstrip('.')}"
            if not skip:
                raise UserError(f"{said}; --skip-bad-images leaves such records out.") from None
            bad[path] = said
        report(done, len(places))
    kept = [record for record, _ in found if bad.keys().isdisjoint(record.images)]
    if bad:
        warn(
            f"{len(found) - len(kept)} of {len(found)} records are left out, because {len(bad)} of their images are "
            f"missing or cannot be read; the first is {next(iter(bad.values()))}."
        )
    return kept


def prepare_adapter(
    adapter: VisualAdapter, records: Sequence[Record], stage: int | None, fresh: bool
) -> None:
    """Fits the features' statistics of a new visual part (fresh), and freezes the projection in stage 2."""
    if fresh and isinstance(adapter.source, Features) and adapter.visual_config.standardise:
        paths = sorted({path for record in records for path in record.images})
        step = max(len(paths) // _STATISTICS, 1)
        if paths:
            with torch.no_grad():
                adapter.standardise.fit(adapter.source.of(paths[::step]))  # type: ignore[operator]
    if stage == 2:
        adapter.projection.requires_grad_(False)
