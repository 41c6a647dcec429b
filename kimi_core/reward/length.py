"""The length reward (section 2.3.3): among right answers, shorter is better."""

import numpy as np
from numpy.typing import ArrayLike


def length_rewards(lengths: ArrayLike, correct: ArrayLike) -> np.ndarray:
    """Reward the responses of one group for being short.

    With λ_i = 0.5 − (len_i − min) / (max − min), a correct response gets λ_i and a wrong one
    min(0, λ_i). When all have the same length, all get 0.

    Args:
        lengths: int ``[k]``, tokens of each response; k ≥ 1.
        correct: bool ``[k]``.

    Returns:
        float64 ``[k]``, each in [−0.5, 0.5], before the weight w.

    Raises:
        ValueError: shapes that differ, an empty group, or ``correct`` that is not bool.

    >>> length_rewards([10, 20, 30, 10], [True, True, True, False]).tolist()
    [0.5, 0.0, -0.5, 0.0]
    """
    tokens, right = np.asarray(lengths), np.asarray(correct)
    if tokens.ndim != 1 or tokens.shape != right.shape or not len(tokens):
        raise ValueError(
            f"Lengths of shape {tokens.shape} and correctness of shape {right.shape}; allowed are "
            "two arrays [k], k at least 1, one entry a response"
        )
    if right.dtype != bool:
        raise ValueError(
            f"Correctness has dtype {right.dtype}; give bool, as in `scores > 0`, since partial "
            "credit has no place in this formula"
        )
    shortest, longest = tokens.min(), tokens.max()
    if shortest == longest:
        return np.zeros(len(tokens))
    shortness = 0.5 - (tokens - shortest) / (longest - shortest)
    return np.where(right, shortness, np.minimum(0.0, shortness))
