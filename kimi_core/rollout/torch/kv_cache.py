"""Keys and values of the rows that are decoded, stored in place and grown from time to time.

It is a transformers ``Cache``, so any causal model fills it through its forward pass. Rows of about
the same length form a *cohort*, with separate storage. Decoding is bound by reading keys and
values, and in the storage of long rows a short one would be stored as if it were long, and, off the
CPU, read so, too. On a CPU the compiled core reads every row to its own length (see ``attention``).
Cohorts are ordered by length, the longest first. The rows of the batch are those of the first
cohort, then those of the second, and so on. A model whose attention cannot work cohort by cohort
has one cohort and a mask.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kimi_core.rollout.torch.attention import Context, Part, attach, in_core

ROUND_TO = 4
"""Positions are allocated in multiples of this."""

HEADROOM = {"cpu": 1 / 16}
"""Positions added when storage grows, as a share of the present ones; 1 on other devices. A CPU
reads the keys of a layer as one stream, and unused positions between the rows interrupt it: with
twice the positions a step took a fifth longer. Copying the cache every 16th of its length costs
less."""

NEARLY = 1.25
"""Allocate a cohort's final size at once if it is at most this many times what is needed now."""

WORTH_A_COHORT = 1 << 19
"""Bytes that a layer stores needlessly, and off the CPU also reads, before the rows are split.
Reading them takes 20 µs at 25 GB/s, and one more call costs 15 to 20 µs."""


