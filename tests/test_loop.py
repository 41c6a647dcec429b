"""The loop with a tiny model: budgets change nothing but when; crashes change nothing at all."""

import json
import os
import shutil
import signal
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from warm import Warm

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import Config
from kimi_core.metrics import read_metrics
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.run.build import Parts, build
from kimi_core.run.config_file import load_config
from kimi_core.run.fine_tuning import fine_tune
from kimi_core.run.run import train
from kimi_core.types import PROMPT_VERSION, Request, Trajectory

TINY = [
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
    fine_tune(parts, given, Console(file=StringIO()))
    parts.loop.start()
    return parts


def trained_by(parts: Parts, iterations: int) -> list[list[Trajectory]]:
    """What each of so many iterations trained."""
    trained = []
    for _ in range(iterations):
        parts.loop.iterate()
        trained.append([t for group in parts.loop.latest.groups for t in group.trajectories])
    return trained


@cache
def sampled_at_once(temperature: float) -> dict[int, Trajectory]:
    """What two iterations without a budget trained, by trajectory."""
    parts = started(FROZEN)
    parts.loop.sampling = replace(parts.loop.sampling, temperature=temperature)
    return {one.trajectory_id: one for some in trained_by(parts, 2) for one in some}


@pytest.mark.parametrize(
    ("release", "temperature"), [("response", 1.0), ("group", 1.0), ("response", 0.0)]
)
def test_a_budget_changes_when_tokens_come_and_not_which(release, temperature):
    """With frozen weights, whatever a budget cuts and continues is what is sampled at once."""
    at_once = sampled_at_once(temperature)
    cut = started(FROZEN, f"rollout.token_budget={BUDGET}", f"trainer.ablation.release={release}")
    cut.loop.sampling = replace(cut.loop.sampling, temperature=temperature)
    in_pieces = {t.trajectory_id: t for ts in trained_by(cut, 5) for t in ts}
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
    parts = started(f"rollout.token_budget={BUDGET}", f"trainer.ablation.release={release}")
    seen: Counter[int] = Counter()
    group_trained: dict[int, set[int]] = defaultdict(set)
    for iteration in range(8):
        report = parts.loop.iterate()
        trained = [t for group in parts.loop.latest.groups for t in group.trajectories]
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
        # What was trained stays until the next iteration begins, so that a state can be saved.
        assert sorted(parts.loop.consumed) == sorted(t.trajectory_id for t in trained)
        held = set(parts.loop.buffer.finished()) - set(parts.loop.consumed)
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


@pytest.mark.parametrize("release", ["response", "group"])
def test_an_iteration_reads_what_goes_on_once_and_what_ends_three_times(release):
    """Before the rollout, when a response has ended, and to pack what is trained."""
    parts = started(f"rollout.token_budget={BUDGET}", f"trainer.ablation.release={release}")
    buffer, read, packed = parts.loop.buffer, Counter(), Counter()
    plain_read, plain_pack = buffer.read, buffer.pack

    def counted_read(key):
        read[key] += 1
        return plain_read(key)

    def counted_pack(keys):
        packed.update(keys)
        return plain_pack(keys)

    buffer.read, buffer.pack = counted_read, counted_pack
    for _ in range(5):
        read.clear(), packed.clear()
        report = parts.loop.iterate()
        assert set(read.values()) <= {1, 2}
        assert sum(times == 2 for times in read.values()) == report.trajectories_finished
        assert len(read) >= report.trajectories_finished + report.trajectories_unfinished
        assert sorted(packed) == sorted(parts.loop.consumed) and set(packed.values()) <= {1}


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


def test_tokens_of_older_versions_are_stale_in_the_metrics():
    parts = started(f"rollout.token_budget={BUDGET}")
    reports = [parts.loop.iterate() for _ in range(5)]
    for report, expected_age in zip(reports, [0, 1, 2, 3, 4], strict=True):
        assert report.max_staleness <= expected_age
    assert reports[0].tokens_stale_share == 0 or reports[0].samples_trained == 0
    assert 0 < reports[4].tokens_stale_share < 1
    assert reports[4].max_staleness == 4  # ceil(30 / 7) pieces of the longest


def test_a_resumed_run_remembers_how_long_engine_and_trainer_have_differed():
    before, after = started(), build(config())
    before.loop.trainer.gaps_over_limit = 2
    after.loop.curriculum.load_state(before.loop.curriculum.state())
    after.loop.load_state(json.loads(json.dumps(before.loop.state())), before.loop.buffer)
    assert after.loop.trainer.gaps_over_limit == 2


TIMES = ("wall_s", "cpu_s", "rollout_s", "train_s", "tokens_per_s", "turn_s")


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


RUN = [
    f"rollout.token_budget={BUDGET}",
    "rollout.stream_tokens=3",
    "iterations=6",
    "trainer.learning_rate=1e-3",
]


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


# Says when each iteration's state is saved. With DIE_IN=module:function:n it kills itself in the
# nth call of that function after the state of iteration DIE_AFTER.
STEPWISE = """
    import importlib
    import itertools
    import os
    import signal
    import sys
    from pathlib import Path
    from kimi_core.run import run, state
    from kimi_core.run.config_file import load_config
    from kimi_core.run.stop import Stopped

    save, calls = state.save, None
    def saved(loop, folder, *rest):
        global calls
        save(loop, folder, *rest)
        print("saved", loop.iteration, flush=True)
        if loop.iteration == int(os.environ.get("DIE_AFTER", 2)):
            calls = itertools.count(1)
    state.save = saved

    if "DIE_IN" in os.environ:
        module, path, fatal = os.environ["DIE_IN"].split(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(module)
        for attribute in owners:
            owner = getattr(owner, attribute)
        original = getattr(owner, name)
        def deadly(*args, **named):
            if calls and next(calls) == int(fatal):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **named)
        setattr(owner, name, deadly)

    try:
        run.train(load_config(None, sys.argv[1:]))
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.status)
    print("done", flush=True)
"""


def start(overrides: list[str], **environment: str) -> Warm:
    return Warm(["-c", dedent(STEPWISE), *overrides], env=os.environ | environment)


def wait_for(process: Warm, line: str) -> None:
    for found in process.stdout:
        if found.strip() == line:
            return
    pytest.fail(f"It ended without {line!r}: {process.stderr.read()}")


def killed(overrides: list[str], **environment: str) -> None:
    """A run that kills itself, as ``environment`` says."""
    process = start(overrides, **environment)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors


@pytest.mark.parametrize(
    "moment",
    [
        "kimi_core.trainer.trainer:Trainer.publish:1",  # trained, not counted
        "kimi_core.run.states:swap:1",  # in metrics.jsonl, its state half saved
        "kimi_core.loop:Loop._evict_consumed:1",  # saved, and the buffer is still as it was
        "kimi_core.loop:Loop._begin:1",  # evicted, nothing begun
        "kimi_core.buffer:RolloutBuffer.append:5",  # a trajectory begun without its prompt
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(straight, tmp_path, moment):
    """kill -9: the run ends bit for bit as if nothing had happened."""
    killed([*TINY, *RUN, f"runs={tmp_path}"], DIE_IN=moment)
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


@pytest.mark.parametrize("calls", [3, 5])
def test_a_run_killed_in_a_rollout_continues_from_the_last_token(
    straight, tmp_path, monkeypatch, calls
):
    """With ``resume = "keep"``, what was acknowledged before kill -9 is the beginning of what goes
    on."""
    killed([*TINY, *RUN, f"runs={tmp_path}"], DIE_IN=f"kimi_core.rollout.phase:_append:{calls}")
    saved = max(int(one.name) for one in (tmp_path / "think" / "states").iterdir())
    with RolloutBuffer.open(tmp_path / "think" / "buffer.bin", readonly=True) as buffer:
        left = {key: buffer.read(key) for key in buffer.unfinished()}
    sampled = {key: int((t.policy_versions == saved).sum()) for key, t in left.items()}
    assert saved == 2
    assert set(sampled.values()) & set(range(1, BUDGET))

    requests: list[list[Request]] = []
    generate = TorchEngine.generate

    def recorded(self, given, sampling):
        if sampling.stream_tokens:  # Evaluations do not stream.
            requests.append(list(given))
        return generate(self, given, sampling)

    monkeypatch.setattr(TorchEngine, "generate", recorded)
    resumed = config(*RUN, f"runs={tmp_path}", "resume=keep")
    folder = train(resumed, resume=True, console=Console(file=StringIO()))

    first = {request.trajectory_id: request for request in requests[0]}
    assert set(first) == {key for key in left if sampled[key] < BUDGET}
    for key, request in first.items():
        assert request.token_ids.tolist() == left[key].token_ids.tolist()
        assert request.budget == min(BUDGET - sampled[key], request.remaining)
    # The first token to go on with comes from a prefill, not a decode step, and rounds otherwise.
    # Decode steps are those of the last process.
    mine, theirs = iteration_lines(folder), iteration_lines(straight)
    assert [line["tokens_sampled"] for line in mine] == [line["tokens_sampled"] for line in theirs]
    for one, other in zip(mine, theirs, strict=True):
        for key, value in one.items():
            if key == "decode_steps":
                continue
            assert value == other[key] or value == pytest.approx(other[key], rel=1e-3, abs=1e-5)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, weights(straight)[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def killed_in_5(tmp_path_factory) -> Path:
    """With ``save_every`` = 3 a kill in iteration 5 finds a buffer of weights that are lost."""
    runs = tmp_path_factory.mktemp("killed")
    overrides = [*TINY, *RUN, f"runs={runs}", "save_every=3"]
    killed(overrides, DIE_IN="kimi_core.trainer.trainer:Trainer.publish:2", DIE_AFTER="3")
    return runs


@pytest.mark.parametrize("spoilt", ["ahead", "missing", "damaged"])
def test_a_live_buffer_that_does_not_fit_gives_way_to_the_snapshot(
    straight, killed_in_5, tmp_path, spoilt
):
    shutil.copytree(killed_in_5, tmp_path, dirs_exist_ok=True)
    overrides = [*RUN, f"runs={tmp_path}", "save_every=3"]
    live = tmp_path / "think" / "buffer.bin"
    if spoilt == "missing":
        live.unlink()
    elif spoilt == "damaged":
        live.write_bytes(live.read_bytes()[:5000])
    said = Console(file=StringIO())
    folder = train(config(*overrides), resume=True, console=said)
    reason = {"ahead": "is of iteration 4", "missing": "is missing", "damaged": "is cut off"}
    assert f"{reason[spoilt]}" in said.file.getvalue()
    assert "restored from" in said.file.getvalue()
    assert iteration_lines(folder) == iteration_lines(straight)
    assert_same_weights(folder, straight)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_iteration_saves_and_can_be_resumed(straight, tmp_path, signum, status):
    overrides = [*TINY, *RUN, f"runs={tmp_path}", "grace_s=120"]
    process = start(overrides)
    wait_for(process, "saved 2")
    process.send_signal(signum)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    folder = tmp_path / "think"
    done = len(iteration_lines(folder))
    assert output.rstrip().endswith(f"stopped at {done} of 6; --resume goes on")
    assert 2 <= done < 6
    assert (folder / "states" / f"{done:06d}").is_dir()
    assert (folder / "checkpoint" / "model.safetensors").is_file()
    assert (folder / "summary.json").is_file()

    train(config(*RUN, f"runs={tmp_path}"), resume=True, console=Console(file=StringIO()))

    assert iteration_lines(folder) == iteration_lines(straight)
    assert_same_weights(folder, straight)
