"""Compares the output of a program with the expected output, as judges of programming contests do.

Lines are compared without white space at their ends, and without empty lines before the first and
behind the last. Two parts of a line that differ as text may still be the same number, written in
another way: ``1.0`` for ``1``.
"""

import re
from decimal import Decimal

NUMBER = re.compile(r"[+-]?(0|[1-9]\d*|(?=\.\d))(\.\d*)?([eE][+-]?\d{1,4})?", re.ASCII)
"""A number without leading zeros: ``007`` is a name or a string of bits, not 7."""

LONGEST_NUMBER = 4000
"""Characters of a part that may be read as a number; longer parts are compared as text."""


def same_output(found: bytes, expected: bytes, tolerance: float = 0.0) -> bool:
    """Whether a program printed what is expected.

    Args:
        tolerance: how far a number may lie from the expected one: by this much, or by this share
            of the expected one. 0: numbers must be equal.

    >>> same_output(b" 1.0 2\\r\\n3\\n\\n", b"1 2\\n3"), same_output(b"1  2", b"1 2")
    (True, False)
    >>> same_output(b"0.3333", b"0.333333"), same_output(b"0.3333", b"0.333333", 1e-3)
    (False, True)
    """
    ours, theirs = lines_of(found), lines_of(expected)
    if ours == theirs:
        return True
    if len(ours) != len(theirs):
        return False
    margin = Decimal(tolerance)
    return all(map(lambda one, other: _same_line(one, other, margin), ours, theirs))


def lines_of(output: bytes) -> list[str]:
    """The lines of an output, without white space at either end and without empty ones around."""
    text = output.decode(errors="surrogateescape").strip()
    return [line.strip() for line in text.split("\n")]


def normalized(output: bytes) -> bytes:
    """An output as ``lines_of`` reads it."""
    return "\n".join(lines_of(output)).encode(errors="surrogateescape")


def _same_line(found: str, expected: str, margin: Decimal) -> bool:
    if found == expected:
        return True
    # Split at single blanks, so that `1  2` is not `1 2`.
    ours, theirs = found.split(" "), expected.split(" ")
    return len(ours) == len(theirs) and all(
        one == other or _same_number(one, other, margin)
        for one, other in zip(ours, theirs, strict=True)
    )


def _same_number(found: str, expected: str, margin: Decimal) -> bool:
    if max(len(found), len(expected)) > LONGEST_NUMBER:
        return False
    if not (NUMBER.fullmatch(found) and NUMBER.fullmatch(expected)):
        return False
    ours, theirs = Decimal(found), Decimal(expected)
    return ours == theirs or (
        margin > 0 and abs(ours - theirs) <= margin * max(Decimal(1), abs(theirs))
    )
