"""Tensor parallelism: the ranks of a group divide heads, widths and vocabulary of a policy.

What is divided how is what transformers says of the architecture (``base_model_tp_plan``). The
embedding and the head are divided by tokens, tied or not, and the loss unites their log-sum-exps
(``kernels.tiles``). Every other parameter is the same on all ranks, as are the hidden states
between layers.
"""

from fnmatch import fnmatch
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import PretrainedConfig

from kimi_core.trainer.policy import Policy

HEADS = 2
"""The dimension of the heads where norms see them, ``[rows, columns, heads, head_dim]``."""


def divide(policy: Policy, mesh: DeviceMesh) -> None:
    """Replace the policy's parameters by this rank's parts, and let its modules exchange results.

    Args:
        mesh: of one dimension. ``check_plan`` holds for the model.
    """
    model = policy.model
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    plan = plan_of(model.config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for name, module in model.base_model.named_modules():
        style = next((plan[some] for some in plan if fnmatch(name, some)), None)
        if module is embedding:
            parallelize_module(module, mesh, RowwiseParallel(input_layouts=Replicate()))
        elif style in STYLES:
            parallelize_module(module, mesh, STYLES[style]())
        elif any(True for _ in module.parameters(recurse=False)):
            _replicate(module, mesh, heads=style is not None)
    for name, parameter in head.named_parameters():
        if name != "weight" or not tied:
            head.register_parameter(
                name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)]))
            )
    if tied:
        head.weight = embedding.weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    policy.tp_group = mesh.get_group()


STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}

NORM_OF_HEADS = "replicated_with_grad_allreduce"


def plan_of(config: PretrainedConfig) -> dict[str, str]:
    """Names of modules, as patterns, and how they are divided.

    Raises:
        ValueError: transformers has no plan for this architecture, or one with other styles.
    """
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    known = {*STYLES, NORM_OF_HEADS}
    odd = next((f"{name}: {style}" for name, style in plan.items() if style not in known), None)
    if not plan or odd:
        raise ValueError(
            f"trainer.tensor_parallel above 1 does not know how to divide {config.model_type} "
            f"({odd or 'transformers has no plan for it'}); set trainer.tensor_parallel = 1"
        )
    return plan


def _replicate(module: nn.Module, mesh: DeviceMesh, *, heads: bool) -> None:
    """Every rank keeps the module's parameters, and computes what it computes.

    Args:
        heads: its input has this rank's heads, so gradients are summed over the ranks.
    """
    placement = Shard(HEADS) if heads else Replicate()

    def enter(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(inputs[0], mesh, [placement], run_check=False), *inputs[1:]

    def leave(_: nn.Module, output: Any, __: DeviceMesh) -> Any:
        return output.to_local()

    distribute_module(module, mesh, None, enter, leave)
