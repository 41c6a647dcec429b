"""What a curation found of each prompt, and the page that shows it to people."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import tomli_w

from kimi_core.config import Config
from kimi_core.evaluation.record import Answer
from kimi_core.types import Prompt

BAR = 40
"""Characters of the longest bar of the histogram."""

KEPT_SHOWN, DROPPED_SHOWN = 5, 3
"""Examples of kept prompts, and of those dropped for one reason."""

LONGEST = 600
"""Characters of an example that are shown."""


@dataclass
class Curation:
    """What became of each prompt. Keys are places in ``prompts``."""

    prompts: list[Prompt]
    subjects: list[tuple[str, str]]
    """Domain and discipline."""
    dropped: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Reason, and a detail for people."""
    difficulty: dict[int, float] = field(default_factory=dict)
    shown: dict[int, Answer] = field(default_factory=dict)
    """An answer of the model; a right one, if there is one."""

    def left(self) -> list[int]:
        return [row for row in range(len(self.prompts)) if row not in self.dropped]

    def drop(self, row: int, reason: str, detail: str = "") -> None:
        """Drop a prompt; the first reason counts."""
        self.dropped.setdefault(row, (reason, detail))

    def summary(self) -> str:
        counts = Counter(reason for reason, _ in self.dropped.values())
        said = ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "none"
        return f"{len(self.left())} of {len(self.prompts)} prompts are kept; dropped: {said}"


def page(curation: Curation, config: Config) -> str:
    """The report, in Markdown."""
    parts = [
        [f"# Curation of {config.prompts.source}", "", curation.summary() + "."],
        ["", "## By subject", "", *_subjects(curation)],
        ["", "## Difficulty", "", *_histogram(curation, config)],
        ["", "## Kept, for example", *_examples(curation, curation.left()[:KEPT_SHOWN])],
    ]
    by_reason = defaultdict(list)
    for row in sorted(curation.dropped):
        by_reason[curation.dropped[row][0]].append(row)
    for reason, rows in by_reason.items():
        shown = _examples(curation, rows[:DROPPED_SHOWN])
        parts.append(["", f"## Dropped: {reason} ({len(rows)})", *shown])
    used = config.model_dump(exclude_none=True, include={"seed", "model", "reward", "curate"})
    parts.append(["", "## Settings", *quoted(tomli_w.dumps(used), len(str(used)))])
    return "\n".join(line for part in parts for line in part) + "\n"


def _subjects(curation: Curation) -> Iterator[str]:
    yield "| domain | discipline | given | kept | mean difficulty of those kept |"
    yield "|---|---|---|---|---|"
    left = curation.left()
    kept = Counter(curation.subjects[row] for row in left)
    for subject, count in sorted(Counter(curation.subjects).items()):
        some = [curation.difficulty[row] for row in left if curation.subjects[row] == subject]
        mean = f"{sum(some) / len(some):.2f}" if some else "–"
        yield f"| {subject[0]} | {subject[1]} | {count} | {kept[subject]} | {mean} |"


def _histogram(curation: Curation, config: Config) -> Iterator[str]:
    settings = config.curate
    yield f"1 − the share of right answers among {settings.samples}, of all prompts that the model"
    yield f"answered. Kept are {settings.lowest_difficulty} to {settings.highest_difficulty}."
    yield ""
    counts = Counter(round(one, 1) for one in curation.difficulty.values())
    most = max(counts.values(), default=1)
    for tenth in range(11):
        count = counts[tenth / 10]
        yield f"    {tenth / 10:.1f} {count:6d} {'█' * -(-BAR * count // most)}"


def _examples(curation: Curation, rows: list[int]) -> Iterator[str]:
    for row in rows:
        prompt = curation.prompts[row]
        said = [f"Reference: `{_plain(prompt.answer)[:80]}`."]
        if row in curation.difficulty:
            said.append(f"Difficulty {curation.difficulty[row]:.2f}.")
        if row in curation.dropped:
            said.append(_plain(curation.dropped[row][1])[:LONGEST])
        yield from [
            "",
            f"Prompt {prompt.id}. " + " ".join(filter(None, said)),
            *quoted(prompt.text),
        ]
        if row in curation.shown:
            yield from ["", "An answer of the model:", *quoted(curation.shown[row].text)]


def quoted(text: str, longest: int = LONGEST) -> list[str]:
    """Text of others as a code block, in which nothing is Markdown."""
    cut = text if len(text) <= longest else text[:longest] + " ..."
    return ["", *(f"    {_plain(line)}".rstrip() for line in cut.splitlines())]


def _plain(text: str) -> str:
    """On one line, without control characters and backquotes."""
    return "".join(c if c.isprintable() and c != "`" else " " for c in text)
