"""RL on programs, end to end: every response that ended has a verdict, or is counted as without."""

import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from plain_run import plain_run, result

from kimi_core.metrics import read_metrics
from kimi_core.reward.code import reward as code
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.sandbox import Pool, SandboxUnavailable, Status

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model.scratch.layers=1",
    "model.scratch.width=16",
    "model.scratch.heads=2",
    "sft.steps=2",
    "iterations=2",
    "prompts.held_out=3",
    "rollout.prompts_per_iteration=3",
    "rollout.samples_per_prompt=4",
    "rollout.max_response_tokens=12",
    "evaluation.prompts=2",
]


def carry_out(tmp_path, *overrides):
    config = load_config(ROOT / "configs" / "code.toml", [*TINY, f"runs={tmp_path}", *overrides])
    iterations, evaluations = read_metrics(train(config) / "metrics.jsonl")
    return iterations, evaluations


@pytest.mark.nightly
def test_verdicts_that_fail_now_and_then_are_counted_and_left_out(tmp_path, monkeypatch):
    failed: set[bytes] = set()

    def flaky(program, *, stdin, files, limits):
        trial = b'"program": "f = lambda x: "' in stdin  # Before the run, and not counted.
        if not trial and zlib.crc32(stdin) % 4 == 0:
            failed.add(stdin)
            return result(Status.INFRA)
        return plain_run(program, stdin=stdin, files=files, limits=limits)

    closed = []
    sandbox = SimpleNamespace(run=flaky, close=lambda: closed.append(True))
    monkeypatch.setattr(code, "open_sandbox", lambda config: sandbox)
    iterations, evaluations = carry_out(tmp_path)
    assert failed and closed
    for one in iterations:
        assert one.trajectories_finished == 12
        assert one.samples_trained + one.infrastructure_errors == 12
    excluded = sum(one.infrastructure_errors for one in [*iterations, *evaluations])
    assert excluded >= len(failed)  # As often as the same program came, not once each.


@pytest.mark.slow
def test_in_the_sandbox(tmp_path):
    try:
        Pool(1).close()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    iterations, _ = carry_out(tmp_path)
    assert [one.samples_trained for one in iterations] == [12, 12]
    assert [one.infrastructure_errors for one in iterations] == [0, 0]


def test_a_host_without_a_sandbox_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise SandboxUnavailable("no bwrap: apt-get install bubblewrap")

    monkeypatch.setattr("kimi_core.reward.code.runner.Pool", missing)
    with pytest.raises(ValueError, match="apt-get install bubblewrap"):
        build(load_config(ROOT / "configs" / "code.toml", TINY))
    assert not any(tmp_path.iterdir())


def test_a_service_that_does_not_answer_is_told_too():
    pytest.importorskip("httpx2")
    config = load_config(None, ["reward.sandbox.url=http://127.0.0.1:9"])
    with pytest.raises(ValueError, match=r"No sandbox service at http://127\.0\.0\.1:9"):
        code.code_reward(config.reward.sandbox)
