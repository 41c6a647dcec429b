"""Attention of a decode step: the core, SDPA, and the limit, one reading of keys and values.

    pytest benches/bench_decode.py                 # half a minute

Rows of 8,192 and 32,768 positions, with the heads of SmolLM2-135M: 9 query heads share 3 key heads
of width 64. *read* is torch's sum of the same keys and values, which is as little as anyone can do
with them. All run in turn, round by round, on one thread, in float32. The rows of the last case are
of unlike length, as decoding has them in one cohort. SDPA needs a mask there and reads every row to
the longest; what is read is counted up to each row's own length.
"""

import numpy as np
import pytest
import torch
from timing import cpu_s

from kimi_core.rollout.torch.attention import Part, one_token

ROWS, KV_HEADS, GROUP, DIM = 16, 3, 3, 64
SCALE = DIM**-0.5
READ = 1 / 1.3
"""Least speed as a share of the speed of reading."""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "longest", "shortest"),
    [("8,192", 8192, 8192), ("32,768", 32768, 32768), ("4,096 to 8,192", 8192, 4096)],
)
def test_decode_attention(name, longest, shortest, ratios):
    torch.manual_seed(0)
    keys, values = torch.randn(2, ROWS, KV_HEADS, longest, DIM)
    query = torch.randn(ROWS, KV_HEADS * GROUP, 1, DIM)
    lengths = np.linspace(shortest, longest, ROWS).astype(np.int64)
    mask = None
    if shortest < longest:
        hidden = torch.arange(longest) >= torch.from_numpy(lengths)[:, None]
        mask = torch.zeros(ROWS, longest).masked_fill_(hidden, torch.finfo(torch.float32).min)
        mask = mask[:, None, None]
    exact = None if mask is None else mask.double()
    in_core = Part(keys, values, lengths=lengths)
    by_torch = Part(keys, values, mask)
    expected = one_token(query.double(), Part(keys.double(), values.double(), exact), SCALE)
    for part in (in_core, by_torch):
        torch.testing.assert_close(
            one_token(query, part, SCALE).double(), expected, atol=1e-5, rtol=0
        )
    core, sdpa, read = cpu_s(
        lambda: one_token(query, in_core, SCALE),
        lambda: one_token(query, by_torch, SCALE),
        lambda: (keys.sum(), values.sum()),
        rounds=7,
    )
    read *= lengths.mean() / longest
    gigabytes = 2 * KV_HEADS * DIM * 4 * lengths.sum() / 1e9
    label = f"decode attention, {ROWS} rows of {name}"
    detail = f"{core * 1e3:.1f} ms, {gigabytes / core:.1f} GB/s; reading {read * 1e3:.1f} ms"
    ratios.record(label, "SDPA", sdpa / core, None, detail)
    ratios.record(label, "reading once", read / core, READ, detail)
