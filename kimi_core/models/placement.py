"""Where a model runs and which of its parameters train: device, dtype, threads, frozen layers."""

import os

import torch
from transformers import PreTrainedModel

THREADS_PAY_FROM = 1_000_000
"""Parameters from which a second CPU thread pays. The default run has 0.2 million and took 3 to 4
CPU-minutes with one thread, and 10 with two, which mostly waited for each other."""


def device_of(name: str) -> torch.device:
    """The device that ``model.device`` names; ``auto`` is a GPU if there is one.

    Raises:
        ValueError: the name is unknown, or torch sees no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"model.device = {name!r}; allowed are auto, cpu, cuda, cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"model.device = {name!r}: torch sees {torch.cuda.device_count()} GPUs here; "
            "give auto or cpu"
        )
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The data type that ``model.dtype`` names; ``auto`` is float32 on a CPU, else bfloat16.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype = {name!r}; allowed are auto, float32, bfloat16")
    return getattr(torch, name)


def check_gpus(device: torch.device, ranks: int) -> None:
    """Refuse more ranks than GPUs: rank i of a trainer takes the i-th.

    Raises:
        ValueError: there are too few.
    """
    there = torch.cuda.device_count()
    if ranks > 1 and device.type == "cuda" and there < ranks:
        raise ValueError(
            f"trainer.ranks = {ranks}: torch sees {there} GPUs here, and each rank takes one; "
            f"give at most {there}"
        )


def limit_threads(model: PreTrainedModel, ranks: int = 1) -> None:
    """Let torch use one CPU thread if the model is too small for more.

    A larger model gets this process's share, if ``ranks`` processes train it on one host. This
    holds for the whole process. OMP_NUM_THREADS takes precedence if it is set.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    if model.num_parameters() < THREADS_PAY_FROM:
        torch.set_num_threads(1)
    elif ranks > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))


def freeze_below(model: PreTrainedModel, trainable_layers: int | None) -> None:
    """Train only the top ``trainable_layers`` decoder layers and the final norm; None: everything.

    All other parameters, tied embeddings included, get ``requires_grad = False``.

    Raises:
        ValueError: the model has not that many layers, or another structure.
    """
    if trainable_layers is None:
        model.requires_grad_(True)
        return
    decoder = model.get_decoder()
    if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        raise ValueError(
            f"Cannot freeze layers of {type(model).__name__}: its decoder has no `layers` and "
            "`norm`; leave trainer.trainable_layers unset"
        )
    total = len(decoder.layers)
    if not 1 <= trainable_layers <= total:
        raise ValueError(
            f"trainer.trainable_layers = {trainable_layers}: the model has {total} layers; give "
            f"1 to {total}, or leave it unset to train everything"
        )
    model.requires_grad_(False)
    decoder.layers[total - trainable_layers :].requires_grad_(True)
    decoder.norm.requires_grad_(True)
