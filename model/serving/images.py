"""Images of a request: data URLs become prompts of an adapter with a visual part."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from zinit_kernels.console import shortened

from ..errors import UserError
from ..llama import Adapter
from ..vision.adapter import VisualAdapter
from ..vision.features import Features
from ..vision.images import read_image
from .errors import ApiError

MOST_IMAGES = 16  # in a request
_KEPT = 256  # images whose features stay in memory
_DATA_URL = re.compile(r"data:image/[a-z.+-]{1,40};base64,", re.IGNORECASE)


class Pictures:
    """Encodes the images of requests, each once while it is remembered. May be called from any thread."""

    def __init__(self) -> None:
        self._features: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._lock = threading.Lock()  # an encoder runs for one image at a time

    def see(self, name: str, adapter: object, urls: Sequence[str]) -> tuple[tuple[str, ...], Adapter]:
        """What requests about these images have in common, as a key, and the adapter for one of them.

        Raises ApiError: an adapter without a visual part or encoder, an address that is no data URL, no image.
        """
        if not isinstance(adapter, VisualAdapter):
            raise ApiError(
                400,
                f"the model {name!r} takes no images: name an adapter with a visual part.",
                param="messages",
            )
        if not isinstance(adapter.source, Features):
            raise ApiError(
                400,
                f"the server has no image encoder for {name!r}: start it with --encoder.",
                param="messages",
            )
        if len(urls) > MOST_IMAGES:
            raise ApiError(
                400, f"a request may hold {MOST_IMAGES} images, this one has {len(urls)}.", param="messages"
            )
        contents = [_content(url, place) for place, url in enumerate(urls, 1)]
        digests = tuple(hashlib.sha256(content).hexdigest() for content in contents)
        with self._lock:
            features = [
                self._feature(adapter.source, digest, content, place)
                for place, (digest, content) in enumerate(zip(digests, contents, strict=True), 1)
            ]
            return digests, adapter.with_images(features, [tuple(range(len(features)))])

    def _feature(self, source: Features, digest: str, content: bytes, place: int) -> Tensor:
        key = source.fingerprint, digest
        feature = self._features.get(key)
        if feature is None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "image"
                path.write_bytes(content)
                try:
                    image = read_image(path, source.convert)
                except UserError as error:
                    sentence = str(error).replace(f"the image {path}", f"image {place}")
                    raise ApiError(400, sentence, param="messages") from None
            (feature,) = source.encoder.encode([image], source.config)
            feature = feature.clone()
        self._features[key] = feature
        self._features.move_to_end(key)
        if len(self._features) > _KEPT:
            self._features.popitem(last=False)
        return feature


def _content(url: str, place: int) -> bytes:
    match = _DATA_URL.match(url)
    if match is None:
        raise ApiError(
            400,
            f"image {place} must be a data URL (data:image/png;base64,...), since this server fetches nothing, got "
            f"{shortened(url, 60)!r}.",
            param="messages",
        )
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except binascii.Error as error:
        raise ApiError(400, f"image {place} is not valid base64: {error}.", param="messages") from None
