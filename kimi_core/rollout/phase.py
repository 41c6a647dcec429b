"""The rollout phase: every open trajectory grows by at most the token budget (section 2.6.2).

``roll_out`` reads each trajectory of the buffer once, before it samples, and each response that
ends once more, when it has ended. Segments go into the buffer a message at a time, and nothing is
done for a single one. Lengths come from the buffer's own counts.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from kimi_core.buffer import RolloutBuffer, TrajectoryInfo
from kimi_core.config import RolloutConfig
from kimi_core.rollout.engine import Engine
from kimi_core.types import (
    END_REASONS,
    PROMPT_VERSION,
    EndReason,
    Prompt,
    Request,
    Sampling,
    SegmentColumns,
    StopStrings,
    Trajectory,
)

SPARE_SEGMENTS = 100
"""Extra segments that fit into each trajectory: a crash cuts a response once more."""


@dataclass(frozen=True)
class Rollout:
    """What the buffer holds after one rollout phase, and what the phase did."""

    finished: list[Trajectory]
    """Every trajectory in the buffer that has ended, oldest first."""
    open_lengths: dict[int, list[int]]
    """Group id → response lengths so far of its trajectories that go on."""
    finished_now: int
    """Trajectories that ended in this phase."""
    repeat_stops: int
    """Of these, the ones that were stopped for repeating themselves."""
    tokens: int
    """Tokens sampled in this phase."""
    decode_steps: int
    """Decode steps of this process."""
    tokens_drawn: int
    """Those of them that this process has sampled, and not one before a resume."""
    tokens_by_worker: dict[int, int]
    """Worker of the engine → tokens that it sampled, of ``tokens_drawn``."""

    @property
    def unfinished(self) -> int:
        return sum(map(len, self.open_lengths.values()))


def begin_group(
    buffer: RolloutBuffer,
    prompt: Prompt,
    prompt_ids: np.ndarray,
    *,
    group_id: int,
    samples: int,
    begun: Sequence[TrajectoryInfo] = (),
) -> None:
    """Open ``samples`` trajectories on one prompt, whose tokens are their first segment, mask 0.

    Args:
        begun: trajectories of the group that are in the buffer already, after a crash. One of them
            may lack its prompt.
    """
    nothing_sampled = np.zeros(len(prompt_ids), np.float32)
    empty = [info.trajectory_id for info in begun if not info.length]
    new = (buffer.begin(prompt.id, group_id) for _ in range(samples - len(begun)))
    for trajectory_id in chain(empty, new):
        buffer.append(
            trajectory_id,
            prompt_ids,
            nothing_sampled,
            nothing_sampled.astype(np.uint8),
            policy_version=PROMPT_VERSION,
        )


def roll_out(
    engine: Engine,
    buffer: RolloutBuffer,
    config: RolloutConfig,
    sampling: Sampling,
    *,
    on_end: Callable[[Trajectory], None] = lambda trajectory: None,
) -> Rollout:
    """Extend every unfinished trajectory in ``buffer``; segments are appended as they arrive.

    Tokens that the engine's present version sampled before a crash count towards a trajectory's
    budget and in the report.

    Args:
        on_end: called with each trajectory that ends, once its last token is in the buffer.
    """
    version, steps_before = engine.policy_version, engine.decode_steps
    before = [buffer.read(info.trajectory_id) for info in buffer.trajectories()]
    requests = [_request(one, config, version) for one in before if one.end_reason is None]
    requests = [request for request in requests if request.budget > 0]
    by_worker: Counter[int] = Counter()
    ended: dict[int, Trajectory] = {}
    for segments in engine.generate(requests, sampling):
        columns = segments if isinstance(segments, SegmentColumns) else SegmentColumns.of(segments)
        _append(buffer, columns)
        by_worker[columns.worker] += len(columns.token_ids)
        for key in columns.trajectory_ids[columns.end_reasons > 0].tolist():
            ended[key] = buffer.read(key)
            on_end(ended[key])
    lengths = {info.trajectory_id: info.length for info in buffer.trajectories()}
    return _report(before, lengths, ended, version, engine.decode_steps - steps_before, by_worker)


def _append(buffer: RolloutBuffer, columns: SegmentColumns) -> None:
    """Store segments in one call; the end of a response is stored with its last token."""
    reasons = columns.end_reasons
    buffer.append_many(
        columns.trajectory_ids,
        columns.token_ids,
        columns.logprobs,
        np.ones(len(columns.token_ids), np.uint8),
        columns.cu_seqlens,
        columns.policy_versions,
        end_reasons=[END_REASONS[one] for one in reasons.tolist()] if reasons.any() else None,
    )


def _report(
    before: Sequence[Trajectory],
    lengths: Mapping[int, int],
    ended: Mapping[int, Trajectory],
    version: int,
    decode_steps: int,
    by_worker: Mapping[int, int],
) -> Rollout:
    """What came of the phase. A trajectory that goes on is only counted; no token is copied."""
    finished: list[Trajectory] = []
    open_lengths: dict[int, list[int]] = {}
    reasons: list[EndReason | None] = []
    tokens = 0
    for one in before:
        drawn = lengths[one.trajectory_id] - len(one.token_ids)
        sampled = int(np.count_nonzero(one.policy_versions == version)) + drawn
        now = ended.get(one.trajectory_id, one)
        if now.end_reason is None:
            open_lengths.setdefault(one.group_id, []).append(one.response_length + drawn)
        else:
            finished.append(now)
        reasons += [now.end_reason] * (sampled > 0)
        tokens += sampled
    return Rollout(
        finished=finished,
        open_lengths=open_lengths,
        finished_now=len(reasons) - reasons.count(None),
        repeat_stops=reasons.count("repeat"),
        tokens=tokens,
        decode_steps=decode_steps,
        tokens_drawn=sum(by_worker.values()),
        tokens_by_worker=dict(sorted(by_worker.items())),
    )


def sampling_for(
    config: RolloutConfig,
    stop_token_ids: frozenset[int],
    stop_strings: StopStrings | None = None,
    *,
    seed: int,
    greedy: bool = False,
) -> Sampling:
    """How the engine draws tokens in this run."""
    return Sampling(
        temperature=0.0 if greedy else config.temperature,
        seed=seed,
        stop_token_ids=stop_token_ids,
        repeat_window=config.repeat_window,
        repeat_count=config.repeat_count,
        stream_tokens=config.stream_tokens,
        stop_strings=stop_strings,
    )


def _request(trajectory: Trajectory, config: RolloutConfig, version: int) -> Request:
    remaining = config.max_response_tokens - trajectory.response_length
    budget = remaining
    if config.token_budget is not None:
        spent = int(np.count_nonzero(trajectory.policy_versions == version))
        budget = min(config.token_budget - spent, remaining)
    return Request(
        trajectory_id=trajectory.trajectory_id,
        token_ids=trajectory.token_ids,
        prompt_length=trajectory.prompt_length,
        budget=budget,
        remaining=remaining,
    )


def buffer_size(longest_prompt: int, config: RolloutConfig) -> tuple[int, int]:
    """Tokens and trajectories that the buffer must hold so that a run never fills it.

    This is the worst case: every response takes ``max_response_tokens``. The buffer's file grows
    with what is there, and most runs need a small part of it.

    A response takes at most ``ceil(max_response_tokens / token_budget)`` iterations. Its group
    stays in the buffer until the slowest response has ended.
    """
    budget = config.token_budget or config.max_response_tokens
    iterations = -(-config.max_response_tokens // budget) + 1
    trajectories = iterations * config.prompts_per_iteration * config.samples_per_prompt
    longest = longest_prompt + config.max_response_tokens
    segments = 1 + iterations * -(-budget // (config.stream_tokens or budget)) + SPARE_SEGMENTS
    return trajectories * RolloutBuffer.tokens_taken(longest, segments), trajectories
