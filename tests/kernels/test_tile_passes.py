"""The C++ passes over a tile, each instruction set against numpy in float64."""

import numpy as np
import pytest

from kimi_core import _C

# Around the 4, 8 and 16 lanes of the instruction sets, and the eight vectors of a float sum.
VOCABS = (1, 3, 4, 5, 15, 16, 17, 31, 128, 129, 1009)


def tile(rows, vocab, *, scale=4.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(rows, vocab))).astype(np.float32)
    return logits, rng.integers(vocab, size=rows), rng.normal(size=vocab).astype(np.float32)


def expected(logits, targets, bias, softcap, temperature):
    """Log-prob, entropy and gradient of the log-prob, by the book."""
    raw = logits.astype(np.float64) + (0 if bias is None else bias)
    scores = softcap * np.tanh(raw / softcap) if softcap else raw
    x = (scores - scores.max(axis=1, keepdims=True)) / temperature
    logprobs = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    p = np.exp(logprobs)
    onehot = np.eye(logits.shape[1])[targets]
    slope = (1 - (scores / softcap) ** 2 if softcap else 1) / temperature
    return (logprobs * onehot).sum(axis=1), -(p * logprobs).sum(axis=1), (onehot - p) * slope


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_against_float64(instruction_set, softcap, temperature, with_bias):
    for vocab in VOCABS:
        logits, targets, bias = tile(5, vocab)
        bias = bias if with_bias else None
        settings = {"bias": bias, "softcap": softcap, "temperature": temperature}
        logprob, entropy, gradient = expected(logits, targets, **settings)
        settings["instruction_set"] = instruction_set
        before = logits.copy()
        top, total, picked, weighted = _C.tile_statistics(logits, targets, **settings)
        assert np.array_equal(logits, before)
        size = 1 + np.abs(logprob).max()
        np.testing.assert_allclose(picked - np.log(total), logprob, rtol=0, atol=2e-7 * size)
        np.testing.assert_allclose(np.log(total) - weighted / total, entropy, rtol=0, atol=1e-6)
        outer = np.linspace(-2, 2, 5, dtype=np.float32)
        _C.tile_gradient(logits, targets, top, total, outer, **settings)
        np.testing.assert_allclose(logits, gradient * outer[:, None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_the_exponential_is_good_to_an_ulp_and_unbiased(instruction_set):
    """Two columns, the second of which is exp(-x): what a bias of it does to 32k tokens."""
    x = -np.linspace(0, 86, 50000, dtype=np.float32)
    logits = np.stack([np.zeros_like(x), x], axis=1)
    zeros = np.zeros(len(x), np.int64)
    top, total, _, _ = _C.tile_statistics(logits, zeros, instruction_set=instruction_set)
    _C.tile_gradient(
        logits, zeros, top, np.ones_like(total), -np.ones_like(top), instruction_set=instruction_set
    )
    error = logits[:, 1].astype(np.float64) / np.exp(x.astype(np.float64)) - 1
    assert np.abs(error).max() < 1.2e-7  # one unit in the last place
    assert abs(error.mean()) * 32768 < 1e-3


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_extreme_rows(instruction_set):
    rows = np.array(
        [
            [0, -200, -1e30, -np.inf, -87.5],  # what vanishes adds nothing, and no NaN
            [-1e3, -1e3, -1e3, -1e3, -1e3],  # far below 0: the maximum must not start there
            [3e38, 0, 0, 0, 0],
            [0, np.nan, 0, 0, 0],
        ],
        np.float32,
    )
    zeros = np.zeros(4, np.int64)
    _, total, picked, weighted = _C.tile_statistics(rows, zeros, instruction_set=instruction_set)
    logprobs = picked - np.log(total)
    np.testing.assert_allclose(logprobs[:3], [0, -np.log(5), 0], atol=1e-7)
    np.testing.assert_allclose((weighted / total)[:3], 0, atol=1e-6)
    assert np.isnan(logprobs[3])


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_targets_elsewhere_pick_nothing(instruction_set):
    logits, targets, _ = tile(4, 33)
    whole = logits.copy()
    none = np.full(4, -1)
    top, total, picked, _ = _C.tile_statistics(logits, none, instruction_set=instruction_set)
    assert not picked.any()
    ones = np.ones(4, np.float32)
    _C.tile_gradient(logits, none, top, total, ones, instruction_set=instruction_set)
    _C.tile_gradient(whole, targets, top, total, ones, instruction_set=instruction_set)
    differ = np.argwhere(logits != whole)
    assert differ[:, 1].tolist() == targets.tolist()
    assert (logits < 0).all()


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_nothing(threads):
    logits, targets, bias = tile(13, 100)
    ones = np.ones(13, np.float32)
    single, several = logits.copy(), logits.copy()
    one = _C.tile_statistics(single, targets, bias)
    other = _C.tile_statistics(several, targets, bias, threads=threads)
    assert all(map(np.array_equal, one, other))
    _C.tile_gradient(single, targets, *one[:2], ones, bias)
    _C.tile_gradient(several, targets, *one[:2], ones, bias, threads=threads)
    assert np.array_equal(single, several)


def test_no_rows():
    logits, targets, _ = tile(0, 10)
    assert all(len(part) == 0 for part in _C.tile_statistics(logits, targets))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": np.array([0, 10])}, ValueError, r"targets must be in \[0, 10\)"),
        ({"targets": np.array([0, -2])}, ValueError, "targets must be in"),
        ({"targets": np.array([0])}, ValueError, "targets must be one-dimensional with 2"),
        ({"targets": np.zeros(2, np.int32)}, TypeError, "incompatible"),
        ({"logits": np.zeros((2, 10))}, TypeError, "incompatible"),
        ({"logits": np.zeros((2, 20), np.float32)[:, ::2]}, TypeError, "incompatible"),
        ({"logits": np.zeros(10, np.float32)}, ValueError, r"\[rows, vocab\]"),
        ({"logits": np.zeros((2, 0), np.float32)}, ValueError, "at least 1"),
        ({"bias": np.zeros(9, np.float32)}, ValueError, "bias must be one-dimensional with 10"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"threads": 0}, ValueError, "threads"),
        ({"instruction_set": "mmx"}, ValueError, "no passes for 'mmx'.*instruction_sets"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    given = {"logits": np.zeros((2, 10), np.float32), "targets": np.zeros(2, np.int64)}
    with pytest.raises(error, match=message):
        _C.tile_statistics(**{**given, **changes})


def test_a_read_only_tile_is_not_written():
    logits, targets, _ = tile(2, 10)
    statistics = _C.tile_statistics(logits, targets)
    logits.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        _C.tile_gradient(logits, targets, *statistics[:2], np.ones(2, np.float32))
