"""The nouns of the system, each with a worked example. ``loop.py`` has the verbs.

The examples all follow one case. Prompt 7 asks ``3*214=``. The policy is at version 4 and may add
three tokens to a response in one iteration. Each character is one token.

Token arrays are one-dimensional numpy arrays with one entry per token: ``token_ids`` int32,
``logprobs`` float32 in nats, ``mask`` uint8 (1: sampled by the policy, counts in the loss; 0: part
of the prompt) and ``policy_versions`` int32 (the version of the weights that sampled the token;
``PROMPT_VERSION`` on prompt tokens).

A policy version is an int. Version 0 is the policy that RL starts from, and each iteration
publishes the next one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

PROMPT_VERSION = -1
"""The policy version written on tokens that no policy sampled."""

EndReason = Literal["stop", "length", "repeat"]
"""Why a response ended: with a stop token, at the total length limit, or by repeating itself."""

END_REASONS: tuple[EndReason | None, ...] = (None, "stop", "length", "repeat")
"""Every end reason by its number in columns; None: the response goes on."""

Normalize = Literal["none", "length", "sqrt_length"]
"""What an objective divides a response's summed log-probs by: 1, its length, or its root."""

Message = Mapping[str, Any]
"""One turn of a conversation: at least ``role`` and ``content``, both strings."""

IMAGE_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Where an image stands in the text of a prompt that has images."""


@dataclass(frozen=True)
class Image:
    """An image of a prompt, by reference. ``models/images.py`` makes and decodes it.

    In a token array, the image with number i in the run's table is a run of the id −1−i, one for
    each position that it takes. So buffer, engines and trainer handle plain token ids, and two
    prompts that differ only in an image have different ids.

    >>> Image("9f86d081", Path("charts/1.png")) == Image("9f86d081", b"the same bytes")
    True
    """

    digest: str
    """SHA-256 of the encoded bytes, in hexadecimal; two images with one digest are the same."""
    source: Path | bytes = field(compare=False, repr=False)
    """The file, or the encoded bytes (PNG, JPEG or WebP)."""


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
    """1 − pass rate of the start model, in [0, 1]; None if it was not measured."""
    tags: dict[str, str] = field(default_factory=dict)
    """Other facts from the source, such as the domain. Reward functions may read them."""
    messages: Sequence[Message] = ()
    """The prompt as a conversation, which the model's chat template renders. ``text`` is then its
    question, for people and reward functions. Empty: the model reads ``text``."""
    images: tuple[Image, ...] = ()
    """The images, in order. Each ``IMAGE_MARK`` in the text (or in the messages) is the place of
    one; without marks, all stand before the text."""


@dataclass(frozen=True)
class Score:
    """What a reward function may return in place of a number.

    >>> Score(0.8, {"correct": 1.0, "format": 0.0}, note="no box").value
    0.8
    """

    value: float
    """The reward."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What it is made of, for metrics and trajectories."""
    note: str = ""
    """Why, for the trajectories: a judge's reasoning, say."""


