"""Log-probs in tiles against float64, with plain torch at the same dtype as the yardstick."""

import pytest
import torch
from flat_kernels import linear_logprob, linear_logprob_ref
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_core.kernels.tiles import UPCAST_ELEMENTS

SIZES = {
    "one token": (1, 16, 101, 64),  # T = 1: a batch of one response of one token
    "primes": (131, 37, 1009, 32),  # nothing divides anything: the last chunk holds 3 rows
    "whole chunks": (64, 24, 257, 16),  # T a multiple of the chunk: no empty chunk at the end
    "one chunk": (29, 17, 53, 1024),  # the chunk is larger than T
    "a row a chunk": (7, 8, 40, 1),  # the smallest chunk
    "few words": (45, 12, 3, 16),  # V smaller than the chunk, and than D
    "one word": (5, 4, 1, 2),  # V = 1: every log-prob is 0 and so is every gradient
    "one feature": (33, 1, 65, 8),  # D = 1: a product instead of a sum
    "past a vector": (9, 5, 129, 4),  # one column beyond eight vectors of 16: the shortest tail
}
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 2.0},
    "softcap and temperature": {"softcap": 1.5, "temperature": 1.7},
}


def problem(tokens, width, vocab, *, seed=0, scale=1.0):
    """Hidden states, output matrix, bias, ids and the gradient that comes from above; float32."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=draw)
    weight = torch.randn(vocab, width, generator=draw) * scale / width**0.5
    bias = torch.randn(vocab, generator=draw)
    ids = torch.randint(vocab, (tokens,), generator=draw)
    return hidden, weight, bias, ids, torch.randn(tokens, generator=draw)


def run(function, inputs, ids, above, **options) -> list[Tensor]:
    """Log-probs and the gradients of hidden, weight and (where there is one) bias, in float64."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    bias = leaves[2] if len(leaves) > 2 else None
    logprobs = function(leaves[0], leaves[1], ids, bias=bias, **options)
    if function is linear_logprob_ref:
        logprobs = logprobs[0]
    logprobs.backward(above.to(logprobs.dtype))
    return [logprobs.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def assert_as_good_as_torch(inputs, ids, above, *, chunk, **options):
    """Error against float64 at most twice what plain torch makes of the same inputs.

    One unit in the last place is allowed on top: on a few numbers torch may be exact by luck.
    """
    truth = run(linear_logprob_ref, [i.double() for i in inputs], ids, above.double(), **options)
    torchs = run(linear_logprob_ref, inputs, ids, above, **options)
    ours = run(linear_logprob, inputs, ids, above, chunk=chunk, **options)
    last_place = torch.finfo(inputs[0].dtype).eps
    # On a GPU Triton's exp and division are approximate, which only float32 shows.
    times = 4 if inputs[0].is_cuda and inputs[0].dtype == torch.float32 else 2
    names = ["log-probs", "d hidden", "d weight", "d bias"]
    for name, true, theirs, own in zip(names, truth, torchs, ours, strict=False):
        assert own.isfinite().all(), name
        bound = times * (theirs - true).norm() + last_place * (true.norm() + last_place)
        error = (own - true).norm()
        assert error <= bound, f"{name}: error {error:.3g}, torch's {bound:.3g} / {times}"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("tokens", "width", "vocab", "chunk"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_torchs(dtype, tokens, width, vocab, chunk, options):
    *inputs, ids, above = problem(tokens, width, vocab)
    for count in (2, 3):  # without and with a bias
        some = [value.to(dtype) for value in inputs[:count]]
        assert_as_good_as_torch(some, ids, above, chunk=chunk, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_on_a_gpu(dtype, options):
    """Besides the sizes above, one of many blocks of the kernels in every direction."""
    for tokens, width, vocab, chunk in [*SIZES.values(), (700, 200, 5003, 300)]:
        *inputs, ids, above = (value.cuda() for value in problem(tokens, width, vocab))
        for count in (2, 3):
            some = [value.to(dtype) for value in inputs[:count]]
            assert_as_good_as_torch(some, ids, above, chunk=chunk, **options)


@pytest.mark.parametrize("shift", [-120.0, 120.0])
def test_shifted_logits_neither_overflow_nor_vanish(shift):
    # exp(120) is infinite and exp(-120) zero in float32: the maximum has to be taken off first.
    hidden, weight, _, ids, above = problem(50, 16, 203)
    assert_as_good_as_torch([hidden, weight, torch.full((203,), shift)], ids, above, chunk=16)


def test_all_logits_negative():
    # A maximum that starts at 0 would be wrong in every row, and nothing else shows it.
    hidden, weight, _, ids, above = problem(50, 16, 203)
    inputs = [hidden.abs() + 1, -weight.abs() - 1]
    assert (inputs[0] @ inputs[1].T).max() < -16
    assert_as_good_as_torch(inputs, ids, above, chunk=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sums_over_peaked_logits_do_not_drift(device, seed, dtype):
    """At most 0.05 nats over 32k tokens: ρ of the objective is such a sum."""
    tokens = 2048
    hidden, weight, _, _, _ = problem(tokens, 16, 4096, seed=seed, scale=6.0)
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    logprobs_tv = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1)
    draw = torch.Generator(device).manual_seed(seed)
    ids = torch.multinomial(logprobs_tv.exp(), 1, generator=draw)[:, 0]
    true = logprobs_tv.gather(1, ids[:, None])[:, 0]
    assert true.exp().median() > 0.3  # peaked indeed
    drift = (linear_logprob(hidden, weight, ids, chunk=512).double() - true).sum()
    assert abs(drift) * 32768 / tokens <= 0.05


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_autograds_in_float64(options):
    *inputs, ids, above = problem(23, 9, 31)
    inputs = [value.double() for value in inputs]
    slow = run(linear_logprob_ref, inputs, ids, above, **options)
    fast = run(linear_logprob, inputs, ids, above, chunk=8, **options)
    for own, true in zip(fast, slow, strict=True):
        torch.testing.assert_close(own, true, rtol=1e-12, atol=1e-12)
    leaves = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, ids, bias=b, chunk=8, **options), leaves
    )


def test_chunk_changes_nothing_but_rounding():
    *inputs, ids, above = problem(40, 12, 77)
    whole = run(linear_logprob, inputs, ids, above, chunk=40)
    for chunk in (1, 7, 39, 41):
        for own, other in zip(
            run(linear_logprob, inputs, ids, above, chunk=chunk), whole, strict=True
        ):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_rows_cost_and_change_nothing(dtype):
    *inputs, ids, above = problem(40, 8, 50)
    inputs = [value.to(dtype) for value in inputs]
    mask = torch.rand(40, generator=torch.Generator().manual_seed(3)) < 0.5
    kept = run(linear_logprob, [inputs[0][mask], *inputs[1:]], ids[mask], above[mask], chunk=8)
    inputs[0][~mask] = torch.nan
    ids[~mask] = -100
    with LargestTensor() as seen:
        masked = run(linear_logprob, inputs, ids, above, chunk=1000, mask=mask)
    assert seen.elements == mask.sum() * 50
    for one, other in zip(masked[:2], kept[:2], strict=True):
        torch.testing.assert_close(one[mask], other, rtol=1e-5, atol=1e-5)
        assert not one[~mask].any()
    last_places = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(masked[2], kept[2], rtol=last_places, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_entropy_is_that_of_the_row_and_has_no_gradient(options):
    hidden, weight, bias, ids, _ = problem(40, 8, 50, scale=3.0)
    weight.requires_grad_()
    mask = ids % 3 > 0
    _, entropy = linear_logprob(
        hidden, weight, ids, bias=bias, mask=mask, return_entropy=True, chunk=8, **options
    )
    _, true = linear_logprob_ref(hidden, weight, ids, bias=bias, mask=mask, upcast=True, **options)
    assert entropy.dtype == torch.float32 and not entropy.requires_grad
    torch.testing.assert_close(entropy.double(), true.detach(), rtol=1e-6, atol=1e-6)


def test_a_matrix_of_16_bits_is_copied_a_piece_at_a_time():
    width, vocab = 64, UPCAST_ELEMENTS // 64 + 100  # two pieces, the second one a short one
    *inputs, ids, above = problem(5, width, vocab)
    ids[0] = vocab - 1
    inputs = [value.bfloat16() for value in inputs]
    with LargestTensor() as seen:
        run(linear_logprob, inputs[:2], ids, above, chunk=2)
    # The gradient in bfloat16 and the sum that becomes it have the size of the matrix; no copy of
    # the matrix itself has.
    whole = [shape for shape, dtype in seen.made if shape == (vocab, width) and dtype.itemsize == 4]
    assert len(whole) == 1
    assert_as_good_as_torch(inputs, ids, above, chunk=2)


def test_tokens_without_gradient_add_nothing():
    """A response that is masked in full: zeros from above give zeros, and no NaN."""
    hidden, weight, bias, ids, above = problem(30, 8, 50)
    above[10:20] = 0
    _, dhidden, dweight, _ = run(linear_logprob, [hidden, weight, bias], ids, above, chunk=8)
    assert not dhidden[10:20].any()
    rest = torch.cat([torch.arange(10), torch.arange(20, 30)])
    kept = run(linear_logprob, [hidden[rest], weight, bias], ids[rest], above[rest], chunk=8)
    torch.testing.assert_close(dweight, kept[2], rtol=1e-5, atol=1e-6)


def test_frozen_inputs_get_no_gradient():
    hidden, weight, bias, ids, _ = problem(10, 8, 20)
    hidden.requires_grad_()
    linear_logprob(hidden, weight, ids, bias=bias, chunk=4).sum().backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None


def test_result_is_float32_and_types_of_gradients_are_the_inputs():
    hidden, weight, _, ids, _ = problem(10, 8, 20)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    logprobs = linear_logprob(hidden, weight, ids.int(), chunk=4)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32 and logprobs.shape == (10,)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_weight_gradients_of_many_chunks_are_summed_in_float32():
    # 512 equal contributions: a bfloat16 sum stops growing at 256 times one of them.
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_logprob(hidden, weight, torch.zeros(512, dtype=torch.long), chunk=1).sum().backward()
    assert weight.grad[:, 0].tolist() == [256, -256]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [70_000, 20_000])
def test_offsets_past_32_bits_on_a_gpu(tokens):
    """More rows than a grid's second dimension allows, and a tile of 2.6e9 numbers."""
    vocab = 131_072 if tokens == 20_000 else 1000
    draw = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, 64, generator=draw, **options)
    weight = torch.randn(vocab, 64, generator=draw, **options)
    ids = torch.randint(vocab, (tokens,), generator=draw, device="cuda")
    found = run(linear_logprob, [hidden, weight], ids, hidden.new_ones(tokens), chunk=tokens)
    last = slice(-500, None)
    true = run(
        linear_logprob_ref,
        [hidden[last].double(), weight.double()],
        ids[last],
        found[0][last] * 0 + 1,
    )
    torch.testing.assert_close(found[0][last], true[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found[1][last], true[1], rtol=0.02, atol=0.05)


def test_no_tokens():
    hidden, weight, _, ids, _ = problem(4, 8, 20)
    hidden, weight = hidden[:0].requires_grad_(), weight.requires_grad_()
    logprobs = linear_logprob(hidden, weight, ids[:0], chunk=4)
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and not weight.grad.any()


class LargestTensor(TorchDispatchMode):
    """Remembers what tensors operations made, and the element count of the largest."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
                if "empty" in str(function) or "to_copy" in str(function):
                    self.made.append((tuple(value.shape), value.dtype))
        return result


def test_all_logits_never_exist_at_once():
    tokens, width, vocab, chunk = 400, 8, 512, 16
    hidden, weight, _, ids, above = problem(tokens, width, vocab)
    with LargestTensor() as slow:
        run(linear_logprob_ref, [hidden, weight], ids, above)
    assert slow.elements == tokens * vocab  # the mode sees what it should
    with LargestTensor() as fast:
        run(linear_logprob, [hidden, weight], ids, above, chunk=chunk, softcap=2.0)
    assert fast.elements == chunk * vocab


@pytest.mark.parametrize("wrong", [-1, 20, 1 << 40])
def test_an_id_outside_the_vocabulary_is_named(wrong):
    hidden, weight, _, ids, _ = problem(5, 8, 20)
    ids[3] = wrong
    with pytest.raises(ValueError, match=rf"{wrong}.*vocabulary allows 0 to 19"):
        linear_logprob(hidden, weight, ids)


@pytest.mark.parametrize(
    ("hidden", "weight", "ids"),
    [
        ((4, 8), (20, 8), (5,)),
        ((4, 7), (20, 8), (4,)),
        ((4,), (20, 8), (4,)),
        ((4, 8), (20, 8), (4, 1)),
    ],
    ids=["count", "width", "flat hidden", "ids in a column"],
)
def test_shapes_that_do_not_fit_are_named(hidden, weight, ids):
    with pytest.raises(ValueError, match="Shapes do not fit"):
        linear_logprob(torch.zeros(hidden), torch.zeros(weight), torch.zeros(ids, dtype=torch.long))


WRONG = {
    "dtypes that differ": (
        {"hidden": torch.zeros(5, 8).half()},
        "hidden is torch.float16 and weight",
    ),
    "integers": ({"hidden": torch.zeros(5, 8).long()}, "hidden is torch.int64"),
    "bias": ({"bias": torch.zeros(19)}, r"bias is torch.float32 \(19,\).*\[20\]"),
    "mask": ({"mask": torch.ones(4) > 0}, r"mask has shape \(4,\): it must be \[5\]"),
    "ids": ({"ids": torch.zeros(5)}, "ids is torch.float32: it must hold integers"),
    "softcap": ({"softcap": 0.0}, "softcap = 0.0"),
    "chunk": ({"chunk": 0}, "chunk = 0"),
    "device": ({"ids": torch.zeros(5, dtype=torch.long, device="meta")}, "ids is on meta"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_else_does_not_fit_is_named(changes, message):
    hidden, weight, _, ids, _ = problem(5, 8, 20)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{"hidden": hidden, "weight": weight, "ids": ids, **changes})


def test_what_is_not_finite_is_an_error():
    hidden, weight, _, ids, _ = problem(5, 8, 20)
    hidden[3, 2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"1 of 5 log-probs are NaN, the first .* token 3"):
        linear_logprob(hidden, weight, ids)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_has_to_be_positive(temperature):
    hidden, weight, _, ids, _ = problem(5, 8, 20)
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(hidden, weight, ids, temperature=temperature)
