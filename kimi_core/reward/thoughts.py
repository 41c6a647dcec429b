"""What a response says after its thoughts."""

import re

_END = re.compile(r"</(?:think|thinking|thought|thoughts|reasoning)>|<\|end_of_thought\|>")


def after_thoughts(text: str) -> str:
    """The text behind the last end of thoughts; all of it if nothing follows.

    >>> after_thoughts("<think>is it 7?</think> 34"), after_thoughts("<think>7</think>")
    (' 34', '<think>7</think>')
    """
    ends = [match.end() for match in _END.finditer(text)]
    return text[ends[-1] :] if ends and text[ends[-1] :].strip() else text
