"""A verdict that could not be reached is never a wrong answer, at any place of the loop."""

import json
import threading
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import Config
from kimi_core.metrics import read_metrics
from kimi_core.reward.base import InfrastructureError, LimitReached, RewardError, RewardOutage
from kimi_core.reward.groups import GroupScorer
from kimi_core.reward.judging import judge_all
from kimi_core.reward.load import close_reward
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.types import Prompt, Trajectory

PROMPT = Prompt(7, "3*214=", "642")


def by_text(prompt: Prompt, text: str) -> float:
    """``r`` is right, ``w`` is wrong, ``?`` has no verdict."""
    if text.startswith("?"):
        raise InfrastructureError("the judge is away")
    return float(text.startswith("r"))


def trajectory(key: int, kind: str, length: int, group: int = 0) -> Trajectory:
    mask = np.array([0, *[1] * length], np.uint8)
    return Trajectory(
        trajectory_id=key,
        prompt_id=PROMPT.id,
        group_id=group,
        token_ids=np.array([0, *[ord(kind)] * length], np.int32),
        logprobs=-0.5 * mask.astype(np.float32),
        mask=mask,
        policy_versions=mask.astype(np.int32) - 1,
        end_reason="stop",
    )


def scorer(*overrides: str) -> GroupScorer:
    never = "rollout.samples_per_prompt=1000"  # An outage.
    config = load_config(None, [never, *overrides])
    return GroupScorer(config, by_text, lambda ids: "".join(map(chr, ids.tolist())))


drawn_groups = st.lists(
    st.tuples(st.sampled_from("rw?"), st.integers(1, 30)), min_size=1, max_size=8
)


@given(drawn_groups, st.data())
def test_a_group_is_as_if_the_response_had_not_been_sampled(drawn, data):
    """Ending in any order over any number of iterations, with a restart between any two: the last
    group to be made, and the scorer's state, are those of the siblings with a verdict alone."""
    release = data.draw(st.sampled_from(["response", "group"]))
    overrides = (f"trainer.ablation.release={release}", "reward.length_weight=0.5")
    made, without = scorer(*overrides), scorer(*overrides)
    waiting = [trajectory(key, *one) for key, one in enumerate(drawn)]
    held: list[Trajectory] = []
    trained, unjudged = [], []
    while waiting:
        count = data.draw(st.integers(1, len(waiting)))
        held, waiting = held + waiting[:count], waiting[count:]
        open_lengths = [1] * len(waiting)
        missing = made.judge([(PROMPT, one) for one in held])
        sound = [one for one in held if one.trajectory_id not in missing]
        group = made.group(PROMPT, held, open_lengths, iteration=0, expected=0.5)
        assert without.judge([(PROMPT, one) for one in sound]) == []
        expected = sound and without.group(PROMPT, sound, open_lengths, iteration=0, expected=0.5)
        if group is None:
            assert not expected
        else:
            assert group.trajectories == expected.trajectories
            np.testing.assert_array_equal(group.rewards, expected.rewards)
            np.testing.assert_array_equal(group.advantages, expected.advantages)
            np.testing.assert_array_equal(group.ended_rewards, expected.ended_rewards)
            trained += [one.trajectory_id for one in group.trajectories]
        unjudged += missing
        released = bool(group) or not open_lengths
        held = [] if released else sound  # The rest is evicted.
        resumed = scorer(*overrides)
        resumed.load_state(json.loads(json.dumps(made.state())))
        made = resumed
    assert sorted(unjudged) == [key for key, (kind, _) in enumerate(drawn) if kind == "?"]
    assert sorted(trained) == [key for key, (kind, _) in enumerate(drawn) if kind != "?"]
    assert made.state() == {}


def test_the_only_response_with_a_verdict_teaches_nothing():
    made = scorer()
    finished = [trajectory(0, "r", 5), trajectory(1, "?", 5)]
    assert made.judge([(PROMPT, one) for one in finished]) == [1]
    group = made.group(PROMPT, finished, [], iteration=0, expected=0.1)
    assert [one.trajectory_id for one in group.trajectories] == [0]
    assert (group.correctness.tolist(), group.advantages.tolist()) == ([1.0], [0.0])
    assert group.ended_rewards.tolist() == group.rewards.tolist()


def test_one_that_never_had_a_length_is_not_in_its_range():
    """Else the longest, which nobody judged, would make both of the others short ones."""
    made = scorer("reward.length_weight=1.0")
    finished = [trajectory(0, "r", 10), trajectory(1, "r", 20), trajectory(2, "?", 30)]
    made.judge([(PROMPT, one) for one in finished])
    group = made.group(PROMPT, finished, [], iteration=0, expected=0.5)
    assert group.rewards.tolist() == [1.5, 0.5]


