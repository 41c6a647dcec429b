"""The rollout phase: every open trajectory goes on by at most the token budget (section 2.6.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import RolloutConfig
from kimi_core.rollout.engine import Engine, Request, Sampling
from kimi_core.types import PROMPT_VERSION, Prompt, Trajectory

STREAM_TOKENS = 64
"""While a response grows, it goes to the buffer so many tokens at a time; a crash loses fewer."""


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
    begun: Sequence[Trajectory] = (),
) -> None:
    """Open ``samples`` trajectories on one prompt; its tokens are their first segment, mask 0.

    ``begun`` are those of the group that are in the buffer already, as after a crash: they get what
    they lack.
    """
    nothing_sampled = np.zeros(len(prompt_ids), np.float32)
    empty = [one.trajectory_id for one in begun if not len(one.token_ids)]
    empty += [buffer.begin(prompt.id, group_id) for _ in range(samples - len(begun))]
    for trajectory_id in empty:
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
    """Extend every unfinished trajectory in ``buffer``; each segment is appended as it arrives."""
    requests = [_request(buffer, key, config, engine.policy_version) for key in buffer.unfinished()]
    finished = repeats = tokens = 0
    steps_before = engine.decode_steps
    for segment in engine.generate([r for r in requests if r.budget > 0], sampling):
        buffer.append_many([segment])
        finished += segment.end_reason is not None
        repeats += segment.end_reason == "repeat"
        tokens += len(segment)
    return RolloutReport(
        finished=finished,
        unfinished=len(requests) - finished,
        repeat_stops=repeats,
        tokens=tokens,
        decode_steps=engine.decode_steps - steps_before,
    )


def sampling_for(
    config: RolloutConfig,
    stop_token_ids: frozenset[int],
    *,
    seed: int,
    greedy: bool = False,
    stream_tokens: int = 0,
) -> Sampling:
    """The engine's settings for this run."""
    return Sampling(
        temperature=0.0 if greedy else config.temperature,
        seed=seed,
        stop_token_ids=stop_token_ids,
        repeat_window=config.repeat_window,
        repeat_count=config.repeat_count,
        stream_tokens=stream_tokens,
    )


def _request(
    buffer: RolloutBuffer, trajectory_id: int, config: RolloutConfig, policy_version: int
) -> Request:
    trajectory = buffer.read(trajectory_id)
    remaining = config.max_response_tokens - trajectory.response_length
    budget = remaining
    if config.token_budget is not None:
        # After a crash in this iteration, what was sampled before it counts.
        budget = config.token_budget - int((trajectory.policy_versions == policy_version).sum())
    return Request(
        trajectory_id=trajectory_id,
        token_ids=trajectory.token_ids,
        prompt_length=trajectory.prompt_length,
        budget=min(budget, remaining),
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
    longest = max(len(ids) for ids in prompts)
    return trajectories * (longest + config.max_response_tokens), trajectories
