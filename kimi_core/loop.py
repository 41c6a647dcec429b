"""One iteration: prompts → curriculum → rollout → buffer → reward → trainer → weights.

``Loop.iterate`` is the report's Figure 3 as code. The loop is synchronous: one version of the
weights samples all tokens of an iteration, and training comes after. Everything random in iteration
i is drawn from ``(seed, i)``, so no random state has to be saved.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kimi_core.buffer import RolloutBuffer, TrajectoryInfo
from kimi_core.cluster.turns import Turns
from kimi_core.config import Config
from kimi_core.metrics import IterationMetrics, mean_parts
from kimi_core.prompts.curriculum import Curriculum
from kimi_core.prompts.many import ById
from kimi_core.reward.groups import GroupScorer
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.phase import Rollout, begin_group, roll_out
from kimi_core.trainer.schedule import share_of_peak
from kimi_core.trainer.trainer import Trainer, TrainingMetrics
from kimi_core.types import Group, Prompt, Sampling, TrainingBatch, Trajectory


@dataclass(frozen=True)
class Outcome:
    """The responses that one iteration used up, for whoever records them."""

    groups: list[Group] = field(default_factory=list)
    """Responses that were trained."""
    unjudged: list[Trajectory] = field(default_factory=list)
    """Responses without a verdict: not trained, and not kept."""
    logprobs: dict[int, np.ndarray] = field(default_factory=dict)
    """Trajectory id → the trainer's log-probs of its tokens, float32; NaN where not counted."""
    entropies: dict[int, np.ndarray] = field(default_factory=dict)
    """The same for the entropy of the trainer's distribution at each token, nats."""


