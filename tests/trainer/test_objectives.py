"""Each objective against its formula, and its gradients against autograd in float64."""

import math

import pytest
import torch

from kimi_core.config import TrainerConfig
from kimi_core.trainer.objectives import CLIP, Responses, grpo, load_objective, omd, reinforce, rest

LENGTHS = [5, 1, 3]  # three responses of one prompt, one of them a single token
NORMS = {"none": [1, 1, 1], "length": [5, 1, 3], "sqrt_length": [5**0.5, 1, 3**0.5]}
REWARDS = torch.tensor([1.0, 0.0, 0.6], dtype=torch.float64)
TAU = 0.3


def responses(ref_logprobs, **changes) -> Responses:
    fields = {
        "ref_logprobs_t": ref_logprobs,
        "response_t": torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS)),
        "advantages_n": REWARDS - REWARDS.mean(),
        "groups_n": torch.tensor([4, 4, 4]),
        "rewards_n": REWARDS,
        "correctness_n": torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64),
        # One response of the group was trained before; the standard deviation is 0.5.
        "ended_rewards": {4: torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)},
    }
    return Responses(**{**fields, **changes})


def logprob_pair(seed=0, dtype=torch.float64):
    """Log-probs under the policy (a leaf) and under the reference, nine tokens each."""
    draw = torch.Generator().manual_seed(seed)
    own = -torch.rand(9, generator=draw, dtype=torch.float64) * 2
    ref = own + torch.randn(9, generator=draw, dtype=torch.float64) * 0.3
    return own.to(dtype).requires_grad_(), ref.to(dtype)


def gradient(losses, own):
    return torch.autograd.grad(losses.sum(), own)[0]


def per_response(values):
    """Sums over each response by slicing: the slow way."""
    return torch.stack([part.sum() for part in values.split(LENGTHS)])


def per_token(values):
    return torch.repeat_interleave(values, torch.tensor(LENGTHS))


@pytest.mark.parametrize("normalize", NORMS)
def test_omd_is_the_squared_difference(normalize):
    own, ref = logprob_pair()
    given = responses(ref)
    rho = per_response(own - ref) / torch.tensor(NORMS[normalize], dtype=torch.float64)
    expected = (given.advantages_n - TAU * rho) ** 2 / (2 * TAU)
    losses = omd(own, given, tau=TAU, normalize=normalize)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(losses, own), gradient(expected, own), rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalize", NORMS)
def test_omd_gives_every_token_of_a_response_the_same_gradient(normalize):
    """−(A_j − τ ρ_j), over the norm where there is one: the squared ratio of the whole response."""
    own, ref = logprob_pair()
    given = responses(ref)
    norm = torch.tensor(NORMS[normalize], dtype=torch.float64)
    rho = per_response((own - ref).detach()) / norm
    expected = per_token(-(given.advantages_n - TAU * rho) / norm)
    losses = omd(own, given, tau=TAU, normalize=normalize)
    torch.testing.assert_close(gradient(losses, own), expected, rtol=1e-12, atol=0)


def test_omd_descends_equation_3_of_the_report():
    """Over a policy's parameters: (1/k) Σ_j [∇log π(y_j)·(r_j − r̄) − τ/2·∇ρ_j²]."""
    draw = torch.Generator().manual_seed(3)
    theta = torch.randn(4, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    states = torch.randn(9, 4, generator=draw, dtype=torch.float64)
    tokens = torch.randint(7, (9, 1), generator=draw)
    own = torch.log_softmax(states @ theta, dim=-1).gather(1, tokens)[:, 0]
    ref = own.detach() + 0.3 * torch.randn(9, generator=draw, dtype=torch.float64)

    ascent = torch.zeros_like(theta)
    for j, (own_j, ref_j) in enumerate(zip(own.split(LENGTHS), ref.split(LENGTHS), strict=True)):
        (dlogpi,) = torch.autograd.grad(own_j.sum(), theta, retain_graph=True)
        (drho2,) = torch.autograd.grad((own_j - ref_j).sum() ** 2, theta, retain_graph=True)
        ascent += (dlogpi * (REWARDS[j] - REWARDS.mean()) - TAU / 2 * drho2) / len(LENGTHS)

    loss = omd(own, responses(ref), tau=TAU, normalize="none").mean()
    torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], -ascent, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("normalize", NORMS)
def test_omd_starts_out_as_reinforce(normalize):
    own, _ = logprob_pair()
    given = responses(own.detach())  # ρ = 0: the policy is still the one that sampled
    pulled = gradient(omd(own, given, tau=TAU, normalize=normalize), own)
    free = gradient(reinforce(own, given, normalize=normalize), own)
    torch.testing.assert_close(pulled, free, rtol=1e-12, atol=0)
    assert free.abs().min() > 0


