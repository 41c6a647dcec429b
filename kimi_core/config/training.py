"""Settings of the trainer: objective, optimizer, schedule, adapters, memory, and ranks."""

from typing import Literal

from pydantic import Field, model_validator

from kimi_core.config.section import Section
from kimi_core.types import Normalize


class AblationConfig(Section):
    normalize: Normalize = "none"
    """Divide each response's summed log-probs by its `length`, by the root of its length
    (`sqrt_length`), or (the report) by `none`."""
    baseline: Literal["mean", "log_partition"] = "mean"
    """Estimate of τ log Z: the group's mean reward, as the report does in practice, or
    τ log mean exp(r/τ)."""
    release: Literal["response", "group"] = "response"
    """Train a response in the iteration in which it ends, or when its whole group has ended. Both
    are the same without a token budget."""


class ScheduleConfig(Section):
    shape: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of all steps over which the learning rate rises to its peak; 0: none."""
    lowest: float = Field(0.1, ge=0, le=1)
    """What it falls to at the last step, as a share of the peak."""


class SftScheduleConfig(ScheduleConfig):
    shape: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of all steps over which the learning rate rises to its peak; 0: none."""


class LoraConfig(Section):
    rank: int = Field(0, ge=0)
    """Rank of the adapters, which are trained in place of the model's own weights. 0: no adapters.
    Needs `pip install 'kimi-core[lora]'`."""
    alpha: int | None = Field(None, ge=1)
    """An adapter's product counts alpha / rank times. Unset: twice the rank."""
    targets: list[str] = []
    """Names of the linear layers that get an adapter, such as `["q_proj", "v_proj"]`. Empty: all
    but the output head."""


class TrainerConfig(Section):
    objective: str = "omd"
    """`omd` is the report's mirror descent; `reinforce`, `grpo` and `rest` are there to compare
    with. `file.py:function` names one of yours; `trainer/objectives.py` has the signature."""
    tau: float = 0.01
    """τ > 0: strength of the pull towards the policy that sampled (section 2.3.2)."""
    ablation: AblationConfig = AblationConfig()
    """Choices that the report makes for you, with what they can be compared with."""
    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Learning rate of AdamW; the peak of the schedule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate changes over the iterations of the run."""
    updates_per_iteration: int = Field(2, ge=1)
    """Optimizer steps per iteration, each on its share of the groups."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    max_staleness: int | None = Field(None, ge=0)
    """Most versions that a token's weights may lie back; older tokens stay out of the loss. Unset:
    all tokens count."""
    tokens_per_micro_batch: int = Field(16384, ge=1)
    """Tokens in one forward and backward pass, padding included; fewer if `memory_gb` is less."""
    head_chunk: int = Field(1024, ge=1)
    """Rows of logits that exist at once."""
    trainable_layers: int | None = Field(None, ge=1)
    """Number of top layers to train, with the final norm. Unset: everything is trained."""
    lora: LoraConfig = LoraConfig()
    """Adapters that are trained in place of the model's weights, in `trainable_layers` or all."""
    memory_gb: float | None = Field(None, gt=0)
    """What the activations of a training pass may take, in 10⁹ bytes. To fit, layers compute their
    activations twice, and micro-batches get smaller. Unset: half of the device's memory."""
    ranks: int = Field(1, ge=1)
    """Processes that train together on this host, each with its part of the parameters, gradients
    and optimizer (FSDP2), over gloo on a CPU and NCCL on GPUs, one GPU each. 1: the run's process
    alone. A multiple of `replicas` · `context_parallel` · `tensor_parallel`."""
    tensor_parallel: int = Field(1, ge=1)
    """Ranks that divide the heads, widths and vocabulary of the model between them."""
    context_parallel: int = Field(1, ge=1)
    """Ranks that divide the tokens of a micro-batch between them (Ulysses): for long responses."""
    replicas: int = Field(1, ge=1)
    """Copies of the sharded parameters (HSDP); each is sharded over `ranks` / `replicas` ranks."""
    ranks_timeout_s: float = Field(300.0, gt=0)
    """Longest wait of one rank for the others, in seconds; longer than a training pass takes."""
    logprob_gap_limit: float = Field(0.05, gt=0)
    """Largest mean |Δ log-prob| between engine and trainer on fresh tokens, in nats. Above it the
    trainer recomputes the reference; three iterations in a row stop the run."""

    @model_validator(mode="after")
    def _adapters_are_not_divided(self) -> "TrainerConfig":
        if self.lora.rank and self.tensor_parallel > 1:
            raise ValueError(
                f"trainer.lora.rank = {self.lora.rank} with trainer.tensor_parallel = "
                f"{self.tensor_parallel}: there is no plan for dividing adapters by heads and "
                "widths; set trainer.tensor_parallel=1, and the ranks shard them"
            )
        return self

    @model_validator(mode="after")
    def _axes_divide_the_ranks(self) -> "TrainerConfig":
        axes = ("replicas", "context_parallel", "tensor_parallel")
        product = self.replicas * self.context_parallel * self.tensor_parallel
        if self.ranks % product:
            given = ", ".join(f"{axis} = {getattr(self, axis)}" for axis in axes)
            raise ValueError(
                f"trainer.ranks = {self.ranks} is not a multiple of {product}, the product of "
                f"trainer.{given}: give {product} ranks or a multiple of it"
            )
        return self

    @model_validator(mode="after")
    def _tau_is_positive(self) -> "TrainerConfig":
        if not self.tau > 0:
            raise ValueError(
                f"trainer.tau = {self.tau}: the regulariser must be greater than 0 "
                "(0.01 is a good start)"
            )
        return self
