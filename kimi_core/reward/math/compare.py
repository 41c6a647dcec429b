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
from sympy import Basic, Expr, Float, I, Integral, MatrixBase, Product, S, Sum, log
from sympy.logic.boolalg import BooleanAtom

from kimi_core.reward.math.answers import agree, may_be_unit, split, unit_name
from kimi_core.reward.math.notation import apart, marks

DIGITS = 1e-6
"""Largest difference of two numbers that count as equal, relative below 1 and absolute above."""

CLEARLY = 1e-3
"""Two expressions whose values differ by more, relative above 1, are not equal."""

UNDONE = (Sum, Product, Integral)
"""What has no value, or a slow one, where a variable is no whole number."""

MOST_DIGITS = 20_000
"""Two ways to write a larger number are not recognised."""

_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname) ?\{([^{}]*)\}(\s*\^\s*\{?\d\}?)?")
_JOINS = re.compile(
    r"(?P<join>\\(?:text|mbox) ?\{ ?,? ?(?:and|or) ?\}|\s(?:and|or)\s|;)"
    r"|\\(?:text|mbox) ?\{[^{}]*\}"
)
_FUNCTION = re.compile(
    r"(?<![\\a-zA-Z])(pi|sin|cos|tan|cot|ln|log|infinity|inf|theta|alpha|beta)\b"
)
_ROOT = re.compile(r"(?<![\\a-zA-Z])sqrt ?\(([^()]*)\)")
_EXP = re.compile(r"(?<![\\a-zA-Z])exp ?\(([^()]*)\)")
_OPERATION = re.compile(
    r"[-+*/^]|\\(?:cdot|times|div|pm|mp|frac|sqrt|le|ge|ne|lt|gt|in)(?![a-zA-Z])|[<>]"
)
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt|leq|geq|neq|equiv|approx)(?![a-zA-Z])")
_ORDER = re.compile(r"([<>]|\\(?:le|ge|lt|gt|leq|geq|leqslant|geqslant)(?![a-zA-Z]))")
_BARS = re.compile(
    r"(?:\||\\l?vert) ?([a-zA-Z]) ?(?:\||\\r?vert) ?"
    r"([<>]|\\(?:leq?|geq?|[lg]t|[lg]eqslant)(?![a-zA-Z])) ?"
    r"(\d+(?:\.\d+)?|\\frac ?\{\d+\} ?\{\d+\}|\\sqrt ?\{?\d+\}?)"
)
"""An absolute value that is less or more than a positive number."""
_CONSTANT_WORDS = re.compile(r"\\(?:pi|cdot|times|frac|sqrt|left|right|infty|pm|circ)|[ei]")


def equal(reference: str, answer: str) -> bool:
    """Whether the cleaned ``answer`` is equal to the cleaned ``reference``."""
    return _same_texts(_plain_names(reference), _plain_names(answer))


def _plain_names(text: str) -> str:
    """LaTeX for what some write as in a program: ``sqrt(2)``, ``2*pi``, ``exp(16)``, ``x<=2``."""
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    text = _EXP.sub(r"e^{\1}", text)
    text = _FUNCTION.sub(lambda match: "\\" + match[1].removesuffix("inity"), text)
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ")
    return re.sub(r"\\inf(?![a-zA-Z])", r"\\infty", text).replace("*", r"\cdot ")


def _same_texts(reference: str, answer: str) -> bool:
    """Compare the texts, and the mathematics between them."""
    reference, answer = _without_bars(reference), _without_bars(answer)
    ours, theirs = _union(reference), _union(answer)
    # A comma may also stand for "and", so it is not taken for "or" without need.
    if ours and theirs and "," not in reference + answer:
        return _letters(reference) == _letters(answer) and _same(ours, theirs)
    if r"\cup" in reference + answer:
        reference, answer = ours or reference, theirs or answer
    if _RELATION.search(reference) and not _same_conjunctions(reference, answer):
        return False
    return _same_pieces(*(_pieces(_joined(text)) for text in (reference, answer)))