@dataclass
class Loop:
    """The parts of a run, and how far the run has come. No part calls the loop."""

    config: Config
    prompts: ById
    """The training prompts by id."""
    encode: Callable[[Prompt], np.ndarray]
    """Gives a prompt's token ids, int32 ``[n]``."""
    curriculum: Curriculum
    engine: Engine
    sampling: Sampling
    buffer: RolloutBuffer
    scorer: GroupScorer
    trainer: Trainer
    iteration: int = 0
    """Iterations done."""
    samples_trained: int = 0
    """Responses trained so far."""
    next_group: int = 0
    consumed: list[int] = field(default_factory=list)
    """Trajectories that the last iteration trained, or that have no verdict. The buffer keeps them
    until the next iteration begins."""
    latest: Outcome = field(default_factory=Outcome)
    steps_before: int = 0
    """Decode steps of the rollout that goes on after a crash, in the processes before."""
    on_rollout: Callable[[Rollout], None] = lambda rollout: None
    """Called when all tokens of an iteration are in the buffer."""

    def __post_init__(self) -> None:
        self.turns = Turns(self.engine, self.trainer, shared=self.config.cluster.hybrid)

    def start(self, version: int = 0) -> None:
        """Publish the weights that the first rollout samples from."""
        self.trainer.publish(version)
        self.engine.serve(version)

    def iterate(self) -> IterationMetrics:
        """Run one iteration and return its metrics.

        Trained responses stay in the buffer until the next iteration begins, so that a state can be
        saved before anything is dropped. An iteration that a crash interrupted goes on: what the
        buffer holds of it is neither begun nor sampled a second time.

        Raises:
            RewardError, RewardOutage: the reward function failed, or most of its verdicts did. The
                sampled tokens stay in the buffer, and a resumed run judges them again.
            TrainingDiverged, LogprobMismatch: as ``Trainer.train`` raises them.
            EngineFailed: the engine could not be kept alive, or refused the new weights.
        """
        clock = _Clock()
        version, restarts = self.engine.policy_version, self.engine.restarts
        self._evict_consumed()
        prompts = self.curriculum.draw(
            self.config.rollout.prompts_per_iteration,
            iteration=self.iteration,
            rng=np.random.default_rng(self._seed(0)),
        )
        self._begin(prompts)
        with self.turns.engine():
            rollout = self._roll_out()
        clock.sampled()
        groups, unjudged = self._score(rollout)
        rate = self.config.trainer.learning_rate * self._share_of_peak()
        with self.turns.trainer():
            trained = self._train(groups, version)
            with self.turns.timed("publish"):
                self.trainer.publish(version + 1)
        with self.turns.timed("serve"):
            self.engine.serve(version + 1)
        self._count(groups, unjudged)
        self.latest = Outcome(groups, unjudged)
        if trained:
            told = (_by_trajectory(groups, one) for one in (trained.logprobs, trained.entropies))
            self.latest = Outcome(groups, unjudged, *told)
        report = self._report(version, rollout, trained, clock.seconds())
        config = self.config.rollout
        several = config.workers > 1 and config.engine == "torch"
        told_apart = several or self.config.cluster.is_open
        by_worker = {str(number): n for number, n in rollout.tokens_by_worker.items()}
        return replace(
            report,
            learning_rate=rate,
            worker_restarts=self.engine.restarts - restarts,
            worker_tokens=by_worker if told_apart else {},
            turn_s=self.turns.seconds(),
        )

    def state(self) -> dict[str, Any]:
        """What the next iteration starts from, as JSON, except tensors, curriculum and buffer."""
        return {
            "iteration": self.iteration,
            "policy_version": self.engine.policy_version,
            "samples_trained": self.samples_trained,
            "next_group": self.next_group,
            "consumed": self.consumed,
            "gaps_over_limit": self.trainer.gaps_over_limit,
            "scorer": self.scorer.state(),
        }

    def load_state(self, state: dict[str, Any], buffer: RolloutBuffer) -> None:
        """Take over what :meth:`state` gave, and the buffer that belongs to it.

        Trainer and curriculum have loaded that state before. The weights are published here.
        """
        self.iteration = state["iteration"]
        self.start(state["policy_version"])
        self.samples_trained = state["samples_trained"]
        self.next_group = state["next_group"]
        self.consumed = state["consumed"]
        self.trainer.gaps_over_limit = state["gaps_over_limit"]
        self.scorer.load_state(state["scorer"])
        self.buffer = buffer

    def close(self) -> None:
        """Close the buffer's file and end the engine's processes."""
        self.buffer.close()
        self.engine.close()

    def _seed(self, purpose: int) -> tuple[int, ...]:
        return self.config.seed, self.iteration, purpose

    def _evict_consumed(self) -> None:
        """Drop what the last iteration used up.

        The mark is set first, and reaches the disk first: ``run/state.py`` says why.
        """
        self.buffer.mark = self.iteration
        self.buffer.flush()
        there = {info.trajectory_id for info in self.buffer.trajectories()}
        self.buffer.evict([key for key in self.consumed if key in there])

    def _begin(self, prompts: Sequence[Prompt]) -> None:
        begun: dict[int, list[TrajectoryInfo]] = defaultdict(list)
        for info in self.buffer.trajectories():
            begun[info.group_id].append(info)
        encoded = [self.encode(prompt) for prompt in prompts]  # Before anything has changed.
        for group_id, (prompt, ids) in enumerate(
            zip(prompts, encoded, strict=True), self.next_group
        ):
            begin_group(
                self.buffer,
                prompt,
                ids,
                group_id=group_id,
                samples=self.config.rollout.samples_per_prompt,
                begun=begun[group_id],
            )
        self.next_group += len(prompts)

    def _roll_out(self) -> Rollout:
        rollout = roll_out(
            self.engine,
            self.buffer,
            self.config.rollout,
            self.sampling,
            on_end=lambda one: self.scorer.begin(self.prompts[one.prompt_id], one),
        )
        rollout = replace(rollout, decode_steps=rollout.decode_steps + self.steps_before)
        self.steps_before = 0
        self.on_rollout(rollout)
        return rollout

    def _score(self, rollout: Rollout) -> tuple[list[Group], list[Trajectory]]:
        """The groups of responses to train now, and the responses without a verdict."""
        finished: dict[int, list[Trajectory]] = defaultdict(list)
        for one in rollout.finished:
            finished[one.group_id].append(one)
        ended = [one for members in finished.values() for one in members]
        missing = set(self.scorer.judge([(self.prompts[one.prompt_id], one) for one in ended]))
        groups = [
            self.scorer.group(
                self.prompts[members[0].prompt_id],
                members,
                rollout.open_lengths.get(group_id, []),
                iteration=self.iteration,
                expected=self.curriculum.success_rate(members[0].prompt_id),
            )
            for group_id, members in finished.items()
        ]
        unjudged = [one for one in ended if one.trajectory_id in missing]
        return [group for group in groups if group is not None], unjudged

    def _train(self, groups: Sequence[Group], version: int) -> TrainingMetrics | None:
        """One training phase; None if no response has ended, as may happen in the first ones."""
        if not groups:
            return None
        batch = TrainingBatch(
            tokens=self.buffer.pack(_trained(groups)),
            group_ids=np.repeat(
                [group.group_id for group in groups], [len(group.rewards) for group in groups]
            ),
            rewards=np.concatenate([group.rewards for group in groups]),
            correctness=np.concatenate([group.correctness for group in groups]),
            advantages=np.concatenate([group.advantages for group in groups]),
            ended_rewards={group.group_id: group.ended_rewards for group in groups},
        )
        return self.trainer.train(
            batch, policy_version=version, seed=self._seed(1), share_of_peak=self._share_of_peak()
        )

    def _share_of_peak(self) -> float:
        """The learning rate of the running iteration, as a share of ``trainer.learning_rate``."""
        return share_of_peak(self.config.trainer.schedule, self.iteration, self.config.iterations)

    def _count(self, groups: Sequence[Group], unjudged: Sequence[Trajectory]) -> None:
        """Count what was trained; responses that have not ended stay for the next iteration.

        A response without a verdict says nothing about its prompt, and is dropped like a trained
        one.
        """
        for group in groups:
            for correctness in group.correctness:
                self.curriculum.record(group.prompt.id, correctness)
            self.samples_trained += len(group.trajectories)
        self.consumed = _trained(groups) + [one.trajectory_id for one in unjudged]
        self.iteration += 1

    def _report(
        self,
        version: int,
        rollout: Rollout,
        trained: TrainingMetrics | None,
        seconds: dict[str, Any],
    ) -> IterationMetrics:
        groups = self.latest.groups
        nothing = float("nan")
        return IterationMetrics(
            iteration=self.iteration,
            policy_version=version,
            reward_mean=_mean([group.rewards for group in groups]),
            accuracy_sampled=_mean([group.correctness for group in groups]),
            length_mean=_mean(
                [[t.response_length for t in group.trajectories] for group in groups]
            ),
            tokens_sampled=rollout.tokens,
            tokens_per_s=rollout.tokens_drawn / max(seconds["rollout_s"], 1e-9),
            decode_steps=rollout.decode_steps,
            trajectories_finished=rollout.finished_now,
            trajectories_unfinished=rollout.unfinished,
            repeat_stops=rollout.repeat_stops,
            samples_trained=len(_trained(groups)),
            samples_trained_total=self.samples_trained,
            tokens_stale_share=trained.tokens_stale_share if trained else nothing,
            max_staleness=trained.max_staleness if trained else 0,
            logprob_gap_mean=trained.logprob_gap_mean if trained else nothing,
            logprob_gap_max=trained.logprob_gap_max if trained else nothing,
            logprob_gap_over_limit_share=(
                trained.logprob_gap_over_limit_share if trained else nothing
            ),
            reference_recomputed=bool(trained and trained.reference_recomputed),
            loss=trained.loss if trained else nothing,
            grad_norm=trained.grad_norm if trained else nothing,
            entropy=trained.entropy if trained else nothing,
            zero_advantage_share=_mean([group.advantages == 0 for group in groups]),
            infrastructure_errors=len(self.latest.unjudged),
            reward_parts=mean_parts([score.parts for group in groups for score in group.scores]),
            **seconds,
        )


class _Clock:
    """Seconds of one iteration, and of its two halves."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._sampled = self._wall

    def sampled(self) -> None:
        self._sampled = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        now = time.perf_counter()
        return {
            "wall_s": now - self._wall,
            "cpu_s": time.process_time() - self._cpu,
            "rollout_s": self._sampled - self._wall,
            "train_s": now - self._sampled,
        }


def _trained(groups: Sequence[Group]) -> list[int]:
    """Trajectory ids in the order in which they are packed."""
    return [one.trajectory_id for group in groups for one in group.trajectories]


def _by_trajectory(groups: Sequence[Group], values: np.ndarray) -> dict[int, np.ndarray]:
    """Trajectory id → the values of its tokens."""
    lengths = [len(one.token_ids) for group in groups for one in group.trajectories]
    parts = np.split(values, np.cumsum(lengths)[:-1])
    return dict(zip(_trained(groups), parts, strict=True))


def _mean(arrays: Sequence[ArrayLike]) -> float:
    return float(np.concatenate(arrays).mean()) if len(arrays) else float("nan")
