"""Memory of activations: what one training pass keeps, and what it recomputes to fit a budget.

A pass keeps what autograd saves, and that grows with the number of tokens. To save memory, a
decoder layer may keep only its input and be computed again in the backward pass. Of the layers that
are trained, as few as possible are recomputed, the lowest first. If recomputing all of them is not
enough, their MLPs work on ``CHUNK`` tokens at a time, too. If that is not enough either,
micro-batches get smaller.

What eager attention and masks keep, l × l for a row of l tokens, is not in the figures: the models
that need them are named at the start of a run.

``Footprint.bytes`` is the formula. Its figures are not from a table of architectures: one short
pass is run, and the tensors that autograd saves are counted.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

log = logging.getLogger(__name__)

CHUNK = 2048
"""Tokens that a recomputed MLP works on at once, if its memory has to be bounded."""

SHARE = 0.5
"""Share of the device's memory that activations may take if ``trainer.memory_gb`` is unset."""

SWITCH = "kimi_recompute"
"""Attribute of a module: whether its next pass with gradients is computed again in ``backward``."""

PROBE_TOKENS = 32
"""Tokens of the pass whose saved tensors are counted."""


@dataclass(frozen=True)
class Plan:
    """What one pass recomputes."""

    layers: int
    """Trained layers that are recomputed, the lowest first."""
    chunked: bool
    """Whether their MLPs work on ``CHUNK`` tokens at a time."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a pass keeps for each token."""

    layers: int
    """Decoder layers that are trained."""
    layer: float
    """Saved by one of them, its MLP included."""
    mlp: float
    """Saved by its MLP alone; 0 if the MLP cannot work on chunks."""
    stream: float
    """Its input: what a recomputed layer keeps."""
    rest: float
    """Saved outside the layers."""

    def bytes(self, tokens: int, plan: Plan) -> int:
        """Peak of a forward and backward pass of ``tokens`` tokens.

        That is what is kept, one recomputed layer whole, and the gradients inside its MLP, which
        are about a third of what the layer saves. With chunks the gradient of the layer's output is
        what counts. ``benches/bench_memory.py`` measures it.
        """
        kept = self.rest + (self.layers - plan.layers) * self.layer + plan.layers * self.stream
        recomputed = self.layer if plan.layers else 0.0
        if not plan.chunked:
            return int(tokens * (kept + recomputed + self.layer / 3))
        whole = kept + recomputed - self.mlp + self.stream
        return int(tokens * whole + 2 * min(tokens, CHUNK) * self.mlp)

    def plan(self, tokens: int, budget: int) -> Plan | None:
        """The plan that recomputes least and fits ``budget`` bytes; None: none does."""
        plans = [Plan(layers, False) for layers in range(self.layers + 1)]
        plans.append(self.least(tokens))
        return next((plan for plan in plans if self.bytes(tokens, plan) <= budget), None)

    def least(self, tokens: int) -> Plan:
        """The plan that takes the least memory.

        To recompute one layer saves nothing, because it is there whole while its gradient is
        computed. Chunks take more if there are few tokens.
        """
        plans = [Plan(0, False), Plan(self.layers, False)]
        if self.mlp and self.layers:
            plans.append(Plan(self.layers, True))
        return min(plans, key=lambda plan: self.bytes(tokens, plan))

    def most_tokens(self, budget: int) -> int:
        """The largest micro-batch that fits ``budget`` bytes, in tokens; 0: not even one does."""
        low, high = 0, 1 << 40
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.plan(middle, budget) else (low, middle - 1)
        return low


