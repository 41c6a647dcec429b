"""From responses that ended to groups with rewards and advantages (sections 2.3.2 and 2.3.3).

A response may be trained in the iteration in which it ends, while siblings of its group are still
open; the scorer keeps what it needs of those that ended before.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kimi_core.config import Config
from kimi_core.reward.function import RewardFunction, score
from kimi_core.reward.length import length_rewards
from kimi_core.trainer.objective import baseline
from kimi_core.types import Group, Prompt, Trajectory


@dataclass(frozen=True)
class Ended:
    """What is kept of a response that ended until its whole group has."""

    trajectory_id: int
    correctness: float
    length: int
    repeated: bool


class GroupScorer:
    """Scores responses and remembers each open group's ended ones.

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

    def score(
        self,
        prompt: Prompt,
        finished: Sequence[Trajectory],
        open_lengths: Sequence[int],
        *,
        iteration: int,
        expected: float,
    ) -> Group | None:
        """Score one group's newly finished responses; None if nothing is to be trained yet.

        Args:
            prompt: the group's.
            finished: its responses that have ended and have not been trained; those that a
                previous call saw are not judged again.
            open_lengths: response lengths so far of its siblings that are still open.
            iteration: decides whether the length reward is on.
            expected: the prompt's success rate, which stands in for each open sibling.

        Raises:
            RewardError: the reward function raised or returned no finite number.
        """
        group_id = finished[0].group_id
        ended = self._ended.setdefault(group_id, [])
        seen = {one.trajectory_id for one in ended}
        ended.extend(self._judge(prompt, one) for one in finished if one.trajectory_id not in seen)
        if open_lengths and self._config.trainer.release == "group":
            return None
        rewards = self._rewards(ended, open_lengths, iteration)
        level = baseline(
            rewards,
            missing=len(open_lengths),
            expected=expected,
            tau=self._config.trainer.tau,
            kind=self._config.trainer.baseline,
        )
        row = {one.trajectory_id: row for row, one in enumerate(ended)}
        rows = [row[trajectory.trajectory_id] for trajectory in finished]
        if not open_lengths:
            del self._ended[group_id]
        return Group(
            prompt=prompt,
            trajectories=tuple(finished),
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

    def _judge(self, prompt: Prompt, trajectory: Trajectory) -> Ended:
        text = self._response_text(trajectory.response_ids)
        return Ended(
            trajectory_id=trajectory.trajectory_id,
            correctness=score(self._reward, prompt, text),
            length=trajectory.response_length,
            repeated=trajectory.end_reason == "repeat",
        )

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
