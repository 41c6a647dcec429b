"""The math reward compared with math-verify: agreement with public test suites, and CPU time.

math-verify is called plainly, in one process. Ours compares in a fork of a worker process, because
an answer may be hostile.

    pytest benches/bench_math.py
"""

import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kimi_core.config import MathConfig
from kimi_core.reward.math.answers import agree, clean
from kimi_core.reward.math.extract import extract
from kimi_core.reward.math.reward import MathReward
from kimi_core.types import Prompt

pytest.importorskip("math_verify")

DATA = Path(__file__).parents[1] / "tests" / "reward" / "data"
ROWS = [json.loads(line) for line in (DATA / "math_suites.jsonl").read_text().splitlines()]
PLAIN = """
import json, sys, time
from math_verify import LatexExtractionConfig, parse, verify
def equal(pair):
    found = [parse(f"${text}$", [LatexExtractionConfig(boxed_match_priority=-1)],
                   parsing_timeout=None) for text in pair]
    verify(*found, timeout_seconds=None)
pairs = json.load(sys.stdin)
half = len(pairs) // 2
for pair in pairs[:half]:
    equal(pair)
start = time.process_time()
for pair in pairs[half:]:
    equal(pair)
print(time.process_time() - start)
"""


def test_agreement(ratios):
    reward = MathReward(MathConfig())
    ours, theirs, total = Counter(), Counter(), Counter()
    for row in ROWS:
        key = f"{row['suite']}, {row['form']}"
        found = reward(Prompt(0, "", row["reference"]), row["response"])
        ours[key] += found == row["expected"]
        theirs[key] += row["math_verify"] == row["expected"]
        total[key] += 1
    reward.close()
    for key, count in total.items():
        detail = f"{ours[key]} and {theirs[key]} of {count} verdicts as the suite expects"
        ratios.record(key, "math-verify", ours[key] / theirs[key], 1.0, detail)


def algebra() -> list[tuple[str, str]]:
    """Pairs of the table of the tests and of the suites that need algebra."""
    table = [line.split("\t") for line in (DATA / "math_pairs.tsv").read_text().splitlines()]
    pairs = [(line[1], line[2]) for line in table if not line[0].startswith("#")]
    for row in ROWS:
        reference = extract(row["reference"], ["boxed", "hashes", "answer"]) or row["reference"]
        answer = extract(row["response"], ["boxed", "hashes", "answer", "last_line"]) or ""
        pairs.append((reference, answer))
    cleaned = [(clean(reference), clean(answer)) for reference, answer in pairs]
    return [pair for pair in cleaned if agree(*pair) is None and all(pair)]


def test_cpu_time_of_algebra(ratios):
    pairs = algebra()
    half = len(pairs) // 2

    def spent(some: list[tuple[str, str]]) -> float:
        """CPU seconds of a reward and its worker, from its start to its end."""
        before = [resource.getrusage(who) for who in (0, resource.RUSAGE_CHILDREN)]
        reward = MathReward(MathConfig(unevaluated=True))
        for pair in some:
            reward.equal(*pair)
        reward.close()
        after = [resource.getrusage(who) for who in (0, resource.RUSAGE_CHILDREN)]
        return sum(
            b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime
            for a, b in zip(before, after, strict=True)
        )

    both, first = [], []
    for _ in range(3):
        first.append(spent(pairs[:half]))
        both.append(spent(pairs))
    ours = min(both) - min(first)
    plain = min(
        float(
            subprocess.run(
                [sys.executable, "-c", PLAIN],
                input=json.dumps(pairs),
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for _ in range(3)
    )
    detail = f"{ours:.2f} and {plain:.2f} CPU s for {len(pairs) - half} pairs"
    ratios.record("algebra", "math-verify", plain / ours, 1 / 1.2, detail)
