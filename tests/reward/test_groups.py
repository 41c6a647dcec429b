"""From ended responses to rewards and advantages, by group and by response."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.reward.base import RewardError
from kimi_core.reward.groups import GroupScorer, baseline
from kimi_core.reward.length import length_rewards
from kimi_core.run.config_file import load_config
from kimi_core.types import Prompt, Trajectory

PROMPT = Prompt(7, "3*214=", "642")
GOOD, BAD = 9, 4
"""Token of a right and of a wrong response: the text is its decimal form."""


def trajectory(key: int, length: int, right: bool, reason="stop", group: int = 0) -> Trajectory:
    tokens = np.array([0, 0, *[GOOD if right else BAD] * length], np.int32)
    mask = np.array([0, 0, *[1] * length], np.uint8)
    return Trajectory(
        trajectory_id=key,
        prompt_id=PROMPT.id,
        group_id=group,
        token_ids=tokens,
        logprobs=-0.5 * mask.astype(np.float32),
        mask=mask,
        policy_versions=np.where(mask > 0, 4, -1).astype(np.int32),
        end_reason=reason,
    )


def judge(prompt: Prompt, text: str) -> float:
    return float(text.startswith(str(GOOD)))


def text_of(token_ids: np.ndarray) -> str:
    return "".join(map(str, token_ids.tolist()))


def scorer(*overrides: str, reward=judge) -> GroupScorer:
    return GroupScorer(load_config(None, list(overrides)), reward, text_of)


def score(made, prompt, finished, open_lengths, *, iteration, expected):
    """What the loop does with one group: judge what ended, then make the group."""
    made.judge([(prompt, one) for one in finished])
    return made.group(prompt, finished, open_lengths, iteration=iteration, expected=expected)


responses = st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=2, max_size=8)


def group_of(drawn) -> list[Trajectory]:
    return [trajectory(key, length, right) for key, (length, right) in enumerate(drawn)]


@given(responses, st.sampled_from(["response", "group"]), st.floats(0, 1))
def test_a_complete_group_has_rewards_minus_their_mean(drawn, release, expected):
    made = scorer(f"trainer.ablation.release={release}")
    group = score(made, PROMPT, group_of(drawn), [], iteration=0, expected=expected)
    right = np.array([right for _, right in drawn], float)
    assert group.prompt == PROMPT
    assert group.correctness.tolist() == group.rewards.tolist() == right.tolist()
    np.testing.assert_allclose(group.advantages, right - right.mean(), atol=1e-12)
    assert group.ended_rewards.std() == pytest.approx(right.std())


def test_an_open_sibling_counts_with_the_expected_rate():
    group = score(
        scorer(),
        PROMPT,
        [trajectory(0, 5, True), trajectory(1, 5, False)],
        [3, 4],
        iteration=0,
        expected=0.25,
    )
    level = (1 + 0 + 0.25 + 0.25) / 4
    np.testing.assert_allclose(group.advantages, [1 - level, -level])


@given(responses, st.data())
def test_each_response_is_trained_once_and_judged_once(drawn, data):
    """Responses of one group end in any order over any number of iterations."""
    for release in ("response", "group"):
        judged: list[str] = []

        def counting(prompt, text, judged=judged):
            judged.append(text)
            return judge(prompt, text)

        made = scorer(f"trainer.ablation.release={release}", reward=counting)
        waiting = group_of(drawn)
        ended: list[Trajectory] = []
        trained: list[int] = []
        iteration = 0
        while waiting:
            count = data.draw(st.integers(1, len(waiting)))
            ended, waiting = ended + waiting[:count], waiting[count:]
            group = score(
                made, PROMPT, ended, [1] * len(waiting), iteration=iteration, expected=0.5
            )
            if release == "group":
                assert (group is None) == bool(waiting)
            if group is not None:
                trained += [one.trajectory_id for one in group.trajectories]
                ended = []  # What is trained is evicted from the buffer.
            iteration += 1
        assert sorted(trained) == list(range(len(drawn)))
        assert len(judged) == len(drawn)
        assert made.state() == {}


@given(responses, st.integers(1, 7), st.floats(0.01, 0.99))
def test_the_baseline_takes_in_siblings_that_were_trained_before(drawn, early, expected):
    early = min(early, len(drawn) - 1)
    made, everyone = scorer(), group_of(drawn)
    right = np.array([right for _, right in drawn], float)
    late = len(drawn) - early
    first = score(made, PROMPT, everyone[:early], [1] * late, iteration=0, expected=expected)
    level = (right[:early].sum() + late * expected) / len(drawn)
    np.testing.assert_allclose(first.advantages, right[:early] - level, atol=1e-12)
    second = score(made, PROMPT, everyone[early:], [], iteration=1, expected=expected)
    np.testing.assert_allclose(second.advantages, right[early:] - right.mean(), atol=1e-12)
    assert second.ended_rewards.std() == pytest.approx(right.std())


def test_the_length_reward_waits_for_its_warmup():
    made = scorer("reward.length_weight=0.4", "reward.length_warmup=3")
    finished = [trajectory(0, 10, True), trajectory(1, 30, True), trajectory(2, 30, False)]
    before = score(made, PROMPT, finished, [], iteration=2, expected=0.5)
    after = score(made, PROMPT, finished, [], iteration=3, expected=0.5)
    np.testing.assert_allclose(before.rewards, [1, 1, 0])
    np.testing.assert_allclose(after.rewards, [1 + 0.2, 1 - 0.2, 0 - 0.2])
    np.testing.assert_allclose(after.advantages, after.rewards - after.rewards.mean())
    assert after.correctness.tolist() == [1, 1, 0]


mixed = st.lists(
    st.tuples(st.integers(1, 30), st.booleans(), st.sampled_from(["stop", "length", "repeat"])),
    min_size=2,
    max_size=8,
)
weights = st.floats(0, 1.999)


def mixed_group(drawn) -> list[Trajectory]:
    return [trajectory(key, *one) for key, one in enumerate(drawn)]


@given(mixed, weights, st.floats(0, 1), st.integers(0, 5), st.integers(0, 5))
def test_a_reward_is_correctness_plus_weighted_shortness_minus_the_penalty(
    drawn, weight, penalty, warmup, iteration
):
    made = scorer(
        f"reward.length_weight={weight}",
        f"reward.length_warmup={warmup}",
        f"reward.repeat_penalty={penalty}",
    )
    group = score(made, PROMPT, mixed_group(drawn), [], iteration=iteration, expected=0.5)
    lengths, right, reasons = zip(*drawn, strict=True)
    expected = np.array(right, float) - penalty * np.array([r == "repeat" for r in reasons])
    if iteration >= warmup:
        expected += weight * length_rewards(lengths, right)
    np.testing.assert_allclose(group.rewards, expected, atol=1e-12)
    np.testing.assert_allclose(group.advantages, expected - expected.mean(), atol=1e-12)
    assert group.correctness.tolist() == list(map(float, right))


@given(mixed, weights, st.lists(st.integers(1, 40), max_size=4))
def test_below_a_weight_of_2_a_right_answer_is_worth_more_than_any_wrong_one(
    drawn, weight, open_lengths
):
    made = scorer(f"reward.length_weight={weight}", "trainer.ablation.release=response")
    group = score(made, PROMPT, mixed_group(drawn), open_lengths, iteration=0, expected=0.5)
    right = group.correctness > 0.5
    if right.any() and not right.all():
        assert group.rewards[right].min() > group.rewards[~right].max()


@given(mixed, weights, st.floats(0, 1), st.permutations(range(8)))
def test_the_order_in_which_responses_end_does_not_matter(drawn, weight, penalty, order):
    order = [index for index in order if index < len(drawn)]
    overrides = (f"reward.length_weight={weight}", f"reward.repeat_penalty={penalty}")
    everyone = mixed_group(drawn)
    straight = score(scorer(*overrides), PROMPT, everyone, [], iteration=0, expected=0.5)
    shuffled = score(
        scorer(*overrides), PROMPT, [everyone[i] for i in order], [], iteration=0, expected=0.5
    )
    np.testing.assert_allclose(shuffled.advantages, straight.advantages[order], atol=1e-12)


def test_an_open_sibling_is_in_the_range_of_lengths():
    """It has 30 tokens already, so the two of 10 and 20 are short ones."""
    made = scorer("reward.length_weight=1.0")
    finished = [trajectory(0, 10, True), trajectory(1, 20, True)]
    group = score(made, PROMPT, finished, [30], iteration=0, expected=0.5)
    np.testing.assert_allclose(group.rewards, [1.5, 1.0])


def test_a_response_that_went_round_in_a_loop_pays_for_it():
    made = scorer("reward.repeat_penalty=0.3")
    finished = [trajectory(0, 5, True, "repeat"), trajectory(1, 5, False, "length")]
    group = score(made, PROMPT, finished, [], iteration=0, expected=0.5)
    np.testing.assert_allclose(group.rewards, [0.7, 0.0])
    assert group.correctness.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("release", ["response", "group"])
def test_its_state_carries_open_groups_over_a_restart(release):
    overrides = (f"trainer.ablation.release={release}", "reward.length_weight=0.5")
    made, resumed = scorer(*overrides), scorer(*overrides)
    first = [trajectory(0, 10, True, "repeat"), trajectory(1, 20, False)]
    rest = [trajectory(2, 30, True)]
    score(made, PROMPT, first, [8], iteration=0, expected=0.5)
    resumed.load_state(json.loads(json.dumps(made.state())))
    assert resumed.state() == made.state() != {}
    finished = rest if release == "response" else first + rest
    groups = [
        score(one, PROMPT, finished, [], iteration=1, expected=0.5) for one in (made, resumed)
    ]
    np.testing.assert_array_equal(groups[0].advantages, groups[1].advantages)
    np.testing.assert_array_equal(groups[0].rewards, groups[1].rewards)


def test_groups_do_not_mix():
    made = scorer()
    score(made, PROMPT, [trajectory(0, 5, True, group=1)], [3], iteration=0, expected=0.5)
    other = score(made, PROMPT, [trajectory(1, 5, False, group=2)], [], iteration=0, expected=0.5)
    assert other.advantages.tolist() == [0.0]
    assert list(made.state()) == ["1"]


def test_a_failing_reward_is_no_verdict_and_may_be_tried_again():
    broken = [True]

    def reward(prompt, text):
        if broken[0] and text.startswith(str(BAD)):
            raise OSError("the judge is away")
        return judge(prompt, text)

    made = scorer(reward=reward)
    finished = [trajectory(0, 5, True), trajectory(1, 5, False)]
    with pytest.raises(RewardError, match="the judge is away"):
        score(made, PROMPT, finished, [], iteration=0, expected=0.5)
    broken[0] = False
    group = score(made, PROMPT, finished, [], iteration=0, expected=0.5)
    assert group.rewards.tolist() == [1.0, 0.0]
    assert group.advantages.tolist() == [0.5, -0.5]


def test_baseline_mean():
    rewards = np.array([1.0, 0.0, 0.0, 0.4])
    assert baseline(rewards, missing=0, expected=0.9, tau=0.01, kind="mean") == pytest.approx(0.35)


def test_baseline_mean_lets_open_siblings_stand_in():
    # The first to end was wrong; its three siblings are expected to be right half the time.
    value = baseline(np.array([0.0]), missing=3, expected=0.5, tau=0.01, kind="mean")
    assert value == pytest.approx(1.5 / 4)


@pytest.mark.parametrize("tau", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("missing", [0, 3])
def test_baseline_log_partition_by_brute_force(tau, missing):
    rewards, expected = [1.2, 0.0, -0.4], 0.3
    terms = [math.exp(r / tau) for r in rewards]
    terms += missing * [expected * math.exp(1 / tau) + (1 - expected)]
    value = baseline(
        np.array(rewards), missing=missing, expected=expected, tau=tau, kind="log_partition"
    )
    assert value == pytest.approx(tau * math.log(sum(terms) / len(terms)), rel=1e-12)


@pytest.mark.parametrize("missing", [0, 2])
def test_baseline_log_partition_tends_to_the_mean(missing):
    settings = {"missing": missing, "expected": 0.25}
    rewards = np.array([1.0, 0.0, 0.5])
    mean = baseline(rewards, tau=1.0, kind="mean", **settings)
    gaps = [
        abs(baseline(rewards, tau=tau, kind="log_partition", **settings) - mean)
        for tau in (1.0, 10.0, 1e5)
    ]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-5


@pytest.mark.parametrize(
    ("rewards", "missing", "expected", "value"),
    [
        ([1.0, 0.0], 0, 0.0, 1 - 0.01 * math.log(2)),  # the best response is all that is left
        ([1.0, 1.0], 0, 0.0, 1.0),
        ([0.0, 0.0], 0, 0.0, 0.0),
        ([-9.0, -9.0], 0, 0.0, -9.0),  # exp(-900) is zero
        ([0.0], 1, 0.0, 0.0),  # an open sibling that is sure to fail adds exp(0)
        ([0.0], 1, 1.0, 1 - 0.01 * math.log(2)),
    ],
)
def test_baseline_log_partition_does_not_overflow_at_a_small_tau(rewards, missing, expected, value):
    # exp(1 / 0.01) is 2.7e43 and exp(1 / 0.0001) infinite.
    got = baseline(
        np.array(rewards), missing=missing, expected=expected, tau=0.01, kind="log_partition"
    )
    assert got == pytest.approx(value, abs=1e-12)
    tiny = baseline(
        np.array(rewards), missing=missing, expected=expected, tau=1e-4, kind="log_partition"
    )
    assert tiny == pytest.approx(round(value), abs=1e-4)
