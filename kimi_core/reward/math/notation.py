r"""What math-verify's parser drops or takes for something else.

It reads ``f'(x)`` as f(x), ``A^T`` as A, ``42_x`` as 42 and ``\ldots 5`` as 5. It reads a capital
letter as a small one, so that R/r is 1. ``marks`` finds what it drops: two answers must have the
same. ``apart`` gives capital letters names that the parser keeps.
"""

import re

_MARK = re.compile(
    r"(?P<prime>(?:\\?[A-Za-z]+|[\d)\]}])(?:_\w|_\{[^{}]*\})?)\s*(?:(?P<primes>'+)"
    r"|\^\s*\{?\s*(?P<named>(?:\\prime\s*)+)\}?"
    r"|\^\s*(?:(?P<bare>T|\\top|\\intercal)(?![A-Za-z])|\{\s*(?P<braced>T|\\top|\\intercal)\s*\}))"
)
_DOTS = re.compile(r"\\[lcdv]?dots(?:[cbmio])?(?![a-zA-Z])|\.\.\.|…")
_SHAPE = re.compile(
    r"\\(?P<shape>angle|measuredangle|triangle|square|odot|overrightarrow|overleftarrow"
    r"|overleftrightarrow|widehat|overarc)\s*\{?\s*(?P<points>[A-Za-z]{2,})"
)
_INDEX = re.compile(r"(?<![\w}\\])(\d[\d.]*)\s*_\s*(?:\{\s*)?([A-Za-z\\][A-Za-z]*)")
_AT = re.compile(r"(?:\\[rm]?vert|\\right\s*|\\big[rl]?\s*)?\|\s*_|\\not(?![a-zA-Z])")
_TOKEN = re.compile(
    r"\\(?:begin|end|math\w+|text\w*|operatorname|mbox)\s*\{[^{}]*\}"
    r"|\\(?P<greek>Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega)(?![a-zA-Z])"
    r"|\\[a-zA-Z]+|(?P<letter>[A-Z])"
)
_SUBSCRIPT = re.compile(r"\s*_\s*(?:(\w)|\{([^{}]*)\})")


def marks(text: str) -> frozenset[str]:
    r"""Signs that change a value, with what they stand at, and that the parser drops.

    >>> sorted(marks(r"f''(x) + \angle ABC")), sorted(marks("5^{T}"))
    (['ABC', "f''"], ['5T'])
    """
    found = set()
    for one in _MARK.finditer(text):
        if one["primes"] or one["named"]:
            sign = one["primes"] or "'" * one["named"].count("p")
        else:
            sign = "T"
        found.add(one["prime"] + sign)
    for one in _SHAPE.finditer(text):
        points = one["points"]
        ends_may_swap = one["shape"] in ("angle", "measuredangle", "triangle")
        found.add(min(points, points[::-1]) if ends_may_swap else one["shape"] + points)
    found |= {f"{one[1]}_{one[2]}" for one in _INDEX.finditer(text)}
    found |= {"|" for _ in _AT.finditer(text)}
    return frozenset(found | {"..." for _ in _DOTS.finditer(text)})


def apart(one: str, other: str) -> tuple[str, str]:
    r"""Both texts, with capitals renamed if a letter occurs as a capital and as a small one.

    >>> apart(r"\frac{R}{r}", "1")
    ('\\frac{r_{capital}}{r}', '1')
    """
    capitals = {
        token["letter"] or token["greek"]
        for text in (one, other)
        for token in _TOKEN.finditer(text)
    } - {None}
    small = _TOKEN.sub(" ", one) + " " + _TOKEN.sub(" ", other)
    names = set(re.findall(r"[a-z]", small)) | set(re.findall(r"\\([a-z]+)", one + " " + other))
    both = {capital for capital in capitals if capital.lower() in names}
    return (_renamed(one, both), _renamed(other, both)) if both else (one, other)


def _renamed(text: str, capitals: set[str]) -> str:
    parts, at = [], 0
    for token in _TOKEN.finditer(text):
        name = token["letter"] or token["greek"]
        if name not in capitals:
            continue
        index = _SUBSCRIPT.match(text, token.end())
        inner = " " + (index[1] or index[2]) if index else ""
        letter = name.lower() if token["letter"] else "\\" + name.lower()
        parts += [text[at : token.start()], f"{letter}_{{capital{inner}}}"]
        at = index.end() if index else token.end()
    return "".join([*parts, text[at:]])
