"""Blocks of tensors between rank 0 and the ranks that cannot open its files.

Files and shared memory of a run are on rank 0's host. A rank on another host sends what it would
write there to rank 0, and rank 0 reads for it. One tensor is on its way at a time, so nobody holds
the whole model. Tensors go over the ranks' process group, with its time limit.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def send(tensors: Iterable[tuple[Any, Tensor]], to: int) -> None:
    """Send tensors, each with something that tells what it is, to rank ``to``; it receives."""
    for told, tensor in tensors:
        held = tensor.detach().cpu().contiguous()
        dist.send_object_list([(told, held.shape, held.dtype)], to)
        if held.numel():
            dist.send(held, to)
    dist.send_object_list([None], to)


def receive(source: int) -> Iterator[tuple[Any, Tensor]]:
    """What rank ``source`` sends, one after another. Take all, or the next message is mistaken."""
    while True:
        box: list[Any] = [None]
        dist.recv_object_list(box, source)
        if box[0] is None:
            return
        told, shape, dtype = box[0]
        held = torch.empty(shape, dtype=dtype)
        if held.numel():
            dist.recv(held, source)
        yield told, held
