"""One training phase: a fresh optimizer, a few updates on responses that ended (section 2.3.2).

The reference π_i is not a second model. It is the log-probs that the engine reported when it
sampled the tokens, and every iteration compares them with the trainer's own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_core.config import TrainerConfig
from kimi_core.models.fingerprint import fingerprint
from kimi_core.models.lora import plain_parameters
from kimi_core.trainer.activations import Recompute
from kimi_core.trainer.gap import Gap
from kimi_core.trainer.master_weights import MasterWeights
from kimi_core.trainer.objectives import Responses, load_objective, omd
from kimi_core.trainer.packing import MicroBatch, micro_batches
from kimi_core.trainer.parallel import shard
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks, on_all_ranks
from kimi_core.trainer.shares import PhaseOutcome, ages_and_counted, deal, shares_of
from kimi_core.types import Batch, TrainingBatch
from kimi_core.weights.publish import Publisher
from kimi_core.weights.shards import load_rows, save_model, save_rows

PATIENCE = 3
"""Consecutive iterations whose log-prob gap may exceed its limit before the run stops."""

PARAMETERS = "tensors.safetensors"
"""The file with the trained parameters in the folder of a state."""


class TrainingDiverged(RuntimeError):
    """A loss or gradient is not finite. The weights are those from before the update."""


class LogprobMismatch(RuntimeError):
    """Engine and trainer give the same tokens different log-probs in several iterations running."""


@dataclass(frozen=True)
class TrainingMetrics:
    """What one training phase did; gaps in nats, over the fresh tokens of the first update."""

    loss: float
    """Mean over the updates."""
    grad_norm: float
    """Mean over the updates, before clipping."""
    logprob_gap_mean: float
    logprob_gap_max: float
    logprob_gap_over_limit_share: float
    """Share of the fresh tokens whose own gap is above ``logprob_gap_limit``, in [0, 1]."""
    reference_recomputed: bool
    tokens_stale_share: float
    max_staleness: int
    entropy: float
    logprobs: np.ndarray
    """The trainer's log-prob of each token in the pass that trained it, float32 ``[T]``; NaN for a
    token that does not count. The second update's passes come after the first update."""
    entropies: np.ndarray
    """Entropy of the distribution at each token in that pass, nats, as ``logprobs``."""


