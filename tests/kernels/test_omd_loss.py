"""The fused loss: one pass, two passes and the slow twin agree, and three GEMMs are three."""

import subprocess
import sys

import pytest
import torch
from flat_kernels import linear_logprob, omd_loss, omd_loss_ref
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_core.kernels.tiles import Tiles

# With chunks of 8: short ones that share a tile, one that is exactly a tile, two that need the
# scratch (3 tiles, and 2 of which the second is smaller), an empty one, one of a single token.
LENGTHS = (3, 5, 8, 21, 0, 9, 1, 4)
WIDTH, VOCAB, CHUNK = 13, 101, 8  # primes: nothing divides anything
SCHEDULES = ("one_pass", "two_pass")


def problem(lengths=LENGTHS, *, width=WIDTH, vocab=VOCAB, dtype=torch.float32, seed=0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    ids = torch.randint(vocab, (tokens,), generator=draw)
    hidden = torch.randn(tokens, width, generator=draw).to(dtype)
    weight = (2 * torch.randn(vocab, width, generator=draw) / width**0.5).to(dtype)
    own = linear_logprob(hidden, weight, ids).float()
    return {
        "hidden": hidden,
        "weight": weight,
        "ids": ids,
        "ref_logprobs": own + 0.1 * torch.randn(tokens, generator=draw),
        "advantages": torch.randn(len(lengths), generator=draw, dtype=torch.float64),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }


def gradients(function, inputs, **options):
    """The loss and the gradients of hidden, weight and (where there is one) bias, in float64."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in {**inputs, **options}.items()
        if name in ("hidden", "weight", "bias") and value is not None
    }
    found = function(**{**inputs, "tau": 0.3, **options, **leaves})
    loss = found if isinstance(found, torch.Tensor) else found.loss
    loss.backward()
    return [loss.detach().double(), *(leaf.grad.double() for leaf in leaves.values())]


def fused(inputs, **options):
    return gradients(omd_loss, inputs, **{"chunk": CHUNK, **options})


def half(inputs, seed=1):
    """A mask over about half of the tokens; all of the last response is outside."""
    mask = torch.rand(len(inputs["ids"]), generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[inputs["cu_seqlens"][-2] :] = False
    return mask


OPTIONS = {
    "plain": {},
    "length": {"normalize": "length"},
    "sqrt_length": {"normalize": "sqrt_length"},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 1.5, "temperature": 1.3},
    "bias": {"bias": torch.linspace(-2, 2, VOCAB)},
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_torchs(dtype, schedule, options, masked):
    assert_as_good_as_torch(problem(dtype=dtype), schedule, options, masked)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_on_a_gpu(dtype, schedule, masked):
    inputs = {name: value.cuda() for name, value in problem(dtype=dtype).items()}
    for case, options in OPTIONS.items():
        assert_as_good_as_torch(inputs, schedule, options, masked, case)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_twice():
    lengths = (300, 1, 900, 40)
    inputs = problem(lengths, width=200, vocab=5003, dtype=torch.bfloat16)
    inputs = {name: value.cuda() for name, value in inputs.items()}
    for schedule in SCHEDULES:
        first, second = (fused(inputs, chunk=256, schedule=schedule) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def assert_as_good_as_torch(inputs, schedule, options, masked, case=""):
    """Error against float64 at most twice what plain torch makes of the same inputs."""
    dtype, device = inputs["hidden"].dtype, inputs["hidden"].device
    options = {**options, "mask": half(inputs).to(device) if masked else None}
    if "bias" in options:
        options["bias"] = options["bias"].to(device, dtype)
    truth = gradients(omd_loss_ref, inputs, **options, upcast=True)
    torchs = gradients(omd_loss_ref, inputs, **options)
    ours = fused(inputs, schedule=schedule, **options)
    last_place = torch.finfo(dtype).eps
    for name, true, theirs, own in zip(
        ("loss", "d hidden", "d weight", "d bias"), truth, torchs, ours, strict=False
    ):
        # A response whose coefficient is exact by luck in one of them: a last place on top.
        times = 4 if inputs["hidden"].is_cuda and dtype == torch.float32 else 2
        bound = times * (theirs - true).norm() + last_place * true.norm()
        assert (own - true).norm() <= bound, (name, case)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_pass_two_passes_and_the_slow_twin_are_equal_in_float64(options):
    inputs = problem(dtype=torch.float64)
    if "bias" in options:
        options = {"bias": options["bias"].double()}
    slow = gradients(omd_loss_ref, inputs, **options)
    for schedule in SCHEDULES:
        for chunk in (1, CHUNK, 1000):
            fast = fused(inputs, schedule=schedule, chunk=chunk, **options)
            for own, true in zip(fast, slow, strict=True):
                torch.testing.assert_close(own, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", ["none", "sqrt_length"])
def test_gradcheck(normalize):
    """Of two passes, which can go backward as often as it asks; one pass equals them, see above."""
    inputs = problem((3, 6, 0, 9), width=5, vocab=11, dtype=torch.float64)
    leaves = [inputs.pop(name).requires_grad_() for name in ("hidden", "weight")]
    options = {"tau": 0.3, "chunk": 4, "schedule": "two_pass", "normalize": normalize}
    assert torch.autograd.gradcheck(lambda h, w: omd_loss(h, w, **inputs, **options).loss, leaves)


def test_the_coefficient_is_the_gradient_of_every_log_prob():
    """c = −(A − τ·ρ), the report's equation (3), by finite differences of the loss in ref."""
    inputs = problem(dtype=torch.float64)
    found = omd_loss(**inputs, tau=0.3, normalize="sqrt_length", chunk=CHUNK)
    for response, start in enumerate(inputs["cu_seqlens"][:-1]):
        if not LENGTHS[response]:
            continue
        moved = inputs["ref_logprobs"].clone().double()
        moved[start] -= 1e-6  # as if the log-prob had grown
        other = omd_loss(**{**inputs, "ref_logprobs": moved}, tau=0.3, normalize="sqrt_length")
        slope = len(LENGTHS) * (other.loss - found.loss) / 1e-6
        assert slope.item() == pytest.approx(found.coefficient_n[response].item(), abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_comes_back_besides_the_loss(schedule):
    inputs = problem()
    mask = half(inputs)
    inputs["hidden"].requires_grad_()
    found = omd_loss(**inputs, tau=0.3, mask=mask, schedule=schedule, chunk=CHUNK)
    logprobs, entropy = linear_logprob(
        inputs["hidden"], inputs["weight"], inputs["ids"], mask=mask, return_entropy=True
    )
    torch.testing.assert_close(found.logprobs_t, logprobs.detach())
    torch.testing.assert_close(found.entropy_t, entropy.to(found.entropy_t.dtype))
    assert (found.rows_computed, found.rows_skipped) == (mask.sum(), (~mask).sum())
    delta = torch.where(mask, logprobs.detach() - inputs["ref_logprobs"], 0).double()
    ratios = torch.stack([part.sum() for part in delta.split(LENGTHS)])
    torch.testing.assert_close(found.log_ratio_n, ratios, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.coefficient_n, 0.3 * ratios - inputs["advantages"])
    assert found.loss.requires_grad
    assert not any(value.requires_grad for value in found[1:] if isinstance(value, torch.Tensor))


class Flops(TorchDispatchMode):
    """Counts those of matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.mm:
            self.count += 2 * args[0].numel() * args[1].shape[1]
        if function.overloadpacket is torch.ops.aten.addmm_:
            self.count += 2 * args[1].numel() * args[2].shape[1]
        return function(*args, **(kwargs or {}))


def gemms(inputs, *, frozen=(), **options):
    """Matrix products of the size of all logits."""
    with Flops() as flops:
        for name in ("hidden", "weight"):
            inputs[name] = inputs[name].detach().requires_grad_(name not in frozen)
        found = omd_loss(**inputs, tau=0.3, **{"chunk": CHUNK, **options})
        if found.loss.requires_grad:
            found.loss.backward()
    return flops.count / (2 * len(inputs["ids"]) * WIDTH * VOCAB)


def test_one_pass_is_three_gemms():
    inputs = problem()
    assert gemms(inputs) == gemms(inputs, schedule="one_pass") == 3
    assert gemms(inputs, schedule="two_pass") == 4
    assert gemms(inputs, frozen=("weight",)) == 2  # only the top of a model is trained
    assert gemms(inputs, frozen=("hidden", "weight")) == 1  # evaluation


def test_masked_rows_cost_and_change_nothing():
    inputs = problem()
    mask = half(inputs)
    kept = mask.sum() / len(mask)
    for schedule, count in (("one_pass", 3), ("two_pass", 4)):
        assert gemms(inputs, mask=mask, schedule=schedule) == pytest.approx(count * kept.item())
        before = fused(inputs, mask=mask, schedule=schedule)
        poisoned = {name: value.detach().clone() for name, value in inputs.items()}
        poisoned["hidden"][~mask] = torch.nan
        poisoned["ref_logprobs"][~mask] = torch.nan
        poisoned["ids"][~mask] = -100
        after = fused(poisoned, mask=mask, schedule=schedule)
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)
        assert not after[1][~mask].any()


def test_a_response_without_counted_tokens_adds_its_advantage_and_no_gradient():
    inputs = problem((4, 6))
    mask = torch.arange(10) < 4
    found = fused(inputs, mask=mask)
    alone = {**inputs, "advantages": inputs["advantages"] * torch.tensor([1.0, 0.0])}
    for one, other in zip(found[1:], fused(alone, mask=mask)[1:], strict=True):
        assert torch.equal(one, other)
    added = inputs["advantages"][1] ** 2 / (2 * 0.3) / 2
    torch.testing.assert_close(found[0] - fused(alone, mask=mask)[0], added)
    none = fused(inputs, mask=torch.zeros(10, dtype=torch.bool))
    assert not none[1].any() and not none[2].any()


def test_coefficients_of_zero_cost_no_gradient():
    inputs = problem((8, 8, 5))
    # The same tiles as in the loss, so that ρ is exactly 0.
    own = omd_loss(**inputs, tau=0.3, chunk=CHUNK).logprobs_t
    inputs |= {"ref_logprobs": own, "advantages": torch.tensor([0.0, 1.0, 0.0])}
    assert gemms(inputs) == pytest.approx((21 + 2 * 8) / 21)


@pytest.mark.parametrize("lengths", [(30,), (30, 8), (8, 30)], ids=str)
def test_one_long_response_needs_no_scratch(lengths):
    assert gemms(problem(lengths), workspace_bytes=0) == 3


def test_past_the_workspace_bound_there_are_two_passes():
    inputs, scratch = problem((30, 30)), 4 * VOCAB * WIDTH
    assert gemms(inputs, workspace_bytes=scratch) == 3
    assert gemms(inputs, workspace_bytes=scratch - 1) == 4
    assert gemms(inputs, workspace_bytes=scratch - 1, frozen=("weight",)) == 2
    with pytest.raises(ValueError, match=rf"scratch of 5,252 bytes.*workspace_bytes = {0}"):
        gemms(inputs, workspace_bytes=0, schedule="one_pass")


def test_the_gradient_from_above_scales():
    inputs = problem()
    for schedule in SCHEDULES:
        leaves = [inputs[name].clone().requires_grad_() for name in ("hidden", "weight")]
        others = {name: inputs[name] for name in inputs if name not in ("hidden", "weight")}
        loss = omd_loss(*leaves, **others, tau=0.3, chunk=CHUNK, schedule=schedule).loss
        (loss * -2.5).backward()
        _, *plain = fused(inputs, schedule=schedule)
        for leaf, once in zip(leaves, plain, strict=True):
            torch.testing.assert_close(leaf.grad.double(), -2.5 * once, rtol=1e-5, atol=1e-7)


def test_one_pass_goes_backward_once():
    inputs = problem()
    inputs["hidden"].requires_grad_()
    loss = omd_loss(**inputs, tau=0.3).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"allows one backward pass.*schedule='two_pass'"):
        loss.backward()


def test_weight_gradients_are_handed_over_not_copied():
    inputs = problem()
    made = []
    add = Tiles.add_dweight

    def remember(self, dz_cv, hidden_cd, sum_vd, beta):
        made.append(sum_vd.data_ptr())
        add(self, dz_cv, hidden_cd, sum_vd, beta)

    inputs["weight"].requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiles, "add_dweight", remember)
        omd_loss(**inputs, tau=0.3, chunk=1000).loss.backward()
    assert inputs["weight"].grad.data_ptr() == made[0]


def test_weight_gradients_of_16_bits_are_summed_in_float32():
    # 512 equal contributions: a bfloat16 sum stops growing at 256 times one of them.
    tokens, zeros = 512, torch.zeros(512)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    found = omd_loss(
        torch.ones(tokens, 1, dtype=torch.bfloat16), weight, zeros.long(),
        ref_logprobs=zeros - torch.log(torch.tensor(2.0)), advantages=torch.ones(tokens),
        cu_seqlens=torch.arange(tokens + 1), tau=1.0, chunk=1,
    )  # fmt: skip
    (found.loss * tokens).backward()
    assert weight.grad[:, 0].tolist() == [-256, 256]


LONG = """
import torch
from kimi_core.kernels import linear_logprob_ref, omd_loss

def status(key):  # bytes
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

tokens, vocab, width = 131072, 49152, 64
draw = torch.Generator().manual_seed(0)
hidden = torch.randn(tokens, width, generator=draw).requires_grad_()
weight = (torch.randn(vocab, width, generator=draw) / 8).requires_grad_()
ids = torch.randint(vocab, (tokens,), generator=draw)
cu_seqlens = torch.tensor([0, 65536, tokens])
gradients = 4 * (hidden.numel() + weight.numel())
before = status("VmRSS")
ref = torch.full((tokens,), -11.0)
found = omd_loss(hidden, weight, ids, ref, torch.ones(2), cu_seqlens, tau=0.1)
found.loss.backward()
print(status("VmHWM") - before - gradients)
last = slice(tokens - 5, tokens)  # logits far past the 2^31st
true, _ = linear_logprob_ref(hidden[last].double(), weight.double(), ids[last])
torch.testing.assert_close(found.logprobs_t[last].double(), true.detach(), rtol=0, atol=1e-5)
"""


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of a process")
def test_131072_tokens_fit_in_a_gibibyte_beyond_inputs_and_gradients():
    """More rows than a 16-bit grid has, and 6.4e9 logits, offsets past 2^31."""
    command = [sys.executable, "-c", LONG]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    tile = 4 * 512 * 49152
    assert 0.9 * tile < int(done.stdout) < 1 << 30


def bad(**changes):
    return {**problem((4, 6)), "tau": 0.3, **changes}


ANY = torch.zeros(10)
BAD_INPUT = {
    "tau of 0": (bad(tau=0.0), "tau = 0.0: .* greater than 0"),
    "tau of NaN": (bad(tau=float("nan")), "tau = nan"),
    "covers too little": (bad(cu_seqlens=torch.tensor([0, 9])), "from 0 to 9.*rise from 0 to 10"),
    "starts late": (bad(cu_seqlens=torch.tensor([1, 4, 10])), "from 1 to 10.*rise from 0 to 10"),
    "falls": (bad(cu_seqlens=torch.tensor([0, 11, 10])), "decreases in between"),
    "float edges": (bad(cu_seqlens=torch.tensor([0.0, 10.0])), "must hold integers"),
    "no response": (bad(cu_seqlens=torch.tensor([0])), "for at least one response"),
    "too many advantages": (bad(advantages=torch.ones(3)), "3 advantages for 2 responses"),
    "short ref": (bad(ref_logprobs=ANY[1:]), r"ref_logprobs has shape \(9,\)"),
    "short mask": (bad(mask=ANY[1:] > 0), r"mask has shape \(9,\)"),
    "mask of floats": (bad(mask=ANY), "mask is torch.float32: it must be bool"),
    "normalize": (bad(normalize="tokens"), "normalize = 'tokens'"),
    "schedule": (bad(schedule="three"), "schedule = 'three'"),
    "workspace": (bad(workspace_bytes=-1), "workspace_bytes = -1"),
    "ids of floats": (bad(ids=ANY), "ids is torch.float32: it must hold integers"),
    "ids out of range": (bad(ids=ANY.long() + 101), "from 101 to 101.*vocabulary allows 0 to 100"),
}  # fmt: skip


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        omd_loss(**inputs)


@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_not_finite_is_an_error(where, value, schedule):
    inputs = problem()
    inputs[where][7] = value
    inputs["hidden"].requires_grad_()
    with pytest.raises(FloatingPointError, match=r"log-probs are NaN, the first .* token \d+:"):
        omd_loss(**inputs, tau=0.3, schedule=schedule)
