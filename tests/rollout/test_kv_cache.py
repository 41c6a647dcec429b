import torch

from kimi_core.rollout.kv_cache import KVCache

HEADS, DIM = 2, 3


def states(rows: int, tokens: int, start: float) -> torch.Tensor:
    return start + torch.arange(rows * HEADS * tokens * DIM).float().view(rows, HEADS, tokens, DIM)


def test_prefill_returns_what_came_and_decode_the_rows_own_past():
    cache = KVCache(layers=1, rows=4, max_positions=100)
    keys, values = states(2, 5, 0), states(2, 5, 1000)
    cache.begin_prefill(first_row=0, length=5)
    assert cache.get_mask_sizes(5, 0) == (5, 0) and cache.get_seq_length() == 0
    seen = cache.update(keys, values, 0)
    assert seen[0] is keys and seen[1] is values

    # The second row has 3 tokens only: its next one overwrites the padding at position 3.
    new_keys, new_values = states(2, 1, 500), states(2, 1, 600)
    cache.begin_decode(torch.tensor([5, 3]), shortest=4, longest=6)
    assert cache.get_mask_sizes(1, 0) == (6, 0) and cache.get_seq_length() == 5
    seen_keys, seen_values = cache.update(new_keys, new_values, 0)
    assert seen_keys.shape == (2, HEADS, 6, DIM)
    for seen, old, new in ((seen_keys, keys, new_keys), (seen_values, values, new_values)):
        for row, length in enumerate((5, 3)):
            assert torch.equal(seen[row, :, :length], old[row, :, :length])
            assert torch.equal(seen[row, :, length], new[row, :, 0])


def test_growth_keeps_the_rows_and_stops_at_the_bound():
    cache = KVCache(layers=2, rows=1, max_positions=67)
    keys = states(1, 62, 0)
    cache.begin_prefill(0, 62)
    for layer in range(2):
        cache.update(keys, keys, layer)
    assert cache.positions == 64  # in fours
    for length, positions in ((62, 64), (63, 64), (64, 68), (65, 68), (66, 68)):
        cache.begin_decode(torch.tensor([length]), length + 1, length + 1)
        for layer in range(2):
            seen, _ = cache.update(states(1, 1, 7), states(1, 1, 7), layer)
            assert torch.equal(seen[:, :, :62], keys)
            assert torch.equal(seen[:, :, 62:], states(1, 1, 7).expand(-1, -1, length - 61, -1))
        assert cache.positions == positions


def test_fresh_positions_are_finite():
    # Masked positions have weight 0 in attention; 0 x NaN would poison the row.
    cache = KVCache(layers=1, rows=3, max_positions=64)
    cache.begin_decode(torch.tensor([0, 40, 0]), 1, 41)
    assert all(seen.isfinite().all() for seen in cache.update(states(3, 1, 0), states(3, 1, 0), 0))


def test_copy_rows_copies_every_layer():
    cache = KVCache(layers=2, rows=4, max_positions=64)
    cache.begin_prefill(0, 2)
    given = [states(2, 2, 100 * layer) for layer in range(2)]
    for layer in range(2):
        cache.update(given[layer], -given[layer], layer)
    cache.copy_rows(torch.tensor([2, 3]), torch.tensor([1, 0]), 2)
    for layer, keys in zip(cache.layers, given, strict=True):
        assert torch.equal(layer.keys[2:, :, :2], keys.flip(0))
        assert torch.equal(layer.values[2:, :, :2], -keys.flip(0))
