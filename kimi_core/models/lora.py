"""LoRA adapters (Hu et al. 2021) through `peft`, and the plain model that everybody else sees.

An adapter adds (alpha / rank) · B A to the weight of a linear layer. The trainer trains A and B,
and the model's own weights are frozen. An engine and a checkpoint have plain weights, in which the
product is merged. They are made one matrix at a time, and the frozen weight is never written: a run
that merged into it and took the product out again would collect rounding errors, and could not
resume exactly.
"""

import copy
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kimi_core.config import Config, LoraConfig, TrainerConfig
from kimi_core.models.placement import freeze_below

ADAPTER = "default"
"""The name that peft gives an adapter."""


def check_lora(config: Config) -> None:
    """Refuse adapters that cannot work, before a model is loaded.

    Raises:
        ValueError: peft is missing, or the model is one from scratch.
    """
    if not config.trainer.lora.rank:
        return
    if find_spec("peft") is None:
        raise ValueError(
            f"trainer.lora.rank = {config.trainer.lora.rank} needs peft: "
            "pip install 'kimi-core[lora]'"
        )
    if config.model.name == "scratch":
        raise ValueError(
            "trainer.lora with model.name = 'scratch': the weights under the adapters would stay "
            "random; set trainer.lora.rank=0, or name a trained model"
        )


def choose_trained(model: PreTrainedModel, trainer: TrainerConfig, seed: int) -> None:
    """Let the top layers be trained, or adapters in them, as the config says.

    Args:
        seed: of the adapters' first matrices; the second ones are 0, so nothing changes at first.

    Raises:
        ValueError: the model has not that many layers, or no layer that is to be adapted.
    """
    freeze_below(model, trainer.trainable_layers)
    if trainer.lora.rank:
        _add_adapters(model, trainer.lora, _targets(model, trainer), seed)


def _targets(model: PreTrainedModel, trainer: TrainerConfig) -> list[str]:
    """Names of the linear layers that get an adapter."""
    layers = list(getattr(model.get_decoder(), "layers", ()))
    top = layers[-(trainer.trainable_layers or 0) :]
    chosen = {id(inner) for one in top for inner in one.modules()}
    linear = [
        name
        for name, module in model.named_modules()
        if id(module) in chosen and isinstance(module, nn.Linear | Conv1D)
    ]
    wanted = set(trainer.lora.targets)
    there = sorted({name.rpartition(".")[2] for name in linear})
    if not linear or wanted - set(there):
        raise ValueError(
            f"trainer.lora.targets = {trainer.lora.targets}; the layers of "
            f"{type(model).__name__} have {', '.join(there) or 'no linear layers'}"
        )
    return [name for name in linear if not wanted or name.rpartition(".")[2] in wanted]


def _add_adapters(model: PreTrainedModel, lora: LoraConfig, targets: list[str], seed: int) -> None:
    from peft import LoraConfig as Settings  # Slow to load, and an extra.
    from peft import inject_adapter_in_model

    alpha = lora.alpha or 2 * lora.rank
    settings = Settings(r=lora.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, ADAPTER)
    model.eval()


def plain_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters as a model without adapters has them; a merged one is made when asked.

    Without adapters these are the model's own parameters.
    """
    return _plain(model, model.named_parameters())


def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The same for a ``state_dict``."""
    return dict(_plain(model, model.state_dict().items()))


def plain_module(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree without adapters, for an engine to read.

    Adapted weights have memory there, and are unmerged at first. All others are shared.
    """
    shared: dict[int, Any] = {id(one): one for one in chain(model.parameters(), model.buffers())}
    plain = copy.deepcopy(model, shared).eval()
    for name, layer in _adapted(plain).items():
        own: Any = layer.base_layer
        own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)
        plain.set_submodule(name, own)
    return plain


def adapted_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights under adapters, of which an engine has another, merged copy."""
    weights = [layer.base_layer.weight for layer in _adapted(model).values()]
    return sum(one.numel() * one.element_size() for one in weights)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Name → layer with an adapter."""
    has = ("base_layer", "get_delta_weight")
    modules = model.named_modules()
    return {name: one for name, one in modules if all(hasattr(one, attribute) for attribute in has)}


@torch.no_grad()
def _plain(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    adapted = _adapted(model)
    for name, tensor in named:
        layer, _, leaf = name.partition(".base_layer.")
        if layer in adapted and leaf == "weight":
            yield f"{layer}.weight", _merged(tensor, adapted[layer])
        elif layer in adapted and leaf:
            yield f"{layer}.{leaf}", tensor
        elif name.partition(".lora_")[0] not in adapted:
            yield name, tensor


def _merged(weight: Tensor, layer: Any) -> Tensor:
    """W + (alpha / rank) · B A, rounded once; of a sharded weight this rank's part of it."""
    product = layer.get_delta_weight(ADAPTER)
    if isinstance(weight, DTensor):
        product = product.redistribute(weight.device_mesh, weight.placements)
    return product.add_(weight.to(product.dtype)).to(weight.dtype)
