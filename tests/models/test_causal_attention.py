"""Causal attention of a chunk against the plain formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.models import causal_attention
from kimi_core.models.causal_attention import causal


def expected_of(q, k, v, scale, window):
    """The formula in float64, with all scores."""
    length, total, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
    places = torch.arange(total)
    apart = places[total - length :, None] - places
    hidden = (apart < 0) | (apart >= (window or total))
    scores = (scale or q.shape[-1] ** -0.5) * q @ k.transpose(2, 3)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@given(
    rows=st.integers(1, 2),
    past=st.integers(0, 40),
    length=st.integers(1, 40),
    window=st.none() | st.integers(1, 90),
    scale=st.sampled_from([None, 0.2, 4.0]),
    masked=st.sampled_from([7, 1024]),
)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.04)]
)
def test_each_token_sees_the_last_ones_up_to_itself(
    dtype, close, heads, rows, past, length, window, scale, masked
):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads[0], length, 16, generator=generator).to(dtype)
    k, v = torch.randn(2, rows, heads[1], past + length + 3, 16, generator=generator).to(dtype)
    k, v = k[:, :, 3:], v[:, :, 3:]  # As in a cache, rows do not lie end to end.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_attention, "MASKED", masked)
        got = causal(q, k, v, scale, window)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), expected_of(q, k, v, scale, window), atol=close, rtol=close
    )


def test_values_of_another_width_take_masks():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    v = torch.randn(1, 2, 9, 4)
    torch.testing.assert_close(
        causal(q, k, v, None, None).double(), expected_of(q, k, v, None, None), atol=1e-5, rtol=0
    )
