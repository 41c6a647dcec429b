"""The nouns of the system, each with a worked example. ``loop.py`` has the verbs.

The running example: prompt 7 asks ``3*214=`` and the policy, at version 4, may add three tokens to
a response in one iteration. Characters are tokens.

Token arrays are one-dimensional numpy arrays, one entry a token: ``token_ids`` int32, ``logprobs``
float32 in nats, ``mask`` uint8 (1 = sampled by the policy, counts in the loss; 0 = prompt) and
``policy_versions`` int32 (the weights that sampled the token; ``PROMPT_VERSION`` on prompt tokens).
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

PROMPT_VERSION = -1
"""The policy version written on tokens that no policy sampled."""

EndReason = Literal["stop", "length", "repeat"]
"""Why a response ended: it said so, it reached the total length limit, or it repeated itself."""


@dataclass(frozen=True)
class Prompt:
    """A question with its reference answer.

    >>> Prompt(id=7, text="3*214=", answer="642").answer
    '642'
    """

    id: int
    text: str
    answer: str
    difficulty: float | None = None
    """1 − pass rate of the start model, in [0, 1]; None where nobody measured it."""
    tags: dict[str, str] = field(default_factory=dict)
    """Whatever else the source knows (domain, discipline); reward functions may read it."""


@dataclass(frozen=True)
class Segment:
    """What one iteration added to one response; the engine's output and the buffer's input.

    The first iteration may add three tokens, so the answer ``642`` plus the stop token (id 1) takes
    two segments; the first one leaves the trajectory open.

    >>> part = Segment(trajectory_id=0, token_ids=np.array([9, 7, 5], np.int32),
    ...     logprobs=np.array([-0.1, -0.7, -0.2], np.float32), policy_version=4, end_reason=None)
    >>> len(part), part.end_reason is None
    (3, True)
    """

    trajectory_id: int
    token_ids: np.ndarray
    logprobs: np.ndarray
    policy_version: int
    end_reason: EndReason | None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Trajectory:
    """One prompt with one response, finished or not, as the buffer returns it.

    After two iterations: six prompt tokens, three tokens from version 4 and one from version 5.

    >>> whole = Trajectory(trajectory_id=0, prompt_id=7, group_id=0,
    ...     token_ids=np.array([6, 17, 5, 4, 7, 3, 9, 7, 5, 1], np.int32),
    ...     logprobs=np.array([0, 0, 0, 0, 0, 0, -0.1, -0.7, -0.2, -0.1], np.float32),
    ...     mask=np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1], np.uint8),
    ...     policy_versions=np.array([-1, -1, -1, -1, -1, -1, 4, 4, 4, 5], np.int32),
    ...     end_reason="stop")
    >>> whole.prompt_length, whole.response_length, whole.response_ids.tolist()
    (6, 4, [9, 7, 5, 1])
    """

    trajectory_id: int
    prompt_id: int
    group_id: int
    token_ids: np.ndarray
    logprobs: np.ndarray
    mask: np.ndarray
    policy_versions: np.ndarray
    end_reason: EndReason | None

    @property
    def prompt_length(self) -> int:
        """Tokens before the first one that a policy sampled."""
        sampled = np.flatnonzero(self.mask)
        return int(sampled[0]) if len(sampled) else len(self.token_ids)

    @property
    def response_length(self) -> int:
        """Tokens from the first sampled one on."""
        return len(self.token_ids) - self.prompt_length

    @property
    def response_ids(self) -> np.ndarray:
        return self.token_ids[self.prompt_length :]


@dataclass(frozen=True)
class Group:
    """The responses of one prompt that are scored and trained together, with their rewards.

    >>> group = Group(prompt=Prompt(7, "3*214=", "642"), trajectories=(),
    ...     correctness=np.array([1.0, 0.0]), rewards=np.array([1.15, 0.0]),
    ...     advantages=np.array([0.575, -0.575]), reward_std=0.575)
    >>> float(group.advantages.sum())
    0.0
    """

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    correctness: np.ndarray
    """What the reward function gave, float64 ``[k]``."""
    rewards: np.ndarray
    """Correctness plus the weighted length reward and the repeat penalty, float64 ``[k]``."""
    advantages: np.ndarray
    """Rewards minus the baseline (section 2.3.2: the mean reward of the group), float64 ``[k]``."""
    reward_std: float
    """Standard deviation of the rewards of all its responses that have ended so far."""


@dataclass(frozen=True)
class Batch:
    """Trajectories packed end to end, as the trainer takes them: no padding.

    ``cu_seqlens`` are the cumulative lengths, int32 ``[n + 1]``: trajectory ``i`` is
    ``token_ids[cu_seqlens[i]:cu_seqlens[i + 1]]``. The other arrays are parallel to ``token_ids``.

    >>> batch = Batch(token_ids=np.zeros(10, np.int32), logprobs=np.zeros(10, np.float32),
    ...     mask=np.zeros(10, np.uint8), policy_versions=np.zeros(10, np.int32),
    ...     cu_seqlens=np.array([0, 4, 10], np.int32))
    >>> len(batch), batch.lengths.tolist()
    (2, [4, 6])
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    mask: np.ndarray
    policy_versions: np.ndarray
    cu_seqlens: np.ndarray

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.cu_seqlens)


@dataclass(frozen=True, order=True)
class WeightVersion:
    """Names one published set of weights. Version 0 is the policy that RL starts from.

    >>> WeightVersion(4).next() > WeightVersion(4)
    True
    """

    number: int

    def next(self) -> "WeightVersion":
        return WeightVersion(self.number + 1)
