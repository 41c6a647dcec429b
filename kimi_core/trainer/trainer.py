"""One training phase: a fresh optimizer, a few updates on responses that ended (section 2.3.2).

The reference π_i is not a second model: it is the log-probs that the engine reported when it
sampled the tokens, and they are measured against the trainer's own in every iteration.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kimi_core.config import TrainerConfig
from kimi_core.trainer import objectives
from kimi_core.trainer.objectives import Responses
from kimi_core.trainer.packing import MicroBatch, micro_batches
from kimi_core.trainer.policy import Policy, trainable_parameters
from kimi_core.types import Batch

PATIENCE = 3
"""Iterations running in which the log-prob gap may be over its limit before the run stops."""


class TrainingDiverged(RuntimeError):
    """A loss or gradient is not finite. The weights are those from before the update."""


class LogprobMismatch(RuntimeError):
    """Engine and trainer give the same tokens different log-probs, iteration after iteration."""


@dataclass(frozen=True)
class TrainingData:
    """What one training phase learns from; n responses."""

    batch: Batch
    advantages: np.ndarray
    """float64 ``[n]``: A_j = r_j − r̄."""
    scales: np.ndarray
    """float64 ``[n]``, standard deviation of the rewards in each response's group (GRPO)."""
    correct: np.ndarray
    """float64 ``[n]``, the reward function's verdict (ReST)."""


@dataclass(frozen=True)
class TrainingMetrics:
    """Means over the updates of one phase; gaps in nats, over the fresh tokens of the first."""

    loss: float
    grad_norm: float
    logprob_gap_mean: float
    logprob_gap_max: float
    logprob_gap_over_limit_share: float
    """Of these tokens, the share whose own gap is above ``logprob_gap_limit``, in [0, 1]."""
    reference_recomputed: bool
    tokens_stale_share: float
    max_staleness: int
    entropy: float


