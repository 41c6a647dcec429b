"""Which prompts come next: curriculum phase, then prioritised sampling (section 2.3.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimi_core.config import CurriculumConfig
from kimi_core.prompts.many import ById
from kimi_core.types import Prompt

PRIOR_WEIGHT = 2.0
"""Samples' worth of the run's overall success rate in each prompt's own rate."""

MANY = 50_000
"""Prompts from which on a draw does not look at all of them."""

PROPOSALS = 20
"""Times that as many rows are proposed as are wanted, before the rest is drawn from all rows."""

Rows = np.ndarray | slice | int


@dataclass(frozen=True)
class Standing:
    """What the curriculum knows of one prompt. Each number is in [0, 1]."""

    success_rate: float
    """Estimated, as ``Curriculum`` says."""
    weight: float
    """Unnormalised probability of being drawn."""
    difficulty: float
    """As measured before the run; 1 minus the success rate if it was not."""


class Curriculum:
    """Draws prompts and keeps the success rate of each.

    A prompt's success rate is that of its responses so far, mixed with ``PRIOR_WEIGHT`` samples'
    worth of the whole run's rate. A prompt that was never tried counts as an average one.
    """

    def __init__(self, prompts: Sequence[Prompt], config: CurriculumConfig) -> None:
        self._config = config
        self._prompts = ById(prompts)
        self._measured = self._prompts.facts.difficulty
        self._successes = np.zeros(len(prompts))
        self._attempts = np.zeros(len(prompts))
        self._total = np.zeros(2)
        """Attempts and successes of all prompts."""

    def success_rates(self) -> np.ndarray:
        """Estimated success rate of every prompt, float64 ``[n]`` in [0, 1]."""
        return self._rates(slice(None))

    def success_rate(self, prompt_id: int) -> float:
        """Estimated success rate of one prompt."""
        return float(self._rates(self._prompts.row(prompt_id)))

    def standing(self, prompt_id: int, iteration: int) -> Standing:
        """Success rate, weight in this iteration, and difficulty of one prompt."""
        rows = np.array([self._prompts.row(prompt_id)])
        found = (self._rates(rows), self._weights(rows, iteration), self._difficulty(rows))
        return Standing(*(float(values[0]) for values in found))

    def weights(self, iteration: int) -> np.ndarray:
        """Unnormalised probability of each prompt in this iteration, float64 ``[n]`` in [0, 1].

        Raises:
            ValueError: the hard phase has begun and no prompt is hard enough.
        """
        weights = self._weights(slice(None), iteration)
        if not weights.any():
            hardest = self._difficulty(slice(None)).max()
            raise ValueError(
                f"No prompt is {self._config.hard_difficulty} hard at iteration {iteration} "
                f"(the hardest is {hardest:.2f}): lower curriculum.hard_difficulty"
            )
        return weights

    def draw(self, count: int, *, iteration: int, rng: np.random.Generator) -> list[Prompt]:
        """Draw ``count`` different prompts, or fewer if fewer have any weight.

        Raises: as ``weights``.
        """
        rows = self._draw_from_many(count, iteration, rng) if len(self._measured) >= MANY else []
        if len(rows) < count:
            weights = self.weights(iteration)
            weights[rows] = 0.0
            more = min(count - len(rows), int(np.count_nonzero(weights)))
            if more:
                chances = weights / weights.sum()
                rows += rng.choice(len(weights), more, replace=False, p=chances).tolist()
        return [self._prompts.prompts[row] for row in rows]

    def record(self, prompt_id: int, correctness: float) -> None:
        """Count one finished response; correctness is clipped to [0, 1]."""
        row = self._prompts.row(prompt_id)
        success = min(max(correctness, 0.0), 1.0)
        self._attempts[row] += 1
        self._successes[row] += success
        self._total += (1.0, success)

    def state(self) -> dict[str, np.ndarray]:
        """What a resumed run needs.

        ``rows``, int64 ``[m]``, are those of the prompts that were tried; ``attempts`` and
        ``successes``, float64 ``[m]``, are theirs; ``total``, float64 ``[2]``, is of all prompts.
        """
        rows = np.flatnonzero(self._attempts)
        return {
            "rows": rows,
            "attempts": self._attempts[rows],
            "successes": self._successes[rows],
            "total": self._total.copy(),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what :meth:`state` gave, or an earlier version's, which had all rows."""
        rows = state["rows"].astype(np.int64) if "rows" in state else slice(None)
        for counts, saved in ((self._attempts, "attempts"), (self._successes, "successes")):
            counts[:] = 0
            counts[rows] = state[saved]
        # A running sum of fractions has other last bits than the sum of the rows.
        sums = np.array([self._attempts.sum(), self._successes.sum()])
        self._total = state["total"].copy() if "total" in state else sums

    def _rates(self, rows: Rows) -> np.ndarray:
        attempts, successes = self._total
        overall = (successes + 1) / (attempts + 2)
        own = self._successes[rows] + PRIOR_WEIGHT * overall
        return own / (self._attempts[rows] + PRIOR_WEIGHT)

    def _difficulty(self, rows: Rows) -> np.ndarray:
        measured = self._measured[rows]
        return np.where(np.isnan(measured), 1 - self._rates(rows), measured)

    def _weights(self, rows: Rows, iteration: int) -> np.ndarray:
        rates = self._rates(rows)
        weights = np.ones(len(rates))
        if self._config.prioritized:
            weights = np.maximum(1 - rates, self._config.floor)
        if self._config.hard_after is not None and iteration >= self._config.hard_after:
            weights = weights * (self._difficulty(rows) >= self._config.hard_difficulty)
        return weights

    def _draw_from_many(self, count: int, iteration: int, rng: np.random.Generator) -> list[int]:
        """Draw up to ``count`` rows without looking at all of them, by rejection.

        A row is proposed at random and accepted with its weight as the probability; a row that was
        drawn is passed over. So each draw is from the remaining rows by their weights. If weights
        are small, some draws are left to do.
        """
        rows: dict[int, None] = {}
        for _ in range(PROPOSALS):
            proposed = rng.integers(len(self._measured), size=count)
            accepted = rng.random(count) < self._weights(proposed, iteration)
            rows |= dict.fromkeys(proposed[accepted].tolist())
            if len(rows) >= count:
                return list(rows)[:count]
        return list(rows)
