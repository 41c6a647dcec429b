"""Accuracy on held-out prompts, greedy and sampled, with the engine and reward of training."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kimi_core.config import RolloutConfig
from kimi_core.metrics import EvaluationMetrics, mean_parts
from kimi_core.reward.combined import Reward
from kimi_core.reward.judging import judge_all
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.phase import sampling_for
from kimi_core.rollout.texts import complete
from kimi_core.types import Prompt, Sampling, Score, StopStrings


@dataclass(frozen=True)
class Evaluator:
    """Answers held-out prompts and scores the answers.

    ``encode`` gives a prompt's token ids, int32 ``[n]``. ``response_text`` turns the ids of a
    response into the text that the reward function sees.
    """

    engine: Engine
    prompts: Sequence[Prompt]
    encode: Callable[[Prompt], np.ndarray]
    response_text: Callable[[np.ndarray], str]
    reward: Reward
    rollout: RolloutConfig
    stop_token_ids: frozenset[int]
    stop_strings: StopStrings | None = None
    workers: int = 1
    """Threads that call ``reward``."""
    timeout_s: float = math.inf
    """Seconds that a call of ``reward`` may take."""

    def evaluate(self, *, iteration: int, seed: int, limit: int | None = None) -> EvaluationMetrics:
        """One greedy and one sampled response to each of the first ``limit`` prompts.

        Responses without a verdict are counted, and left out of the means.

        Raises:
            RewardError: the reward function raised or returned no finite number.
            RewardOutage: most verdicts could not be reached.
        """
        started = time.perf_counter()
        prompts = self.prompts[:limit]
        greedy, _ = self._answer(prompts, self._sampling(seed, greedy=True))
        sampled, lengths = self._answer(prompts, self._sampling(seed, greedy=False))
        return EvaluationMetrics(
            iteration=iteration,
            policy_version=self.engine.policy_version,
            accuracy_greedy=_mean(greedy),
            accuracy_sampled=_mean(sampled),
            length_mean=float(np.mean(lengths)),
            n=len(prompts),
            seed=seed,
            wall_s=time.perf_counter() - started,
            infrastructure_errors=greedy.count(None) + sampled.count(None),
            reward_parts=mean_parts([one.parts for one in sampled if one is not None]),
        )

    def _sampling(self, seed: int, *, greedy: bool) -> Sampling:
        sampling = sampling_for(
            self.rollout, self.stop_token_ids, self.stop_strings, seed=seed, greedy=greedy
        )
        return replace(sampling, stream_tokens=0)  # Nothing has to be stored in between.

    def _answer(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> tuple[list[Score | None], list[int]]:
        """Score (None: no verdict) and length of one response to each prompt."""
        answers = complete(
            self.engine,
            [self.encode(prompt) for prompt in prompts],
            sampling,
            max_tokens=self.rollout.max_response_tokens,
        )
        texts = [self.response_text(answer.token_ids) for answer in answers]
        scores = judge_all(
            self.reward,
            list(zip(prompts, texts, strict=True)),
            workers=self.workers,
            outage_from=self.rollout.samples_per_prompt,
            timeout_s=self.timeout_s,
        )
        return scores, [len(answer) for answer in answers]


def _mean(scores: Sequence[Score | None]) -> float:
    judged = [one.value for one in scores if one is not None]
    return float(np.mean(judged)) if judged else float("nan")
