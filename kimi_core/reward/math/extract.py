"""Where the final answer stands in a response.

Everything here takes time linear in the text, whatever the text.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from kimi_core.reward.thoughts import after_thoughts

Place = Literal["boxed", "hashes", "answer", "last_line"]

LONGEST = 2000
"""Most characters of a sentence or an answer that is looked at closely."""

_TURN_END = re.compile(
    r"<\|(?:im_start|im_end|eot_id|end|endoftext|end_of_text)\|>|</s>|<eos>|<end_of_turn>|<｜end▁of▁sentence｜>"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_SEPARATOR = re.compile(r"\\?q?quad|\\[,;:! ()\[\]]|[$&\s]|\\text\s*\{([^{}]*)\}")
_ANSWER = re.compile(
    r"(?i:answer)[*_]*(?:\s*(?:is\s*:?|are\s*:?|:|=)[*_]*|\s*(?=\$|\\[(\[]))\s*(?=\S)"
)
_FINAL = re.compile(r"(?i)final answer is")
_AMOUNTS = re.compile(r"(?<!\\)\$(?=\d)([^$]*\s)\$(?=\d)")
"""Two amounts of money, as in ``10 books * $5 = $50``: no formula ends behind a space and before a
digit."""
_TOTAL = re.compile(
    r"(?<![\\\w])[^\W\d_]{2}[^=]*+=(?:[^=]*+=)? ?((?:\\?\$|€|£)\d[\d,]*+(?:\.\d+)?) ?\.?$"
)
"""What such a sum with a word in it ends with."""
_DOLLAR = re.compile(r"(?<!\\)\$")
_BRACKETS = (
    re.compile(r"\\\((.*?)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*?)\\\]", re.DOTALL),
)
_DOLLARS = re.compile(r"(?<!\\)\$([^$]*)(?<!\\)\$")
_FORMULA = {r"\[": r"\]", "$$": "$$", r"\(": r"\)"}
_SAYS = re.compile(r"\w\s+(?:is|are)\s|\w['’]s\s")
_PROSE = re.compile(r"[^\W\d_]{2,}[^\w{\\]+[^\W\d_]{2,}|\b(?:is|are)\s|['’]s\s|\w\s?:\s")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\[(])")
_HOPE = re.compile(r"\s*I hope it is correct\.?\s*")
_VERB = re.compile(r"(?:\b(?:is|are|equals?|by|be|get|gives?)|(?:'|’)s|[=:≈])\s+(?=\S)")
_DOUBT = re.compile(r"(?i)\b(?:or|not|never|neither|either|maybe|isn['’]t|aren['’]t)\b")
_NUMBER = re.compile(
    r"(?<![\w.,/\\^_-])[-−]?(?:\\?\$|€|£)?"
    r"(?:\d{1,3}(?:,\d{3})+|\d+,\d\d(?= ?[$€£])|\d+)(?:\.\d+)?(?:/\d+)?"
    r"(?:\s?(?:\\?[%$]|€|£))?(?![\w/^])"
)


def extract(text: str, places: Sequence[Place]) -> str | None:
    r"""The final answer in ``text``, from the first of ``places`` that exists; None without one.

    * ``boxed``: the last closed ``\boxed{…}`` with the braces in it. Boxes with only a comma, "and"
      or "or" between them are one answer. A sentence "the final answer is …" after the last box
      counts instead, if ``answer`` is among the places;
    * ``hashes``: the line after the last ``####``;
    * ``answer``: what follows the last ``Answer:``, ``answer is`` or ``answer =``, or what
      ``<answer>`` and ``</answer>`` enclose;
    * ``last_line``: the last line that is not empty.

    The last two take from a sentence the formula or number that it ends with. Text inside
    ``<think>`` never counts if anything follows it.

    >>> extract(r"so \boxed{\frac{1}{2}}.", ["boxed"])
    '\\frac{1}{2}'
    >>> extract("<think>I get 7.</think> The answer is **34**", ["answer"])
    '34'
    """
    turn_end = _TURN_END.search(text)
    text = after_thoughts(text[: turn_end.start()] if turn_end else text)
    find: dict[Place, Callable[[str], str | None]] = {
        "boxed": partial(_boxed, yield_to_final="answer" in places),
        "hashes": _hashes,
        "answer": _after_answer,
        "last_line": _last_line,
    }
    for place in places:
        found = find[place](text)
        if found is not None and found.strip():
            return found.strip()
    return None


def _boxed(text: str, *, yield_to_final: bool) -> str | None:
    opened: list[tuple[int, int] | None] = []  # Where a box and its content start; None: a brace.
    # Start of each closed box, start and end of its content.
    boxes: list[tuple[int, int, int]] = []
    for token in _BOX.finditer(text):
        if token[0] == "}":
            begun = opened.pop() if opened else None
            if begun is not None and (not boxes or begun[0] > boxes[-1][0]):
                boxes.append((*begun, token.start()))
        elif token[0] == "{":
            opened.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            opened.append((token.start(), token.end()))
    if not boxes or (yield_to_final and _FINAL.search(text, boxes[-1][2])):
        return None
    first = len(boxes) - 1
    while first and _joins(text[boxes[first - 1][2] + 1 : boxes[first][0]]):
        first -= 1
    contents = [text[start:end].strip() for _, start, end in boxes[first:]]
    if len(contents) == 1 and "\\" not in contents[0] and _SAYS.search(contents[0]):
        return _from_sentence(contents[0])
    return ", ".join(dict.fromkeys(content for content in contents if content))


def _joins(between: str) -> bool:
    """Whether the text between two boxes makes them parts of one answer."""
    if len(between) > 60:
        return False
    rest = _SEPARATOR.sub(lambda match: f" {match[1] or ''} ", between)
    words = rest.replace(",", " , ").replace(";", " , ").lower().split()
    if not words or any(character.isdigit() for character in rest):
        return False
    in_text = r"\text" in between
    return words[-1] in (",", "and", "or") and (in_text or set(words) <= {",", "and", "or"})


def _hashes(text: str) -> str | None:
    _, hashes, after = text.rpartition("####")
    return after.strip().partition("\n")[0] if hashes else None


def _after_answer(text: str) -> str | None:
    if (tag := text.rfind("<answer>")) >= 0:
        inside, closed, _ = text[tag + len("<answer>") :].partition("</answer>")
        if closed and inside.strip():
            return _from_passage(inside.strip())
    # From the last "answer" on, so that no line is read twice.
    start = len(text)
    lowered = text.lower()
    if len(lowered) != len(text):  # A few letters grow when lowered.
        lowered = text
    while (start := lowered.rfind("answer", 0, start)) >= 0:
        match = _ANSWER.match(text, start)
        if match:
            return _from_passage(text[match.end() :])
    return None


def _last_line(text: str) -> str | None:
    text = text.strip()
    for left, right in _FORMULA.items():
        if text.endswith((right, right + ".")) and left != r"\(":
            body = text.removesuffix(".")[: -len(right)]
            start = body.rfind(left, max(0, len(body) - LONGEST))
            if start >= 0:
                return body[start + len(left) :]
    line = text.rsplit("\n", 1)[-1]
    if len(line) <= LONGEST:
        line = _SENTENCE_END.split(_HOPE.sub("", line))[-1]
    return _from_sentence(line)


def _from_passage(passage: str) -> str:
    """The answer at the start of a passage: a formula over several lines, or a sentence.

    Several formulas there are one answer, as in ``_last_formula``.
    """
    for left, right in _FORMULA.items():
        if passage.startswith(left):
            found, rest = [], passage[:LONGEST]
            while right in rest[len(left) :]:
                inside, _, rest = rest[len(left) :].partition(right)
                found.append(inside.strip())
                between, _, _ = rest.partition(left)
                if not _joins(between):
                    break
                rest = rest[len(between) :]
            if any(found):
                return ", ".join(filter(None, found))
    line = passage.partition("\n")[0][: LONGEST + 1]
    return _from_sentence(_SENTENCE_END.split(line)[0])


def _from_sentence(sentence: str) -> str:
    """The formula or the number that a sentence ends with; the whole of it if that is not clear."""
    if len(sentence) > LONGEST:
        return sentence
    sentence = _AMOUNTS.sub(r"\\$\1\\$", sentence)
    sentence = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", "", sentence).strip()
    if (total := _TOTAL.search(sentence)) and not _DOUBT.search(sentence):
        return total[1]
    if not _PROSE.search(_without_formulas(sentence)):
        formula = _last_formula(sentence)
        return sentence if formula is None else formula
    verbs = list(_VERB.finditer(_without_formulas(sentence)))
    after = sentence[verbs[-1].end() :] if verbs else sentence
    if _DOUBT.search(_without_formulas(after)):
        return sentence
    if (formula := _last_formula(after)) is not None:
        return formula
    after = after.rstrip(". ")
    numbers = _NUMBER.findall(after)
    if numbers and _NUMBER.match(after):
        # A few words after the number are its unit.
        is_sentence = len(after.split()) > 5 or numbers[0].endswith(("$", "€", "£"))
        return numbers[0] if is_sentence and len(numbers) == 1 else after
    if not numbers and (formula := _last_formula(sentence)) is not None:
        return formula
    everywhere = set(_NUMBER.findall(sentence))
    return everywhere.pop() if len(everywhere) == 1 else after


def _without_formulas(sentence: str) -> str:
    """``sentence`` with formulas blanked out, at its length."""
    pattern = r"(?<!\\)\$[^$]*\$|\\\([^\n]*?\\\)"
    return re.sub(pattern, lambda match: "#" * len(match[0]), sentence)


def _last_formula(text: str) -> str | None:
    """What stands in the last formula, with those that "and", "or" or a comma joins to it."""
    is_paired = len(_DOLLAR.findall(text)) % 2 == 0
    for pattern in (*_BRACKETS, _DOLLARS) if is_paired else _BRACKETS:
        found = [one for one in pattern.finditer(text) if one[1].strip()]
        if found:
            first = len(found) - 1
            while first and _joins(text[found[first - 1].end() : found[first].start()]):
                first -= 1
            return ", ".join(dict.fromkeys(one[1].strip() for one in found[first:]))
    return None
