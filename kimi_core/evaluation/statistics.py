"""Figures of k sampled answers to each problem, with intervals."""

import math
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right (Chen et al. 2021).

    It is 1 − C(n − right, k) / C(n, k): the share of the sets of k out of n answers that hold a
    right one.

    >>> pass_at_k(10, 5, 1), round(pass_at_k(4, 2, 2), 3)
    (0.5, 0.833)

    Raises:
        ValueError: k is not within 1 to n, or ``right`` not within 0 to n.
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(f"pass@{k} of {right} right among {n} answers is not defined")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
    """Index of the first answer of the most frequent kind; the kind that came first of equals.

    Args:
        answers: final answers; None has no vote.
        same: whether two answers are of one kind.
    """
    kinds: list[tuple[int, str, int]] = []
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        for place, (first, known, count) in enumerate(kinds):
            if same(known, answer):
                kinds[place] = (first, known, count + 1)
                break
        else:
            kinds.append((index, answer, 1))
    return max(kinds, key=lambda kind: kind[2])[0] if kinds else None


def interval(values: Sequence[float], seed: int) -> tuple[float, float, str]:
    """95 % interval of the mean over problems: low, high, and its method.

    Values that are all 0 or 1 get Wilson's interval; others are drawn 2,000 times with replacement
    (bootstrap over problems, percentiles).

    Args:
        values: one a problem, each from 0 to 1; not empty.
    """
    n, mean = len(values), float(np.mean(values))
    if set(values) <= {0.0, 1.0}:
        centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
        return max(centre - half, 0.0), min(centre + half, 1.0), "Wilson"
    rng, array = np.random.default_rng(seed), np.asarray(values)
    means = [array[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high), "bootstrap over problems"
