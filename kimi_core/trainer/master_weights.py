"""float32 master weights: what the optimizer updates when the model computes in 16 bits.

A bfloat16 weight has 8 significant bits. An update below 1/512 of the weight is lost when it is
added to such a weight, and AdamW's updates are about as large as the learning rate. The optimizer
therefore updates float32 copies, the masters, and each step rounds the masters into the model.
Gradients of micro-batches are summed in float32 as well.

Rounding to the nearest would still hide small updates. A model that was loaded in bfloat16 starts
in the middle between two rounding limits, so at a learning rate of 1e-6 most weights would not move
for a hundred updates. Each weight of a bfloat16 model therefore has a rounding limit that is drawn
at random, once. The model then moves as far as its masters, on average over the weights. The same
masters always give the same model, so a resumed run needs nothing but the masters.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kimi_core.trainer.ranks import Ranks

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class MasterWeights:
    """The trained parameters with their masters. A parameter of 32 or 64 bits is its own master.

    Args:
        parameters: name → parameter, collected before any forward pass, because a sharded policy
            shows gathered copies between a forward pass and the end of its backward pass.
        ranks: that hold the parameters; None: this process alone.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._parameters = dict(parameters)
        self.masters = {name: _master(parameter) for name, parameter in parameters.items()}
        """Name → master, in the order of ``parameters``."""

    def hold(self, parameters: Mapping[str, nn.Parameter]) -> str | None:
        """The name of a parameter that is missing here; None if all are here."""
        held = {id(parameter) for parameter in self._parameters.values()}
        return next((name for name, p in parameters.items() if id(p) not in held), None)

    def adamw(self, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
        """A new optimizer of the masters, without moments.

        It reads and writes each tensor once, in a third of the time of torch's default on a CPU.
        """
        return torch.optim.AdamW(
            list(self.masters.values()),
            lr=learning_rate,
            weight_decay=weight_decay,
            betas=(0.9, 0.95),
            fused=True,
        )

    def add_gradients(self) -> None:
        """Move the parameters' gradients to the masters. Call it after every backward pass."""
        for parameter, master in self._in_16_bits():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def clip_gradients(self, largest_norm: float) -> float:
        """Scale the gradients to at most ``largest_norm``; return their norm before that."""
        if self._ranks.size == 1:
            return float(nn.utils.clip_grad_norm_(self.masters.values(), largest_norm))
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        squares = sum(float(local(one).double().square().sum()) / _held(one) for one in gradients)
        norm = math.sqrt(float(self._ranks.sum(squares)))
        for gradient in gradients:
            local(gradient).mul_(min(1.0, largest_norm / (norm + 1e-6)))
        return norm

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the masters, round them into the model, and drop the gradients."""
        optimizer.step()
        optimizer.zero_grad()
        self._round()

    def drop_gradients(self) -> None:
        """Forget the gradients of parameters and masters."""
        for tensor in (*self._parameters.values(), *self.masters.values()):
            tensor.grad = None

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Copy ``saved`` tensors into masters and parameters: by name, of a shard its rows."""
        for name, master in self.masters.items():
            local(master).copy_(saved[name])
        self._round()

    def _round(self) -> None:
        for seed, (parameter, master) in enumerate(self._in_16_bits()):
            to, exact = local(parameter), local(master)
            to.copy_(_dithered(exact, seed) if to.dtype == torch.bfloat16 else exact)

    def _in_16_bits(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs = ((p, self.masters[name]) for name, p in self._parameters.items())
        return [(parameter, master) for parameter, master in pairs if parameter is not master]


def _dithered(exact: Tensor, seed: int) -> Tensor:
    """Round float32 to bfloat16, up with the probability that makes the mean exact.

    A bfloat16 is the upper half of a float32. Adding a random lower half and cutting the sum off
    carries into the upper half with a probability equal to the part that is cut off.
    """
    generator = torch.Generator(exact.device).manual_seed(seed)
    dither = torch.randint(
        1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator
    )
    return ((exact.view(torch.int32) + dither) & -(1 << 16)).view(torch.float32).bfloat16()


def local(tensor: Tensor) -> Tensor:
    """The tensor, or this rank's part of a sharded one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _held(tensor: Tensor) -> int:
    """Number of ranks that hold the same part of a sharded tensor."""
    assert isinstance(tensor, DTensor)
    pairs = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in pairs if placement.is_replicate())


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype not in SIXTEEN_BITS:
        return parameter
    return nn.Parameter(parameter.detach().float())
