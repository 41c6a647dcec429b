"""Where each tensor of a model lies in a slot of an arena.

vLLM fuses q, k and v into one tensor, and gate and up into another: the rows of one follow the rows
of the next. A slot stores tensors in the same way, so two kinds of readers need no copy:

* an *entry* is the fused tensor under vLLM's name;
* a *part* is the rows of an entry that come from one Hugging Face tensor, under that tensor's name.

Tied embeddings are stored once. With tensor parallelism each rank has a separate layout, which
holds only the rows and columns that the rank computes with.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from transformers import PretrainedConfig

from kimi_core.models.load import auto_class

ALIGNMENT = 256
"""Alignment of each entry, in bytes. CUDA's allocator aligns to the same number, so a slot that is
copied whole to a GPU stays aligned. It is a multiple of a cache line, so no two threads write into
the same line."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` whose fused names are known; SmolLM2 has ``llama``."""

DTYPES = ("float32", "bfloat16", "float16")

_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_BY_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")
_BY_VOCABULARY = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Part:
    """A range of rows or columns of a Hugging Face tensor, stored in an entry."""

    name: str
    whole: tuple[int, ...]
    """Shape of the whole Hugging Face tensor."""
    dim: int
    """0: the part is rows ``start:stop`` of the tensor; 1: columns."""
    start: int
    stop: int
    row: int
    """Row of the entry at which the part begins."""

    @property
    def shape(self) -> tuple[int, ...]:
        taken = list(self.whole)
        taken[self.dim] = self.stop - self.start
        return tuple(taken)

    @property
    def index(self) -> tuple[slice, ...]:
        """Index into the whole tensor that gives the part as a view."""
        return (slice(None),) * self.dim + (slice(self.start, self.stop),)