@pytest.mark.parametrize("workers", [1, 4])
def test_verdicts_come_in_the_order_of_the_responses(workers):
    """With four threads the first call ends last: it waits for the three after it."""
    others = threading.Semaphore(0)

    def slow_at_first(prompt: Prompt, text: str) -> float:
        if text == "0" and workers > 1:
            for _ in range(3):
                assert others.acquire(timeout=30)
        elif text != "0":
            others.release()
        if text == "2":
            raise InfrastructureError("the judge is away")
        return float(text)

    responses = [(PROMPT, str(number)) for number in range(4)]
    verdicts = judge_all(slow_at_first, responses, workers=workers, outage_from=2)
    assert [one and one.value for one in verdicts] == [0.0, 1.0, None, 3.0]


def test_one_worker_calls_one_after_the_other_in_one_thread():
    threads = []

    def remember(prompt: Prompt, text: str) -> float:
        threads.append(threading.current_thread())
        return 0.0

    judge_all(remember, [(PROMPT, "a"), (PROMPT, "b")], workers=1, outage_from=2)
    assert threads == threads[:1] * 2 and threads[0].daemon


@pytest.mark.parametrize("workers", [1, 3])
def test_a_fault_of_the_function_is_still_that(workers):
    def broken(prompt: Prompt, text: str) -> float:
        return 1 / int(text)

    with pytest.raises(RewardError, match="'0'"):
        judge_all(
            broken, [(PROMPT, "1"), (PROMPT, "0"), (PROMPT, "x")], workers=workers, outage_from=1
        )


def test_responses_that_reach_a_limit_are_no_outage():
    def bomb(prompt: Prompt, text: str) -> float:
        raise LimitReached("took more than 10 CPU-seconds")

    verdicts = judge_all(bomb, [(PROMPT, "9^9^9")] * 8, workers=1, outage_from=2)
    assert verdicts == [None] * 8


@given(st.text("rw?", max_size=12), st.integers(1, 6))
def test_more_than_half_and_a_groups_worth_make_an_outage(kinds, outage_from):
    responses = [(PROMPT, kind) for kind in kinds]
    failed = kinds.count("?")
    if failed >= outage_from and failed > len(kinds) / 2:
        with pytest.raises(RewardOutage, match=f"^{failed} of {len(kinds)} .*the judge is away"):
            judge_all(by_text, responses, workers=1, outage_from=outage_from)
    else:
        verdicts = judge_all(by_text, responses, workers=1, outage_from=outage_from)
        expected = [{"r": 1.0, "w": 0.0, "?": None}[kind] for kind in kinds]
        assert [one and one.value for one in verdicts] == expected


def test_an_outage_leaves_the_scorer_as_it_was():
    made = scorer("rollout.samples_per_prompt=2")
    made.judge([(PROMPT, trajectory(0, "r", 3))])
    before = made.state()
    with pytest.raises(RewardOutage):
        made.judge([(PROMPT, trajectory(key, kind, 3)) for key, kind in [(1, "?"), (2, "?")]])
    assert made.state() == before


def test_only_what_can_be_closed_is_closed():
    class Holding:
        closed = 0

        def __call__(self, prompt: Prompt, text: str) -> float:
            return 0.0

        def close(self) -> None:
            self.closed += 1

    holding = Holding()
    close_reward(holding)
    close_reward(by_text)
    assert holding.closed == 1


# A run. The file `away` beside the reward says of which responses there is no verdict: those whose
# text, prompt included, has a hash that begins with a byte below it.
REWARD = """
import hashlib
from pathlib import Path
from kimi_core.reward.base import InfrastructureError

HERE = Path(__file__).parent

class Judge:
    def __call__(self, prompt, text):
        with (HERE / "calls").open("a") as calls:
            calls.write(f"{prompt.id} {text}\\n")
        first = hashlib.sha256(f"{prompt.id} {text}".encode()).digest()[0]
        if first < int((HERE / "away").read_text()):
            raise InfrastructureError("the judge is away")
        return float(text.rpartition("#")[2] == prompt.answer)

    def close(self):
        (HERE / "closed").touch()

judge = Judge()
"""


