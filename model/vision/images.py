"""The one door for image files: a path becomes 8-bit RGB pixels, or one sentence says why not.

Only images whose pixels are 8-bit RGB or greyscale are taken as they are. Turning any other kind into RGB takes a
decision (what is behind transparent pixels, which frame of an animation, which inks), so it is done only when asked.
An image is refused by its header, before it is decoded, if it would take too much memory.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from zinit_kernels.console import shortened

from ..errors import UserError

MOST_PIXELS = 100_000_000  # 300 MB of RGB; a camera's images have up to 60 million
LONGEST_SHAPE = 100  # the longer side over the shorter: encoders scale the shorter one to hundreds of pixels
# The formats that photographs and pictures come in. Pillow knows others, and some of these run programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_CONVERT = "convert it to 8-bit RGB, or pass --convert-images"
_PNG_DEPTH = 24  # the place of the bit depth in a PNG file
_TIFF_DEPTHS = 258  # the tag of the bits per sample


class ImageError(UserError):
    """A file is no image that is taken. The message is one sentence that names it."""


def read_bytes(path: str | Path) -> bytes:
    """The content of an image file. Raises ImageError if it cannot be read."""
    path, name = Path(path), _name(path)
    try:
        if not path.is_file():
            raise ImageError(f"{name} is {'not a file' if path.exists() else 'missing'}.")
        return path.read_bytes()
    except OSError as error:  # no permission, a name that is too long
        raise ImageError(f"{name} cannot be read: {error.strerror or error}.") from None


def read_image(path: str | Path, convert: bool = False) -> Any:
    """The image of a file as a PIL image in mode RGB, turned upright as its EXIF data say.

    convert: also takes images that are not 8-bit RGB or greyscale. Palettes become their colours, transparent pixels
    are put on white, inks (CMYK) become the colours that Pillow makes of them, 16-bit greyscale is scaled to 8 bits,
    and of an animation the first frame is taken.

    Raises ImageError, before the pixels are decoded wherever the header tells: not an image, a damaged one, one
    that is too large, a side of one pixel, a file that cannot be read.
    """
    try:
        from PIL import Image, ImageFile
    except ModuleNotFoundError:
        raise UserError("images need Pillow: pip install 'zinit-kernels[vision]'.") from None

    name, content = _name(path), read_bytes(path)
    if not content:
        raise ImageError(f"{name} is empty.")
    truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit is a warning; ours is below
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
            _check_size(name, *image.size)
            what = _unusual(image)
            if what and not convert:
                raise ImageError(f"{name} {what}: {_CONVERT}.")
            image.load()
            return as_rgb(image, name)
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name} is no image in a known format ({', '.join(_FORMATS)}).") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has more than {MOST_PIXELS:,} pixels: scale it down.") from None
    except Exception as error:  # whatever Pillow stumbles over in a damaged file
        reason = " ".join(str(error).split()).rstrip(".")
        raise ImageError(f"{name} is truncated or damaged ({shortened(reason)}).") from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated


def _name(path: str | Path) -> str:
    return f"the image {shortened(str(path))}"


def _check_size(name: str, width: int, height: int) -> None:
    size = f"{name} has {width:,} x {height:,} pixels"
    if width * height > MOST_PIXELS:
        raise ImageError(f"{size}, more than {MOST_PIXELS:,}: scale it down.")
    if min(width, height) < 2:
        raise ImageError(f"{size}: at least 2 x 2 are needed.")
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        raise ImageError(f"{size}: one side is more than {LONGEST_SHAPE} times the other, crop it.")


def _unusual(image: Any) -> str:
    """How an image differs from 8-bit RGB and greyscale; '' if it does not."""
    if (
        image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    ):  # a phone's MPO is a photograph and its preview
        return f"has {image.n_frames} frames or pages"
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or _has_deep_channels(image):
        return "has more than 8 bits a channel"
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return "has an alpha channel, or a transparent colour"
    if image.mode == "P":
        return "has a palette"
    if image.mode == "CMYK":
        return "is CMYK, which are inks and no colours"
    if image.mode not in ("RGB", "L", "1"):
        return f"is of mode {image.mode}"
    return ""


def _has_deep_channels(image: Any) -> bool:
    """Whether a file whose mode says 8 bits has more: Pillow drops the lower bytes of 16-bit RGB without a word."""
    if image.format == "PNG":
        image.fp.seek(_PNG_DEPTH)
        return bool(image.fp.read(1) == b"\x10")
    if image.format == "TIFF":
        return max(image.tag_v2.get(_TIFF_DEPTHS, (8,))) > 8
    return any("16" in str(tile[3]) for tile in image.tile) and image.format == "PPM"


def as_rgb(image: Any, name: str = "the image") -> Any:
    """A PIL image as `read_image` makes it with convert: upright, on white, in mode RGB. Raises ImageError."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion cuts them off at 255
        image = image.convert("I").point(lambda value: value * (255 / 65535) + 0.5).convert("L")
    if image.mode == "F":
        raise ImageError(
            f"{name} holds floating-point numbers, which have no agreed range: convert it to 8-bit RGB."
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
