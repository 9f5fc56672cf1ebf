"""The door for image files: what passes has the file's pixels, and everything else is one sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from model.errors import UserError
from model.vision.images import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width, height, depth=8, colour=2, rows=b""):
    """A PNG file with any header; rows: unfiltered scan lines."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def deep_rgb():
    values = PIXELS.astype(">u2") * 257
    return png(9, 6, 16, 2, b"".join(b"\0" + row.tobytes() for row in values))


RGB = Image.fromarray(PIXELS)
JPEG = encoded(RGB.resize((64, 64)), "JPEG")
FRAMES = {"save_all": True, "append_images": [RGB.rotate(90)]}
DEEP_GREY = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
UNUSUAL = {
    "cmyk": (encoded(RGB.convert("CMYK"), "JPEG"), "CMYK"),
    "deep-grey": (encoded(DEEP_GREY, "PNG"), "more than 8 bits"),
    "deep-grey-tiff": (encoded(DEEP_GREY, "TIFF"), "more than 8 bits"),
    "deep-rgb": (deep_rgb(), "more than 8 bits"),
    "palette": (encoded(RGB.convert("P"), "PNG"), "palette"),
    "alpha": (encoded(RGB.convert("RGBA"), "PNG"), "alpha"),
    "grey-alpha": (encoded(RGB.convert("LA"), "PNG"), "alpha"),
    "transparent-colour": (encoded(RGB, "PNG", transparency=(1, 2, 3)), "transparent"),
    "gif": (encoded(RGB, "GIF", **FRAMES), "2 frames"),
    "apng": (encoded(RGB, "PNG", **FRAMES), "2 frames"),
    "webp": (encoded(RGB, "WEBP", **FRAMES), "2 frames"),
    "pages": (encoded(RGB, "TIFF", **FRAMES), "2 frames or pages"),
}
REFUSED = {
    "text": (b"not an image", "no image"),
    "empty": (b"", "empty"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    "truncated-jpeg": (JPEG[: len(JPEG) // 2], "truncated or damaged"),
    "jpeg-header": (JPEG[:20], "no image|damaged"),
    "truncated-png": (encoded(RGB, "PNG")[:-30], "truncated or damaged"),
    "flipped-png": (encoded(RGB, "PNG").replace(b"IDAT", b"IDAT\xff", 1), "truncated or damaged"),
    "one-pixel": (encoded(RGB.resize((1, 1)), "PNG"), "1 x 1 pixels"),
    "one-row": (encoded(RGB.resize((9, 1)), "PNG"), "9 x 1 pixels"),
    "thin": (encoded(RGB.resize((402, 4)), "PNG"), "more than 100 times"),
    "bomb": (png(30_000, 20_000), "pixels"),
    "below-pillows-limit": (png(12_000, 9_000), "108,000,000|12,000 x 9,000 pixels"),
    "float": (encoded(Image.new("F", (8, 8)), "TIFF"), "floating-point|more than 8 bits"),
}


@pytest.fixture
def file(tmp_path):
    def write(content):
        (tmp_path / "image").write_bytes(content)
        return tmp_path / "image"

    return write


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_pixels_are_those_of_the_file(file, format):
    options = {"lossless": True} if format == "WEBP" else {}
    image = read_image(file(encoded(RGB, format, **options)))
    assert image.mode == "RGB" and np.array_equal(image, PIXELS)
    if format != "WEBP":
        assert np.array_equal(
            read_image(file(encoded(RGB.convert("L"), format))), RGB.convert("L").convert("RGB")
        )


def test_photographs_are_turned_upright(file):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert np.array_equal(read_image(file(encoded(RGB, "PNG", exif=exif))), np.rot90(PIXELS, -1))


def test_a_phones_photograph_with_its_preview(file):
    content = encoded(RGB.resize((64, 64)), "MPO", save_all=True, append_images=[RGB.resize((32, 32))])
    assert read_image(file(content)).size == (64, 64)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pixels_need_to_be_asked_for(file, name):
    content, said = UNUSUAL[name]
    path = file(content)
    with pytest.raises(UserError, match=f"(?s){said}.*--convert-images"):
        read_image(path)
    image = read_image(path, convert=True)
    assert image.mode == "RGB" and image.size == RGB.size


def test_conversions(file):
    assert np.array_equal(
        read_image(file(UNUSUAL["deep-grey"][0]), convert=True), np.repeat(PIXELS[..., :1], 3, 2)
    )
    assert np.array_equal(read_image(file(deep_rgb()), convert=True), PIXELS)
    palette = RGB.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read_image(file(encoded(palette, "PNG")), convert=True), palette.convert("RGB"))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert read_image(file(encoded(half, "PNG")), convert=True).getpixel((0, 0)) == (255, 127, 127)
    first = read_image(file(encoded(RGB, "PNG", **FRAMES)), convert=True)
    assert np.array_equal(first, PIXELS)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("convert", [False, True])
def test_refused_in_one_sentence(file, name, convert, monkeypatch):
    content, said = REFUSED[name]
    if "bomb" in name or "limit" in name:
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match=said) as error:
        read_image(file(content), convert)
    assert "\n" not in str(error.value) and "image" in str(error.value)


def test_missing_and_folders(tmp_path):
    long = tmp_path / ("a" * 300)
    for path, said in (
        (tmp_path / "none.png", "missing"),
        (tmp_path, "not a file"),
        (long, "cannot be read|missing"),
    ):
        with pytest.raises(UserError, match=said):
            read_image(path)


def test_frames_are_counted_in_a_damaged_file(file):
    """Pillow counts frames by reading on, and may stumble before any pixel is decoded."""
    content = UNUSUAL["pages"][0]
    for end in range(10, len(content), max(len(content) // 60, 1)):
        with pytest.raises(UserError):
            read_image(file(content[:end]))


def test_truncated_whatever_pillow_was_told(file, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError, match="truncated"):
        read_image(file(REFUSED["truncated-jpeg"][0]))
