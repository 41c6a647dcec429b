"""The loop with a tiny model: budgets change nothing but when; crashes change nothing at all."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import kimi_core
from kimi_core.config import Config, load_config
from kimi_core.metrics import read_metrics
from kimi_core.run import Parts, build, fine_tune, train
from kimi_core.types import PROMPT_VERSION, Trajectory

TINY = [
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.context=64",
    "model.device=cpu",
    "prompts.held_out=20",
    "sft.data=multiply",
    "sft.steps=8",
    "sft.batch_size=8",
    "rollout.prompts_per_iteration=4",
    "rollout.samples_per_prompt=3",
    "rollout.max_response_tokens=30",
    "evaluation.every=100",
    "evaluation.prompts=4",
]
FROZEN = "trainer.learning_rate=1e-30"
BUDGET = 7


def config(*overrides: str) -> Config:
    return load_config(None, [*TINY, *overrides])


def started(*overrides: str) -> Parts:
    """A model after a little SFT, so that some of its responses end by themselves."""
    given = config(*overrides)
    parts = build(given)
    fine_tune(parts.model, parts.codec, given, parts.train_prompts, Console(file=StringIO()))
    return parts


def trained_by(parts: Parts, iterations: int) -> list[list[Trajectory]]:
    """What each of so many iterations trained."""
    trained = []
    for _ in range(iterations):
        parts.loop.iterate()
        trained.append([t for group in parts.loop.latest_groups for t in group.trajectories])
    return trained


@pytest.mark.parametrize(
    ("release", "temperature"), [("response", 1.0), ("group", 1.0), ("response", 0.0)]
)
def test_a_budget_changes_when_tokens_come_and_not_which(release, temperature):
    """With frozen weights, whatever a budget cuts and continues is what is sampled at once."""
    whole = started(FROZEN)
    cut = started(FROZEN, f"rollout.token_budget={BUDGET}", f"trainer.release={release}")
    for parts in (whole, cut):
        parts.loop.sampling = replace(parts.loop.sampling, temperature=temperature)
    at_once = {t.trajectory_id: t for ts in trained_by(whole, 2) for t in ts}
    in_pieces = {t.trajectory_id: t for ts in trained_by(cut, 7) for t in ts}
    # Prompts are drawn by success rates, which a budget lets come later: the first iteration's
    # prompts are the same for certain, so those 12 trajectories are.
    assert len(at_once) == 24
    for key in range(12):
        np.testing.assert_array_equal(at_once[key].token_ids, in_pieces[key].token_ids)
        np.testing.assert_allclose(at_once[key].logprobs, in_pieces[key].logprobs, atol=1e-4)
        assert at_once[key].end_reason == in_pieces[key].end_reason
    assert max(t.response_length for t in in_pieces.values()) > 2 * BUDGET
    if temperature:
        assert {t.end_reason for t in at_once.values()} >= {"length", "stop"}
    else:
        assert len({at_once[key].token_ids.tobytes() for key in range(12)}) == 4  # one a prompt


@pytest.mark.parametrize("release", ["response", "group"])
def test_continued_trajectories_carry_their_versions_and_are_trained_once(release):
    parts = started(f"rollout.token_budget={BUDGET}", f"trainer.release={release}")
    seen: Counter[int] = Counter()
    group_trained: dict[int, set[int]] = defaultdict(set)
    for iteration in range(8):
        report = parts.loop.iterate()
        trained = [t for group in parts.loop.latest_groups for t in group.trajectories]
        assert report.policy_version == iteration
        assert report.decode_steps <= BUDGET
        assert report.samples_trained == len(trained)
        assert (
            report.samples_trained_total
            == parts.loop.samples_trained
            == sum(seen.values()) + len(trained)
        )
        if trained:
            assert report.logprob_gap_max < 1e-4
            assert not report.reference_recomputed
        for one in trained:
            seen[one.trajectory_id] += 1
            group_trained[one.group_id].add(iteration)
            check_versions(one, last=iteration)
        waiting = [parts.loop.buffer.read(key) for key in parts.loop.buffer.unfinished()]
        assert len(waiting) == report.trajectories_unfinished
        for one in waiting:
            check_versions(one, last=iteration)
        # What was just trained leaves the buffer when the next iteration begins.
        just_trained = {one.trajectory_id for one in trained}
        assert set(parts.loop.trained) == just_trained <= set(parts.loop.buffer.finished())
        held = set(parts.loop.buffer.finished()) - just_trained
        assert not held & set(seen)
        if release == "response":
            assert not held  # Trained in the iteration in which they end.
        # Every trajectory begun is trained, or in the buffer, and never both.
        assert len(seen) + len(waiting) + len(held) == 12 * (iteration + 1)
    assert set(seen.values()) == {1}
    if release == "group":
        assert all(len(iterations) == 1 for iterations in group_trained.values())
    else:
        assert any(len(iterations) > 1 for iterations in group_trained.values())


def check_versions(one: Trajectory, *, last: int) -> None:
    response = one.policy_versions[one.prompt_length :]
    assert set(one.policy_versions[: one.prompt_length].tolist()) == {PROMPT_VERSION}
    assert np.all(np.diff(response) >= 0)
    assert response.max() <= last
    versions, counts = np.unique(response, return_counts=True)
    assert np.all(np.diff(versions) == 1)  # It goes on in every iteration until it ends.
    assert np.all(counts[:-1] == BUDGET)
    assert counts[-1] <= BUDGET
    assert np.all(one.logprobs[one.prompt_length :] <= 0)


class Killed(Exception):
    """Stands for a process that dies while it samples."""


@pytest.mark.parametrize("segments", [0, 1, 5, 11])
@pytest.mark.parametrize("budget", [None, BUDGET])
def test_a_rollout_cut_short_goes_on_from_its_last_segment(budget, segments):
    """The third iteration dies after so many segments; nothing that arrived is sampled again."""
    overrides = [] if budget is None else [f"rollout.token_budget={budget}"]
    whole, cut = started(*overrides), started(*overrides)
    for parts in (whole, cut):
        parts.loop.sampling = replace(parts.loop.sampling, stream_tokens=3)
        trained_by(parts, 2)
    state = json.loads(json.dumps(cut.loop.state()))
    policy = {name: tensor.clone() for name, tensor in cut.model.state_dict().items()}
    generate = cut.loop.engine.generate
    arrived = []

    def dies(requests, sampling):
        for segment in generate(requests, sampling):
            if len(arrived) == segments:
                raise Killed
            arrived.append(segment)
            yield segment

    cut.loop.engine.generate = dies
    with pytest.raises(Killed):
        cut.loop.iterate()
    expected = whole.loop.iterate()

    again = started(*overrides)
    again.model.load_state_dict(policy)
    again.loop.sampling = cut.loop.sampling
    again.loop.load_state(state, cut.loop.buffer)
    report = again.loop.iterate()

    assert report.tokens_sampled + sum(map(len, arrived)) == expected.tokens_sampled
    assert report.reward_mean == pytest.approx(expected.reward_mean, nan_ok=True)
    assert report.trajectories_unfinished == expected.trajectories_unfinished
    assert again.loop.buffer.unfinished() == whole.loop.buffer.unfinished()
    assert again.loop.trained == whole.loop.trained
    for key in [*whole.loop.buffer.unfinished(), *whole.loop.trained]:
        one, other = (parts.loop.buffer.read(key) for parts in (whole, again))
        assert one.end_reason == other.end_reason
        for name in ("token_ids", "mask", "policy_versions"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_groups_half_begun_are_completed():
    """A crash between `begin` and the prompt's tokens, or between two samples of a group."""
    whole, cut = started(), started()
    prompts = whole.loop._next_prompts()
    cut.loop.buffer.begin(prompts[0].id, 0)
    reports = [parts.loop.iterate() for parts in (whole, cut)]
    assert reports[0].tokens_sampled == reports[1].tokens_sampled
    for key in range(12):
        one, other = (parts.loop.buffer.read(key) for parts in (whole, cut))
        assert (one.prompt_id, one.group_id) == (other.prompt_id, other.group_id)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)


