"""How far the log-probs of engine and trainer are apart."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from kimi_core.trainer.ranks import Ranks


@dataclass(frozen=True)
class Gap:
    """|Δ log-prob| over the tokens of all ranks, in nats."""

    mean: float = 0.0
    largest: float = 0.0
    over_limit_share: float = 0.0
    """Share of the tokens whose own gap is above the limit, in [0, 1]."""

    @classmethod
    def of(cls, own: np.ndarray, engines: np.ndarray, limit: float, ranks: Ranks) -> Self:
        """Compare this rank's tokens and unite the ranks. All ranks call this.

        Args:
            own: the trainer's log-probs; tokens with NaN are left out.
            engines: the engine's, of the same tokens.
        """
        delta = np.abs(own - engines)
        delta = delta[~np.isnan(delta)]
        total, count, over = ranks.data_sum(
            [delta.sum(dtype=float), len(delta), (delta > limit).sum()]
        )
        most = ranks.largest(float(delta.max(initial=0)))
        return cls(float(total / count), most, float(over / count)) if count else cls()