@dataclass(frozen=True)
class Segment:
    """Tokens that an engine added to one response; the engine's output and the buffer's input.

    The answer ``642`` and the stop token (id 1) are four tokens, so they take two iterations and
    two segments. The first segment leaves the trajectory open.

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
class SegmentColumns:
    """n segments as columns: what passes between processes and what the buffer appends.

    Segment ``i`` has the tokens ``cu_seqlens[i]:cu_seqlens[i + 1]``. A trajectory may have several
    segments, in order.

    >>> part = Segment(0, np.array([9, 7], np.int32), np.array([-0.1, -0.7], np.float32), 4, None)
    >>> last = Segment(0, np.array([5], np.int32), np.array([-0.2], np.float32), 4, "stop")
    >>> columns = SegmentColumns.of([part, last])
    >>> columns.token_ids.tolist(), columns.cu_seqlens.tolist(), columns.end_reasons.tolist()
    ([9, 7, 5], [0, 2, 3], [0, 1])
    >>> [segment.end_reason for segment in columns]
    [None, 'stop']
    """

    trajectory_ids: np.ndarray
    """int64 ``[n]``."""
    token_ids: np.ndarray
    """int32 ``[t]``, all segments end to end."""
    logprobs: np.ndarray
    """float32 ``[t]``."""
    cu_seqlens: np.ndarray
    """int32 ``[n + 1]``."""
    policy_versions: np.ndarray
    """int32 ``[n]``."""
    end_reasons: np.ndarray
    """uint8 ``[n]``, numbers of ``END_REASONS``."""
    worker: int = 0
    """Which worker of the engine sampled them; 0 if it has only one."""

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> "SegmentColumns":
        """The columns of at least one segment."""
        return cls(
            trajectory_ids=np.array([one.trajectory_id for one in segments], np.int64),
            token_ids=np.concatenate([one.token_ids for one in segments]),
            logprobs=np.concatenate([one.logprobs for one in segments]),
            cu_seqlens=np.cumsum([0, *map(len, segments)], dtype=np.int32),
            policy_versions=np.array([one.policy_version for one in segments], np.int32),
            end_reasons=np.array([END_REASONS.index(one.end_reason) for one in segments], np.uint8),
        )

    def __len__(self) -> int:
        return len(self.trajectory_ids)

    def __iter__(self) -> Iterator[Segment]:
        return map(self.segment, range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def segment(self, index: int) -> Segment:
        """One segment, whose arrays are views."""
        tokens = slice(int(self.cu_seqlens[index]), int(self.cu_seqlens[index + 1]))
        return Segment(
            trajectory_id=int(self.trajectory_ids[index]),
            token_ids=self.token_ids[tokens],
            logprobs=self.logprobs[tokens],
            policy_version=int(self.policy_versions[index]),
            end_reason=END_REASONS[self.end_reasons[index]],
        )


@dataclass(frozen=True)
class Trajectory:
    """One prompt with one response, finished or not, as the buffer returns it.

    After two iterations it has six prompt tokens, three from version 4 and one from version 5.

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
        """Number of tokens before the first sampled one."""
        first = int(self.mask.argmax()) if len(self.mask) else 0
        return first if self.mask[first : first + 1].any() else len(self.mask)

    @property
    def response_length(self) -> int:
        """Number of tokens from the first sampled one to the end."""
        return len(self.token_ids) - self.prompt_length

    @property
    def response_ids(self) -> np.ndarray:
        return self.token_ids[self.prompt_length :]


@dataclass(frozen=True)
class Group:
    """Responses to one prompt that are trained together in one iteration, with their rewards.

    Arrays are float64 ``[k]``, one entry per trajectory.

    >>> group = Group(group_id=0, prompt=Prompt(7, "3*214=", "642"), trajectories=(),
    ...     correctness=np.array([1.0, 0.0]), length_rewards=np.array([0.15, 0.0]),
    ...     penalties=np.array([0.0, 0.0]), advantages=np.array([0.575, -0.575]),
    ...     ended_rewards=np.array([1.15, 0.0]))
    >>> group.rewards.tolist(), float(group.advantages.sum())
    ([1.15, 0.0], 0.0)
    """

    group_id: int
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    correctness: np.ndarray
    """The reward function's result."""
    length_rewards: np.ndarray
    """The weighted length reward (section 2.3.3); 0 while it is off."""
    penalties: np.ndarray
    """What a response loses for repeating itself; at least 0."""
    advantages: np.ndarray
    """Rewards minus the baseline (section 2.3.2: the mean reward of the group)."""
    ended_rewards: np.ndarray
    """Rewards of every response of the group that has ended so far, also in earlier iterations."""
    scores: tuple[Score, ...] = ()
    """What the reward function returned, one a trajectory."""

    @property
    def rewards(self) -> np.ndarray:
        """Correctness plus length reward minus penalty."""
        return self.correctness + self.length_rewards - self.penalties


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