class Recompute:
    """Has the layers of a model recompute what does not fit.

    Without gradients, as in an engine that reads the same module, the layers compute as before.

    Args:
        model: its trained layers are those with a parameter that requires a gradient.
        memory_gb: what the activations of a pass may take, in 10⁹ bytes; None: ``SHARE`` of the
            memory of the model's device.
        sharing: ranks that divide the tokens of a pass between them.
    """

    def __init__(self, model: PreTrainedModel, memory_gb: float | None, sharing: int = 1) -> None:
        self._sharing = sharing
        self._layers = trained_layers(model)
        self._mlps = [mlp for mlp in map(_mlp, self._layers) if mlp is not None]
        self._model = model
        self._footprint: Footprint | None = None
        self._warned = False
        self.budget = self.budget_of(memory_gb, model.device)
        """Bytes."""
        for layer in self._layers:
            _let_recompute(layer, _whole)
        for mlp in self._mlps:
            _let_recompute(mlp, _in_chunks)

    @staticmethod
    def budget_of(memory_gb: float | None, device: torch.device) -> int:
        """Bytes that the activations of a pass may take."""
        return int(SHARE * device_memory(device) if memory_gb is None else memory_gb * 1e9)

    def footprint(self, run: Callable[[Tensor], Any]) -> Footprint:
        """What a pass keeps, measured once; ``run`` as for ``measure``."""
        if self._footprint is None:
            self._set(Plan(0, False))
            self._footprint = measure(self._model, run)
        return self._footprint

    def assume(self, footprint: Footprint | None, budget: int) -> None:
        """Take over what another process has measured."""
        self._footprint, self.budget = footprint or self._footprint, budget

    def most_tokens(self, wanted: int, run: Callable[[Tensor], Any]) -> int:
        """``wanted`` or, if that is too much, the size of the largest micro-batch that fits."""
        most = self._sharing * self.footprint(run).most_tokens(self.budget)
        return min(wanted, max(1, most))

    def fit(self, tokens: int) -> Plan:
        """Prepare the next pass, which has ``tokens`` tokens, and return what it will recompute.

        If nothing fits, the pass takes as little as it can, and a warning says how much.
        ``footprint`` must have been called.
        """
        footprint = self._footprint
        assert footprint is not None
        tokens = -(-tokens // self._sharing)
        plan = footprint.plan(tokens, self.budget)
        if plan is None:
            plan = footprint.least(tokens)
            if not self._warned:
                log.warning(
                    "A training pass of %d tokens needs about %.3g GB for activations, whatever is "
                    "recomputed; trainer.memory_gb allows %.3g GB",
                    tokens,
                    footprint.bytes(tokens, plan) / 1e9,
                    self.budget / 1e9,
                )
                self._warned = True
        self._set(plan)
        return plan

    def _set(self, plan: Plan) -> None:
        for number, layer in enumerate(self._layers):
            setattr(layer, SWITCH, number < plan.layers)
        for mlp in self._mlps:
            setattr(mlp, SWITCH, plan.chunked)


def measure(model: PreTrainedModel, run: Callable[[Tensor], Any]) -> Footprint:
    """The footprint of ``model``, from one pass of ``PROBE_TOKENS`` tokens.

    Args:
        run: the pass; it takes token ids, int64 ``[1, PROBE_TOKENS]``, on the model's device.

    Raises: what ``run`` raises.
    """
    layers = trained_layers(model)
    saved = _Saved(model)
    for layer in layers[:-1]:
        saved.watch(layer, "others")
    if layers:
        saved.watch(layers[-1], "layer")
        if (mlp := _mlp(layers[-1])) is not None:
            saved.watch(mlp, "mlp")
    ids = torch.ones(1, PROBE_TOKENS, dtype=torch.int64, device=model.device)
    try:
        with torch.enable_grad(), saved_tensors_hooks(saved.save, lambda nothing: nothing):
            run(ids)
    finally:
        saved.unwatch()
    of = {name: count / PROBE_TOKENS for name, count in saved.bytes.items()}
    return Footprint(
        layers=len(layers),
        layer=of["layer"] + of["mlp"],
        mlp=of["mlp"] if saved.per_token else 0.0,
        stream=saved.stream / PROBE_TOKENS,
        rest=of["rest"],
    )


class _Saved:
    """Counts the bytes that autograd saves while certain modules compute."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.bytes = {"rest": 0, "others": 0, "layer": 0, "mlp": 0}
        self.stream = 0
        """Bytes of the input of the module ``layer``."""
        self.per_token = False
        """Whether the module ``mlp`` gives a part of its tokens what it gives them among all."""
        self._where = ["rest"]
        self._parameters = {_storage(parameter) for parameter in model.parameters()}
        # Tensors are held until the end, so that no other gets the place of one in memory.
        self._seen: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def watch(self, module: nn.Module, name: str) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._where.append(name)
            if name == "layer":
                self.stream = _input(args, kwargs).nbytes

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._where.pop()
            if name == "mlp" and len(args) == 1 and not kwargs and isinstance(output, Tensor):
                with torch.no_grad():
                    part = module.forward(args[0][:, 1::2])
                whole = output[:, 1::2]
                self.per_token = part.shape == whole.shape and torch.allclose(
                    part, whole, rtol=1e-2, atol=1e-3, equal_nan=True
                )

        self._handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]

    def unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()  # With them goes the pass, and what of the weights it holds.

    def save(self, tensor: Tensor) -> None:
        """Count a tensor. Autograd keeps nothing: an output kept by the operation that made it
        would be a circle, which would keep all weights for ever."""
        place = _storage(tensor)
        if place not in self._seen and place not in self._parameters:
            self._seen[place] = tensor
            self.bytes[self._where[-1]] += tensor.untyped_storage().nbytes()


def trained_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers with a parameter that requires a gradient, lowest first.

    Empty for a model whose layers transformers cannot recompute.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return [m for m in layers if any(p.requires_grad for p in m.parameters())]


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine as far as its control group may use it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [machine]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def _let_recompute(module: nn.Module, compute: Callable[..., Any]) -> None:
    """Give a module the attribute ``SWITCH``, off at first.

    The module gets a class with another ``forward``, as FSDP2 does it. A replaced method of the
    module would still compute with this module's weights in a copy of it.
    """
    plain = type(module)
    if hasattr(module, SWITCH):
        return

    @wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, SWITCH) and torch.is_grad_enabled():
            return compute(partial(plain.forward, self), *args, **kwargs)
        return plain.forward(self, *args, **kwargs)

    contents = {"forward": forward, SWITCH: False, "__module__": plain.__module__}
    module.__class__ = type(plain.__name__, (plain,), contents)


def _whole(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Only the non-reentrant kind carries gradients to parameters above frozen layers.
    return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _in_chunks(plain: Callable[..., Any], hidden_rld: Tensor) -> Tensor:
    parts = [_whole(plain, part) for part in hidden_rld.split(CHUNK, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _mlp(layer: nn.Module) -> nn.Module | None:
    found = getattr(layer, "mlp", None)
    return found if isinstance(found, nn.Module) else None


def _input(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
