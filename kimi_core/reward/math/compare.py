"""Whether two final answers are equal by algebra, with math-verify.

math-verify compares values: numbers, expressions, sets, intervals, tuples, matrices, relations. It
drops words and units, compares a list by its numbers alone, and calls two equations equal if both
are contradictions. Therefore this module takes an answer apart first:

1. Texts and units. Both answers must name the same ones, unless only one has a unit at its end.
2. Equations. ``name = value`` is compared by names and values, other equations as a whole.
3. Values go to math-verify. Two numbers must also agree to six digits.

It runs in a fork of ``worker``, because an answer may be anything.
"""

import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, I, MatrixBase, S
from sympy.logic.boolalg import BooleanAtom

from kimi_core.reward.math.answers import agree, unit_name

DIGITS = 1e-6
"""Largest relative difference of two numbers that count as equal."""

_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname) ?\{([^{}]*)\}(\s*\^\s*\{?\d\}?)?")
_JOINS = re.compile(r"(?:\\(?:text|mbox) ?\{ ?,? ?(?:and|or) ?\}|\s(?:and|or)\s|;)")
_FUNCTION = re.compile(
    r"(?<![\\a-zA-Z])(pi|sin|cos|tan|cot|ln|log|infinity|inf|theta|alpha|beta)\b"
)
_ROOT = re.compile(r"(?<![\\a-zA-Z])sqrt ?\(([^()]*)\)")
_EXP = re.compile(r"(?<![\\a-zA-Z])exp ?\(([^()]*)\)")
_OPERATION = re.compile(
    r"[-+*/^]|\\(?:cdot|times|div|pm|mp|frac|sqrt|le|ge|ne|lt|gt|in)(?![a-zA-Z])|[<>]"
)
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt|leq|geq|neq|equiv|approx)(?![a-zA-Z])")
_CONSTANT_WORDS = re.compile(r"\\(?:pi|cdot|times|frac|sqrt|left|right|infty|pm|circ)|[ei]")


def equal(reference: str, answer: str) -> bool:
    """Whether the cleaned ``answer`` is equal to the cleaned ``reference``."""
    return _same_texts(_plain_names(reference), _plain_names(answer))


def _plain_names(text: str) -> str:
    """LaTeX for what some write as in a program: ``sqrt(2)``, ``2*pi``, ``exp(16)``."""
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    text = _EXP.sub(r"e^{\1}", text)
    text = _FUNCTION.sub(lambda match: "\\" + match[1].replace("infinity", "infty"), text)
    return text.replace(r"\inf ", r"\infty ").replace("*", r"\cdot ")


def _same_texts(reference: str, answer: str) -> bool:
    """Compare the texts, and the mathematics between them."""
    ours, theirs = (_pieces(_JOINS.sub(",", text)) for text in (reference, answer))
    if ours[1::2] == theirs[1::2]:
        if len(ours) == 1 or (len(ours) == 3 and not (ours[2] + theirs[2]).strip(" .")):
            return _same_items(ours[0], theirs[0])
        pairs = zip(ours[::2], theirs[::2], strict=True)
        return all(one.strip() == other.strip() or _same(one, other) for one, other in pairs)
    one, other = _without_unit(ours), _without_unit(theirs)
    if one is None or other is None or (len(ours) > 1 and len(theirs) > 1):
        return False
    return _same_items(one, other)


def _pieces(text: str) -> list[str]:
    """Mathematics and texts in turn; it begins and ends with mathematics, which may be empty."""
    pieces, at = [], 0
    for match in _TEXT.finditer(text):
        words = " ".join((match[1] + re.sub(r"[\s{}]", "", match[2] or "")).lower().split())
        if not words.strip(" ,."):
            continue
        pieces += [text[at : match.start()], unit_name(words) or words]
        at = match.end()
    return [*pieces, text[at:]]


def _without_unit(pieces: list[str]) -> str | None:
    """The mathematics, if the only text is at its end; otherwise None."""
    if len(pieces) == 1 or (len(pieces) == 3 and not pieces[2].strip(" .")):
        return pieces[0]
    return None


def _same(reference: str, answer: str) -> bool:
    """Compare what has neither texts nor equations."""
    known = agree(reference.strip(), answer.strip())
    return _same_values(reference, answer) if known is None else known


