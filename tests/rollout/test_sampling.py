import numpy as np
import pytest
import torch

from kimi_core.rollout import sampling
from kimi_core.rollout.sampling import draw, uniforms


def test_uniforms_depend_on_seed_trajectory_and_position_only():
    ids, positions = np.array([3, 3, 9]), np.array([5, 6, 5])
    together = uniforms(7, ids, positions)
    apart = [uniforms(7, ids[i : i + 1], positions[i : i + 1])[0] for i in range(3)]
    assert together.tolist() == apart
    assert len(set(together)) == 3
    assert not np.isin(uniforms(8, ids, positions), together).any()


def splitmix64(state: int) -> int:
    """The published generator's output at a state, in Python integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


@pytest.mark.parametrize(("seed", "trajectory", "position"), [(0, 0, 0), (3, 2**40, 131_071)])
def test_uniforms_are_fixed_for_good(seed, trajectory, position):
    # A change here would break the exact resumption of every run on disk.
    golden = 0x9E3779B97F4A7C15
    key = splitmix64((seed + golden) % 2**64)
    for counter in (trajectory, position):
        key = splitmix64((key + (counter + 1) * golden) % 2**64)
    assert uniforms(seed, np.array([trajectory]), np.array([position]))[0] == (key >> 12) / 2**52


def test_uniforms_are_flat_and_uncorrelated():
    ids, positions = (grid.ravel() for grid in np.meshgrid(np.arange(256), np.arange(256)))
    u = uniforms(-1, ids, positions)  # any integer is a seed
    assert 0 <= u.min() and u.max() < 1
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    chi2 = ((counts - 1024.0) ** 2 / 1024).sum()
    assert chi2 < 63 + 5 * np.sqrt(2 * 63)
    for shift in (1, 256):  # the next trajectory, the next position
        correlation = 12 * np.mean((u[:-shift] - 0.5) * (u[shift:] - 0.5))
        assert abs(correlation) < 5 / np.sqrt(len(u))


def test_frequencies_follow_the_tempered_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    n = 40_000
    u = uniforms(0, np.arange(n), np.zeros(n, np.int64))
    tokens, logprobs = draw(logits.expand(n, -1), 0.7, u)
    expected = (logits.double() / 0.7).log_softmax(-1).numpy()
    frequency = np.bincount(tokens, minlength=4) / n
    assert np.abs(frequency - np.exp(expected)).max() < 5 * 0.5 / np.sqrt(n)
    np.testing.assert_allclose(logprobs, expected[tokens], atol=1e-6)


VOCABULARIES = [1024, 1063, 49_152]
"""Those that are handled in blocks; the last block of the second is not full."""


def logits_of(n: int, vocabulary: int, scale: float) -> torch.Tensor:
    return torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_blocks_draw_what_a_plain_sum_draws(vocabulary, scale):
    n = 64
    logits = logits_of(n, vocabulary, scale)
    uniform = torch.from_numpy(uniforms(1, np.arange(n), np.arange(n)))
    plain, blocks = (
        f(logits, uniform) for f in (sampling._from_cumulative, sampling._from_cumulative_by_blocks)
    )
    # A number nearer to the edge of a token than the rounding may give its neighbour.
    assert (plain[0] != blocks[0]).sum() <= (1 if vocabulary > 2000 else 0)
    same = plain[0] == blocks[0]
    np.testing.assert_allclose(blocks[1][same], plain[1][same], rtol=0, atol=3e-7)
    for ours, theirs in zip(
        sampling._most_likely_by_blocks(logits), sampling._most_likely(logits), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-7)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_frequencies_of_blocks_follow_the_softmax(vocabulary):
    n = 20_000
    logits = logits_of(1, vocabulary, 1.0) * 4
    tokens = np.concatenate(
        [
            draw(
                logits.expand(1000, -1),
                1.0,
                uniforms(2, np.arange(i, i + 1000), np.zeros(1000, int)),
            )[0]
            for i in range(0, n, 1000)
        ]
    )
    p = logits[0].double().softmax(-1).numpy()
    often = p > 20 / n
    expected, found = p[often] * n, np.bincount(tokens, minlength=vocabulary)[often]
    chi2 = ((found - expected) ** 2 / expected).sum()
    assert chi2 < often.sum() + 5 * np.sqrt(2 * often.sum())


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1 - 2.0**-52])
@pytest.mark.parametrize("alive", [[0], [63, 64], [1000, 1062], [5, 500, 1062]])
def test_blocks_never_give_a_token_of_probability_zero(u, alive):
    logits = torch.full((1, 1063), -torch.inf)
    logits[0, alive] = torch.linspace(-1, 1, len(alive))
    tokens, logprobs = draw(logits, 1.0, np.full(1, u))
    assert tokens[0] in alive and np.isfinite(logprobs).all()
    tokens, logprobs = draw(logits, 0, None)
    assert tokens[0] == alive[-1] and np.isfinite(logprobs).all()


def test_the_first_of_equals_is_the_most_likely():
    logits = torch.zeros(1, 1063)
    logits[0, [70, 90, 1062]] = 1.0
    assert draw(logits, 0, None)[0].tolist() == [70]


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-52])
def test_never_a_token_of_probability_zero(u):
    # Zero-probability tokens at both edges and in the middle, where the cumulative sum is flat.
    logits = torch.tensor([[-torch.inf, 1.0, -1e9, 0.0, -torch.inf], [-1e9, -1e9, 3.0, -1e9, -1e9]])
    tokens, logprobs = draw(logits, 1.0, np.full(2, u))
    assert tokens.tolist() == [1 if u == 0 else 3, 2]
    assert np.isfinite(logprobs).all()


def test_greedy_takes_the_most_likely_and_reports_temperature_one():
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(0)) * 3
    tokens, logprobs = draw(logits, 0, np.zeros(16))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(logprobs, logits.double().log_softmax(-1).amax(-1), atol=1e-6)


def test_logprobs_are_unbiased_where_fp32_log_softmax_is_not():
    # Peaked logits over a large vocabulary, as a trained model gives them.
    logits = torch.randn(64, 49152, generator=torch.Generator().manual_seed(0)) * 2
    logits[:, 0] += 15
    tokens, logprobs = draw(logits, 0, np.zeros(64))
    exact = logits.double().log_softmax(-1).numpy()[np.arange(64), tokens]
    assert abs(np.mean(logprobs - exact)) < 2e-7
    assert np.abs(logprobs - exact).max() < 1e-6


def test_rows_in_blocks_give_the_same(monkeypatch):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    u = uniforms(0, np.arange(7), np.arange(7))
    whole = draw(logits, 1.0, u)
    monkeypatch.setattr(sampling, "CACHED_ELEMENTS", 30)  # 2 rows a block, the last one short
    for given, expected in zip(draw(logits, 1.0, u), whole, strict=True):
        np.testing.assert_array_equal(given, expected)


def test_bfloat16_logits_are_raised_to_fp32_first():
    logits = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    u = uniforms(0, np.arange(4), np.arange(4))
    for given, expected in zip(draw(logits, 0.8, u), draw(logits.float(), 0.8, u), strict=True):
        np.testing.assert_array_equal(given, expected)
