"""Which responses each update of an iteration trains on."""

import numpy as np


def deal(group_ids: np.ndarray, updates: int, seed: tuple[int, ...]) -> list[np.ndarray]:
    """Deal the responses of an iteration to its updates, in random order.

    A group stays together, so its prompt is computed in one update only. Each group goes to the
    update that has the fewest responses so far. With fewer groups than updates, responses are dealt
    one by one, so that each update has some.

    Args:
        group_ids: the group of each response, int ``[N]``, N at least 1.
        updates: at least 1.
        seed: decides the order.

    Returns at most ``updates`` shares, none of them empty: indices of responses, int64.
    """
    rng = np.random.default_rng(seed)
    names = np.unique(group_ids)
    if len(names) < updates:
        shares = np.array_split(rng.permutation(len(group_ids)), updates)
        return [share for share in shares if len(share)]
    dealt: list[list[np.ndarray]] = [[] for _ in range(updates)]
    sizes = [0] * updates
    for group in rng.permutation(names):
        members = np.flatnonzero(group_ids == group)
        fewest = sizes.index(min(sizes))
        dealt[fewest].append(members)
        sizes[fewest] += len(members)
    return [np.concatenate(members) for members in dealt]