def _same_items(reference: str, answer: str) -> bool:
    """Compare answers that may be equations, or lists of them."""
    both = reference + " " + answer
    if "=" not in both or _RELATION.search(both):
        return _same(reference, answer)
    ours, theirs = _assignments(reference, trusted=True), _assignments(answer)
    if ours is None or theirs is None:
        whole = "=" in reference and "=" in answer
        return whole and _same_values(reference, answer, imaginary=False)
    our_names, their_names = ([name for name, _ in one] for one in (ours, theirs))
    named, other_named = set(our_names) - {""}, set(their_names) - {""}
    if named and other_named:
        if named != other_named:
            return False
        return all(_same(_values(ours, name), _values(theirs, name)) for name in sorted(named))
    if len(named | other_named) > 1:  # Values of several names have an order.
        pairs = zip_longest((v for _, v in ours), (v for _, v in theirs))
        return all(
            one is not None and other is not None and _same(one, other) for one, other in pairs
        )
    return _same(_values(ours), _values(theirs))


def _values(assignments: Sequence[tuple[str, str]], name: str | None = None) -> str:
    return ", ".join(value for other, value in assignments if name in (None, other))


def _assignments(text: str, *, trusted: bool = False) -> list[tuple[str, str]] | None:
    """``(name, value)`` of each item; the name is empty for a bare value. None for other equations.

    A value without a name belongs to the name before it: ``a = 4, -8`` are two values of a. In an
    answer that is not ``trusted``, every other side must be equal to the value.
    """
    found: list[tuple[str, str]] = []
    for item in _split(text, ","):
        sides = [side.strip() for side in _split(item, "=")]
        *names, value = sides
        if not value or not all(names):
            return None
        others = [name for name in names if not _is_name(name)]
        is_trusted = trusted and len(others) < len(names)
        if not is_trusted and not all(_is_restated(other, value) for other in others):
            return None
        own = [re.sub(r"\\(?:left|right)|[\s{}]", "", name) for name in names if _is_name(name)]
        before = found[-1][0] if found else ""
        found.append((own[0] if own else before, value))
    return found


def _is_name(side: str) -> bool:
    """Whether a side of an equation names a quantity: ``x_1``, ``f(2)``, ``(p, q)``, ``|AB|``."""
    outside = re.sub(r"(?<=[\w}])\([^()]*\)|_\{[^{}]*\}|_\w", "", side)
    outside = re.sub(r"\\frac ?\{[A-Z]+\} ?\{[A-Z]+\}", "AB", outside)
    return bool(re.search(r"[A-Za-z]", outside)) and not _OPERATION.search(outside)


def _is_restated(side: str, value: str) -> bool:
    """Whether a side is a constant that is equal to the value, as in ``2 + 3 = 5``."""
    if re.search(r"[A-Za-z]", _CONSTANT_WORDS.sub("", side)):
        return False
    return _same(side, value)


def _split(text: str, mark: str) -> list[str]:
    """Split at marks outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == mark and depth <= 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _same_values(reference: str, answer: str, *, imaginary: bool = True) -> bool:
    """Ask math-verify, which reads i as a variable; here i is the imaginary unit."""
    ours, theirs = _read(reference, imaginary), _read(answer, imaginary)
    if any(isinstance(one, bool | BooleanAtom) for one in ours + theirs):
        return False
    if not verify(ours, theirs, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    return not (ours and theirs) or _same_numbers(ours[0], theirs[0])


def _read(text: str, imaginary: bool) -> list[Any]:
    whole = [LatexExtractionConfig(boxed_match_priority=-1)]
    # A dollar inside would make several formulas, of which the last one counts.
    text = text.replace(r"\$", "").replace("$", "")
    found = parse(f"${text}$", whole, parsing_timeout=None)
    if not imaginary:
        return found
    return [
        one.subs({symbol: I for symbol in one.free_symbols if symbol.name == "i"})
        if isinstance(one, Basic | MatrixBase)
        else one
        for one in found
    ]


def _same_numbers(one: Any, other: Any) -> bool:
    """False if both are numbers and differ; math-verify rounds to six decimals."""
    if not all(isinstance(x, Basic) and getattr(x, "is_number", False) for x in (one, other)):
        return True
    if one.is_finite is False or other.is_finite is False:
        return True
    difference = (one - other).evalf(30)
    size = max(abs(one.evalf(30)), abs(other.evalf(30)))
    if difference == 0 or size is S.NaN:
        return True
    return bool(abs(difference) <= DIGITS * min(1, size))