def test_tokens_of_older_versions_are_stale_in_the_metrics():
    parts = started(f"rollout.token_budget={BUDGET}")
    reports = [parts.loop.iterate() for _ in range(5)]
    for report, expected_age in zip(reports, [0, 1, 2, 3, 4], strict=True):
        assert report.max_staleness <= expected_age
    assert reports[0].tokens_stale_share == 0 or reports[0].samples_trained == 0
    assert 0 < reports[4].tokens_stale_share < 1
    assert reports[4].max_staleness == 4  # ceil(30 / 7) pieces of the longest


TIMES = ("wall_s", "cpu_s", "rollout_s", "train_s", "tokens_per_s")


def lines(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock measured."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def iteration_lines(folder: Path) -> list[dict]:
    return [line for line in lines(folder) if line["kind"] == "iteration"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


RUN = [f"rollout.token_budget={BUDGET}", "iterations=6", "trainer.learning_rate=1e-3"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Six iterations without a break."""
    runs = tmp_path_factory.mktemp("runs")
    return train(config(*RUN, f"runs={runs}"), console=Console(file=StringIO()))


def test_the_same_seed_gives_the_same_run_and_another_does_not(straight, tmp_path):
    given = config(*RUN, f"runs={tmp_path}")
    again = train(given, console=Console(file=StringIO()))
    assert lines(again) == lines(straight)
    assert_same_weights(again, straight)
    other = train(
        config(*RUN, f"runs={tmp_path}", "name=other", "seed=1", "iterations=1"),
        console=Console(file=StringIO()),
    )
    assert iteration_lines(other)[0] != iteration_lines(straight)[0]


# Says when each iteration's state is saved. With DIE_IN=module:function it kills itself in the
# fourth call of that function.
STEPWISE = """
    import importlib
    import itertools
    import os
    import signal
    import sys
    from pathlib import Path
    from kimi_core import run
    from kimi_core.config import load_config

    save = run._save
    def saved(parts, folder, *rest):
        save(parts, folder, *rest)
        print("saved", parts.loop.iteration, flush=True)
    run._save = saved

    if "DIE_IN" in os.environ:
        module, name = os.environ["DIE_IN"].split(":")
        module, calls = importlib.import_module(module), itertools.count(1)
        original = getattr(module, name)
        def deadly(*args, **named):
            if next(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **named)
        setattr(module, name, deadly)

    run.train(load_config(None, sys.argv[2:]), resume=sys.argv[1] == "resume")
    print("done", flush=True)
"""


def start(how: str, overrides: list[str], **environment: str) -> subprocess.Popen:
    root = str(Path(kimi_core.__file__).parents[1])
    code = "\n".join(line[4:] for line in STEPWISE.splitlines())
    return subprocess.Popen(
        [sys.executable, "-c", code, how, *overrides],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, line: str) -> None:
    for found in process.stdout:
        if found.strip() == line:
            return
    pytest.fail(f"It ended without {line!r}: {process.stderr.read()}")


@pytest.mark.parametrize(
    "moment",
    [
        "anywhere",
        "kimi_core.loop:publish",  # trained, not counted
        "kimi_core.run_folder:_swap",  # in metrics.jsonl, its state half saved
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(straight, tmp_path, moment):
    """kill -9 after the second iteration: the run then ends as if nothing had happened."""
    overrides = [*TINY, *RUN, f"runs={tmp_path}"]
    if moment == "anywhere":
        process = start("new", overrides)
        wait_for(process, f"saved {random.Random(os.getpid()).choice([2, 3, 4])}")
        process.send_signal(signal.SIGKILL)
    else:
        process = start("new", overrides, DIE_IN=moment)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "think" / "checkpoint").exists()

    folder = train(config(*RUN, f"runs={tmp_path}"), resume=True, console=Console(file=StringIO()))

    assert [line["iteration"] for line in iteration_lines(folder)] == [1, 2, 3, 4, 5, 6]
    assert iteration_lines(folder) == iteration_lines(straight)
    assert_same_weights(folder, straight)
    summary = json.loads((folder / "summary.json").read_text())
    iterations, evaluations = read_metrics(folder / "metrics.jsonl")
    # The SFT before the kill is in the time of the whole run.
    assert summary["wall_s"] > sum(i.wall_s for i in iterations) + sum(
        e.wall_s for e in evaluations
    )


def test_ctrl_c_ends_the_iteration_saves_and_can_be_resumed(straight, tmp_path):
    overrides = [*TINY, *RUN, f"runs={tmp_path}"]
    process = start("new", overrides)
    wait_for(process, "saved 2")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.rstrip().endswith("done")
    assert "Traceback" not in errors
    folder = tmp_path / "think"
    done = len(iteration_lines(folder))
    assert 2 <= done < 6
    assert (folder / "states" / f"{done:06d}").is_dir()
    assert (folder / "checkpoint" / "model.safetensors").is_file()
    assert (folder / "summary.json").is_file()

    train(config(*RUN, f"runs={tmp_path}"), resume=True, console=Console(file=StringIO()))

    assert iteration_lines(folder) == iteration_lines(straight)
    assert_same_weights(folder, straight)
