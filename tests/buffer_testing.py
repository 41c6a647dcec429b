"""Shared by the tests of the buffer: tokens whose values follow from trajectory and position."""

import numpy as np


def tokens(key: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions ``start:end`` of a trajectory; each value follows from trajectory and position."""
    at = np.arange(start, end)
    ids = (key * 100_003 + at) & 0x7FFFFFFF
    logprobs = -(at % 97 + (key % 89) / 128)
    return ids.astype(np.int32), logprobs.astype(np.float32), ((key + at) % 5 > 0).astype(np.uint8)


def is_whole(found, key: int) -> bool:
    expected = tokens(key, 0, len(found.token_ids))
    given = (found.token_ids, found.logprobs, found.mask)
    return all(np.array_equal(a, b) for a, b in zip(expected, given, strict=True))
