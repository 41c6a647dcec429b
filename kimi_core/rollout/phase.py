"""The rollout phase: every open trajectory goes on by at most the token budget (section 2.6.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from kimi_core.buffer import RolloutBuffer, TrajectoryInfo
from kimi_core.config import RolloutConfig
from kimi_core.rollout.engine import Engine, Request, Sampling
from kimi_core.types import PROMPT_VERSION, Prompt, Segment, Trajectory

SPARE_SEGMENTS = 100
"""Room in each trajectory for the cuts that crashes make: one more segment each."""


@dataclass(frozen=True)
class RolloutReport:
    """What one rollout phase did."""

    finished: int
    unfinished: int
    repeat_stops: int
    tokens: int
    decode_steps: int


def begin_group(
    buffer: RolloutBuffer,
    prompt: Prompt,
    prompt_ids: np.ndarray,
    *,
    group_id: int,
    samples: int,
    begun: Sequence[TrajectoryInfo] = (),
) -> None:
    """Open ``samples`` trajectories on one prompt; its tokens are their first segment, mask 0.

    ``begun`` are those of the group that are in the buffer already, after a crash; one of them may
    lack its prompt.
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
    engine: Engine, buffer: RolloutBuffer, config: RolloutConfig, sampling: Sampling
) -> RolloutReport:
    """Extend every unfinished trajectory in ``buffer``; segments are appended as they arrive.

    What the engine's present version has sampled already, before a crash, counts: towards each
    trajectory's budget, and in the report.
    """
    version, steps_before = engine.policy_version, engine.decode_steps
    requests = [_request(buffer.read(key), config, version) for key in buffer.unfinished()]
    requests = [request for request in requests if request.budget > 0]
    for segments in engine.generate(requests, sampling):
        _append(buffer, segments)
    return _report(buffer, version, engine.decode_steps - steps_before)


def _append(buffer: RolloutBuffer, segments: Sequence[Segment]) -> None:
    """Store segments in one call; a response ends in the same instant as its last token."""
    token_ids = np.concatenate([segment.token_ids for segment in segments])
    buffer.append_many(
        np.array([segment.trajectory_id for segment in segments]),
        token_ids,
        np.concatenate([segment.logprobs for segment in segments]),
        np.ones(len(token_ids), np.uint8),
        np.cumsum([0, *map(len, segments)], dtype=np.int32),
        np.array([segment.policy_version for segment in segments], np.int32),
        end_reasons=[segment.end_reason for segment in segments],
    )


def _report(buffer: RolloutBuffer, version: int, decode_steps: int) -> RolloutReport:
    """What the buffer holds of one version; the steps are those of this process."""
    tokens, reasons = 0, []
    for info in buffer.trajectories():
        sampled = int(np.count_nonzero(buffer.read(info.trajectory_id).policy_versions == version))
        tokens += sampled
        if sampled:
            reasons.append(info.end_reason)
    return RolloutReport(
        finished=len(reasons) - reasons.count(None),
        unfinished=len(buffer.unfinished()),
        repeat_stops=reasons.count("repeat"),
        tokens=tokens,
        decode_steps=decode_steps,
    )


def sampling_for(
    config: RolloutConfig, stop_token_ids: frozenset[int], *, seed: int, greedy: bool = False
) -> Sampling:
    """The engine's settings for this run."""
    return Sampling(
        temperature=0.0 if greedy else config.temperature,
        seed=seed,
        stop_token_ids=stop_token_ids,
        repeat_window=config.repeat_window,
        repeat_count=config.repeat_count,
        stream_tokens=config.stream_tokens,
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


def buffer_size(prompts: Sequence[np.ndarray], config: RolloutConfig) -> tuple[int, int]:
    """Tokens and trajectories that the buffer must hold so that a run never fills it.

    A response takes at most ``ceil(max_response_tokens / token_budget)`` iterations, and its group
    stays until the slowest has ended.
    """
    budget = config.token_budget or config.max_response_tokens
    iterations = -(-config.max_response_tokens // budget) + 1
    trajectories = iterations * config.prompts_per_iteration * config.samples_per_prompt
    longest = max(len(ids) for ids in prompts) + config.max_response_tokens
    segments = 1 + iterations * -(-budget // (config.stream_tokens or budget)) + SPARE_SEGMENTS
    return trajectories * RolloutBuffer.tokens_taken(longest, segments), trajectories