@dataclass(frozen=True)
class Entry:
    """A tensor of a slot under vLLM's name; its parts are stored one after the other, by rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the slot."""
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """The entries of a slot. Equal layouts have equal hashes.

    >>> from transformers import LlamaConfig
    >>> tiny = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    >>> layout = Layout.from_config(tiny, dtype="float32")
    >>> layout.entries[1].name, layout.entries[1].shape
    ('model.layers.0.self_attn.qkv_proj.weight', (32, 16))
    >>> [(part.name[-13:], part.row) for part in layout.entries[1].parts]
    [('q_proj.weight', 0), ('k_proj.weight', 16), ('v_proj.weight', 24)]
    >>> layout.tied
    {'lm_head.weight': 'model.embed_tokens.weight'}
    """

    entries: tuple[Entry, ...]
    tied: dict[str, str]
    """Further Hugging Face name → the name that the same tensor is stored under."""
    tp_rank: int = 0
    tp_size: int = 1
    note: str = ""
    """Why vLLM has to copy from this layout; empty if it need not."""

    @classmethod
    def from_config(
        cls,
        hf_config: PretrainedConfig,
        *,
        dtype: str | torch.dtype,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> Self:
        """Lay out a causal model for one rank of tensor parallelism.

        Llama (SmolLM2 too), Mistral, Qwen2 and Qwen3 are laid out as vLLM stores them. A rank holds
        the rows of its heads in q, k and v, its rows of gate and up, its columns of o_proj and
        down_proj, and its rows of the vocabulary. KV heads are repeated if there are fewer of them
        than ranks. The vocabulary is divided after rounding up to a multiple of 64, as in vLLM.

        Any other model keeps its tensor names, and every rank holds all tensors whole. ``note``
        says so, with a warning.

        Raises:
            ValueError: the dtype is not in ``DTYPES``, the rank is out of range, or the number of
                ranks does not divide heads or widths.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype = {name!r}; allowed are {', '.join(DTYPES)}")
        if not 0 <= tp_rank < tp_size:
            raise ValueError(
                f"tp_rank = {tp_rank}; with tp_size = {tp_size}, 0 to {tp_size - 1} are allowed"
            )
        shapes, tied = _parameters_of(hf_config)
        note = ""
        if hf_config.model_type in FAMILIES:
            taken = _fused(shapes, _Ranges(hf_config, tp_rank, tp_size))
        else:
            taken = {key: [_whole(key, shape)] for key, shape in shapes.items()}
            note = (
                f"Model type {hf_config.model_type!r} is not one of {', '.join(FAMILIES)}: the "
                "arena keeps its tensor names and stores whole tensors on every rank, and an "
                "engine that fuses or shards tensors has to copy them"
            )
            warnings.warn(note, stacklevel=2)
        return cls(tuple(_placed(taken, name)), tied, tp_rank, tp_size, note)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of a slot."""
        last = max(self.entries, key=lambda entry: entry.offset)
        return _aligned(last.offset + last.nbytes)

    @cached_property
    def by_hf_name(self) -> dict[str, tuple[Entry, Part]]:
        """Hugging Face name, tied names included → where the tensor is stored."""
        found = {part.name: (entry, part) for entry in self.entries for part in entry.parts}
        return found | {alias: found[name] for alias, name in self.tied.items()}

    @cached_property
    def hash(self) -> bytes:
        """SHA-256 of ``to_json``, that is of all names, shapes, dtypes and offsets."""
        return hashlib.sha256(self.to_json().encode()).digest()

    def to_json(self) -> str:
        """The layout as an arena file stores it; equal layouts give equal texts."""
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote. Raises ValueError for anything else."""
        try:
            given = json.loads(text)
            entries = tuple(_entry(entry) for entry in given.pop("entries"))
            layout = cls(entries, **given)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"Cannot read the arena's table of tensors: {error!r}") from error
        return layout

    def difference(self, other: "Layout") -> str:
        """The first difference to another layout, as text; empty if there is none."""
        own, given = ((x.tp_rank, x.tp_size, x.tied) for x in (self, other))
        if own != given:
            return (
                f"rank {own[0]} of {own[1]} with ties {own[2]}, not rank {given[0]} of {given[1]} "
                f"with ties {given[2]}"
            )
        for mine, theirs in zip(self.entries, other.entries, strict=False):
            if mine != theirs:
                return (
                    f"{mine.name} {list(mine.shape)} {mine.dtype} at {mine.offset}, not "
                    f"{theirs.name} {list(theirs.shape)} {theirs.dtype} at {theirs.offset}"
                )
        if len(self.entries) != len(other.entries):
            return f"{len(self.entries)} tensors, not {len(other.entries)}"
        return ""


class _Ranges:
    """The parts of a known family's tensors that one rank holds, by vLLM's rules."""

    def __init__(self, config: PretrainedConfig, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        _check_divides(size, heads, "num_attention_heads")
        _check_divides(size, config.intermediate_size, "intermediate_size")
        if size <= kv_heads:
            _check_divides(size, kv_heads, "num_key_value_heads")
            kv = self._share(kv_heads * head)
        else:
            if size % kv_heads:
                raise ValueError(
                    f"tp_size = {size}; allowed are multiples and divisors of num_key_value_heads "
                    f"= {kv_heads}"
                )
            first = rank // (size // kv_heads) * head
            kv = (first, first + head)
        self.vocabulary = -(-config.vocab_size // 64) * 64
        _check_divides(size, self.vocabulary, "vocab_size, rounded up to a multiple of 64,")
        mlp = self._share(config.intermediate_size)
        self.rows = {
            "self_attn.q_proj": self._share(heads * head),
            "self_attn.k_proj": kv,
            "self_attn.v_proj": kv,
            "mlp.gate_proj": mlp,
            "mlp.up_proj": mlp,
        }

    def part(self, name: str, shape: tuple[int, ...]) -> Part:
        module, _, kind = name.rpartition(".")
        end = re.sub(r"^model\.layers\.\d+\.", "", module)
        if end in self.rows:
            start, stop = self.rows[end]
            return Part(name, shape, 0, start, stop, 0)
        if end in _BY_COLUMNS and kind == "weight":
            return Part(name, shape, 1, *self._share(shape[1]), 0)
        if module in _BY_VOCABULARY:
            start, stop = self._share(self.vocabulary)
            return Part(name, shape, 0, min(start, shape[0]), min(stop, shape[0]), 0)
        return _whole(name, shape)

    def _share(self, width: int) -> tuple[int, int]:
        each = width // self.size
        return self.rank * each, (self.rank + 1) * each


def _check_divides(size: int, width: int, what: str) -> None:
    if width % size:
        raise ValueError(f"tp_size = {size} does not divide {what} = {width}")


def _whole(name: str, shape: tuple[int, ...]) -> Part:
    return Part(name, shape, 0, 0, shape[0], 0)


def _parameters_of(config: PretrainedConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of a model's parameters, in the model's order, and its tied names; needs no memory."""
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shapes, tied = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names[id(parameter)] == name:
            shapes[name] = tuple(parameter.shape) or (1,)
        else:
            tied[name] = names[id(parameter)]
    return shapes, tied


def _fused(shapes: Mapping[str, tuple[int, ...]], ranges: _Ranges) -> dict[str, list[Part]]:
    """Entry name → its parts, in the model's order."""
    taken: dict[str, list[Part]] = {}
    for name, shape in shapes.items():
        entry = name
        for fused, parts in _FUSED.items():
            for part in parts:
                entry = entry.replace(f".{part}.", f".{fused}.")
        taken.setdefault(entry, []).append(ranges.part(name, shape))
    return taken


def _placed(taken: Mapping[str, list[Part]], dtype: str) -> Iterable[Entry]:
    offset = 0
    for name, parts in taken.items():
        row, placed = 0, []
        for part in parts:
            placed.append(replace(part, row=row))
            row += part.shape[0]
        entry = Entry(name, dtype, (row, *parts[0].shape[1:]), offset, tuple(placed))
        yield entry
        offset = _aligned(offset + entry.nbytes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _entry(given: dict[str, Any]) -> Entry:
    parts = tuple(Part(**{**part, "whole": tuple(part["whole"])}) for part in given.pop("parts"))
    return Entry(**{**given, "shape": tuple(given["shape"])}, parts=parts)
