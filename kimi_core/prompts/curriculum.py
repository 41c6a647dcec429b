"""Which prompts come next: curriculum phase, then prioritised sampling (section 2.3.4)."""

from collections.abc import Sequence

import numpy as np

from kimi_core.config import CurriculumConfig
from kimi_core.types import Prompt

PRIOR_WEIGHT = 2.0
"""Samples' worth of the run's overall success rate in each prompt's own rate."""


class Curriculum:
    """Draws prompts and keeps the success rate of each.

    A prompt's success rate is that of its responses so far, mixed with ``PRIOR_WEIGHT`` samples'
    worth of the whole run's rate. A prompt that was never tried counts as an average one.
    """

    def __init__(self, prompts: Sequence[Prompt], config: CurriculumConfig) -> None:
        self._config = config
        self._row = {prompt.id: row for row, prompt in enumerate(prompts)}
        self._prompts = list(prompts)
        self._measured = np.array(
            [np.nan if prompt.difficulty is None else prompt.difficulty for prompt in prompts]
        )
        self._successes = np.zeros(len(prompts))
        self._attempts = np.zeros(len(prompts))

    def success_rates(self) -> np.ndarray:
        """Estimated success rate of every prompt, float64 ``[n]`` in [0, 1]."""
        overall = (self._successes.sum() + 1) / (self._attempts.sum() + 2)
        return (self._successes + PRIOR_WEIGHT * overall) / (self._attempts + PRIOR_WEIGHT)

    def success_rate(self, prompt_id: int) -> float:
        """Estimated success rate of one prompt."""
        return float(self.success_rates()[self._row[prompt_id]])

    def weights(self, iteration: int) -> np.ndarray:
        """Unnormalised probability of each prompt in this iteration, float64 ``[n]``.

        Raises:
            ValueError: the hard phase has begun and no prompt is hard enough.
        """
        rates = self.success_rates()
        weights = np.ones(len(rates))
        if self._config.prioritized:
            weights = np.maximum(1 - rates, self._config.floor)
        if self._config.hard_after is not None and iteration >= self._config.hard_after:
            difficulty = np.where(np.isnan(self._measured), 1 - rates, self._measured)
            weights = weights * (difficulty >= self._config.hard_difficulty)
            if not weights.any():
                raise ValueError(
                    f"No prompt is {self._config.hard_difficulty} hard at iteration {iteration} "
                    f"(the hardest is {difficulty.max():.2f}): lower curriculum.hard_difficulty"
                )
        return weights

    def draw(self, count: int, *, iteration: int, rng: np.random.Generator) -> list[Prompt]:
        """Draw ``count`` different prompts, or fewer if fewer have any weight."""
        weights = self.weights(iteration)
        count = min(count, int(np.count_nonzero(weights)))
        rows = rng.choice(len(weights), count, replace=False, p=weights / weights.sum())
        return [self._prompts[row] for row in rows]

    def record(self, prompt_id: int, correctness: float) -> None:
        """Count one finished response; correctness is clipped to [0, 1]."""
        row = self._row[prompt_id]
        self._attempts[row] += 1
        self._successes[row] += min(max(correctness, 0.0), 1.0)

    def state(self) -> dict[str, np.ndarray]:
        """What a resumed run needs: attempts and successes, float64 ``[n]``."""
        return {"attempts": self._attempts.copy(), "successes": self._successes.copy()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take over what :meth:`state` gave."""
        self._attempts[:] = state["attempts"]
        self._successes[:] = state["successes"]
