"""Final answers that need no algebra to be compared: numbers, units, words and choices.

`agree` has no opinion on expressions, sets, intervals, matrices and equations (see `compare`). The
plain cases stay here because math-verify errs on some of them: it rounds to six decimals (1e-7 is
2e-7 to it), drops units (5 cm is 5 m), and reads words as products of letters (evil is vile).

Everything here takes time linear in the text, whatever the text.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from kimi_core.reward.math.extract import LONGEST

TOLERANCE = Fraction(1, 10**6)
"""Decimals agree within this, relative below 1 and absolute above."""

_SYMBOLS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "°": r"^\circ ",
    "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "\u2009": " ", "\u202f": " ", "\xa0": " ", "±": r"\pm ", "∅": r"\emptyset ",
}  # fmt: skip
_SPACING = re.compile(r"\\\\|\\[,;:! ]|\\q?quad|~|\\(?:left|right|displaystyle)(?![a-zA-Z])")
_SPACE = {"~": " ", "\\ ": " ", "\\\\": "\\\\"}  # The last ends a row of a matrix.
_GROUP = re.compile(r"(?<=\d),\\!\s*(?=\d{3}(?!\d))")
"""A comma between groups of digits, with the thin space that some write after it."""
_ROOT = re.compile(r"√\s*(\d+|\w|\([^()]*\))")
_UPRIGHT = re.compile(
    r"\\(?:mathrm|operatorname|text|mathbf|textbf|mathit|mbox)\*?\s*\{\s*(?:([eid])"
    r"|((?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|min|max|gcd|lcm|det))\s*\}"
)
"""Constants and functions in upright type, which are not units."""
_BARE_FRACTION = re.compile(r"\\frac ?(\d|\{\d+\}) ?(\d|\{\d+\})")
_SEGMENT = re.compile(r"\\overline ?\{ ?([A-Z]{2,}) ?\}|\\triangle ?\{? ?([A-Z]{3})\}?(?![A-Za-z])")
_ANGLES = re.compile(
    r"(?:\\left ?)?\\langle(?![a-zA-Z])([^|]{1,200}?)(?:\\right ?)?\\rangle(?![a-zA-Z])"
)
"""A vector in angle brackets."""
_PER = re.compile(
    r"\\frac\s*\{\s*(\\(?:text|mathrm)\s*\{[^{}]*)\}\s*\}\s*\{\s*\\\w+\s*\{([^{}]*\})\s*\}"
)
_ALL_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


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
    text = text.replace(r"\varnothing", r"\emptyset")
    text = _ANGLES.sub(r"(\1)", text)
    text = _BARE_FRACTION.sub(_braced, text)
    text = _SEGMENT.sub(lambda match: match[1] or match[2], text)
    text = _GROUP.sub(",", text)
    text = _PER.sub(r"\1/\2", text)
    text = _UPRIGHT.sub(lambda match: match[1] or f"\\{match[2]} ", text)
    if whole := _ALL_TEXT.fullmatch(text):
        text = whole[1].strip()
    text = _SPACING.sub(lambda match: _SPACE.get(match[0], ""), text)
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip(" ,;\\")


def _braced(match: re.Match[str]) -> str:
    """``\\frac12`` with its braces."""
    above, below = (part.strip("{}") for part in match.groups())
    return rf"\frac{{{above}}}{{{below}}}"


def agree(reference: str, answer: str) -> bool | None:
    """Whether two cleaned answers are the same; None if only algebra can tell.

    Numbers are exact, unless one is a decimal: then they agree to six decimals, and to six
    significant digits below 1. A percent sign makes hundredths, or is taken for a unit: 50 % agrees
    with 0.5 and with 50. Units that both name must be the same; nothing is converted. Words agree
    whatever their case. Two or more capital letters are a name, such as that of a line AB.
    """
    if reference == answer or _same_text(reference, answer):
        return True
    if max(len(reference), len(answer)) > LONGEST:
        return False
    ours, theirs = _quantity(reference), _quantity(answer)
    if ours and theirs:
        return _same_quantity(ours, theirs)
    if ours and _is_no_number(answer):
        return False
    for part in (_choice, _based, _name, _date, _time):
        one, other = part(reference), part(answer)
        if one and other:
            return one == other
    if (letter := _choice(reference)) and (labelled := _LABELLED.match(answer)):
        return letter == labelled[1]
    words = _words(reference)
    if words:
        return words == _words(answer)
    # The parser would subtract or divide the parts of a date.
    return False if _date(reference) or _date(answer) else None


@dataclass(frozen=True)
class Quantity:
    value: Fraction
    is_decimal: bool
    percent: bool
    unit: str


_LABELLED = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mbox) ?\{ ?)?(?=\(?([A-H])[).:])\(?[A-H][).:]+ ?\}?[ .:]*(?=\S)"
)
"""A choice with its text after it."""
_DIGITS = r"\d{1,3}(?:[, ]\d{3})+|\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?P<currency>\\?\$|€|£)? ?(?:"
    rf"(?:(?P<whole>\d+) ?)?(?:\\frac ?\{{ ?(?P<above>-?\d+) ?\}} ?\{{ ?(?P<below>\d+) ?\}}"
    rf"|(?<![\d.])(?:(?<=\d )|(?<!\d))(?P<over>\d+) ?/ ?(?P<under>\d+))"
    rf"|(?P<integer>{_DIGITS})?(?P<decimals>\.\d+)?"
    r"(?:(?P<point>\.)?\\overline ?\{ ?(?P<repeating>\d+) ?\})?"
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
_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_SCALE = re.compile(rf"({'|'.join(_SCALES)})s?\b ?(?:of )?(?P<rest>.*)")
_CHANGES = re.compile(
    r"\b(?:n?or|not?|never|n?either|if|unless|except|but|and|than|is|are|isn|aren|to"
    r"|at (?:least|most)"
    rf"|{'|'.join(_SCALES)}|half|halves|thirds?|(?:four|fif|six|seven|eigh|nin|ten)ths?"
    r"|(?:hundred|thousand|million|billion)ths?|(?:hundred|thousand|million|billion|trillion|dozen)s"
    r"|squared|cubed|factorial|plus|minus|over|divided|multiplied|modulo|mod|choose|itself|by"
    r"|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|wrong|incorrect|false|true)\b"
)
"""Words behind a number that change it, or say something else about it."""
_LETTERS = re.compile(r"[^\W\d_]+(?:[ /.'’()^·-]+(?:[^\W\d_]+|[23]\b))*[ .)]*")
_DEGREES = re.compile(r"(?:\^ ?\{? ?\\circ ?\}?|deg(?:ree)?s?) ?(c(?:elsius)?|f(?:ahrenheit)?)?")
_SCALES_OF_DEGREES = {"c": "celsius", "f": "fahrenheit"}
_COUNTS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve"),
]
_COUNT = re.compile(rf"^({'|'.join(_COUNTS)})(?![a-zA-Z-])", re.IGNORECASE)
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound"}
_SAME_UNIT = {
    alias: names.split()[0]
    for names in (
        "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
        "mm millimeter millimetre", "inch in inche", "foot ft feet", "mile mi", "g gram",
        "kg kilogram", "second s sec", "minute min", "hour h hr", "degree deg", "dollar usd",
        "cent ¢", "liter litre l", "milliliter ml millilitre",
        "celsius", "fahrenheit", "km/h kph km/hour", "mile/hour mi/h mph",
    )
    for alias in names.split()
}  # fmt: skip


def _quantity(text: str) -> Quantity | None:
    # A decimal comma is only told from a list, or from a group of digits, by a currency.
    text = re.sub(r"^(-?\d+),(\d\d) ?(?=(?:\\?\$|€|£)$)", r"\1.\2 ", text)
    text = _COUNT.sub(lambda word: str(_COUNTS.index(word[1].lower())), text, count=1)
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    above, below = part["above"] or part["over"], part["below"] or part["under"]
    if above is not None:
        if int(below) == 0 or (part["whole"] and above.startswith("-")):
            return None
        value = int(part["whole"] or 0) + Fraction(int(above), int(below))
    elif part["repeating"] and (part["point"] is None) == (part["decimals"] is not None):
        fixed, cycle = (part["decimals"] or ".")[1:], part["repeating"]
        value = Fraction(int((part["integer"] or "0").replace(",", "").replace(" ", "")))
        value += Fraction(int(fixed or 0), 10 ** len(fixed))
        value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    elif part["repeating"]:
        return None
    elif part["integer"] or part["decimals"]:
        digits = re.sub(r"[, ]", "", part["integer"] or "0")
        value = Fraction(digits + (part["decimals"] or ""))
        value *= Fraction(10) ** int((part["exponent"] or "0").strip("{} "))
    else:
        return None
    rest = _UNIT_TEXT.sub(r"\1", part["rest"]).strip()
    if scale := _SCALE.fullmatch(rest.lower()):
        value, rest = value * _SCALES[scale[1]], scale["rest"]
    unit = unit_name(rest)
    if unit is None:
        return None
    unit = unit or _CURRENCIES.get((part["currency"] or "").removeprefix("\\"), "")
    percent = unit == "%"
    return Quantity(
        -value if part["sign"] == "-" else value,
        is_decimal=bool(part["decimals"]) or (part["exponent"] or "").strip("{} ").startswith("-"),
        percent=percent,
        unit="" if percent else unit,
    )


def unit_name(text: str) -> str | None:
    """The unit after a number, ``""`` without one; None if something else follows."""
    text = _UNIT_TEXT.sub(r"\1", text).strip().lower().replace(" per ", "/")
    if text in ("", "%", r"\%", "percent"):
        return "%" if text else ""
    if (currency := text.removeprefix("\\")) in _CURRENCIES:
        return _CURRENCIES[currency]
    if degrees := _DEGREES.fullmatch(text):
        return _SCALES_OF_DEGREES[degrees[1][0]] if degrees[1] else "degree"
    if not _UNIT_NAME.fullmatch(text):
        return None
    name, power = re.fullmatch(r"(.*?)(?:\^?\{?([23])\}?)?", text).groups()  # type: ignore[union-attr]
    words = re.split(r"[ /-]", name)
    if name != "times" and (_CHANGES.search(name) or any(word in _NOT_UNITS for word in words)):
        return None
    if words[0] in ("square", "sq", "cubic", "cu") and len(words) > 1:
        power, name = {"s": "2", "c": "3"}[words[0][0]], name.split(" ", 1)[-1]
    if name in _SAME_UNIT:
        return _SAME_UNIT[name] + (power or "")
    parts = [
        part if part in _SAME_UNIT or len(part) < 3 else part.removesuffix("s")
        for part in name.split("/")
    ]
    name = "/".join(_SAME_UNIT.get(part, part) for part in parts)
    return _SAME_UNIT.get(name, name) + (power or "")


def may_be_unit(words: str) -> bool:
    """Whether lower-case words behind a number only name what is counted or measured.

    >>> may_be_unit("distinct sequences"), may_be_unit("or more"), may_be_unit("million")
    (True, False, False)
    """
    if unit_name(words) is not None:
        return True
    if words in _NOT_UNITS or _CHANGES.search(words):
        return False
    return bool(_LETTERS.fullmatch(words.strip(" ,.()")))


def _same_quantity(one: Quantity, other: Quantity) -> bool:
    units = {one.unit, other.unit} - {""}
    # Which degrees a temperature has is often clear without a letter.
    if len(units) > 1 and ("degree" not in units or not units & {*_SCALES_OF_DEGREES.values()}):
        return False
    close = one.is_decimal or other.is_decimal
    if one.percent != other.percent and _close(one.value, other.value, close):
        return True
    scaled = [q.value / 100 if q.percent else q.value for q in (one, other)]
    return _close(scaled[0], scaled[1], close or one.percent or other.percent)


_WORD = re.compile(r"[a-zA-Z]{2,}")
_VARIABLE = re.compile(r"(?<![a-zA-Z])[a-df-hj-z](?![a-zA-Z])")
_LAST_UNIT = re.compile(r"(?<=[\d}\] )]) ?[mgshl](?: ?\^ ?\{?[23]\}?)?$")
_LIST = re.compile(r"[\[(][^\[\]()]*,[^\[\]()]*[\])]")


def _is_no_number(text: str) -> bool:
    """Whether a cleaned answer is in a form that a number's never has.

    That is a list, a number in a base other than ten, or, without words or a relation, an
    expression with a variable, even one that cancels out.

    >>> [_is_no_number(one) for one in ("[5,5]", "5x/x", "0x", "101_2", "x=5", "5 for all x")]
    [True, True, True, True, False, False]
    """
    if _LIST.fullmatch(text):
        return True
    if based := re.search(r"\d_ ?\{? ?(\d+)", text):
        return based[1] != "10"
    plain = re.sub(r"\\(?:approx|simeq|equiv|in)(?![a-zA-Z])", "=", _UNIT_TEXT.sub(" words ", text))
    plain = re.sub(r"\\[a-zA-Z]+", " ", plain)
    if "=" in plain or _WORD.search(plain):
        return False
    return bool(_VARIABLE.search(_LAST_UNIT.sub("", plain)))


def _close(one: Fraction, other: Fraction, is_decimal: bool) -> bool:
    if not is_decimal:
        return one == other
    return abs(one - other) <= TOLERANCE * min(Fraction(1), max(abs(one), abs(other)))


_OPERATION = re.compile(
    r"\\(?:cdot|times|div|[dt]?binom|ast|star|log|ln|lg|exp|arc\w+|sin|cos|tan|cot|sec|csc|min|max"
    r"|gcd|lcm|det|lfloor|lceil|floor|ceil|[bp]?mod|varphi|phi|begin)(?![a-zA-Z])"
    r"|[+*!÷×]|(?<=[\w)}\]]) ?-|- ?-|i ?\^"
)
_UNDONE = re.compile(
    r"\\(?:int|iint|oint|sum|prod|lim)(?![a-zA-Z])"
    r"|\\frac ?\{ ?(?:d|\\partial)[^{}]{0,20}\} ?\{ ?(?:d|\\partial)|(?:d|\\partial) ?/ ?d[a-z]"
)


def is_restated(reference: str, answer: str) -> bool:
    """Whether a cleaned answer leaves a computation undone that the reference has done.

    That is any operation if the reference is a plain number, and otherwise an integral, a
    derivative, a limit, a sum or a product.

    >>> is_restated("42", "17+25"), is_restated("x+1", "1+x"), is_restated("0.001", "10^{-3}")
    (True, False, False)
    >>> is_restated("55", r"\\sum_{k=1}^{10} k"), is_restated("55", r"\\sum_{k=1}^{10} k = 55")
    (True, False)
    """
    value = split(answer, "=")[-1]
    if _UNDONE.search(value) and not _UNDONE.search(reference):
        return True
    return _quantity(reference) is not None and bool(_OPERATION.search(value))


def _same_text(one: str, other: str) -> bool:
    """Whether ``\\text{…}`` and the case of letters are the only difference."""
    if r"\text" not in one + other:
        return False
    plain = [" ".join(_UNIT_TEXT.sub(r"\1", text).lower().split()) for text in (one, other)]
    return plain[0] == plain[1] and len(plain[0]) > 2


def split(text: str, mark: str) -> list[str]:
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


def _date(text: str) -> str | None:
    """A date in digits, without zeros in front."""
    if not re.fullmatch(r"\d{1,4}(?:-\d{1,2}-|/\d{1,2}/|\.\d{1,2}\.)\d{1,4}", text):
        return None
    return re.sub(r"\b0+(?=\d)", "", text)


def _time(text: str) -> tuple[str, str, str] | None:
    """Hour, minute and half of a time of the day."""
    plain = " ".join(_UNIT_TEXT.sub(r"\1", text).lower().split())
    match = re.fullmatch(r"0?(\d{1,2})(?::(\d\d))? ?([ap])\.? ?m\.?", plain)
    return (match[1], match[2] or "00", match[3]) if match else None


def _name(text: str) -> str | None:
    return text if re.fullmatch(r"[A-Z]{2,}", text) else None


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
