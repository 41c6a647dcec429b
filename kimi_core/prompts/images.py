"""Images of a JSONL line: a list of references, or parts of its messages."""

import json
from pathlib import Path
from typing import Any

from kimi_core.models.images import checked, image_of
from kimi_core.prompts.place import Place
from kimi_core.types import IMAGE_MARK, Image

REFERENCES = '"images": ["charts/1.png", "data:image/png;base64,..."]'


def take_images(record: dict[str, Any], where: Place) -> tuple[Image, ...]:
    """Take the images out of a line, so that prompt and messages hold marks in their places.

    ``images`` lists paths, relative to the file, data URIs, and what an image column of
    ``datasets`` holds, ``{"bytes": ...}``. A message's content may be a list
    of parts: ``{"type": "text", "text": ...}``, ``{"type": "image"}`` for the next one of
    ``images``, or ``{"type": "image", "image": REFERENCE}`` and ``{"type": "image_url",
    "image_url": {"url": REFERENCE}}`` with a reference of their own.

    Raises:
        ValueError: a reference cannot be read, or marks and images are not equally many.
    """
    listed = record.pop("images", None) or []
    listed = [listed] if isinstance(listed, dict) else listed
    if not isinstance(listed, list) or not all(map(_is_reference, listed)):
        raise ValueError(
            f"{where}: images are {json.dumps(listed, default=repr):.80}; allowed are {REFERENCES}"
        )
    prompt, references, marks = record.get("prompt"), list(listed), 0
    if isinstance(prompt, list):
        found: list[str] = []
        record["prompt"] = [_flat(message, found, where) for message in prompt]
        named = [one for one in found if one]
        if named and (listed or len(named) < len(found)):
            raise ValueError(
                f"{where}: some images are named in the messages and some in a list; name all of "
                "them in one place"
            )
        references, marks = named or references, len(found)
    elif isinstance(prompt, str) and references:
        marks = prompt.count(IMAGE_MARK)
    if marks and marks != len(references):
        raise ValueError(
            f"{where}: {len(references)} images have {marks} places in the prompt; give one place "
            "for each image, or none to put all before the text"
        )
    try:
        return tuple(_image(one, Path(where.path).parent) for one in references)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _is_reference(one: object) -> bool:
    return isinstance(one, str) or (isinstance(one, dict) and isinstance(one.get("bytes"), bytes))


def _image(reference: str | dict[str, Any], folder: Path) -> Image:
    if isinstance(reference, str):
        return image_of(reference, folder)
    return checked(reference["bytes"])


def _flat(message: Any, found: list[str], where: Place) -> Any:
    """The message with text as its content; ``found`` gets each image's reference, or ""."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(_part(part, found, where) for part in content)}


def _part(part: Any, found: list[str], where: Place) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("image", "image_url"):
        named = part.get(kind, "")
        named = named.get("url", "") if isinstance(named, dict) else named
        if isinstance(named, str):
            found.append(named)
            return IMAGE_MARK
    raise ValueError(
        f"{where}: a part of a message is {json.dumps(part):.80}; allowed are "
        '{"type": "text", "text": "..."} and {"type": "image", "image": "..."}'
    )