@pytest.fixture
def given_config(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "away").write_text("60")

    def make(*overrides: str) -> Config:
        return load_config(
            None,
            [
                "model.scratch.layers=2",
                "model.scratch.width=32",
                "model.scratch.heads=2",
                "model.scratch.context=64",
                "model.device=cpu",
                "prompts.held_out=20",
                "sft.data=multiply",
                "sft.steps=8",
                "sft.batch_size=8",
                "rollout.prompts_per_iteration=4",
                "rollout.samples_per_prompt=3",
                "rollout.max_response_tokens=30",
                "rollout.token_budget=12",
                "evaluation.every=100",
                "iterations=6",
                f"runs={tmp_path}",
                f"reward.function={tmp_path}/reward.py:judge",
                *overrides,
            ],
        )

    return make


def run(config: Config, **arguments) -> Path:
    return train(config, console=Console(file=StringIO()), **arguments)


@pytest.mark.parametrize("release", ["response", "group"])
def test_the_loop_accounts_for_every_response(given_config, tmp_path, release):
    (tmp_path / "away").write_text("40")  # Few end in some iterations here.
    parts = build(given_config(f"trainer.ablation.release={release}"))
    loop, begun, trained, unjudged = parts.loop, 0, set(), 0
    for _ in range(8):
        report = loop.iterate()
        begun += 12
        new = [t.trajectory_id for group in loop.latest.groups for t in group.trajectories]
        assert not trained & set(new)
        trained.update(new)
        unjudged += report.infrastructure_errors
        assert len(loop.consumed) == len(new) + report.infrastructure_errors
        assert report.samples_trained == len(new)
        waiting = set(loop.buffer.unfinished()) | set(loop.buffer.finished()) - set(loop.consumed)
        assert len(trained) + unjudged + len(waiting) == begun
        if release == "response":
            assert not set(loop.buffer.finished()) - set(loop.consumed)
    assert unjudged > 5
    assert len(trained) > 5
    assert loop.curriculum.state()["attempts"].sum() == loop.samples_trained == len(trained)
    parts.close()


@pytest.mark.nightly
def test_a_run_counts_them_closes_the_judge_and_resumes_to_the_same_weights(given_config, tmp_path):
    straight = run(given_config("name=straight"))
    assert (tmp_path / "closed").exists()
    iterations, evaluations = read_metrics(straight / "metrics.jsonl")
    assert sum(line.infrastructure_errors for line in iterations) > 3
    assert evaluations[0].infrastructure_errors > 3
    assert evaluations[0].n == 20
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["infrastructure_errors"] == sum(m.infrastructure_errors for m in iterations)

    run(given_config("name=parts", "iterations=3"))
    folder = run(given_config("name=parts", "reward.workers=1"), resume=True)
    for name, tensor in load_file(straight / "checkpoint" / "model.safetensors").items():
        other = load_file(folder / "checkpoint" / "model.safetensors")[name]
        assert torch.equal(tensor, other), name


@pytest.mark.nightly
def test_threads_change_nothing(given_config):
    one = run(given_config("name=one", "iterations=2"))
    four = run(given_config("name=four", "iterations=2", "reward.workers=4"))
    for name, tensor in load_file(one / "checkpoint" / "model.safetensors").items():
        other = load_file(four / "checkpoint" / "model.safetensors")[name]
        assert torch.equal(tensor, other), name


@pytest.mark.nightly
def test_an_outage_stops_the_run_and_a_resumed_one_judges_the_same_responses(
    given_config, tmp_path
):
    overrides = ("rollout.token_budget=30",)  # All responses end in their iteration.
    straight = run(given_config("name=straight", *overrides, "iterations=3"))
    run(given_config("name=cut", *overrides, "iterations=2"))
    (tmp_path / "away").write_text("256")
    (tmp_path / "calls").unlink()
    cut = given_config("name=cut", *overrides, "iterations=3")
    with pytest.raises(RewardOutage, match=r"12 of 12 verdicts .* the judge is away.*--resume"):
        run(cut, resume=True)
    _trial, *lines = (tmp_path / "calls").read_text().splitlines()
    judged = sorted(lines)
    with RolloutBuffer.open(tmp_path / "cut" / "buffer.bin", readonly=True) as buffer:
        left = {key: buffer.read(key).token_ids.tolist() for key in buffer.finished()}
    assert len(left) == len(judged) == 12

    (tmp_path / "away").write_text("60")
    (tmp_path / "calls").unlink()
    folder = run(cut, resume=True)
    _trial, *calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(calls[:12]) == judged
    for name, tensor in load_file(straight / "checkpoint" / "model.safetensors").items():
        other = load_file(folder / "checkpoint" / "model.safetensors")[name]
        assert torch.equal(tensor, other), name