def test_omd_sums_float32_logprobs_in_float64():
    """32k tokens that each moved by one part in 10^5: a float32 sum would lose some of it."""
    count = 32768
    ref = torch.full((count,), -1.0)
    own = ref + 1e-5
    given = responses(ref, response_t=torch.zeros(count, dtype=torch.long))
    rho = float((own - ref)[0].double()) * count
    losses = omd(own, given, tau=1.0, normalize="none")
    assert losses.dtype == torch.float64
    assert float(losses[0]) == pytest.approx(
        (float(given.advantages_n[0]) - rho) ** 2 / 2, rel=1e-12
    )


@pytest.mark.parametrize("normalize", NORMS)
def test_reinforce(normalize):
    own, ref = logprob_pair()
    given = responses(ref)
    norm = torch.tensor(NORMS[normalize], dtype=torch.float64)
    losses = reinforce(own, given, normalize=normalize)
    expected = -given.advantages_n * per_response(own) / norm
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    expected_gradient = per_token(-given.advantages_n / norm)
    torch.testing.assert_close(gradient(losses, own), expected_gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "clipped"),
    [
        (1.0, 0.1, False),
        (1.0, 0.5, True),  # a good response that became much likelier: no further
        (1.0, -0.5, False),  # a good one that became less likely is pulled back
        (-1.0, -0.1, False),
        (-1.0, -0.5, True),  # a bad response that became much less likely: no further
        (-1.0, 0.5, False),  # a bad one that became likelier is pushed down
    ],
)
def test_grpo_clips_only_what_has_gone_far_enough(advantage, log_ratio, clipped):
    ref = torch.full((1,), -1.0, dtype=torch.float64)
    own = (ref + log_ratio).requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    given = Responses(
        ref_logprobs_t=ref,
        response_t=torch.zeros(1, dtype=torch.long),
        groups_n=torch.tensor([4]),
        rewards_n=one,
        correctness_n=one,
        advantages_n=advantage * one,
        ended_rewards={4: torch.tensor([1.0, 0.0], dtype=torch.float64)},
    )
    losses = grpo(own, given)
    scaled = advantage / (0.5 + 1e-6)
    ratio = math.exp(log_ratio)
    bound = 1 + CLIP if log_ratio > 0 else 1 - CLIP
    assert losses.item() == pytest.approx(-scaled * (bound if clipped else ratio), rel=1e-12)
    expected = 0.0 if clipped else -scaled * ratio
    assert gradient(losses, own).item() == pytest.approx(expected, rel=1e-12)


def test_grpo_averages_over_tokens_and_divides_by_the_deviation():
    own, _ = logprob_pair()
    spread = {4: 0.5, 5: 0.25, 6: 0.0}
    given = responses(
        own.detach(),
        groups_n=torch.tensor([4, 5, 6]),
        ended_rewards={
            group: torch.tensor([half, -half, half, -half], dtype=torch.float64)
            for group, half in spread.items()
        },
    )
    deviations = torch.tensor(list(spread.values()), dtype=torch.float64)
    expected = -given.advantages_n / (deviations + 1e-6)  # every ratio is 1
    losses = grpo(own, given)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    torch.testing.assert_close(
        gradient(losses, own), per_token(expected / lengths), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("normalize", ["none", "length"])
def test_rest_fits_right_answers_only(normalize):
    own, ref = logprob_pair()
    losses = rest(own, responses(ref), normalize=normalize)
    norm = torch.tensor(NORMS[normalize], dtype=torch.float64)
    right = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(losses, -right * per_response(own) / norm, rtol=1e-12, atol=0)
    slope = gradient(losses, own)
    torch.testing.assert_close(slope, per_token(-right / norm), rtol=1e-12, atol=0)
    assert slope[5] == 0  # the wrong one


def test_an_objective_in_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def plain(logprobs_t, responses):\n"
        "    return -responses.rewards_n * responses.sum(logprobs_t)\n"
    )
    config = TrainerConfig(objective="mine.py:plain")
    own, ref = logprob_pair()
    losses = load_objective(config, base_folder=tmp_path)(own, responses(ref))
    torch.testing.assert_close(losses, -REWARDS * per_response(own))


def test_an_unknown_objective_is_an_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'ppo'; allowed are omd, .*, or file\.py:function"):
        load_objective(TrainerConfig(objective="ppo"))
