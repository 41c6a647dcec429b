"""Images from files and data URIs: what is read, and what is refused."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from kimi_core.models.images import (
    MOST_PIXELS,
    decoded,
    image_of,
    image_of_picture,
    image_of_pixels,
    reference_of,
)


def encoded(picture: Pillow.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def header_only(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        whole = kind + body
        return struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


RED = Pillow.new("RGB", (3, 2), "red")
FRAMES = [Pillow.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
BAD = {
    "text": (b"not an image", "is not an image that can be read; allowed are PNG, JPEG, WEBP"),
    "empty": (b"", "is not an image that can be read"),
    "cut": (encoded(Pillow.effect_noise((64, 64), 50))[:900], "cannot be decoded"),
    "gif": (encoded(RED, "GIF"), "is not an image that can be read"),
    "cmyk": (encoded(RED.convert("CMYK"), "JPEG"), "pixel format CMYK; allowed are 1, L, LA"),
    "sixteen": (encoded(Pillow.new("I;16", (2, 2))), "pixel format I;16"),
    "animated": (
        encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
        "is animated; give one frame",
    ),
    "huge": (header_only(9_000, 9_000), rf"9000 x 9000 pixels; at most {MOST_PIXELS:,}"),
    "bomb": (header_only(60_000, 60_000), "cannot be decoded: Image size"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        image_of("a.png", tmp_path)
    assert str(tmp_path / "a.png") in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"No image .*/charts/1\.png; paths are relative"):
        image_of("charts/1.png", tmp_path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:text/plain;base64,YQ==", "begins with data:image/png;base64"),
        ("data:image/png,abc", "begins with data:image/png;base64"),
        ("data:image/png;base64,!!", "is not base64"),
        ("data:image/png;base64,YWJj", "the image of 3 bytes is not an image"),
    ],
)
def test_a_bad_uri_is_refused(tmp_path, uri, message):
    with pytest.raises(ValueError, match=message):
        image_of(uri, tmp_path)


def test_the_same_bytes_are_the_same_image(tmp_path):
    content = encoded(RED)
    (tmp_path / "a.png").write_bytes(content)
    by_path = image_of("a.png", tmp_path)
    by_uri = image_of("data:image/png;base64," + base64.b64encode(content).decode(), Path())
    assert by_path == by_uri
    assert decoded(by_path).size == (3, 2)
    assert image_of(reference_of(by_path), Path("/")) == by_path
    assert image_of(reference_of(by_uri), Path("/")) == by_path


def test_pixels_survive():
    pixels = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.array(decoded(image_of_pixels(pixels))), pixels)
    assert np.array_equal(np.array(decoded(image_of_picture(Pillow.fromarray(pixels)))), pixels)


def test_transparent_is_white_and_grey_becomes_rgb():
    clear = Pillow.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.array(decoded(image_of_picture(clear))).min() == 255
    grey = np.array(decoded(image_of_pixels(np.full((2, 2), 7, np.uint8))))
    assert grey.shape == (2, 2, 3)
    assert (grey == 7).all()


def test_a_camera_held_sideways_is_turned(tmp_path):
    exif = Pillow.Exif()
    exif[0x0112] = 6  # Turn by 90 degrees.
    (tmp_path / "a.jpg").write_bytes(encoded(RED, "JPEG", exif=exif))
    assert decoded(image_of("a.jpg", tmp_path)).size == (2, 3)


def test_a_file_that_changes_during_a_run(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(RED))
    image = image_of("a.png", tmp_path)
    (tmp_path / "a.png").write_bytes(encoded(FRAMES[1]))
    with pytest.raises(ValueError, match=r"a\.png has changed since this run began"):
        decoded(image)