class Cohort:
    """Rows that share storage: for each layer ``keys`` and ``values``, each
    ``[capacity, kv_heads, positions, head_dim]``. Rows 0 .. count − 1 are live."""

    def __init__(self, rows: int, layers: int, positions: int, bound: int):
        self.count = self.capacity = rows
        self.positions = positions
        self.bound = bound
        """Positions that no row will exceed."""
        self.longest = 0
        """Positions of the longest row after the present pass."""
        self.at: tuple[torch.Tensor, torch.Tensor] | int = 0
        """Where the pass writes: (rows, positions), or one position for all rows."""
        self.masks: dict[int | None, torch.Tensor | None] = {}
        """For each window of a layer (None: no window), additive, ``[n, 1, 1, longest]``: hides
        positions beyond a row's length and before its window. A mask of None hides nothing."""
        self.lengths: np.ndarray | None = None
        """Positions of each row after the present pass, int64 ``[n]``, in place of masks."""
        self.keys: list[torch.Tensor | None] = [None] * layers
        self.values: list[torch.Tensor | None] = [None] * layers

    def resize(self, rows: int, positions: int) -> None:
        """Move the live rows to storage of another size."""
        self.capacity, self.positions = rows, positions
        for stored in (self.keys, self.values):
            for layer, old in enumerate(stored):
                if old is not None:
                    stored[layer] = self._allocate(old, self.count)

    def fill(
        self, layer: int, rows: slice, begin: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store the tokens from ``begin`` on, ``[m, kv_heads, tokens, head_dim]``."""
        end = begin + keys.shape[2]
        if self.keys[layer] is None:
            self.keys[layer] = self._allocate(keys, 0)
            self.values[layer] = self._allocate(values, 0)
        for stored, new in ((self.keys[layer], keys), (self.values[layer], values)):
            assert stored is not None
            stored[rows, :, begin:end] = new

    def context(self, layer: int, row: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one row up to ``end``, ``[1, kv_heads, end, head_dim]`` each."""
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None and values is not None
        return keys[row : row + 1, :, :end], values[row : row + 1, :, :end]

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token per row, ``[count, kv_heads, 1, head_dim]``.

        Returns the keys and values that the rows attend to, ``[count, kv_heads, longest,
        head_dim]`` each.
        """
        stored_keys, stored_values = self.keys[layer], self.values[layer]
        assert stored_keys is not None and stored_values is not None
        if self.count < self.capacity:
            stored_keys, stored_values = stored_keys[: self.count], stored_values[: self.count]
        if isinstance(self.at, int):  # A plain copy, 5 times as fast as scattered rows.
            stored_keys.select(2, self.at).copy_(keys.select(2, 0))
            stored_values.select(2, self.at).copy_(values.select(2, 0))
        else:
            rows_c, positions_c = self.at
            stored_keys[rows_c, :, positions_c] = keys[:, :, 0]
            stored_values[rows_c, :, positions_c] = values[:, :, 0]
        return stored_keys.narrow(2, 0, self.longest), stored_values.narrow(2, 0, self.longest)

    def hide(self, positions_c: torch.Tensor, windows: set[int | None], dtype: torch.dtype) -> None:
        """Make the masks of a step with one token per row at these positions, int64 ``[n]``."""
        seen = torch.arange(self.longest, device=positions_c.device)
        for window in windows:
            hidden_cs = seen > positions_c[:, None]
            if window is not None:
                hidden_cs |= seen <= positions_c[:, None] - window
            mask_cs = torch.zeros_like(hidden_cs, dtype=dtype)
            mask_cs.masked_fill_(hidden_cs, torch.finfo(dtype).min)
            self.masks[window] = mask_cs[:, None, None]

    def position_bytes(self) -> int:
        """Bytes that a layer keeps for one position of one row."""
        keys = self.keys[0]
        assert keys is not None
        return 2 * keys[0, :, 0].nbytes

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (tensor for tensor in self.keys + self.values if tensor is not None)

    def _allocate(self, old: torch.Tensor, rows: int) -> torch.Tensor:
        """New storage that begins with ``rows`` rows of ``old``."""
        _, heads, length, dim = old.shape
        new = old.new_empty(self.capacity, heads, self.positions, dim)
        if not rows:
            return new.zero_()
        new[:rows, :, :length] = old[:rows]
        # Masked positions have weight 0, and 0 times a stray NaN is NaN.
        new[:, :, length:] = 0
        new[rows:, :, :length] = 0
        return new


class KVCache(Cache):
    """Keys and values of rows that come and go, in cohorts.

    Call ``begin_prefill`` or ``begin_decode``, then run the model once with this cache.

    Args:
        layers: attention layers of the model.
        like: any tensor of the model's device and dtype.
        position_bytes: bytes that a layer keeps for one position of one row.
        split: whether the model's attention works cohort by cohort (see ``attention``).
        windows: the positions that each layer attends to, the token's own included (None: all).
            Without it no layer has a window.
    """

    def __init__(
        self,
        layers: int,
        like: torch.Tensor,
        position_bytes: int,
        *,
        split: bool,
        windows: Sequence[int | None] = (),
    ):
        self.cohorts: list[Cohort] = []
        self.dtype = like.dtype
        self.device = like.device
        self.position_bytes = position_bytes
        self.split = split
        self.in_core = split and in_core(like.device, like.dtype)
        self.windows = list(windows) or [None] * layers
        super().__init__(layers=[KVLayer(self, layer) for layer in range(layers)])
        self.filling: tuple[slice, int, torch.Tensor | None] | None = None
        """In a prefill: the rows of the last cohort that it fills, the position where it begins,
        and the context of each row."""
        self.longest = 0

    def add(self, lengths: np.ndarray, bound: int) -> None:
        """Begin a cohort for rows of ``lengths``, longest first, int64 ``[m]``."""
        positions = self._positions(int(lengths[0]) + 1, bound)
        cohort = Cohort(len(lengths), len(self.layers), positions, bound)
        cohort.longest = int(lengths[0])
        self.cohorts.append(cohort)

    def begin_prefill(
        self, rows: slice, begin: int, end: int, contexts_m: torch.Tensor | None
    ) -> None:
        """The next forward pass fills these rows of the last cohort.

        Args:
            rows: among those of the cohort, ``[m]``.
            begin: position of the pass's first token. If it is not 0, earlier passes have filled
                the positions before it, and all rows have one context.
            end: position after the last token of the longest context; the others are padded.
            contexts_m: which context each row has, int64 ``[m]``; None: each its own, in order.
        """
        self.filling, self.longest = (rows, begin, contexts_m), end

    def begin_decode(self, positions_n: np.ndarray) -> None:
        """Prepare a forward pass with one token per row, at these positions, int64 ``[n]``.

        A row's position is its length before the step.
        """
        self.filling = None
        self._merge(positions_n)
        start = 0
        for cohort in self.cohorts:
            positions_c = positions_n[start : start + cohort.count]
            start += cohort.count
            shortest, cohort.longest = int(positions_c.min()) + 1, int(positions_c.max()) + 1
            if cohort.longest > cohort.positions:
                half_empty = 2 * cohort.count <= cohort.capacity
                cohort.resize(
                    cohort.count if half_empty else cohort.capacity,
                    self._positions(cohort.longest, cohort.bound),
                )
            at = torch.from_numpy(positions_c).to(self.device, non_blocking=True)
            even = shortest == cohort.longest
            cohort.at = shortest - 1 if even else (torch.arange(cohort.count, device=at.device), at)
            cohort.masks = dict.fromkeys(self.windows)
            if self.in_core:
                cohort.lengths = positions_c + 1
                continue
            hiding = set(self.windows)
            if even:  # Faster, because only windows hide anything.
                hiding = {w for w in hiding if w is not None and w < shortest}
            cohort.hide(at, hiding, self.dtype)
        self.longest = max(cohort.longest for cohort in self.cohorts)

    @torch.inference_mode()
    def remove(self, ended_n: np.ndarray) -> np.ndarray:
        """Drop rows; the last rows of a cohort move into the gaps.

        Args:
            ended_n: the rows to drop, bool ``[n]``.

        Returns:
            The previous index of each remaining row, int64 ``[m]``.
        """
        order, start = [], 0
        for cohort in self.cohorts:
            ended_c = ended_n[start : start + cohort.count]
            survivors = np.flatnonzero(~ended_c)
            holes = np.flatnonzero(ended_c[: len(survivors)])
            movers = survivors[survivors >= len(survivors)]
            if len(holes):
                self._move(cohort, holes, movers)
            rows = np.arange(len(survivors))
            rows[holes] = movers
            order.append(start + rows)
            start += cohort.count
            cohort.count = len(survivors)
        self.cohorts = [cohort for cohort in self.cohorts if cohort.count]
        return np.concatenate(order)

    def cut(self, lengths: np.ndarray) -> list[slice]:
        """Cut rows of ``lengths``, longest first, int64 ``[m]``, into cohorts."""
        if not self.split:
            return [slice(0, len(lengths))]
        cuts, waste = [0], 0
        for length in lengths:
            waste += int(lengths[cuts[-1]] - length) * self.position_bytes
            if waste >= WORTH_A_COHORT:
                # Cut where this length begins, so that equal lengths stay together.
                cuts.append(int(np.searchsorted(-lengths, -length)))
                waste = 0
        return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]

    def _merge(self, positions_n: np.ndarray) -> None:
        """Join neighbouring cohorts that are too small to be worth a separate call."""
        if len(self.cohorts) == 1:
            return
        starts = np.cumsum([0, *(cohort.count for cohort in self.cohorts[:-1])])
        totals = np.add.reduceat(positions_n, starts).tolist()
        longest = np.maximum.reduceat(positions_n, starts).tolist()
        index = 1
        while index < len(self.cohorts):
            into, small = self.cohorts[index - 1 : index + 1]
            total = totals[index - 1] + totals[index]
            most = max(longest[index - 1], longest[index])
            waste = (into.count + small.count) * most - total
            if self.split and waste * self.position_bytes >= WORTH_A_COHORT:
                index += 1
                continue
            self._join(into, small, longest[index])
            for values, value in ((totals, total), (longest, most)):
                values[index - 1 : index + 1] = [value]
            del self.cohorts[index]

    def _join(self, into: Cohort, small: Cohort, length: int) -> None:
        rows = into.count + small.count
        into.bound = max(into.bound, small.bound)
        if rows > into.capacity or length > into.positions:
            into.resize(max(rows, into.capacity), max(into.positions, small.positions))
        for old, new in zip(small.tensors(), into.tensors(), strict=True):
            new[into.count : rows, :, :length] = old[: small.count, :, :length]
        into.count = rows

    def _move(self, cohort: Cohort, holes: np.ndarray, movers: np.ndarray) -> None:
        to_m = torch.from_numpy(holes).to(self.device, non_blocking=True)
        from_m = torch.from_numpy(movers).to(self.device, non_blocking=True)
        used = min(cohort.longest, cohort.positions)
        for tensor in cohort.tensors():
            tensor[to_m, :, :used] = tensor[from_m, :, :used]

    def _positions(self, needed: int, bound: int) -> int:
        assert needed <= bound, (needed, bound)
        with_headroom = needed + int(HEADROOM.get(self.device.type, 1.0) * needed)
        positions = bound if bound <= NEARLY * needed else min(with_headroom, bound)
        return -(-positions // ROUND_TO) * ROUND_TO


class KVLayer(CacheLayerMixin):
    """One layer of the cache, which the model calls between its projections and its attention."""

    is_sliding = False

    def __init__(self, cache: KVCache, index: int):
        super().__init__()
        self.cache = cache
        self.index = index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: cohorts allocate storage when they are filled."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[n, kv_heads, tokens, head_dim]`` and return the keys and values to attend to."""
        cache = self.cache
        if cache.filling is not None:
            return self._fill(*cache.filling, key_states, value_states)
        if not cache.split:
            return cache.cohorts[0].extend(self.index, key_states, value_states)
        window = cache.windows[self.index]
        counts = [cohort.count for cohort in cache.cohorts]
        states = zip(key_states.split(counts), value_states.split(counts), strict=True)
        parts = [
            Part(*cohort.extend(self.index, *new), cohort.masks[window], cohort.lengths, window)
            for cohort, new in zip(cache.cohorts, states, strict=True)
        ]
        return attach(key_states, parts), value_states

    def _fill(
        self, rows: slice, begin: int, contexts_m: torch.Tensor | None, *states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache, cohort = self.cache, self.cache.cohorts[-1]
        new = states if contexts_m is None else [one[contexts_m] for one in states]
        cohort.fill(self.index, rows, begin, *new)
        keys, values = states
        if begin:
            keys, values = cohort.context(self.index, rows.start, cache.longest)
        if cache.split:
            attach(keys, Context(cache.windows[self.index]))
        return keys, values

    def get_seq_length(self) -> int:
        """Number of positions before the tokens of the next forward pass."""
        filling = self.cache.filling
        return self.cache.longest - 1 if filling is None else filling[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.longest, 0

    def get_max_length(self) -> int:
        return -1