class Trainer:
    """Updates a policy in place, saves it, and publishes its weights.

    With several ranks, each has a trainer of the same policy. What rank 0 is asked to do, all do.

    Args:
        policy: its parameters that require a gradient are trained; it is put into eval mode. With
            several ranks it is sharded here.
        config: the objective and its settings.
        publisher: takes the weights to the engine.
        ranks: the processes that train together; None: this one alone.

    Raises:
        ValueError: ``trainer.objective`` names nothing that exists, or the ranks cannot divide the
            model.
        RankFailed: another rank ended or did not answer in time.
    """

    def __init__(
        self,
        policy: Policy,
        config: TrainerConfig,
        publisher: Publisher,
        ranks: Ranks | None = None,
    ) -> None:
        # With dropout, engine and trainer would disagree, and recomputing would drop other values.
        self.policy = policy.eval()
        self._config = config
        self._publisher = publisher
        self._objective = load_objective(config)
        self._weights: MasterWeights | None = None
        self.published: int | None = None
        """The version published last."""
        self.gaps_over_limit = 0
        """Consecutive iterations whose gap exceeded its limit; part of a run's state."""
        self.recompute = Recompute(policy.model, config.memory_gb, config.context_parallel)
        self.ranks = ranks or Ranks()
        known = None
        if self.ranks.rank == 0:
            # A sharded policy would hide what its passes keep, and its frozen parameters.
            several = self.ranks.size > 1
            kept = self.recompute.footprint(policy.probe) if several else None
            known = fingerprint(policy.model), kept, self.recompute.budget
        with self.ranks.naming_the_lost("the start"):
            self._fingerprint, kept, budget = self.ranks.everywhere(known)
            self.recompute.assume(kept, budget)
            shard(policy, config, self.ranks)

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def train(
        self,
        batch: TrainingBatch,
        *,
        policy_version: int,
        seed: tuple[int, ...],
        share_of_peak: float = 1.0,
    ) -> TrainingMetrics:
        """Take ``updates_per_iteration`` steps, each on its share of the groups.

        Args:
            batch: at least one response. With several ranks each gets only what it trains on.
            policy_version: the version of the present weights, which sampled this iteration's
                tokens.
            seed: decides which update each group belongs to.
            share_of_peak: what the learning rate is multiplied by.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; that update is not taken.
            LogprobMismatch: the gap to the engine exceeded its limit for ``PATIENCE`` iterations
                running.
            RankFailed: another rank ended or did not answer in time.
            RuntimeError: the policy's parameters were replaced during the phase.
        """
        updates = deal(batch.group_ids, self._config.updates_per_iteration, seed)
        shares = shares_of(batch, updates, self.ranks.data_parallel, self.policy.images)
        rate = self._config.learning_rate * share_of_peak
        phase = self._train(self.ranks.each(shares), policy_version, rate)
        met = np.full((2, len(batch.tokens.token_ids)), np.nan, np.float32)
        for share, mine in zip(shares, phase.met, strict=False):
            met[:, share.tokens] = mine
        ages, counted = ages_and_counted(batch.tokens, policy_version, self._config.max_staleness)
        return TrainingMetrics(
            loss=float(np.mean(phase.losses)),
            grad_norm=float(np.mean(phase.norms)),
            logprob_gap_mean=phase.gap.mean,
            logprob_gap_max=phase.gap.largest,
            logprob_gap_over_limit_share=phase.gap.over_limit_share,
            reference_recomputed=phase.recomputed,
            tokens_stale_share=float((ages[counted] > 0).mean()) if counted.any() else 0.0,
            max_staleness=int(ages[counted].max(initial=0)),
            entropy=phase.entropy,
            logprobs=met[0],
            entropies=met[1],
        )

    @on_all_ranks
    def _train(self, share: Any, policy_version: int, rate: float) -> PhaseOutcome:
        """``train`` on every rank; ``share`` is a ``Share``, for each rank its own."""
        self.policy.take_images(share.images)
        weights = self._master_weights()
        # Moments belong to a reference, and the reference just changed: the optimizer is new.
        optimizer = weights.adamw(rate, self._config.weight_decay)
        tokens = share.batch.tokens
        ages, counted = ages_and_counted(tokens, policy_version, self._config.max_staleness)
        fresh = (ages == 0) & counted
        reference, met = tokens.logprobs, np.full((2, len(tokens.token_ids)), np.nan, np.float32)
        losses, norms, gap = [], [], Gap()
        recomputed = False
        for number, (which, size) in enumerate(zip(share.updates, share.sizes, strict=True)):
            loss = self._accumulate(share.batch, counted, reference, which, size, met)
            if number == 0:
                limit = self._config.logprob_gap_limit
                gap = Gap.of(met[0, fresh], reference[fresh], limit, self.ranks)
                recomputed = self._check_gap(gap.mean)
                if recomputed:
                    weights.drop_gradients()
                    own = self.logprobs(tokens, counted, np.arange(len(tokens)))
                    reference = np.where(fresh, own, reference)
                    loss = self._accumulate(share.batch, counted, reference, which, size, met)
            norms.append(self._update(weights, optimizer, loss))
            losses.append(loss)
        nats, count = self.ranks.data_sum([reference[counted].sum(dtype=float), counted.sum()])
        entropy = float(-nats / count) if count else 0.0
        return PhaseOutcome(losses, norms, gap, recomputed, entropy, self.ranks.gather(met))

    @on_all_ranks
    def publish(self, version: int) -> None:
        """Hand the present weights over as ``version``; an engine then serves them.

        Raises:
            ValueError: the version is not newer than the one published last.
            TimeoutError: an arena has no free slot; the message names the processes that use them.
        """
        if self.published is not None and version <= self.published:
            raise ValueError(
                f"Cannot publish version {version}: version {self.published} was published, and "
                "versions only grow"
            )
        self._publisher.publish(plain_parameters(self.policy.model), version)
        self.published = version

    @on_all_ranks
    def save(self, folder: Path) -> None:
        """Write the trained parameters into ``folder``: the float32 masters if a model has 16 bits.

        Frozen parameters come with the model, and the optimizer is new in each iteration. Every
        rank writes its rows into the one file, so any number of ranks can load it.

        Raises:
            OSError: the disk is full or has another fault.
        """
        save_rows(self._master_weights().masters, folder / PARAMETERS, self.ranks)

    @on_all_ranks
    def save_pretrained(self, folder: Path) -> None:
        """Write the model into ``folder`` in Hugging Face format. Raises: as ``save``."""
        save_model(self.policy.model, folder, self.ranks)

    @on_all_ranks
    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take over what ``save`` wrote, on any number of ranks.

        Raises:
            ValueError: the parameters there are not those that this trainer trains.
        """
        weights = self._master_weights()
        saved = load_rows(folder / PARAMETERS, weights.masters, self.ranks)
        if odd := saved.keys() ^ weights.masters.keys():
            raise ValueError(
                f"{folder} holds {len(saved)} trained parameters and the model has "
                f"{len(weights.masters)}; "
                f"{sorted(odd)[0]} is in one of them only: resume with the same model and the same "
                "trainer.trainable_layers"
            )
        weights.load(saved)

    def fingerprint(self) -> str:
        """Names the model by what training never changes: settings and frozen parameters."""
        return self._fingerprint

    @on_all_ranks
    def rest(self) -> None:
        """Free gradients and cached blocks, which only the next ``train`` needs."""
        self._master_weights().drop_gradients()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def logprobs(self, batch: Batch, wanted: np.ndarray, which: np.ndarray) -> np.ndarray:
        """The policy's log-probs of the ``wanted`` tokens of the sequences ``which``.

        Every rank calls this with its own sequences. Float32 ``[T]``, NaN elsewhere.
        """
        result = np.full(len(batch.token_ids), np.nan, np.float32)
        for micro in self._micro_batches(batch, wanted, which):
            if micro is None:
                self.policy.nothing()
            else:
                result[micro.source_t.cpu().numpy()] = self.policy.logprobs(micro).cpu().numpy()
        self.policy.forget_gathered()
        return result

    def _master_weights(self) -> MasterWeights:
        """The trained parameters with their masters, which live as long as the parameters do."""
        trainable = self.policy.trainable()
        if self._weights is None or self._weights.hold(trainable) is not None:
            self._weights = MasterWeights(trainable, self.ranks)
        return self._weights

    def _accumulate(
        self,
        batch: TrainingBatch,
        counted: np.ndarray,
        reference: np.ndarray,
        which: np.ndarray,
        size: int,
        met: np.ndarray,
    ) -> float:
        """Add the gradient of an update's mean loss, and return the loss.

        Writes log-probs and entropies of this rank's counted tokens into ``met``, ``[2, T]``.

        Args:
            which: the update's responses on this rank.
            size: its number of responses on all ranks.
        """
        total = 0.0
        assert self._weights is not None
        for micro in self._micro_batches(batch.tokens, counted, which):
            loss, met_2t, fault = None, None, ""
            try:
                if micro is None:
                    loss = self.policy.nothing()
                else:
                    self.recompute.fit(micro.ids_rl.numel())
                    mean, met_2t, count = self._loss(micro, batch, reference)
                    loss = mean * (count / size)
            except FloatingPointError as error:
                fault = str(error)
            if said := self.ranks.fault(fault):  # Before ``backward``, where the others would wait.
                raise self._diverged(said)
            assert loss is not None
            (loss * self.policy.averaged_over).backward()
            self._weights.add_gradients()
            total += float(loss.detach())
            if micro and met_2t is not None:
                met[:, micro.source_t.cpu().numpy()] = met_2t.cpu().numpy()
        return float(self.ranks.data_sum(total))

    def _micro_batches(
        self, batch: Batch, wanted: np.ndarray, which: np.ndarray
    ) -> Iterator[MicroBatch | None]:
        """The sequences ``which``; None: a pass of other ranks alone."""
        mine = micro_batches(
            batch,
            wanted,
            which,
            max_tokens=self.recompute.most_tokens(
                self._config.tokens_per_micro_batch, self.policy.probe
            ),
            share_prompts=self.policy.shares_prompts,
            layout=self.policy.layout,
            masks_up_to=self.policy.masks_up_to,
            device=self._device,
        )
        return self.ranks.passes(mine)

    def _loss(
        self, micro: MicroBatch, batch: TrainingBatch, reference: np.ndarray
    ) -> tuple[Tensor, Tensor, int]:
        """Mean loss of a micro-batch, its log-probs and entropies, its number of responses."""
        responses = Responses.of(batch, reference, micro)
        count, objective = len(responses.advantages_n), self._objective
        is_omd = isinstance(objective, partial) and objective.func is omd
        if isinstance(objective, partial) and is_omd and self.policy.context is None:
            fused = self.policy.omd_loss(micro, responses, **objective.keywords)
            return fused.loss, torch.stack([fused.logprobs_t, fused.entropy_t]), count
        logprobs_t, entropy_t = self.policy(micro)
        losses_n = objective(logprobs_t, responses)
        if losses_n.shape != (count,):
            raise ValueError(
                f"trainer.objective = {self._config.objective!r} returned a tensor of shape "
                f"{tuple(losses_n.shape)}; it must return one loss per response, shape ({count},)"
            )
        return losses_n.mean(), torch.stack([logprobs_t, entropy_t]).detach(), count

    def _check_gap(self, mean: float) -> bool:
        """Whether the reference has to be recomputed."""
        if mean <= self._config.logprob_gap_limit:
            self.gaps_over_limit = 0
            return False
        self.gaps_over_limit += 1
        if self.gaps_over_limit >= PATIENCE:
            raise LogprobMismatch(
                f"Engine and trainer differ by {mean:.3g} nats a token (limit "
                f"{self._config.logprob_gap_limit}) for {PATIENCE} iterations running: the engine "
                "samples from other weights or in another precision than the trainer. Check "
                "model.dtype and the weight hand-over, or raise trainer.logprob_gap_limit"
            )
        return True

    def _update(
        self, weights: MasterWeights, optimizer: torch.optim.Optimizer, loss: float
    ) -> float:
        """Clip, take one step, and return the norm of the gradient before clipping."""
        if missing := weights.hold(self.policy.trainable()):
            raise RuntimeError(
                f"The optimizer does not hold the trainable parameter {missing}, so it would get "
                "no update. Something replaced it during the training phase: shard the policy "
                "before train() is called, with the policy itself as the root"
            )
        norm = weights.clip_gradients(self._config.grad_clip)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise self._diverged(f"Loss {loss} with gradient norm {norm}")
        weights.step(optimizer)
        return norm

    def _diverged(self, what: str) -> TrainingDiverged:
        assert self._weights is not None
        self._weights.drop_gradients()
        return TrainingDiverged(
            f"{what}: the update was not taken. Lower trainer.learning_rate (now "
            f"{self._config.learning_rate}) or look at the rewards and log-probs in "
            "this iteration's file in trajectories/"
        )
