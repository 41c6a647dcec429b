"""How far engine and trainer are apart in the log-probs of the same tokens."""

import numpy as np


def logprob_gap(
    own: np.ndarray, engines: np.ndarray, fresh: np.ndarray, limit: float
) -> tuple[float, float, float]:
    """Mean and maximum of |Δ log-prob| in nats, and the share of tokens above ``limit``.

    Over those fresh tokens that ``own`` has a log-prob of.
    """
    delta = np.abs(own[fresh] - engines[fresh])
    delta = delta[~np.isnan(own[fresh])]
    if not len(delta):
        return 0.0, 0.0, 0.0
    return float(delta.mean()), float(delta.max()), float((delta > limit).mean())
