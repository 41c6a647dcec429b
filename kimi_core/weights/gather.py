"""From a model's tensors to the arrays that are copied into a slot, with all checks."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from kimi_core.weights.layout import Layout, Part

NamedTensors = Mapping[str, Any] | Iterable[tuple[str, Any]]
"""Hugging Face names with tensors, or with numpy arrays of float32 or float16."""

Source = tuple[np.ndarray, str, str, int]
"""Elements as numpy holds them, their dtype, the dtype to cast to, and the offset in the slot."""

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def sources_of(named_tensors: NamedTensors, layout: Layout) -> list[Source]:
    """The arrays to copy, in the order of the slot; views of the tensors where possible.

    Raises:
        ValueError: names are missing, unknown or given twice, or a shape or dtype is wrong.
    """
    given = _by_name(named_tensors, layout)
    sources = []
    for entry in layout.entries:
        row_bytes = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
        for part in entry.parts:
            array, dtype = _checked(given[part.name], part, entry.dtype)
            if array.size:  # With a small vocabulary, a rank may have no rows.
                sources.append((array, dtype, entry.dtype, entry.offset + part.row * row_bytes))
    return sources


def _by_name(named_tensors: NamedTensors, layout: Layout) -> dict[str, torch.Tensor]:
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    given: dict[str, torch.Tensor] = {}
    for name, value in pairs:
        if name in given:
            raise ValueError(f"Cannot publish: {name} is given twice")
        given[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
    unknown = sorted(given.keys() - layout.by_hf_name.keys())
    missing = [name for name in layout.by_hf_name if name not in given.keys() | layout.tied.keys()]
    if unknown or missing:
        raise ValueError(
            f"Cannot publish: {_some(missing)} missing, and {_some(unknown)} unknown to the "
            "layout; give the tensors of the model that the layout was made from, under its names"
        )
    for alias, name in layout.tied.items():
        if alias in given and not _is_same(given[alias], given[name]):
            raise ValueError(
                f"Cannot publish: {alias} is tied to {name} in the layout, but here it is another "
                "tensor; make the layout from this model's config"
            )
    return given


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.dtype, a.device) == (b.data_ptr(), b.shape, b.dtype, b.device)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} names are" + (f" ({shown})" if names else "")


def _checked(tensor: torch.Tensor, part: Part, dtype: str) -> tuple[np.ndarray, str]:
    """The part of a tensor as a numpy array, and its dtype. Copied only if the tensor is on a GPU
    or its part is not contiguous."""
    if (tuple(tensor.shape) or (1,)) != part.whole:
        raise ValueError(
            f"Cannot publish {part.name}: its shape is {list(tensor.shape)}, but the layout has "
            f"{list(part.whole)}"
        )
    name = _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
    if name not in (dtype, "float32"):
        raise ValueError(
            f"Cannot publish {part.name} as {name} into an arena of {dtype}; allowed are "
            f"{dtype} and float32"
        )
    taken = tensor.reshape(part.whole)[part.index]
    if taken.is_cuda:  # Casting on the GPU first halves the bytes of the copy.
        taken, name = taken.to(getattr(torch, dtype)).cpu(), dtype
    if taken.dtype == torch.bfloat16:
        taken = taken.view(torch.int16)  # numpy has no bfloat16.
    if part.dim == 0 or taken.stride(-1) != 1:
        taken = taken.reshape(-1)
    return taken.numpy(), name
