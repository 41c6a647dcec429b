"""Figure 7: long2short by four methods from one model that thinks long.

Each method is tried in two settings on a seed that counts nowhere else. The setting that is used
is the one with the fewest tokens among those within 0.02 of the long model's accuracy; if none is,
the most accurate one.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from figures.runs import TASKS, Runs
from figures.seeds import difference, table
from kimi_core.long2short import METHODS
from kimi_core.long2short.comparison import Point, draw

LENGTHS = [
    "think",
    "sft.data=multiply_lengths",
    "rollout.max_response_tokens=144",
    "model.scratch.context=160",
    "rollout.repeat_count=5",
    "iterations=20",
    "evaluation.every=20",
]
"""A model with something to save: it gives right answers of four lengths."""

SETTINGS = {
    "merge": [["1", "1"], ["1", "2"]],
    "shortest": [
        ["long2short.sft.learning_rate=3e-4"],
        ["long2short.sft.learning_rate=1e-4"],
    ],
    "dpo": [
        ["long2short.dpo.learning_rate=1e-5", "long2short.dpo.beta=0.1"],
        ["long2short.dpo.learning_rate=1e-5", "long2short.dpo.steps=200"],
    ],
    "rl": [
        ["long2short.rl.length_weight=0.3"],
        ["long2short.rl.length_weight=0.1"],
    ],
}
"""Method → its settings; those of ``merge`` are the weights of the long and the short model."""

IN_TURN = (("merge", "shortest", "rl"), ("dpo",))
"""DPO takes most of the time, so it comes last."""

TRIED = 2
SEARCH_SEED = 100
COST = 0.02
"""Accuracy that a setting may lose against the long model."""


def run(runs: Runs, figures: Path) -> str:
    """Make all points and the plot; return the table."""
    long = runs.train("lengths-0", *LENGTHS, "seed=0")
    short = runs.sft(
        "lengths-short",
        *LENGTHS[:-2],
        f"model.name={long}/checkpoint",
        f"sft.data={TASKS}:worked",
        "sft.steps=60",
        "sft.learning_rate=3e-4",
    )
    tried = [_points(runs, long, short, column, [SEARCH_SEED]) for column in range(TRIED)]
    chosen = {method: choose(method, tried) for method in METHODS}
    points = _points(runs, long, short, chosen, runs.seeds)
    (figures / "fig7.png").write_bytes(draw(points))
    return "\n\n".join([_search_table(tried, chosen), _table(points)])


def choose(method: str, tried: Sequence[Sequence[Point]]) -> int:
    """Which setting of a method is used, by the rule at the top."""
    found = [next(one for one in points if one.method == method) for points in tried]
    long = next(one for one in tried[0] if one.method == "long")
    good = [one for one in found if one.accuracy_sampled >= long.accuracy_sampled - COST]
    best = (
        min(good, key=lambda one: one.tokens)
        if good
        else max(found, key=lambda one: one.accuracy_sampled)
    )
    return found.index(best)


def _points(
    runs: Runs, long: Path, short: Path, column: int | dict[str, int], seeds: Sequence[int]
) -> list[Point]:
    """Points of all methods, each in one of its settings."""
    at = column if isinstance(column, dict) else dict.fromkeys(METHODS, column)
    out = runs.folder / ("fig7-" + "".join(str(at[method]) for method in METHODS))
    weights = SETTINGS["merge"][at["merge"]]
    others = [one for name in METHODS[1:] for one in SETTINGS[name][at[name]]]
    for methods in IN_TURN:
        wanted = {(name, seed) for name in ("long", *methods) for seed in seeds}
        if wanted <= {(one.method, one.seed) for one in _made(out, seeds)}:
            continue
        runs.kimi(
            *("long2short", str(long), *others, "long2short.rl.max_response_tokens=64"),
            *("--out", str(out), "--short", f"{short}/checkpoint", "--weights", *weights),
            *("--seeds", *map(str, seeds), "--methods", *methods),
        )
    return _made(out, seeds)


def _made(out: Path, seeds: Sequence[int]) -> list[Point]:
    summary = out / "summary.json"
    points = json.loads(summary.read_text())["points"] if summary.exists() else []
    return [Point(**one) for one in points if one["seed"] in seeds]


def _search_table(tried: Sequence[Sequence[Point]], chosen: dict[str, int]) -> str:
    lines = [f"Settings, tried on seed {SEARCH_SEED}:", ""]
    lines += ["| method | setting | sampled | tokens | |", "|---|---|---|---|---|"]
    for method in METHODS:
        for column, points in enumerate(tried):
            one = next(point for point in points if point.method == method)
            setting = ", ".join(SETTINGS[method][column]).replace("long2short.", "")
            mark = "used" if chosen[method] == column else ""
            cells = f"{one.accuracy_sampled:.3f} | {one.tokens:.1f} | {mark}"
            lines.append(f"| {method} | {setting} | {cells} |")
    return "\n".join(lines)


def _table(points: Sequence[Point]) -> str:
    long = {one.seed: one for one in points if one.method == "long"}
    rows, lines = {}, []
    for method in ("long", *METHODS):
        some = [one for one in points if one.method == method]
        start = [long[one.seed] for one in some]
        rows[f"{method}, {len(some)} seeds"] = [
            [one.accuracy_greedy for one in some],
            [one.accuracy_sampled for one in some],
            [one.tokens for one in some],
            [a.tokens / b.tokens for a, b in zip(some, start, strict=True)],
            [one.samples for one in some],
            [one.cpu_s for one in some],
        ]
        ours, theirs = ([one.accuracy_sampled for one in both] for both in (some, start))
        lines.append(f"{method} − long, sampled accuracy: {difference(ours, theirs)}")
    by = {method: {one.seed: one for one in points if one.method == method} for method in METHODS}
    for method in ("merge", "shortest", "dpo"):
        both = sorted(by["rl"].keys() & by[method].keys())
        ours, theirs = ([by[name][seed].tokens for seed in both] for name in ("rl", method))
        lines.append(f"rl − {method}, tokens: {difference(ours, theirs)}")
    head = table(["greedy", "sampled", "tokens", "of long", "samples", "CPU-s"], rows)
    return "\n".join(["Mean over seeds with 95 % interval:", "", head, "", *lines[1:]])
