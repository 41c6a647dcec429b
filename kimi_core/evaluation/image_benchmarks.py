"""Lines of benchmarks that ask about images: MathVista and MMMU, as their authors publish them.

An image is a path relative to the file, a data URI, or what an image column of Parquet holds,
``{"bytes": ...}``. Problems with options are answered by a letter, all others by a final answer.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from kimi_core.evaluation.problem import LETTERS, Problem, with_options
from kimi_core.types import IMAGE_MARK

_PLACE = re.compile(r"<image (\d+)>")


def mathvista(line: Mapping[str, Any]) -> Problem:
    """``question``, ``image`` (or ``decoded_image``), ``answer``; ``choices`` or None.

    The right choice is given by its text. ``unit`` and ``precision`` say how a number is wanted.
    """
    image = line.get("decoded_image") or line["image"]
    subject = (line.get("metadata") or {}).get("task") or ""
    question, answer = line["question"], line["answer"]
    if choices := tuple(line.get("choices") or ()):
        if answer not in choices:
            raise ValueError(f"the answer {answer!r} is none of {len(choices)} choices")
        letter = LETTERS[choices.index(answer)]
        return with_options(Problem(question, letter, subject, choices, (image,)))
    if line.get("unit"):
        question += f" (unit: {line['unit']})"
    if line.get("precision"):
        digits = int(line["precision"])
        question += f" Round to {digits} decimal place{'s' if digits > 1 else ''}."
    return Problem(question, str(answer), subject, images=(image,))


def mmmu(line: Mapping[str, Any]) -> Problem:
    """``question`` and ``options`` with places such as ``<image 1>``, and ``image_1`` to 7.

    ``options`` is a list, or the text of one; with none of them the problem is open.
    """
    options = line.get("options") or []
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except SyntaxError:
            raise ValueError(f"options are {options!r:.60}, not a list") from None
    texts = [line["question"], *map(str, options)]
    images = tuple(line[f"image_{number}"] for text in texts for number in _PLACE.findall(text))
    question, *options = (_PLACE.sub(IMAGE_MARK, text) for text in texts)
    if not images:
        images = tuple(line[key] for key in sorted(line) if _is_image(key, line[key]))
    subject = line.get("subfield") or line.get("subject") or ""
    problem = Problem(question, str(line["answer"]), subject, tuple(options), images)
    return with_options(problem) if options else problem


def _is_image(key: str, value: Any) -> bool:
    return bool(re.fullmatch(r"image_\d+", key)) and value is not None