def _same_pieces(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Compare mathematics and texts in turn."""
    if ours[1::2] == theirs[1::2]:
        if len(ours) == 1 or (len(ours) == 3 and not (ours[2] + theirs[2]).strip(" .")):
            return _same_items(ours[0], theirs[0])
        pairs = zip(ours[::2], theirs[::2], strict=True)
        return all(one.strip() == other.strip() or _same(one, other) for one, other in pairs)
    one, other = _without_unit(ours), _without_unit(theirs)
    if one is None or other is None or (len(ours) > 1 and len(theirs) > 1):
        return False
    return _same_items(one, other)


def _letters(text: str) -> set[str]:
    """The variables of one letter."""
    return set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", text))


def _without_bars(text: str) -> str:
    r"""``|x| < c`` without the bars; any other text as it is.

    >>> _without_bars(r"|x| \le 3"), _without_bars(r"\lvert t\rvert > \frac{1}{2}")
    ('-3 \\le x \\le 3', 't < -\\frac{1}{2} \\text{ or } t > \\frac{1}{2}')
    """
    found = _BARS.fullmatch(text.strip())
    if not found:
        return text
    name, sign, end = found.groups()
    if sign[0] == "<" or sign[:2] == r"\l":
        return f"-{end} {sign} {name} {sign} {end}"
    back = sign.replace(">", "<").replace(r"\g", r"\l")
    return rf"{name} {back} -{end} \text{{ or }} {name} {sign} {end}"


def _union(text: str) -> str | None:
    r"""Relations of one variable, joined by "or" or a comma, as a union of intervals.

    >>> _union(r"x<1 \text{ or } 2 \le x < 3"), _union("x<1 and x>2")
    ('(-\\infty,1)\\cup[2,3)', None)
    """
    intervals, variables = [], set()
    for item in re.split(r"\\(?:text|mbox) ?\{ ?or ?\}|\sor\s|\\lor(?![a-zA-Z])|,", text):
        first, *rest = (part.strip() for part in _ORDER.split(item))
        sides, signs = [first, *rest[1::2]], rest[::2]
        is_up = all(sign[0] == "<" or sign[:2] == r"\l" for sign in signs)
        if is_up == all(sign[0] == ">" or sign[:2] == r"\g" for sign in signs):
            return None  # Neither, or no relation at all.
        if not is_up:
            sides, signs = sides[::-1], signs[::-1]
        if len(sides) == 2:
            end = not re.fullmatch("[a-zA-Z]", sides[0])
            sides = [*sides, r"\infty"] if end else [r"-\infty", *sides]
            signs = [*signs, "<"] if end else ["<", *signs]
        low, variable, high = sides if len(sides) == 3 else ("", "", "")
        if not (low and high and re.fullmatch("[a-zA-Z]", variable)):
            return None
        variables.add(variable)
        left, right = ("[" if "e" in signs[0] else "(", "]" if "e" in signs[1] else ")")
        intervals.append(f"{left}{low},{high}{right}")
    return r"\cup".join(intervals) if len(variables) == 1 else None


def _joined(text: str) -> str:
    """Commas where "and" or "or" stands between two formulas, and not inside a longer text."""
    return _JOINS.sub(lambda match: "," if match["join"] else match[0], text)


def _same_conjunctions(one: str, other: str) -> bool:
    """False if relations are joined by "and" in one text and by "or" in the other."""
    ours, theirs = (set(re.findall(r"\b(?:and|or)\b", text.lower())) for text in (one, other))
    return not ours or not theirs or ours == theirs


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


def _without_unit(pieces: Sequence[str]) -> str | None:
    """The mathematics, if the only text is a unit at its end; otherwise None."""
    if len(pieces) == 1:
        return pieces[0]
    has_unit = len(pieces) == 3 and not pieces[2].strip(" .") and may_be_unit(pieces[1])
    return pieces[0] if has_unit else None


def _same(reference: str, answer: str) -> bool:
    """Compare what has neither texts nor equations."""
    known = agree(reference.strip(), answer.strip())
    return _same_values(reference, answer) if known is None else known


def _same_items(reference: str, answer: str) -> bool:
    """Compare answers that may be equations, or lists of them."""
    both = reference + " " + answer
    if "=" not in both or _RELATION.search(both):
        return _same(reference, answer)
    ours, theirs = _assignments(reference), _assignments(answer)
    if ours is None or theirs is None:
        # math-verify would look at the last side of a chain alone.
        items = split(reference, ",") + split(answer, ",")
        is_chain = any(len(split(item, "=")) != 2 for item in items)
        return not is_chain and _same_values(reference, answer, imaginary=False)
    our_names, their_names = ([name for name, _ in one] for one in (ours, theirs))
    named, other_named = set(our_names) - {""}, set(their_names) - {""}
    if named and other_named:
        if named != other_named:
            return _is_swapped(ours, theirs)
        return all(_same(_values(ours, name), _values(theirs, name)) for name in sorted(named))
    if len(named | other_named) > 1:  # Values of several names have an order.
        pairs = zip_longest((v for _, v in _listed(ours)), (v for _, v in _listed(theirs)))
        return all(
            one is not None and other is not None and _same(one, other) for one, other in pairs
        )
    return _same(_values(ours), _values(theirs))


def _is_swapped(ours: Sequence[tuple[str, str]], theirs: Sequence[tuple[str, str]]) -> bool:
    """Whether one is ``x = y`` and the other ``y = x``."""
    sides = [[re.sub(r"\s", "", side) for side in one[0]] for one in (ours, theirs)]
    return len(ours) == len(theirs) == 1 and sides[0] == sides[1][::-1]


def _values(assignments: Sequence[tuple[str, str]], name: str | None = None) -> str:
    return ", ".join(value for other, value in assignments if name in (None, other))


def _assignments(text: str) -> list[tuple[str, str]] | None:
    """``(name, value)`` of each item; the name is empty for a bare value. None for other equations.

    A value without a name belongs to the name before it: ``a = 4, -8`` are two values of a. In a
    chain the last side is the value. Without a name, every other side must be equal to it.
    """
    found: list[tuple[str, str]] = []
    for item in split(text, ","):
        sides = [side.strip() for side in split(item, "=")]
        if len(sides) == 2 and _is_name(sides[1]) and not _is_name(sides[0]):
            sides.reverse()
        *names, value = sides
        if not value or not all(names):
            return None
        others = [name for name in names if not _is_name(name)]
        is_named = len(others) < len(names)
        if not is_named and not all(_is_restated(other, value) for other in others):
            return None
        own = [re.sub(r"\\(?:left|right)|[\s{}]", "", name) for name in names if _is_name(name)]
        before = found[-1][0] if found else ""
        found += _each((own[0] if own else before, value))
    return found


def _each(assignment: tuple[str, str]) -> list[tuple[str, str]]:
    """``(x, y) = (1, 2)`` as x = 1 and y = 2; any other assignment as it is."""
    name, value = assignment
    names, values = _in_brackets(name), _in_brackets(value)
    return list(zip(names, values, strict=True)) if len(names) == len(values) > 1 else [assignment]


def _listed(assignments: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The items of a tuple that stands alone, without a name."""
    (name, value), *more = assignments
    items = [] if name or more else _in_brackets(value)
    return [("", item) for item in items] or assignments


def _in_brackets(text: str) -> list[str]:
    """The items of a tuple; empty for anything else."""
    text = text.strip()
    if not (text.startswith("(") and text.endswith(")")):
        return []
    return [item.strip() for item in split(text[1:-1], ",")]


def _is_name(side: str) -> bool:
    """Whether a side of an equation names a quantity: ``x_1``, ``f(2)``, ``(p, q)``, ``|AB|``."""
    outside = re.sub(r"(?<=[\w}])\([^()]*\)|_\{[^{}]*\}|_\w", "", side)
    outside = re.sub(r"\\frac ?\{(?:[A-Z]+|d ?\w?)\} ?\{(?:[A-Z]+|d ?\w)\}", "AB", outside)
    return bool(re.search(r"[A-Za-z]", outside)) and not _OPERATION.search(outside)


def _is_restated(side: str, value: str) -> bool:
    """Whether a side is a constant that is equal to the value, as in ``2 + 3 = 5``."""
    if re.search(r"[A-Za-z]", _CONSTANT_WORDS.sub("", side)):
        return False
    return _same(side, value)


def _same_values(reference: str, answer: str, *, imaginary: bool = True) -> bool:
    """Ask math-verify, which reads i as a variable; here i is the imaginary unit."""
    if marks(reference) != marks(answer) or _brackets(reference) + _brackets(answer) in (
        r"(\{",
        r"\{(",
    ):
        return False
    reference, answer = apart(reference, answer)
    ours, theirs = _read(reference, imaginary), _read(answer, imaginary)
    if any(isinstance(one, bool | BooleanAtom) for one in ours + theirs):
        return False
    if ours and theirs and _differ_at_a_point(ours[0], theirs[0]):
        return False
    if not verify(ours, theirs, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    return not (ours and theirs) or _same_numbers(ours[0], theirs[0])


def _brackets(text: str) -> str:
    """The bracket around a list of at least two items, otherwise an empty string."""
    text = text.strip()
    for left, right in (("(", ")"), (r"\{", r"\}")):
        inside = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and len(split(inside, ",")) > 1:
            return left
    return ""


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


def _differ_at_a_point(one: Any, other: Any) -> bool:
    """Whether two expressions have clearly unlike values where their variables are given ones.

    It spares math-verify an expansion that may never end, as that of ``\\sin(512x)``.
    """
    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return False
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    point = {symbol: Float(f"0.{37 + 11 * at}19") for at, symbol in enumerate(symbols)}
    if not symbols or len(symbols) > 5 or one.has(*UNDONE) or other.has(*UNDONE):
        return False
    values = [expression.evalf(15, subs=point) for expression in (one, other)]
    if not all(value.is_number and value.is_finite for value in values):
        return False
    return bool(abs(values[0] - values[1]) > CLEARLY * max(1, *map(abs, values)))


def _same_numbers(one: Any, other: Any) -> bool:
    """False if both are numbers and differ; math-verify rounds to six decimals."""
    if not all(isinstance(x, Basic) and getattr(x, "is_number", False) for x in (one, other)):
        return True
    if one.is_finite is False or other.is_finite is False:
        return True
    size = max(abs(one.evalf(30)), abs(other.evalf(30)))
    if one == other or size is S.NaN:
        return True
    # As many digits as the numbers have before the point, and 30 more.
    digits = 30 + (min(int(log(size, 10).evalf(15)), MOST_DIGITS) if size > 1 else 0)
    difference = (one - other).evalf(digits)
    return bool(abs(difference) <= DIGITS * min(1, size))
