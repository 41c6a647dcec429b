"""Accuracy on a set of prompts, greedy and sampled, with the engine of training."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kimi_core.config import RolloutConfig
from kimi_core.config.evaluation import HELD_OUT, pass_ks
from kimi_core.evaluation.progress import Progress
from kimi_core.evaluation.record import RIGHT
from kimi_core.evaluation.statistics import pass_at_k
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
    """Answers the prompts of one set, ``batch_rows`` at a time, and scores the answers.

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
    name: str = HELD_OUT
    """Of the set, in ``Progress``."""
    samples: int = 1
    """Sampled responses to each prompt."""

    def evaluate(
        self,
        *,
        iteration: int,
        seed: int,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> EvaluationMetrics:
        """A greedy and ``samples`` sampled responses to each of the first ``limit`` prompts.

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
        greedy, _, texts = self._answer("greedy", prompts, 1, seed, progress)
        sampled, lengths, _ = self._answer("sampled", prompts, self.samples, seed, progress)
        several = [*prompts] * self.samples
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
            sampled_by_domain=_by_domain(several, sampled),
            same_answer=same_answer(prompts, texts),
            samples=self.samples,
            pass_at_k=_pass_at(sampled, self.samples) if self.samples > 1 else {},
        )

    def _sampling(self, seed: int, *, greedy: bool) -> Sampling:
        sampling = sampling_for(
            self.rollout, self.stop_token_ids, self.stop_strings, seed=seed, greedy=greedy
        )
        return replace(sampling, stream_tokens=0)  # Nothing has to be stored in between.

    def _answer(
        self,
        which: str,
        prompts: Sequence[Prompt],
        samples: int,
        seed: int,
        progress: Progress | None,
    ) -> tuple[list[Score | None], list[int], list[str]]:
        """Score (None: no verdict), length and text of ``samples`` responses to each prompt.

        First come the first responses to all prompts, then the second ones, and so on. Sample ``j``
        of prompt ``i`` has the number ``j · all prompts + i``, which seeds it.
        """
        sampling = self._sampling(seed, greedy=which == "greedy")
        key = which if self.name == HELD_OUT else f"{self.name}/{which}"
        each, every = len(self.prompts), range(len(prompts))
        numbers = [sample * each + at for sample in range(samples) for at in every]
        answers: dict[int, np.ndarray] = {}
        for start in range(0, len(numbers), self.rollout.batch_rows):
            block = numbers[start : start + self.rollout.batch_rows]
            answers |= self._complete(key, block, sampling, progress)
        texts = {number: self.response_text(answers[number]) for number in numbers}
        scores = self._judge(key, texts, progress)
        return (
            [scores[number] for number in numbers],
            [len(answers[number]) for number in numbers],
            [texts[number] for number in numbers],
        )

    def _judge(
        self, key: str, texts: dict[int, str], progress: Progress | None
    ) -> dict[int, Score | None]:
        scores: dict[int, Score | None] = {}
        if progress:
            scores |= {at: one for (kind, at), one in progress.verdicts.items() if kind == key}
        left = [number for number in texts if number not in scores]
        at_once = max(JUDGED, JUDGED_PER_WORKER * self.workers) if progress else len(texts)
        for start in range(0, len(left), at_once):
            some = left[start : start + at_once]
            found = judge_all(
                self.reward,
                [(self._prompt(number), texts[number]) for number in some],
                workers=self.workers,
                outage_from=self.rollout.samples_per_prompt,
                timeout_s=self.timeout_s,
            )
            for number, score in zip(some, found, strict=True):
                scores[number] = score
                if progress and score is not None:
                    progress.judged((key, number), score)
        return scores

    def _prompt(self, number: int) -> Prompt:
        """The prompt of a response."""
        return self.prompts[number % len(self.prompts)]

    def _complete(
        self, key: str, block: Sequence[int], sampling: Sampling, progress: Progress | None
    ) -> dict[int, np.ndarray]:
        """Token ids of the responses with the numbers in ``block``.

        A block that was cut off is sampled a second time as a whole, unless ``keep_responses``:
        in another batch, the last bits of a logit may differ, and with them a token.
        """
        found: dict[int, np.ndarray] = {}
        if progress:
            there = {at: progress.responses.get((key, at)) for at in block}
            found = {at: ids for at, ids in there.items() if ids is not None}
        if len(found) < len(block) and not self.keep_responses:
            found = {}
        left = [at for at in block if at not in found]

        def keep(response: Segment) -> None:
            if progress:
                progress.ended((key, response.trajectory_id), response.token_ids)

        answers = complete(
            self.engine,
            [self.encode(self._prompt(at)) for at in left],
            sampling,
            max_tokens=self.rollout.max_response_tokens,
            ids=left,
            on_end=keep,
        )
        return found | {at: one.token_ids for at, one in zip(left, answers, strict=True)}


def _pass_at(scores: Sequence[Score | None], samples: int) -> dict[str, float]:
    """k → mean over prompts of pass@k, from the responses that have a verdict.

    Args:
        scores: those of ``_answer``: sample by sample.
    """
    count = len(scores) // samples
    judged = [[one for one in scores[at::count] if one is not None] for at in range(count)]
    found = {}
    for k in pass_ks(samples):
        chances = [
            pass_at_k(len(some), sum(one.value > RIGHT for one in some), k)
            for some in judged
            if len(some) >= k
        ]
        found[str(k)] = float(np.mean(chances)) if chances else math.nan
    return found


def same_answer(prompts: Sequence[Prompt], responses: Sequence[str]) -> float:
    """Share of the questions asked as text and as an image that got the same final answer.

    The ``question`` tag of a prompt with images is the text of its other form. Two responses
    without an answer are not the same. NaN: there is no such question.
    """
    given = zip(prompts, responses, strict=True)
    as_text = {prompt.text: final(one) for prompt, one in given if not prompt.images}
    given = zip(prompts, responses, strict=True)
    pairs = [
        (as_text[question], final(one))
        for prompt, one in given
        if prompt.images and (question := prompt.tags.get("question", "")) in as_text
    ]
    return float(np.mean([a == b != "" for a, b in pairs])) if pairs else math.nan


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