class Trainer:
    """Updates a model in place.

    Args:
        model: the policy, in eval mode; parameters that require a gradient are trained. With
            activation checkpointing its dropout probabilities are set to zero for good.
        config: the objective and its settings.
        temperature: the one that tokens are sampled with.
    """

    def __init__(
        self, model: PreTrainedModel, config: TrainerConfig, *, temperature: float
    ) -> None:
        self._config = config
        self._policy = Policy(model, temperature=temperature, head_chunk=config.head_chunk)
        self._parameters = trainable_parameters(model)
        self._device = self._parameters[0].device
        self.gaps_over_limit = 0
        """Iterations running in which the gap was over its limit; of a run's state."""
        if config.activation_checkpointing:
            # The frozen bottom of a model feeds activations that need no gradient; only the
            # non-reentrant kind carries gradients to parameters above them.
            model.gradient_checkpointing_enable({"use_reentrant": False})
            # transformers then also asks for a gradient of the embeddings' output, which only the
            # reentrant kind needs: it would send the backward pass through every frozen layer.
            model.disable_input_require_grads()
            _remove_dropout(model)

    def train(
        self, data: TrainingData, *, policy_version: int, rng: np.random.Generator
    ) -> TrainingMetrics:
        """Take ``updates_per_iteration`` steps, each on its share of the responses.

        Args:
            data: responses that have ended; at least one.
            policy_version: of the weights as they stand, which sampled this iteration's tokens.
            rng: deals the responses out to the updates.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; that update is not taken.
            LogprobMismatch: the gap to the engine stayed over its limit although the reference was
                recomputed, for ``PATIENCE`` iterations running.
        """
        optimizer = self._fresh_optimizer()
        ages = policy_version - data.batch.policy_versions
        counted = data.batch.mask > 0
        if self._config.max_staleness is not None:
            counted = counted & (ages <= self._config.max_staleness)
        reference = data.batch.logprobs
        shares = np.array_split(
            rng.permutation(len(data.batch)), self._config.updates_per_iteration
        )
        losses, norms, gap = [], [], (0.0, 0.0, 0.0)
        recomputed = False
        for number, share in enumerate(share for share in shares if len(share)):
            loss, logprobs = self._accumulate(data, counted, reference, share)
            if number == 0:
                fresh = (ages == 0) & counted
                gap = _gap(logprobs, reference, fresh, self._config.logprob_gap_limit)
                recomputed = self._check_gap(gap[0])
                if recomputed:
                    optimizer.zero_grad()
                    everyone = np.arange(len(data.batch))
                    own = self.logprobs(data.batch, counted, everyone)
                    reference = np.where(fresh, own, reference)
                    loss, _ = self._accumulate(data, counted, reference, share)
            norms.append(self._update(optimizer, loss))
            losses.append(loss)
        return TrainingMetrics(
            loss=float(np.mean(losses)),
            grad_norm=float(np.mean(norms)),
            logprob_gap_mean=gap[0],
            logprob_gap_max=gap[1],
            logprob_gap_over_limit_share=gap[2],
            reference_recomputed=recomputed,
            tokens_stale_share=float((ages[counted] > 0).mean()) if counted.any() else 0.0,
            max_staleness=int(ages[counted].max(initial=0)),
            entropy=float(-reference[counted].mean()) if counted.any() else 0.0,
        )

    @torch.no_grad()
    def logprobs(
        self, batch: Batch, wanted: np.ndarray, which: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """The policy's log-probs of the ``wanted`` tokens, float32 ``[T]``, NaN elsewhere."""
        result = np.full(len(batch.token_ids), np.nan, np.float32)
        for micro in self._micro_batches(batch, wanted, which):
            result[micro.source_t.cpu().numpy()] = self._policy.logprobs(micro).cpu().numpy()
        return result

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        """Its moments belong to the reference it was built against, and that has just changed."""
        return torch.optim.AdamW(
            self._parameters,
            lr=self._config.learning_rate,
            weight_decay=self._config.weight_decay,
            betas=(0.9, 0.95),
        )

    def _accumulate(
        self, data: TrainingData, counted: np.ndarray, reference: np.ndarray, share: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Add the gradient of the mean loss over ``share``; return it and the log-probs met."""
        total = 0.0
        met = np.full(len(reference), np.nan, np.float32)
        for micro in self._micro_batches(data.batch, counted, share):
            # transformers checkpoints in training mode only, and says nothing otherwise.
            self._policy.model.train(self._config.activation_checkpointing)
            try:
                mean, logprobs_t, count = self._loss(micro, data, reference)
            except FloatingPointError as error:
                raise self._diverged(str(error)) from error
            finally:
                self._policy.model.eval()
            loss = mean * (count / len(share))
            loss.backward()
            total += float(loss.detach())
            met[micro.source_t.cpu().numpy()] = logprobs_t.detach().cpu().numpy()
        return total, met

    def _micro_batches(
        self, batch: Batch, wanted: np.ndarray, which: Sequence[int] | np.ndarray
    ) -> Iterator[MicroBatch]:
        return micro_batches(
            batch,
            wanted,
            which,
            max_tokens=self._config.tokens_per_micro_batch,
            share_prompts=self._policy.shares_prompts,
            device=self._device,
        )

    def _responses(self, data: TrainingData, reference: np.ndarray, micro: MicroBatch) -> Responses:
        # A sequence's wanted tokens lie side by side in a micro-batch.
        members_n, response_t = torch.unique_consecutive(micro.sequence_t, return_inverse=True)
        rows = members_n.cpu().numpy()

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(self._device)

        return Responses(
            ref_logprobs_t=tensor(reference[micro.source_t.cpu().numpy()]),
            response_t=response_t,
            advantages_n=tensor(data.advantages[rows]),
            scales_n=tensor(data.scales[rows]),
            correct_n=tensor(data.correct[rows]),
        )

    def _loss(
        self, micro: MicroBatch, data: TrainingData, reference: np.ndarray
    ) -> tuple[Tensor, Tensor, int]:
        """Mean loss over the responses of a micro-batch, the log-probs met, how many responses."""
        config = self._config
        responses = self._responses(data, reference, micro)
        count = len(responses.advantages_n)
        if config.objective == "omd":
            found = self._policy.omd_loss(
                micro, responses, tau=config.tau, normalize=config.normalize
            )
            return found.loss, found.logprobs_t, count
        logprobs_t = self._policy.logprobs(micro)
        if config.objective == "reinforce":
            losses_n = objectives.reinforce(logprobs_t, responses, normalize=config.normalize)
        elif config.objective == "grpo":
            losses_n = objectives.grpo(logprobs_t, responses)
        else:
            losses_n = objectives.rest(logprobs_t, responses, normalize=config.normalize)
        return losses_n.mean(), logprobs_t, count

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
                "samples from other weights or in another precision than the trainer's. Check "
                "model.dtype and the weight hand-over, or raise trainer.logprob_gap_limit"
            )
        return True

    def _update(self, optimizer: torch.optim.Optimizer, loss: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._config.grad_clip))
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise self._diverged(f"Loss {loss} with gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def _diverged(self, what: str) -> TrainingDiverged:
        for parameter in self._parameters:
            parameter.grad = None
        return TrainingDiverged(
            f"{what}: the update was not taken. Lower trainer.learning_rate (now "
            f"{self._config.learning_rate}) or look at the rewards and log-probs of this "
            "iteration's samples"
        )


def _remove_dropout(model: nn.Module) -> None:
    """Let training mode compute what eval mode does: with dropout or jitter, trainer and engine
    would disagree on the log-probs."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def _gap(
    own: np.ndarray, engines: np.ndarray, fresh: np.ndarray, limit: float
) -> tuple[float, float, float]:
    """Over the fresh tokens that were met: mean and maximum of |Δ log-prob|, in nats, and the share
    of tokens above ``limit``."""
    delta = np.abs(own[fresh] - engines[fresh])
    delta = delta[~np.isnan(own[fresh])]
    if not len(delta):
        return 0.0, 0.0, 0.0
    return float(delta.mean()), float(delta.max()), float((delta > limit).mean())
