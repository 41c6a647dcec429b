"""How the ranks divide a policy: FSDP2, replicas, tensor and context parallelism, and any product.

Rank = ((replica · shards + shard) · context_parallel + c) · tensor_parallel + t.

* The ranks of a *replica* shard its parameters with FSDP2, over shard and c together. A decoder
  layer is gathered when it computes; embeddings, final norm and head are gathered by the policy,
  the root. Gradients, float32 masters and moments are sharded as the parameters are.
* The t of a *tensor-parallel* group divide heads, widths and vocabulary (``tensor.py``).
* The c of a *context-parallel* group divide the columns of a row (``context.py``).

FSDP2 averages gradients over all ranks but t, so a rank multiplies its part of the loss by their
number (``Policy.averaged_over``).

Layer by layer, rank 0 sends the weights and each rank keeps its part. The other ranks may begin
without weights (``blueprint.py``), and never hold more than one layer whole.
"""

import math
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from kimi_core.config import TrainerConfig
from kimi_core.trainer.context import ContextParallel
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks, is_lost
from kimi_core.trainer.tensor import divide, plan_of


def shard(policy: Policy, config: TrainerConfig, ranks: Ranks) -> None:
    """Replace the policy's parameters by this rank's parts. One rank keeps the policy as it is.

    Gradients are summed in float32 whatever the model's dtype is.

    Raises:
        ValueError: the model cannot be divided in this way.
    """
    if ranks.size == 1:
        return
    layers, before = decoder_layers(policy.model), None
    if ranks.copies > 1 and ranks.rank == 0:
        before = _sample(policy)
    if config.context_parallel > 1 and policy.layout != "end_to_end":
        raise ValueError(
            f"trainer.context_parallel = {config.context_parallel}: the attention of "
            f"{type(policy.model).__name__} cannot be told where the sequences of a row begin; "
            "set trainer.context_parallel = 1"
        )
    context, tensor = config.context_parallel, config.tensor_parallel
    device = torch.device(ranks.everywhere(policy.model.device.type))
    shape = (config.replicas, ranks.size // config.replicas // tensor, tensor)
    mesh = _mesh(device, shape, ("replicas", "shards", "tensor"), config)
    if context > 1:
        shape = (ranks.data_parallel, context, tensor)
        groups = _mesh(device, shape, ("data", "context", "tensor"), config)
        policy.context = ContextParallel(groups.get_group("context"))
        policy.masks_up_to = 0
    policy.averaged_over = ranks.size // tensor
    # With two dimensions FSDP2 replicates over the first.
    places = mesh["replicas", "shards"] if config.replicas > 1 else mesh["shards"]
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for unit in (*layers, policy):
        receive(unit, device)
        if tensor > 1:
            divide(policy, mesh["tensor"], unit)
        fully_shard(unit, mesh=places, mp_policy=precision)
    if ranks.copies > 1:
        _compare(policy, ranks.everywhere(before))


def receive(unit: torch.nn.Module, device: torch.device) -> None:
    """Give a module the parameters and buffers that it has on rank 0. All ranks call this.

    Args:
        unit: modules that share a tensor still share it after. What is sharded is passed over.
        device: where they get memory if they are on torch's meta device.
    """
    received: dict[int, tuple[Tensor, Tensor]] = {}
    for module in unit.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for owned in tables:
            for name, tensor in owned.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in received:
                    whole = _with_memory(tensor, device)
                    dist.broadcast(whole.detach(), 0)
                    # The key belongs to a tensor that is alive.
                    received[id(tensor)] = tensor, whole
                owned[name] = received[id(tensor)][1]


def _with_memory(tensor: Tensor, device: torch.device) -> Tensor:
    if not tensor.is_meta:
        return tensor
    whole = torch.empty_like(tensor, device=device)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(whole, requires_grad=tensor.requires_grad)
    return whole


def _sample(policy: Policy) -> np.ndarray:
    """Log-probs of two made-up sequences, float64."""
    rng = np.random.default_rng(0)
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    sequences = [rng.integers(vocabulary, size=length).astype(np.int32) for length in (12, 5)]
    return np.concatenate([logprobs for _, logprobs in policy.on_sequences(sequences)])


def _compare(policy: Policy, before: np.ndarray) -> None:
    """Refuse a model that computes something else once it is divided.

    Raises:
        ValueError: on every rank.
    """
    try:
        gap, why = np.abs(_sample(policy) - before).max(), "its log-probs would differ by {:.3g}"
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if isinstance(error, RuntimeError) and is_lost(error):
            raise
        gap, why = math.inf, str(error)
    policy.forget_gathered()
    exact = next(policy.parameters()).dtype in (torch.float32, torch.float64)
    if gap > (3e-5 if exact else 0.05) * (1 + np.abs(before).max()):
        raise ValueError(
            f"trainer.tensor_parallel and trainer.context_parallel cannot divide "
            f"{type(policy.model).__name__}: {why.format(gap)}; set both to 1"
        )


def check_axes(model: PretrainedConfig, trainer: TrainerConfig) -> None:
    """Refuse axes that do not divide a model; its weights need not be loaded.

    Raises:
        ValueError: a setting and what it should divide are named.
    """
    tensor, context = trainer.tensor_parallel, trainer.context_parallel
    if tensor == context == 1:
        return
    text = model.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if tensor > 1:
        plan_of(model)
        sizes = {
            "attention heads": heads,
            "heads of keys and values": kv_heads,
            "columns in its MLP": text.intermediate_size,
        }
        for name, size in sizes.items():
            if size % tensor:
                raise ValueError(
                    f"trainer.tensor_parallel = {tensor} does not divide the model's {size} {name}"
                )
    if context > 1:
        own, kept = heads // tensor, kv_heads // tensor
        if own % context or (kept % context and context % kept):
            each = f" for each tensor-parallel rank ({own} and {kept})" if tensor > 1 else ""
            raise ValueError(
                f"trainer.context_parallel = {context} has to divide the model's {heads} attention "
                f"heads{each}, and to divide its {kv_heads} heads of keys and values or be a "
                "multiple of them"
            )


def _mesh(
    device: torch.device, shape: tuple[int, ...], names: tuple[str, ...], config: TrainerConfig
) -> DeviceMesh:
    """A mesh whose groups have the time limit of the config."""
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():
        group.set_timeout(timedelta(seconds=config.ranks_timeout_s))
    return mesh


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder layers, lowest first.

    Raises:
        ValueError: they are not where models of transformers have them.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not layers:
        raise ValueError(
            f"Cannot shard {type(model).__name__}: its decoder has no `layers`; set "
            "trainer.ranks = 1"
        )
    return list(layers)
