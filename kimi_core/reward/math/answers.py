"""Final answers: where they stand in a response, and those that need no algebra to be compared.

`extract` finds the answer, `agree` compares numbers, units, words and choices. What it has no
opinion on (expressions, sets, intervals, matrices, equations) is for math-verify. The plain cases
stay here because math-verify errs on some of them: it rounds to six decimals (1e-7 is 2e-7 to it),
drops units (5 cm is 5 m), and reads words as products of letters (evil is vile).

Everything here takes time linear in the text, whatever the text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Place = Literal["boxed", "hashes", "answer", "last_line"]

LONGEST = 2000
"""Most characters of an answer that is not simply compared letter by letter."""

TOLERANCE = Fraction(1, 10**6)
"""Decimals agree within this, relative below 1 and absolute above."""

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER = re.compile(r"(?i:answer)(?:\*\*)?(?:\s*(?:is\s*:?|:|=))(?:\*\*)?[ \t]*(\S[^\n]*)")


def extract(text: str, places: Sequence[Place]) -> str | None:
    r"""The final answer in ``text``, from the first of ``places`` that exists; None without one.

    * ``boxed``: the last ``\boxed{…}`` that is closed, with the braces in it;
    * ``hashes``: the line after the last ``####``;
    * ``answer``: the line after the last ``Answer:``, ``answer is`` or ``answer =``;
    * ``last_line``: the last line that is not empty, or the last ``$…$`` in it.

    >>> extract(r"so \boxed{\frac{1}{2}}.", ["boxed"])
    '\\frac{1}{2}'
    """
    find = {"boxed": _boxed, "hashes": _hashes, "answer": _after_answer, "last_line": _last_line}
    for place in places:
        found = find[place](text)
        if found is not None and found.strip():
            return found.strip()
    return None


def _boxed(text: str) -> str | None:
    open_braces: list[int | None] = []  # Where the content of a box starts; None: another brace.
    last: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append(token.end())
    return None if last is None else text[last[0] : last[1]]


def _hashes(text: str) -> str | None:
    _, hashes, after = text.rpartition("####")
    return after.strip().partition("\n")[0] if hashes else None


def _after_answer(text: str) -> str | None:
    # From the last "answer" on, so that no line is read twice.
    start = len(text)
    lowered = text.lower()
    if len(lowered) != len(text):  # A few letters grow when lowered.
        lowered = text
    while (start := lowered.rfind("answer", 0, start)) >= 0:
        match = _ANSWER.match(text, start)
        if match:
            return _last_formula(match[1])
    return None


def _last_line(text: str) -> str | None:
    lines = text.strip().rsplit("\n", 1)
    return _last_formula(lines[-1])


def _last_formula(line: str) -> str:
    """The text between the last pair of dollars in a line, or the whole line."""
    parts = re.split(r"(?<!\\)\$", line)
    inside = [part for part in parts[1::2] if part.strip()]
    return inside[-1] if inside and len(parts) % 2 else line


_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "°": r"^\circ ",
    "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "\u2009": " ", "\u202f": " ", "\xa0": " ", "±": r"\pm ", "∅": r"\emptyset ",
}  # fmt: skip
_SPACING = re.compile(r"\\\\|\\[,;:! ]|\\q?quad\b|~|\\(?:left|right|displaystyle)(?![a-zA-Z])")
_SPACE = {"~": " ", "\\ ": " ", "\\\\": "\\\\"}  # The last ends a row of a matrix.
_ROOT = re.compile(r"√\s*(\d+|\w|\([^()]*\))")


def clean(answer: str) -> str:
    """``answer`` without parts that do not change its meaning: dollars, spacing, a full stop.

    >>> clean(r"$\\left( 1,\\, 2 \\right)$.")
    '( 1, 2 )'
    """
    text = answer.strip().strip("*").strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            text = text[len(left) : -len(right)]
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1]}}}", text)
    for symbol, latex in _SYMBOLS.items():
        text = text.replace(symbol, latex)
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace("{,}", ",")
    text = _SPACING.sub(lambda match: _SPACE.get(match[0], ""), text)
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").strip()


def agree(reference: str, answer: str) -> bool | None:
    """Whether two cleaned answers are the same; None if only algebra can tell.

    Numbers are exact, unless one is a decimal: then they agree to six decimals, and to six
    significant digits below 1. A percent sign makes hundredths, or is taken for a unit: 50 % agrees
    with 0.5 and with 50. Units that both name must be the same; nothing is converted. Words agree
    whatever their case.
    """
    if reference == answer:
        return True
    if max(len(reference), len(answer)) > LONGEST:
        return False
    ours, theirs = _quantity(reference), _quantity(answer)
    if ours and theirs:
        return _same_quantity(ours, theirs)
    for part in (_choice, _based):
        one, other = part(reference), part(answer)
        if one and other:
            return one == other
    words = _words(reference)
    if words:
        return words == _words(answer)
    return None


@dataclass(frozen=True)
class Quantity:
    value: Fraction
    is_decimal: bool
    percent: bool
    unit: str


_DIGITS = r"\d{1,3}(?:[, ]\d{3})+|\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?:\\?\$|€|£)? ?(?:"
    rf"(?:(?P<whole>\d+) ?)?(?:\\frac ?\{{ ?(?P<above>-?\d+) ?\}} ?\{{ ?(?P<below>\d+) ?\}}"
    rf"|(?<![\d.])(?:(?<=\d )|(?<!\d))(?P<over>\d+) ?/ ?(?P<under>\d+))"
    rf"|(?P<integer>{_DIGITS})?(?P<decimals>\.\d+)?"
    rf"(?: ?(?:[eE]|(?:\\times|\\cdot|\*) ?10 ?\^)"
    rf" ?(?P<exponent>[-+]?\d{{1,2}}|\{{ ?[-+]?\d{{1,2}} ?\}}))?"
    rf") ?(?P<rest>.*)"
)
_UNIT_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname) ?\{([^{}]*)\}")
_UNIT_NAME = re.compile(r"[a-z]+(?:[ /-][a-z]+)*(?:\^?\{?[23]\}?)?")
_NOT_UNITS = frozenset(
    [
        *("pi", "sqrt", "sin", "cos", "tan", "cot", "log", "ln", "exp", "mod", "times", "div"),
        *("infinity", "infty", "theta", "alpha", "beta", "choose", "over", "plus", "minus"),
        *("or", "and", "if", "for", "where"),
        *"abceiknrtxyz",
    ]
)
"""Variables, functions and small words that may follow a number."""
_SAME_UNIT = {
    alias: names.split()[0]
    for names in (
        "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
        "mm millimeter millimetre", "inch in inche", "foot ft feet", "mile mi", "g gram",
        "kg kilogram", "second s sec", "minute min", "hour h hr", "degree deg", "dollar usd",
        "liter litre l", "milliliter ml millilitre", "km/h kph",
    )
    for alias in names.split()
}  # fmt: skip


def _quantity(text: str) -> Quantity | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    above, below = part["above"] or part["over"], part["below"] or part["under"]
    if above is not None:
        if int(below) == 0 or (part["whole"] and above.startswith("-")):
            return None
        value = int(part["whole"] or 0) + Fraction(int(above), int(below))
    elif part["integer"] or part["decimals"]:
        digits = re.sub(r"[, ]", "", part["integer"] or "0")
        value = Fraction(digits + (part["decimals"] or ""))
        value *= Fraction(10) ** int((part["exponent"] or "0").strip("{} "))
    else:
        return None
    unit = _unit(part["rest"])
    if unit is None:
        return None
    percent = unit == "%"
    return Quantity(
        -value if part["sign"] == "-" else value,
        is_decimal=bool(part["decimals"]) or (part["exponent"] or "").strip("{} ").startswith("-"),
        percent=percent,
        unit="" if percent else unit,
    )


def _unit(text: str) -> str | None:
    """The unit after a number, ``""`` without one; None if something else follows."""
    text = _UNIT_TEXT.sub(r"\1", text).strip().lower().replace(" per ", "/")
    if text in ("", "%", r"\%", "percent"):
        return "%" if text else ""
    if text.replace(" ", "") in (r"^\circ", r"^{\circ}"):
        return "degree"
    if not _UNIT_NAME.fullmatch(text):
        return None
    name, power = re.fullmatch(r"(.*?)(?:\^?\{?([23])\}?)?", text).groups()  # type: ignore[union-attr]
    words = re.split(r"[ /-]", name)
    if any(word in _NOT_UNITS for word in words):
        return None
    if words[0] in ("square", "sq", "cubic", "cu") and len(words) > 1:
        power, name = {"s": "2", "c": "3"}[words[0][0]], name.split(" ", 1)[-1]
    if name not in _SAME_UNIT and len(name) > 2:
        name = name.removesuffix("s")
    return _SAME_UNIT.get(name, name) + (power or "")


def _same_quantity(one: Quantity, other: Quantity) -> bool:
    if one.unit and other.unit and one.unit != other.unit:
        return False
    close = one.is_decimal or other.is_decimal
    if one.percent != other.percent and _close(one.value, other.value, close):
        return True
    scaled = [q.value / 100 if q.percent else q.value for q in (one, other)]
    return _close(scaled[0], scaled[1], close or one.percent or other.percent)


def _close(one: Fraction, other: Fraction, is_decimal: bool) -> bool:
    if not is_decimal:
        return one == other
    return abs(one - other) <= TOLERANCE * min(Fraction(1), max(abs(one), abs(other)))


def _choice(text: str) -> str | None:
    match = re.fullmatch(r"\(?([A-Za-z])[).]?", _UNIT_TEXT.sub(r"\1", text).strip())
    return match[1] if match else None


def _based(text: str) -> tuple[str, str] | None:
    """Digits and base of a number with its base as a subscript."""
    match = re.fullmatch(r"(-?[0-9A-Z]+)_\{? ?(\d{1,2}) ?\}?", text)
    return (match[1], match[2]) if match else None


def _words(text: str) -> str | None:
    """Lower-case words; None if the text is no words. One or two letters are symbols."""
    plain = re.sub(r"\s+", " ", _UNIT_TEXT.sub(r"\1", text)).strip().lower()
    if not re.fullmatch(r"[^\W\d_]+(?:[ '’-][^\W\d_]+)*", plain):
        return None
    words = re.split(r"[ '’-]", plain)
    if max(map(len, words)) < 3 or any(word in _NOT_UNITS - {"and", "or", "a"} for word in words):
        return None
    return plain
