"""From responses that ended to groups with rewards and advantages (sections 2.3.2 and 2.3.3).

A response may be trained in the iteration in which it ends, while other responses of its group are
still open. The scorer therefore remembers what it needs of those that ended before.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from kimi_core.config import Config
from kimi_core.reward.calls import Response
from kimi_core.reward.combined import Reward
from kimi_core.reward.judging import Judging, scores
from kimi_core.reward.length import length_rewards
from kimi_core.types import Group, Prompt, Score, Trajectory


@dataclass(frozen=True)
class Ended:
    """What the scorer keeps of a response with a verdict until its whole group has ended."""

    trajectory_id: int
    correctness: float
    length: int
    repeated: bool
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""


class GroupScorer:
    """Judges responses, and remembers those of each open group until the whole group has ended.

    A response without a verdict is left out of its group: it counts neither for the baseline nor
    for the range of lengths.

    Args:
        config: ``reward``, ``trainer.tau``, ``trainer.ablation`` and ``rollout.samples_per_prompt``
            are read.
        reward: the run's reward function.
        response_text: turns token ids, int32 ``[n]``, into text without the stop token.
    """

    def __init__(
        self, config: Config, reward: Reward, response_text: Callable[[np.ndarray], str]
    ) -> None:
        self._config = config
        self._reward = reward
        self._response_text = response_text
        self._ended: dict[int, list[Ended]] = {}
        self._judging, self._texts = self._new_judging()

    def begin(self, prompt: Prompt, one: Trajectory) -> None:
        """Have a response that ended judged while others are still sampled.

        A function that is ``async`` or takes all responses at once is called in ``judge``. So are
        all errors raised.
        """
        response = prompt, self._response_text(one.response_ids)
        self._texts[one.trajectory_id] = response
        self._judging.add(one.trajectory_id, response)

    def judge(self, finished: Sequence[tuple[Prompt, Trajectory]]) -> list[int]:
        """Judge the responses that ended; return the ids of those without a verdict.

        A response that an earlier call judged is not judged again; on one that went through
        ``begin``, the verdict is waited for. An error leaves the scorer as it
        was.

        Raises:
            RewardError: the reward function raised or returned no finite number.
            RewardOutage: more than half of the verdicts, and at least a group's worth, failed.
        """
        seen = {one.trajectory_id for ended in self._ended.values() for one in ended}
        new = [(prompt, one) for prompt, one in finished if one.trajectory_id not in seen]
        for prompt, one in new:
            if one.trajectory_id not in self._texts:
                self.begin(prompt, one)
        judging, texts = self._judging, self._texts
        self._judging, self._texts = self._new_judging()
        # In the order of ``finished`` and not of arrival: sums over a group then round alike.
        keys = [one.trajectory_id for _, one in new]
        verdicts = scores(
            [texts[key] for key in keys],
            judging.verdicts(keys),
            outage_from=self._config.rollout.samples_per_prompt,
        )
        unjudged = []
        for (_, one), score in zip(new, verdicts, strict=True):
            if score is None:
                unjudged.append(one.trajectory_id)
                continue
            self._ended.setdefault(one.group_id, []).append(
                Ended(
                    trajectory_id=one.trajectory_id,
                    correctness=score.value,
                    length=one.response_length,
                    repeated=one.end_reason == "repeat",
                    parts=dict(score.parts),
                    note=score.note,
                )
            )
        return unjudged

    def group(
        self,
        prompt: Prompt,
        finished: Sequence[Trajectory],
        open_lengths: Sequence[int],
        *,
        iteration: int,
        expected: float,
    ) -> Group | None:
        """Rewards and advantages of the responses to train now; None if there are none.

        A response that has no siblings, because they have no verdict, has nothing to be compared
        with. Its advantage is 0.

        Args:
            prompt: the group's.
            finished: the group's responses that have ended and were not trained; at least one, and
                all of them went through ``judge``.
            open_lengths: response lengths so far of the group's responses that go on.
            iteration: decides whether the length reward is on.
            expected: the prompt's success rate, which stands for each open response.
        """
        group_id = finished[0].group_id
        if open_lengths and self._config.trainer.ablation.release == "group":
            return None
        ended = self._ended.get(group_id, [])
        if not open_lengths:
            self._ended.pop(group_id, None)
        row = {one.trajectory_id: row for row, one in enumerate(ended)}
        judged = [one for one in finished if one.trajectory_id in row]
        if not judged:
            return None
        correctness = np.array([one.correctness for one in ended])
        length_rewards = self._length_rewards(ended, open_lengths, iteration)
        penalties = self._config.reward.repeat_penalty * np.array([one.repeated for one in ended])
        rewards = correctness + length_rewards - penalties
        level = baseline(
            rewards,
            missing=len(open_lengths),
            expected=expected,
            tau=self._config.trainer.tau,
            kind=self._config.trainer.ablation.baseline,
        )
        rows = [row[one.trajectory_id] for one in judged]
        return Group(
            group_id=group_id,
            prompt=prompt,
            trajectories=tuple(judged),
            correctness=correctness[rows],
            length_rewards=length_rewards[rows],
            penalties=penalties[rows],
            advantages=rewards[rows] - level,
            ended_rewards=rewards,
            scores=tuple(Score(ended[i].correctness, ended[i].parts, ended[i].note) for i in rows),
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {str(key): [asdict(one) for one in ended] for key, ended in self._ended.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self._ended = {int(key): [Ended(**one) for one in ended] for key, ended in state.items()}

    def _new_judging(self) -> tuple[Judging, dict[int, Response]]:
        """Verdicts that are asked for from now on, and the responses by trajectory id."""
        settings = self._config.reward
        return Judging(self._reward, settings.workers, settings.timeout_s), {}

    def _length_rewards(
        self, ended: Sequence[Ended], open_lengths: Sequence[int], iteration: int
    ) -> np.ndarray:
        """The weighted length reward of each ended response; 0 while it is off."""
        config = self._config.reward
        if not config.length_weight or iteration < config.length_warmup:
            return np.zeros(len(ended))
        # An open response is at least as long as it is now, so its length belongs in the range.
        lengths = [one.length for one in ended] + list(open_lengths)
        correct = [one.correctness > 0.5 for one in ended] + [False] * len(open_lengths)
        return config.length_weight * length_rewards(lengths, correct)[: len(ended)]


def baseline(
    rewards: np.ndarray,
    *,
    missing: int,
    expected: float,
    tau: float,
    kind: Literal["mean", "log_partition"],
) -> float:
    """Estimate of τ·log Z from the responses of one prompt (section 2.3.2).

    Args:
        rewards: of the responses that have ended, in this iteration or before, float64 ``[m]``.
        missing: number of responses that are still open. Each counts with the reward that the
            prompt's success rate predicts, so that the few which end first do not decide alone.
        expected: that success rate, in [0, 1].
        tau: τ, the strength of the regulariser.
        kind: ``mean``: the mean reward, as the report does in practice;
            ``log_partition``: τ·log mean exp(r/τ), which tends to the mean for large τ.
    """
    total = len(rewards) + missing
    if kind == "mean":
        return (float(rewards.sum()) + missing * expected) / total
    # An open response ends with reward 1 with probability `expected`, otherwise with 0.
    outcomes = np.append(rewards, [1.0, 0.0])
    weights = np.append(np.ones(len(rewards)), [missing * expected, missing * (1 - expected)])
    outcomes, weights = outcomes[weights > 0], weights[weights > 0]
    # Shifted by the largest outcome, because exp(1 / τ) overflows and exp(-1 / τ) vanishes.
    top = float(outcomes.max())
    return float(top + tau * np.log((weights * np.exp((outcomes - top) / tau)).sum() / total))
