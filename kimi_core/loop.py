"""One iteration: prompts → curriculum → rollout → buffer → reward → trainer → weights.

``Loop.iterate`` is the report's Figure 3 as code. The loop is synchronous: all sampling of an
iteration is done with one version of the weights, and all training comes after it. Everything
random in iteration i is drawn from ``(seed, i)``, so nothing random needs to be saved.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kimi_core.buffer import RolloutBuffer, TrajectoryInfo
from kimi_core.config import Config
from kimi_core.metrics import IterationMetrics
from kimi_core.prompts.curriculum import Curriculum
from kimi_core.reward.groups import GroupScorer
from kimi_core.rollout.engine import Engine, Sampling
from kimi_core.rollout.phase import RolloutReport, begin_group, roll_out
from kimi_core.trainer.trainer import Trainer, TrainingData, TrainingMetrics
from kimi_core.types import Group, Prompt, Trajectory, WeightVersion
from kimi_core.weights.publish import publish


@dataclass
class Loop:
    """The parts, and where the run stands. The parts do not know of each other."""

    config: Config
    prompts: dict[int, Prompt]
    """The training prompts by id."""
    encode: Callable[[Prompt], np.ndarray]
    """A prompt's token ids, int32 ``[n]``."""
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
    """Trajectories that the last iteration trained, or found no verdict on; still in the buffer
    until the next begins."""
    latest_groups: list[Group] = field(default_factory=list)
    """What the last iteration trained, for whoever wants to look at it."""

    def iterate(self) -> IterationMetrics:
        """Run one iteration and return what it did.

        What it trained stays in the buffer until the next one begins, so that a state saved in
        between comes before the loss. An iteration that a crash cut short goes on: what is in the
        buffer of it already is neither begun nor sampled again.

        Raises:
            RewardError, RewardOutage: the reward function failed, or most of its verdicts did; the
                sampled tokens stay in the buffer, and a resumed run judges them again.
            TrainingDiverged, LogprobMismatch: as ``Trainer.train`` raises them.
            EngineFailed: the engine could not be kept alive, or refused the new weights.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        version = WeightVersion(self.engine.policy_version)

        self._evict_consumed()
        self._begin(self._next_prompts())
        rollout = roll_out(self.engine, self.buffer, self.config.rollout, self.sampling)
        sampled = time.perf_counter()
        groups, unjudged = self._score()
        trained = self._train(groups, version)
        publish(self.engine, version.next())
        self._count(groups, unjudged)

        self.iteration += 1
        self.latest_groups = groups
        done = time.perf_counter()
        return self._report(
            groups,
            rollout,
            trained,
            version,
            infrastructure_errors=len(unjudged),
            wall_s=done - wall,
            cpu_s=time.process_time() - cpu,
            rollout_s=sampled - wall,
            train_s=done - sampled,
        )

    def state(self) -> dict[str, Any]:
        """Everything but tensors and the buffer that the next iteration starts from, as JSON."""
        return {
            "iteration": self.iteration,
            "policy_version": self.engine.policy_version,
            "samples_trained": self.samples_trained,
            "next_group": self.next_group,
            "consumed": self.consumed,
            "gaps_over_limit": self.trainer.gaps_over_limit,
            "curriculum": {key: value.tolist() for key, value in self.curriculum.state().items()},
            "scorer": self.scorer.state(),
        }

    def load_state(self, state: dict[str, Any], buffer: RolloutBuffer) -> None:
        """Take over what :meth:`state` gave, and the buffer that belongs to it."""
        self.iteration = state["iteration"]
        self.engine.update(state["policy_version"])
        self.samples_trained = state["samples_trained"]
        self.next_group = state["next_group"]
        self.consumed = state["consumed"]
        self.trainer.gaps_over_limit = state["gaps_over_limit"]
        self.curriculum.load_state(
            {key: np.array(value) for key, value in state["curriculum"].items()}
        )
        self.scorer.load_state(state["scorer"])
        self.buffer = buffer

    def close(self) -> None:
        """Give the buffer's file free, and end what the engine has started."""
        self.buffer.close()
        self.engine.close()

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.iteration, purpose])

    def _next_prompts(self) -> list[Prompt]:
        count = self.config.rollout.prompts_per_iteration
        return self.curriculum.draw(count, iteration=self.iteration, rng=self._rng(0))

    def _evict_consumed(self) -> None:
        """The mark comes first, and reaches the disk first: see ``live_buffer``."""
        self.buffer.mark = self.iteration
        self.buffer.flush()
        there = {info.trajectory_id for info in self.buffer.trajectories()}
        self.buffer.evict([key for key in self.consumed if key in there])

    def _begin(self, prompts: Sequence[Prompt]) -> None:
        begun: dict[int, list[TrajectoryInfo]] = defaultdict(list)
        for info in self.buffer.trajectories():
            begun[info.group_id].append(info)
        for group_id, prompt in enumerate(prompts, self.next_group):
            begin_group(
                self.buffer,
                prompt,
                self.encode(prompt),
                group_id=group_id,
                samples=self.config.rollout.samples_per_prompt,
                begun=begun[group_id],
            )
        self.next_group += len(prompts)

    def _score(self) -> tuple[list[Group], list[int]]:
        """Groups of the responses that are to be trained now, and ids of those without a verdict,
        which are in no group."""
        finished: dict[int, list[Trajectory]] = defaultdict(list)
        for key in self.buffer.finished():
            trajectory = self.buffer.read(key)
            finished[trajectory.group_id].append(trajectory)
        open_lengths: dict[int, list[int]] = defaultdict(list)
        for key in self.buffer.unfinished():
            trajectory = self.buffer.read(key)
            open_lengths[trajectory.group_id].append(trajectory.response_length)
        unjudged = self.scorer.judge(
            [(self.prompts[t.prompt_id], t) for ended in finished.values() for t in ended]
        )
        groups = []
        for group_id, trajectories in finished.items():
            prompt = self.prompts[trajectories[0].prompt_id]
            group = self.scorer.group(
                prompt,
                trajectories,
                open_lengths[group_id],
                iteration=self.iteration,
                expected=self.curriculum.success_rate(prompt.id),
            )
            if group is not None:
                groups.append(group)
        return groups, unjudged

    def _train(self, groups: Sequence[Group], version: WeightVersion) -> TrainingMetrics | None:
        """One training phase; None where nothing has ended yet, as may be in the first ones."""
        if not groups:
            return None
        trained_ids = [t.trajectory_id for group in groups for t in group.trajectories]
        data = TrainingData(
            batch=self.buffer.pack(trained_ids),
            advantages=np.concatenate([group.advantages for group in groups]),
            scales=np.concatenate([np.full(len(g.rewards), g.reward_std) for g in groups]),
            correct=np.concatenate([group.correctness for group in groups]),
        )
        return self.trainer.train(data, policy_version=version.number, rng=self._rng(1))

    def _count(self, groups: Sequence[Group], unjudged: Sequence[int]) -> None:
        """Count what was trained; what has not ended stays for the next iteration.

        A response without a verdict says nothing about its prompt and goes like a trained one.
        """
        for group in groups:
            for correctness in group.correctness:
                self.curriculum.record(group.prompt.id, correctness)
            self.samples_trained += len(group.trajectories)
        trained = [t.trajectory_id for group in groups for t in group.trajectories]
        self.consumed = trained + list(unjudged)

    def _report(
        self,
        groups: Sequence[Group],
        rollout: RolloutReport,
        trained: TrainingMetrics | None,
        version: WeightVersion,
        *,
        infrastructure_errors: int,
        **seconds: float,
    ) -> IterationMetrics:
        def mean(arrays: list[np.ndarray]) -> float:
            return float(np.concatenate(arrays).mean()) if arrays else float("nan")

        nothing = float("nan")
        lengths = [np.array([t.response_length for t in group.trajectories]) for group in groups]
        return IterationMetrics(
            iteration=self.iteration,
            policy_version=version.number,
            reward_mean=mean([group.rewards for group in groups]),
            accuracy_sampled=mean([group.correctness for group in groups]),
            length_mean=mean(lengths),
            tokens_sampled=rollout.tokens,
            tokens_per_s=rollout.tokens / max(seconds["rollout_s"], 1e-9),
            decode_steps=rollout.decode_steps,
            trajectories_finished=rollout.finished,
            trajectories_unfinished=rollout.unfinished,
            repeat_stops=rollout.repeat_stops,
            samples_trained=sum(map(len, lengths)),
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
            zero_advantage_share=mean([group.advantages == 0 for group in groups]),
            infrastructure_errors=infrastructure_errors,
            **seconds,
        )
