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


def divide(policy: Policy, mesh: DeviceMesh, unit: nn.Module) -> None:
    """Replace a unit's parameters by this rank's parts, and let its modules exchange results.

    Call it for each decoder layer, and then for the policy.

    Args:
        mesh: of one dimension. ``plan_of`` the model raises nothing.
        unit: of the policy; its parameters are whole.
    """
    model = policy.model
    plan = plan_of(model.config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.base_model.named_modules()}
    tied = head.weight is embedding.weight
    for module in unit.modules():
        owned = dict(module.named_parameters(recurse=False))
        if not owned or any(isinstance(p, DTensor) for p in owned.values()) or module is head:
            continue
        style = next((plan[some] for some in plan if fnmatch(names[module], some)), None)
        if module is embedding:
            _parallelize(module, mesh, RowwiseParallel(input_layouts=Replicate()))
        elif style in STYLES:
            _parallelize(module, mesh, STYLES[style]())
        else:
            _replicate(module, mesh, heads=style is not None)
    if unit is policy:
        for name, parameter in head.named_parameters():
            part = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            head.register_parameter(name, nn.Parameter(part, parameter.requires_grad))
        if tied:
            head.weight = embedding.weight
        policy.tp_group = mesh.get_group()


def _parallelize(module: nn.Module, mesh: DeviceMesh, style: ParallelStyle) -> None:
    # Every rank has the whole parameters, so nothing has to be sent.
    parallelize_module(module, mesh, style, src_data_rank=None)


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

    def keep(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            same = DTensor.from_local(parameter.detach(), mesh, [Replicate()], run_check=False)
            module.register_parameter(name, nn.Parameter(same, parameter.requires_grad))

    distribute_module(module, mesh, keep, enter, leave)
