"""Settings of the trainer that a few runs need: ablations, schedules, and adapters."""

from typing import Literal

from pydantic import Field

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
    alpha: float | None = Field(None, gt=0)
    """An adapter's product counts alpha / rank times. Unset: twice the rank."""
    targets: list[str] = []
    """Names of the linear layers that get an adapter, such as `["q_proj", "v_proj"]`. Empty: all
    but the output head."""