@dataclass(frozen=True)
class TrainingBatch:
    """What one training phase learns from: n responses that have ended, packed, with their rewards.

    >>> tokens = Batch(token_ids=np.zeros(10, np.int32), logprobs=np.zeros(10, np.float32),
    ...     mask=np.ones(10, np.uint8), policy_versions=np.zeros(10, np.int32),
    ...     cu_seqlens=np.array([0, 4, 10], np.int32))
    >>> batch = TrainingBatch(tokens, group_ids=np.array([3, 3]), rewards=np.array([1.0, 0.0]),
    ...     correctness=np.array([1.0, 0.0]), advantages=np.array([0.5, -0.5]),
    ...     ended_rewards={3: np.array([1.0, 0.0])})
    >>> len(batch)
    2
    """

    tokens: Batch
    group_ids: np.ndarray
    """The group of each response, int64 ``[n]``."""
    rewards: np.ndarray
    """float64 ``[n]``."""
    correctness: np.ndarray
    """The reward function's result, float64 ``[n]``."""
    advantages: np.ndarray
    """Rewards minus the baseline, float64 ``[n]``."""
    ended_rewards: Mapping[int, np.ndarray]
    """Group id → ``Group.ended_rewards``, float64."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Request:
    """One open trajectory that an engine is to extend.

    ``budget`` and ``remaining`` are at least 1. A response that reaches ``remaining`` ends with
    ``"length"``; one that spends ``budget`` first stays open.

    >>> prompt = np.array([6, 17, 5, 4, 7, 3], np.int32)
    >>> Request(trajectory_id=0, token_ids=prompt, prompt_length=6, budget=3, remaining=96).steps
    3
    """

    trajectory_id: int
    """Names the trajectory in the segments that come back, and seeds its sampling."""
    token_ids: np.ndarray
    """The prompt and every segment so far, int32 ``[n]``; not empty."""
    prompt_length: int
    """Where the response begins. Repeats are looked for from there."""
    budget: int
    """Output tokens that this call may add."""
    remaining: int
    """Output tokens left until the total length limit."""

    @property
    def steps(self) -> int:
        """The most tokens that the call may add."""
        return min(self.budget, self.remaining)


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a response, and how its tokens become text; ``rollout/stop.py`` finds them.

    >>> StopStrings(strings=("$",), text=lambda ids: "".join(map(chr, ids))).text([53, 36])
    '5$'
    """

    strings: tuple[str, ...]
    """At least one, and none is empty."""
    text: Callable[[Sequence[int]], str]
    """Gives the text of tokens that stand in the middle of a response."""
    can_complete: dict[int, bool] = field(default_factory=dict, compare=False, repr=False)
    """Token id → whether it can be the last of a stop string; filled as tokens come."""


@dataclass(frozen=True)
class Sampling:
    """How an engine draws tokens; the same for all requests of a call.

    Log-probs are those of the distribution that is sampled: ``softmax(logits / temperature)``. With
    ``temperature = 0`` the engine takes the most likely token and reports its log-prob at
    temperature 1. A token depends only on ``(seed, trajectory_id, position)`` and the model. It
    does not depend on the other rows of the batch, nor on how a response is cut into segments.

    >>> Sampling(temperature=1.0, seed=0, stop_token_ids=frozenset({1})).repeat_window
    0
    """

    temperature: float
    seed: int
    stop_token_ids: frozenset[int]
    repeat_window: int = 0
    """Length of the repeated block, in tokens; 0 turns detection off."""
    repeat_count: int = 0
    """A response ends with ``"repeat"`` when one block has occurred this many times."""
    stream_tokens: int = 0
    """Tokens of a growing response between two segments; 0: one segment at its end."""
    stop_strings: StopStrings | None = None
    """Strings that end a response as soon as its text contains one, whatever its tokens are."""
