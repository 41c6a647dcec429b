"""Sharding a policy over the ranks with FSDP2: each rank keeps 1/n of every parameter's rows.

Parameters, gradients, float32 masters and moments are sharded. A decoder layer is gathered when it
computes; embeddings, final norm and head are gathered by the policy, the root. FSDP2 averages
gradients over the ranks, so a rank multiplies its part of the loss by their number.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks


def shard(policy: Policy, ranks: Ranks) -> None:
    """Replace the policy's parameters by this rank's shards. One rank keeps the policy as it is.

    Gradients are summed in float32 whatever the model's dtype is.
    """
    if ranks.size == 1:
        return
    mesh = init_device_mesh(policy.model.device.type, (ranks.size,))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in decoder_layers(policy.model):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)


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
