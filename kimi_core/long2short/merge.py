"""Averages the weights of models in Hugging Face format, tensor by tensor (section 2.4).

Every file of the result has the header of the first model's file of that name. Names, shapes, types
and places of the tensors are therefore the first model's, and so are shards, their index and tied
weights. The other models may be sharded otherwise.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from kimi_core.models.fingerprint import VOLATILE_SETTINGS
from kimi_core.models.load import check_folder

INDEX = "model.safetensors.index.json"
LOADING = (*VOLATILE_SETTINGS, "torch_dtype")
"""Settings of a model that say how it was saved, and not what it computes."""


def merge(models: Sequence[str | Path], out: Path, weights: Sequence[float] = ()) -> None:
    """Write the model whose weights are the average of others' to the folder ``out``.

    Sums are taken in float64 and rounded once. One tensor of each model is in memory at a time.

    Args:
        models: at least two folders with config.json, *.safetensors and a tokenizer.
        out: a folder that does not exist.
        weights: one for each model, above 0; only their ratios matter. None: all the same.

    Raises:
        ValueError: a folder holds no model, the weights do not fit, or the models are unlike:
            in their settings, their tokenizers, or the names, shapes or types of their tensors.
            Nothing is written then.
    """
    folders = [Path(model) for model in models]
    shares = _shares(folders, weights or [1.0] * len(folders))
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"No model folder {folder}; merging needs a local folder of each")
        check_folder(folder)
    _check_settings(folders)
    _check_tokenizers(folders)
    with ExitStack() as stack:
        readers = [_Reader(folder, stack) for folder in folders]
        for other in readers[1:]:
            _check_tensors(readers[0], other)
        out.mkdir(parents=True)
        for path in sorted(folders[0].iterdir()):
            if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
                shutil.copyfile(path, out / path.name)
        for name in sorted(set(readers[0].files.values())):
            _write(folders[0] / name, out / name, readers, shares)


class _Reader:
    """The tensors of one model by name, read when they are asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        """Tensor → the file that holds it."""
        self._open: dict[str, Any] = {}
        for name in _weight_files(folder):
            file = self._open[name] = stack.enter_context(safe_open(folder / name, "pt"))
            self.files |= dict.fromkeys(file.keys(), name)

    def kind(self, name: str) -> tuple[list[int], str]:
        """Shape and type of a tensor."""
        piece = self._open[self.files[name]].get_slice(name)
        return piece.get_shape(), piece.get_dtype()

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self._open[self.files[name]].get_tensor(name)
        return found


def _weight_files(folder: Path) -> list[str]:
    """The files with the model's weights: those that transformers would load.

    Raises:
        ValueError: there is neither one file nor an index, or a file that the index names is
            missing.
    """
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has neither model.safetensors nor {INDEX}: save it again")
    try:
        names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged ({error!r}): copy it again") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder / INDEX} names {missing[0]}, which is not there: copy it again")
    return names


def _shares(folders: Sequence[Path], weights: Sequence[float]) -> list[float]:
    if len(folders) < 2:
        raise ValueError(f"Merging needs at least two models, and got {len(folders)}")
    fit = len(weights) == len(folders)
    if not fit or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(
            f"Weights {list(weights)} for {len(folders)} models; give one above 0 for each, as in "
            "0.7 0.3"
        )
    return [weight / sum(weights) for weight in weights]


def _check_settings(folders: Sequence[Path]) -> None:
    first, *others = [json.loads((folder / "config.json").read_text()) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        keys = sorted({*first, *other} - set(LOADING))
        unlike = [key for key in keys if first.get(key) != other.get(key)]
        if unlike:
            raise ValueError(
                f"{folders[0]} and {folder} are unlike models: "
                + ", ".join(f"{key} is {first.get(key)} and {other.get(key)}" for key in unlike[:3])
                + "; only models of one architecture and size can be averaged"
            )


def _check_tokenizers(folders: Sequence[Path]) -> None:
    first, *others = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        unlike = sorted(t for t in {*first, *other} if first.get(t) != other.get(t))
        if unlike:
            one = unlike[0]
            raise ValueError(
                f"{folders[0]} and {folder} have unlike tokenizers: token {one!r} is number "
                f"{first.get(one)} and {other.get(one)}; only models with the same can be averaged"
            )


def _check_tensors(first: _Reader, other: _Reader) -> None:
    both = f"{first.folder} and {other.folder}"
    odd = sorted(first.files.keys() ^ other.files.keys())
    if odd:
        raise ValueError(
            f"{both} hold unlike weights: {odd[0]} is in one of them only. Save both with the same "
            "version of transformers (save_pretrained leaves tied weights out)"
        )
    for name in first.files:
        if first.kind(name) != other.kind(name):
            (shape, dtype), (other_shape, other_dtype) = first.kind(name), other.kind(name)
            raise ValueError(
                f"{both} hold unlike weights: {name} is {shape} of {dtype} and {other_shape} of "
                f"{other_dtype}; save both with the same sizes and in the same dtype"
            )


def _write(source: Path, target: Path, readers: Sequence[_Reader], shares: Sequence[float]) -> None:
    """Write a file with the header of ``source`` and the averages of its tensors."""
    with source.open("rb") as template, target.open("wb") as file:
        size = template.read(8)
        header = template.read(int.from_bytes(size, "little"))
        file.write(size + header)
        for name in _in_order(json.loads(header)):
            values = [reader.tensor(name) for reader in readers]
            file.write(_average(name, values, shares).flatten().view(torch.uint8).numpy().data)


def _in_order(header: Mapping[str, Any]) -> list[str]:
    """The tensors of a file as they lie in it."""
    places = {name: one["data_offsets"] for name, one in header.items() if name != "__metadata__"}
    return sorted(places, key=lambda name: places[name])


def _average(name: str, values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    first = values[0]
    if first.is_floating_point():
        total = sum(share * value.double() for share, value in zip(shares, values, strict=True))
        assert isinstance(total, Tensor)
        return total.to(first.dtype)
    if all(torch.equal(first, value) for value in values):
        return first
    raise ValueError(f"{name} holds {first.dtype}, which has no average, and the models differ")
