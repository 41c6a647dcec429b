"""Keys and values of the rows being decoded, in place: preallocated, and grown now and then.

A transformers ``Cache``, so that any causal model fills it through its own forward pass. Each row
keeps its tokens at positions 0 .. length − 1. A prefill writes whole contexts into rows side by
side and attends to nothing else; a decode step writes one token a row, each at its own length, and
attends to the rows' common prefix of positions, in which the caller masks what is beyond a row's
length. Nothing is concatenated, and most steps allocate nothing.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

ROUND_TO = 4
"""Positions are allocated in multiples of this."""

HEADROOM = {"cpu": 1 / 16}
"""Positions added at a growth, as a share of those there; 1 on other devices. A CPU reads keys of a
layer as one stream, and unused positions between the rows break it up: with twice the positions a
step took a fifth longer, more than it costs to copy the cache every 16th of its length."""


class KVCache(Cache):
    """Keys and values of up to ``rows`` sequences.

    Call ``begin_prefill`` or ``begin_decode``, then run the model once with this cache.

    Args:
        layers: attention layers of the model.
        rows: sequences decoded side by side at most.
        max_positions: what no sequence will exceed; growth stops there.
    """

    def __init__(self, layers: int, rows: int, max_positions: int):
        self.rows = rows
        self.max_positions = max_positions
        self.positions = 0
        super().__init__(layers=[KVLayer(self) for _ in range(layers)])
        self.first_row = 0
        self.longest = 0
        self.at: tuple[torch.Tensor, torch.Tensor] | int | None = None
        """Where the next pass writes: rows and positions, one position for all, None: a prefill."""

    def begin_prefill(self, first_row: int, length: int) -> None:
        """The next forward pass holds contexts of ``length`` tokens, padding included, for the rows
        from ``first_row`` on."""
        self._reserve(length, 0.0)
        self.first_row, self.longest, self.at = first_row, length, None

    def begin_decode(self, positions_n: torch.Tensor, shortest: int, longest: int) -> None:
        """The next forward pass holds one token for each of rows 0 .. n − 1.

        Args:
            positions_n: int64, where each row's token goes: the row's length before the step.
            shortest, longest: the rows' least and greatest length after the step.
        """
        self._reserve(longest, HEADROOM.get(positions_n.device.type, 1.0))
        self.first_row, self.longest = 0, longest
        if shortest == longest:
            self.at = longest - 1
        else:
            self.at = torch.arange(len(positions_n), device=positions_n.device), positions_n

    def copy_rows(self, to_rows: torch.Tensor, from_rows: torch.Tensor, length: int) -> None:
        """Copy the first ``length`` positions between rows, int64 ``[m]`` each, disjoint."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[to_rows, :, :length] = buffer[from_rows, :, :length]

    def _reserve(self, positions: int, headroom: float) -> None:
        if positions <= self.positions:
            return
        assert positions <= self.max_positions, (positions, self.max_positions)
        positions = min(positions + int(headroom * self.positions), self.max_positions)
        self.positions = -(-positions // ROUND_TO) * ROUND_TO
        for layer in self.layers:
            layer.grow()


class KVLayer(CacheLayerMixin):
    """One layer's share: ``keys`` and ``values``, ``[rows, kv_heads, positions, head_dim]``.

    Shapes, dtype and device are those of the first keys and values that the model hands in.
    """

    is_sliding = False

    def __init__(self, cache: KVCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = self._allocate(key_states[:, :, :0])
        self.values = self._allocate(value_states[:, :, :0])
        self.is_initialized = True

    def grow(self) -> None:
        """Make room for ``cache.positions`` and carry over what is there."""
        if self.is_initialized:
            self.keys = self._allocate(self.keys)
            self.values = self._allocate(self.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[n, kv_heads, tokens, head_dim]`` and return what the tokens attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, n = self.cache, len(key_states)
        if cache.at is None:
            rows = slice(cache.first_row, cache.first_row + n)
            self.keys[rows, :, : cache.longest] = key_states
            self.values[rows, :, : cache.longest] = value_states
            return key_states, value_states
        if isinstance(cache.at, int):  # a plain copy, 5 times as fast as scattered rows
            self.keys[:n, :, cache.at] = key_states[:, :, 0]
            self.values[:n, :, cache.at] = value_states[:, :, 0]
        else:
            rows_n, positions_n = cache.at
            self.keys[rows_n, :, positions_n] = key_states[:, :, 0]
            self.values[rows_n, :, positions_n] = value_states[:, :, 0]
        return self.keys[:n, :, : cache.longest], self.values[:n, :, : cache.longest]

    def get_seq_length(self) -> int:
        """Positions before the tokens of the coming forward pass."""
        return 0 if self.cache.at is None else self.cache.longest - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.longest, 0

    def get_max_length(self) -> int:
        return self.cache.max_positions

    def _allocate(self, old: torch.Tensor) -> torch.Tensor:
        """``old`` with ``cache.positions`` positions; ``[any, kv_heads, 0, head_dim]`` to begin."""
        _, heads, length, dim = old.shape
        new = old.new_empty(self.cache.rows, heads, self.cache.positions, dim)
        if length:
            new[:, :, :length] = old
        # Not left as found: masked positions have weight 0, and 0 times a stray NaN is NaN.
        new[:, :, length:] = 0
        return new
