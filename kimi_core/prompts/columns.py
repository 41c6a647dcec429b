"""From the columns of any data set to those of this project, by ``fields`` and ``template``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FINAL = "####"
"""Stands before the final answer of a solution, as in GSM8K."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, and how a prompt is written from them.

    >>> line = {"question": "1+1?", "answer": "One and one. #### 2"}
    >>> Columns().prompt(line)
    {'prompt': '1+1?', 'answer': '2'}
    >>> Columns(template="Q: {question} A:").example(line)
    {'prompt': 'Q: 1+1? A:', 'response': 'One and one. #### 2'}
    >>> Columns({"prompt": "ask", "answer": "n"}).prompt({"ask": "1+1?", "n": 2, "level": 3})
    {'prompt': '1+1?', 'answer': '2', 'level': 3}
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    """Our name → the column's. A column that is not named keeps its own name."""
    template: str = ""
    """The prompt, with ``{column}`` where a column's text goes; empty: the column ``prompt``."""

    def __bool__(self) -> bool:
        return bool(self.fields or self.template)

    def prompt(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record with ``prompt`` (or ``messages``) and ``answer``; the rest becomes tags.

        Raises:
            ValueError: there is no such column.
        """
        found = self._renamed(record, "answer")
        answer = found.get("answer")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            found["answer"] = str(answer)
        elif isinstance(answer, str) and (self.fields or is_gsm8k(record)) and FINAL in answer:
            found["answer"] = answer.rpartition(FINAL)[2].strip()
        return found

    def example(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record with ``prompt`` (or ``messages``) and ``response``. Raises: as ``prompt``."""
        return self._renamed(record, "response")

    def _renamed(self, record: Mapping[str, Any], answer: str) -> dict[str, Any]:
        fields = self.fields
        if not fields and is_gsm8k(record):
            fields = {"prompt": "question", answer: "answer"}
        if missing := [column for column in fields.values() if column not in record]:
            raise ValueError(f"no column {missing[0]!r}; it has {', '.join(map(str, record))}")
        taken = {*fields.values(), *fields}
        found = {ours: record[column] for ours, column in fields.items()}
        found |= {key: value for key, value in record.items() if key not in taken}
        if self.template:
            found["prompt"] = self._filled(record)
        return found

    def _filled(self, record: Mapping[str, Any]) -> str:
        def text_of(place: re.Match[str]) -> str:
            column = place[1]
            if column not in record:
                known = ", ".join(map(str, record))
                raise ValueError(f"no column {column!r}, which the template names; it has {known}")
            return str(record[column])

        return re.sub(r"\{(\w+)\}", text_of, self.template)


def is_gsm8k(record: Mapping[str, Any]) -> bool:
    """Whether a record is a line of GSM8K: a question, and a solution that ends ``#### 72``."""
    answer = record.get("answer")
    return "prompt" not in record and "question" in record and FINAL in str(answer or "")
