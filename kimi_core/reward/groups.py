"""From responses that ended to groups with rewards and advantages (sections 2.3.2 and 2.3.3).

A response may be trained in the iteration in which it ends, while siblings of its group are still
open; the scorer keeps what it needs of those that ended before.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kimi_core.config import Config
from kimi_core.reward.base import RewardFunction, judge_all
from kimi_core.reward.length import length_rewards
from kimi_core.trainer.objectives import baseline
from kimi_core.types import Group, Prompt, Trajectory


@dataclass(frozen=True)
class Ended:
    """What is kept of a response with a verdict until its whole group has ended."""

    trajectory_id: int
    correctness: float
    length: int
    repeated: bool


class GroupScorer:
    """Judges responses, and remembers each open group's until the whole group has ended.

    A response whose verdict could not be reached is left out of its group: neither the baseline nor
    the range of lengths knows of it.

    Args:
        config: ``reward``, ``trainer.release``, ``trainer.tau``, ``trainer.baseline`` and
            ``rollout.samples_per_prompt`` are read.
        reward: the run's reward function.
        response_text: from token ids ``[n]`` to text, without the stop token.
    """

    def __init__(
        self, config: Config, reward: RewardFunction, response_text: Callable[[np.ndarray], str]
    ) -> None:
        self._config = config
        self._reward = reward
        self._response_text = response_text
        self._ended: dict[int, list[Ended]] = {}

    def judge(self, finished: Sequence[tuple[Prompt, Trajectory]]) -> list[int]:
        """Judge all that an iteration ended; returns the ids of those without a verdict.

        Those that a previous call judged are not judged again. An error leaves everything as it
        was.

        Raises:
            RewardError: the reward function raised or returned no finite number.
            RewardOutage: more than half of the verdicts, and at least a group's worth, failed.
        """
        seen = {one.trajectory_id for ended in self._ended.values() for one in ended}
        new = [(prompt, one) for prompt, one in finished if one.trajectory_id not in seen]
        verdicts = judge_all(
            self._reward,
            [(prompt, self._response_text(one.response_ids)) for prompt, one in new],
            workers=self._config.reward.workers,
            outage_from=self._config.rollout.samples_per_prompt,
        )
        unjudged = []
        for (_, one), correctness in zip(new, verdicts, strict=True):
            if correctness is None:
                unjudged.append(one.trajectory_id)
                continue
            self._ended.setdefault(one.group_id, []).append(
                Ended(
                    trajectory_id=one.trajectory_id,
                    correctness=correctness,
                    length=one.response_length,
                    repeated=one.end_reason == "repeat",
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
        """Rewards and advantages of what one group has to train now; None if nothing is.

        A response that is alone in its group, because there is no verdict on its siblings, has
        nothing to be compared with: its advantage is 0.

        Args:
            prompt: the group's.
            finished: its responses that have ended and have not been trained, at least one; all
                went through `judge`.
            open_lengths: response lengths so far of its siblings that are still open.
            iteration: decides whether the length reward is on.
            expected: the prompt's success rate, which stands in for each open sibling.
        """
        group_id = finished[0].group_id
        if open_lengths and self._config.trainer.release == "group":
            return None
        ended = self._ended.get(group_id, [])
        if not open_lengths:
            self._ended.pop(group_id, None)
        row = {one.trajectory_id: row for row, one in enumerate(ended)}
        judged = [one for one in finished if one.trajectory_id in row]
        if not judged:
            return None
        rewards = self._rewards(ended, open_lengths, iteration)
        level = baseline(
            rewards,
            missing=len(open_lengths),
            expected=expected,
            tau=self._config.trainer.tau,
            kind=self._config.trainer.baseline,
        )
        rows = [row[one.trajectory_id] for one in judged]
        return Group(
            prompt=prompt,
            trajectories=tuple(judged),
            correctness=np.array([ended[row].correctness for row in rows]),
            rewards=rewards[rows],
            advantages=rewards[rows] - level,
            reward_std=float(rewards.std()),
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {str(key): [asdict(one) for one in ended] for key, ended in self._ended.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self._ended = {int(key): [Ended(**one) for one in ended] for key, ended in state.items()}

    def _rewards(
        self, ended: Sequence[Ended], open_lengths: Sequence[int], iteration: int
    ) -> np.ndarray:
        config = self._config.reward
        correctness = np.array([one.correctness for one in ended])
        rewards = correctness - config.repeat_penalty * np.array([one.repeated for one in ended])
        if config.length_weight and iteration >= config.length_warmup:
            # An open sibling is at least as long as it is now, so it belongs in the range.
            lengths = [one.length for one in ended] + list(open_lengths)
            correct = np.concatenate([correctness > 0.5, np.zeros(len(open_lengths), bool)])
            rewards = (
                rewards + config.length_weight * length_rewards(lengths, correct)[: len(ended)]
            )
        return rewards
