"""Makes images from files and bytes, and decodes them. Pillow is loaded with the first image.

A picture from a data set is hostile input. Only the decoders of ``FORMATS`` are used, and sizes are
read from the header and checked before anything is decoded.
"""

import base64
import binascii
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_core.types import Image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FORMATS = ("PNG", "JPEG", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
"""Pixel formats of Pillow whose conversion to RGB loses nothing but transparency."""

MOST_PIXELS = 50_000_000
MOST_BYTES = 64_000_000
"""Limits of one image: decoded, and as it is encoded."""

PREVIEW_SIDE = 512
"""Pixels of the longer side of a preview, at most."""

DATA_URI = "data:image/"


STARTS = {"png": b"\x89PNG", "jpeg": b"\xff\xd8", "webp": b"RIFF"}
"""Formats that are read, and how their files begin."""


def image_of(reference: str, folder: Path) -> Image:
    """The image that a file name or a data URI names, decoded once to see that it can be.

    Args:
        reference: a path, relative to ``folder`` or absolute, or ``data:image/png;base64,...``.

    Raises:
        ValueError: it is missing, broken, animated, too large, or in a format that is not read.
    """
    if reference.startswith("data:"):
        head, comma, body = reference.partition(",")
        if not (head.startswith(DATA_URI) and head.endswith(";base64") and comma):
            raise ValueError(
                f"image {reference!r:.60}: a data URI begins with data:image/png;base64, (or jpeg, "
                "or webp)"
            )
        try:
            source: Path | bytes = base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise ValueError(f"image {reference!r:.60} is not base64: {error}") from None
    else:
        source = folder / reference
    return checked(source)


def checked(source: Path | bytes) -> Image:
    """The image in a file, or in encoded bytes, decoded once to see that it can be.

    Raises: as `image_of`.
    """
    encoded = _bytes_of(source)
    _decode(encoded, _name(source))
    return Image(hashlib.sha256(encoded).hexdigest(), source)


def image_of_pixels(pixels: Any) -> Image:
    """An image of grey levels uint8 ``[h, w]`` or of colours uint8 ``[h, w, 3]``, kept as PNG."""
    stream = io.BytesIO()
    _pillow().fromarray(pixels).save(stream, "PNG", compress_level=1)
    encoded = stream.getvalue()
    return Image(hashlib.sha256(encoded).hexdigest(), encoded)


def image_of_picture(picture: "Picture") -> Image:
    """An image of a picture of Pillow, such as a row of ``datasets`` holds, kept as PNG."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return checked(stream.getvalue())


def reference_of(image: Image) -> str:
    """What `image_of` makes the image of, wherever the line stands."""
    if isinstance(image.source, Path):
        return str(image.source.absolute())
    return f"{DATA_URI}png;base64,{base64.b64encode(image.source).decode()}"


def decoded(image: Image) -> "Picture":
    """The picture in RGB, upright, on white where it is transparent.

    Raises:
        ValueError: the file is gone or has other bytes than when the image was made.
    """
    return _decode(_own_bytes(image), _name(image.source))


def preview(image: Image) -> bytes:
    """A PNG for people to look at, small and made of pixels alone: nothing of the file is copied.

    Raises: as `decoded`.
    """
    picture = decoded(image)
    picture.info.clear()  # A colour profile would be copied.
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def data_uri(image: Image) -> str:
    """The image itself as a data URI, for a server that cannot read our files.

    Raises: as `decoded`.
    """
    encoded = _own_bytes(image)
    kind = next((kind for kind, start in STARTS.items() if encoded.startswith(start)), "png")
    return f"{DATA_URI}{kind};base64,{base64.b64encode(encoded).decode()}"


def _own_bytes(image: Image) -> bytes:
    encoded = _bytes_of(image.source)
    if hashlib.sha256(encoded).hexdigest() != image.digest:
        raise ValueError(
            f"{_name(image.source)} has changed since this run began: put the file back and resume "
            "the run, or start another run"
        )
    return encoded


def _decode(encoded: bytes, name: str) -> "Picture":
    pillow = _pillow()
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with pillow.open(io.BytesIO(encoded), formats=FORMATS) as picture:
            _check(picture, name)
            picture.load()
            upright = ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} is not an image that can be read; allowed are {', '.join(FORMATS)}"
        ) from None
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be decoded: {error}; save the image again") from error
    if upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info:
        over = upright.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", over.size, "white"), over).convert("RGB")
    return upright.convert("RGB")


def _check(picture: "Picture", name: str) -> None:
    """Refuse what the header says."""
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels; at most {MOST_PIXELS:,} are decoded: make it "
            "smaller"
        )
    if getattr(picture, "n_frames", 1) > 1:
        raise ValueError(f"{name} is animated; give one frame as an image")
    if picture.mode not in MODES:
        raise ValueError(
            f"{name} has the pixel format {picture.mode}; allowed are {', '.join(MODES)}: convert "
            "it to RGB"
        )


def _bytes_of(source: Path | bytes) -> bytes:
    if isinstance(source, Path):
        if not source.is_file():
            raise ValueError(f"No image {source}; paths are relative to the file that names them")
        size = source.stat().st_size
    else:
        size = len(source)
    if size > MOST_BYTES:
        raise ValueError(f"{_name(source)} has {size:,} bytes; at most {MOST_BYTES:,} are read")
    return source.read_bytes() if isinstance(source, Path) else source


def _name(source: Path | bytes) -> str:
    return f"image {source}" if isinstance(source, Path) else f"the image of {len(source)} bytes"


def _pillow() -> Any:
    try:
        from PIL import Image as pillow
    except ImportError:
        raise ValueError(
            "Images need the package pillow: pip install 'kimi-core[vision]'"
        ) from None
    return pillow
