"""Accuracy on held-out prompts, greedy and sampled, with the engine and reward of training."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kimi_core.config import RolloutConfig
from kimi_core.evaluation.progress import Progress
from kimi_core.metrics import EvaluationMetrics, mean_parts
from kimi_core.reward.combined import Reward
from kimi_core.reward.judging import judge_all
from kimi_core.reward.load import final
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.phase import sampling_for
from kimi_core.rollout.texts import complete
from kimi_core.types import Prompt, Sampling, Score, Segment, StopStrings

JUDGED = 64
JUDGED_PER_WORKER = 8
"""Verdicts after which they are stored; more with many workers, which would wait for each other."""


@dataclass(frozen=True)
class Evaluator:
    """Answers held-out prompts, ``batch_rows`` at a time, and scores the answers.

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
    keep_responses: bool = False
    """Whether an evaluation that was cut off keeps the responses of a block that is not whole."""

    def evaluate(
        self,
        *,
        iteration: int,
        seed: int,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> EvaluationMetrics:
        """One greedy and one sampled response to each of the first ``limit`` prompts.

        Responses without a verdict are counted, and left out of the means.

        Args:
            progress: holds what an evaluation that was cut off has already, and keeps what comes.

        Raises:
            OSError: ``progress`` could not be written.
            RewardError: the reward function raised or returned no finite number.
            RewardOutage: most verdicts could not be reached.
        """
        started = time.perf_counter()
        prompts = self.prompts[:limit]
        greedy, _, texts = self._answer("greedy", prompts, seed, progress)
        sampled, lengths, _ = self._answer("sampled", prompts, seed, progress)
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
            greedy_by_domain=_by_domain(prompts, greedy),
            sampled_by_domain=_by_domain(prompts, sampled),
            same_answer=same_answer(prompts, texts),
        )

    def _sampling(self, seed: int, *, greedy: bool) -> Sampling:
        sampling = sampling_for(
            self.rollout, self.stop_token_ids, self.stop_strings, seed=seed, greedy=greedy
        )
        return replace(sampling, stream_tokens=0)  # Nothing has to be stored in between.

    def _answer(
        self, which: str, prompts: Sequence[Prompt], seed: int, progress: Progress | None
    ) -> tuple[list[Score | None], list[int], list[str]]:
        """Score (None: no verdict), length and text of one response to each prompt."""
        sampling = self._sampling(seed, greedy=which == "greedy")
        answers: dict[int, np.ndarray] = {}
        for start in range(0, len(prompts), self.rollout.batch_rows):
            block = range(start, min(len(prompts), start + self.rollout.batch_rows))
            answers |= self._complete(which, block, sampling, progress)
        texts = [self.response_text(answers[at]) for at in range(len(prompts))]
        scores: dict[int, Score | None] = {}
        if progress:
            scores |= {at: one for (kind, at), one in progress.verdicts.items() if kind == which}
        left = [at for at in range(len(prompts)) if at not in scores]
        at_once = max(JUDGED, JUDGED_PER_WORKER * self.workers) if progress else len(prompts)
        for start in range(0, len(left), at_once):
            some = left[start : start + at_once]
            found = judge_all(
                self.reward,
                [(prompts[at], texts[at]) for at in some],
                workers=self.workers,
                outage_from=self.rollout.samples_per_prompt,
                timeout_s=self.timeout_s,
            )
            for at, score in zip(some, found, strict=True):
                scores[at] = score
                if progress and score is not None:
                    progress.judged((which, at), score)
        order = range(len(prompts))
        return [scores[at] for at in order], [len(answers[at]) for at in order], texts

    def _complete(
        self, which: str, block: range, sampling: Sampling, progress: Progress | None
    ) -> dict[int, np.ndarray]:
        """Token ids of the responses to the prompts at the places in ``block``.

        A block that was cut off is sampled a second time as a whole, unless ``keep_responses``:
        in another batch, the last bits of a logit may differ, and with them a token.
        """
        found: dict[int, np.ndarray] = {}
        if progress:
            there = {at: progress.responses.get((which, at)) for at in block}
            found = {at: ids for at, ids in there.items() if ids is not None}
        if len(found) < len(block) and not self.keep_responses:
            found = {}
        left = [at for at in block if at not in found]

        def keep(response: Segment) -> None:
            if progress:
                progress.ended((which, response.trajectory_id), response.token_ids)

        answers = complete(
            self.engine,
            [self.encode(self.prompts[at]) for at in left],
            sampling,
            max_tokens=self.rollout.max_response_tokens,
            ids=left,
            on_end=keep,
        )
        return found | {at: one.token_ids for at, one in zip(left, answers, strict=True)}


def same_answer(prompts: Sequence[Prompt], responses: Sequence[str]) -> float:
    """Share of the questions asked as text and as an image that got the same final answer.

    The ``question`` tag of a prompt with images is the text of its other form. NaN: there is none.
    """
    given = zip(prompts, responses, strict=True)
    as_text = {prompt.text: final(one) for prompt, one in given if not prompt.images}
    given = zip(prompts, responses, strict=True)
    pairs = [
        (as_text[question], final(one))
        for prompt, one in given
        if prompt.images and (question := prompt.tags.get("question", "")) in as_text
    ]
    return float(np.mean([a == b for a, b in pairs])) if pairs else math.nan


def _by_domain(prompts: Sequence[Prompt], scores: Sequence[Score | None]) -> dict[str, float]:
    """Mean score of the prompts of each domain that have a verdict."""
    found: dict[str, list[Score | None]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        if score is not None and "domain" in prompt.tags:
            found.setdefault(prompt.tags["domain"], []).append(score)
    return {domain: _mean(some) for domain, some in sorted(found.items())}


def _mean(scores: Sequence[Score | None]) -> float:
    judged = [one.value for one in scores if one is not None]
    return float(np.mean(judged)) if judged else float("nan")
