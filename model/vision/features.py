"""Features of images, each encoded once: kept in memory, or on disk if there is a folder for them.

    features = Features(load_encoder(directory), FeatureConfig(), cache="features")
    first, second = features.of(["a.jpg", "b.jpg"])

A file of the cache is named by the encoder's fingerprint, which its image processor is part of, by what is taken from
it, and by the image's bytes: a picture that is renamed is found again, and one that is changed is encoded again.
Images are encoded one at a time, so that a feature has the same bits whatever else is encoded; a run that resumes
depends on that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from zinit_kernels.checkpoints import CheckpointError, write_atomically
from zinit_kernels.checkpoints.tensor_files import read_safetensors
from zinit_kernels.checkpoints.writing import safetensors_bytes

from ..fingerprint import checksum
from .config import FeatureConfig, to_json
from .encoders import Encoder
from .images import read_bytes, read_image


class Features:
    """The features [T, M * D] of image files. `counted` is how many images the encoder has seen.

    cache: a folder; without one the features of all images stay in memory. convert: as in `read_image`.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: FeatureConfig,
        cache: str | Path | None = None,
        convert: bool = False,
    ):
        self.encoder, self.config, self.convert = encoder, config, convert
        self.feature_size = encoder.feature_size(config)
        self.counted = 0
        self._kept: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}
        self._folder = None if cache is None else Path(cache) / self.fingerprint
        self._blank: Tensor | None = None

    @property
    def fingerprint(self) -> str:
        """Of everything but the image that features depend on."""
        text = f"{self.encoder.fingerprint} {to_json(self.config)} {self.convert}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def digests(self) -> Mapping[str, str]:
        """Of each image file so far, the SHA-256 of its content."""
        return self._names

    def of(self, paths: Sequence[str]) -> list[Tensor]:
        """The features of these files, in order. Raises UserError for one that is no image."""
        return [self._of(path) for path in paths]

    def prepare(
        self, paths: Iterable[str], report: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Encodes what is not known yet. `report` is told how many images are done, and of how many."""
        new = [path for path in dict.fromkeys(paths) if path not in self._names]
        for done, path in enumerate(new, 1):
            self._of(path)
            report(done, len(new))

    def blank(self) -> Tensor:
        """The features that stand for no image, of an adapter that was trained with a blank one."""
        if self._blank is None:
            self._blank = self.encoder.blank(self.config)
        return self._blank

    def _of(self, path: str) -> Tensor:
        name = self._names.get(path)
        if name is None:
            name = hashlib.sha256(read_bytes(path)).hexdigest()
        feature = self._kept.get(name)
        if feature is None:
            feature = self._read(name)
        if feature is None:
            (feature,) = self.encoder.encode([read_image(path, self.convert)], self.config)
            feature = feature.clone()
            self.counted += 1
            self._write(name, feature)
        self._names[path] = name
        return feature

    def _read(self, name: str) -> Tensor | None:
        path = None if self._folder is None else self._folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            tensors, metadata = read_safetensors(path)
            feature = tensors["features"]
        except (CheckpointError, KeyError):  # a damaged file of the cache is made again
            return None
        # files of before November 2026 have no sum
        if metadata.get("sum", f"{checksum(feature):08x}") != f"{checksum(feature):08x}":
            return None
        fits = feature.dim() == 2 and feature.shape[1] == self.feature_size and feature.is_floating_point()
        return feature if fits else None

    def _write(self, name: str, feature: Tensor) -> None:
        if self._folder is None:
            self._kept[name] = feature
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        content = safetensors_bytes({"features": feature}, {"sum": f"{checksum(feature):08x}"})
        write_atomically(self._folder / f"{name}.safetensors", content)
