"""An evaluation that is cut off goes on, and ends with the numbers of an unbroken one."""

from contextlib import closing
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_runs import TINY

from kimi_core import _C
from kimi_core.evaluation.held_out import Evaluator
from kimi_core.evaluation.progress import Progress, sealed_line
from kimi_core.metrics import EvaluationMetrics, read_metrics
from kimi_core.run import run as module
from kimi_core.run.build import Parts, build
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.types import Score

ABOUT = {"iteration": 0}


def test_a_file_gives_back_what_was_put_in_up_to_the_first_damage(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    with closing(Progress(path, ABOUT)) as progress:
        progress.ended(("greedy", 0), np.array([5, 7], np.int32))
        progress.judged(("greedy", 0), Score(0.5, {"a": 1.0}, "why"))
        progress.ended(("sampled", 3), np.array([], np.int32))
    whole = path.read_bytes()
    with closing(Progress(path, ABOUT)) as again:
        assert again.responses["greedy", 0].tolist() == [5, 7]
        assert again.responses["sampled", 3].dtype == np.int32
        assert again.verdicts == {("greedy", 0): Score(0.5, {"a": 1.0}, "why")}
    assert path.read_bytes() == whole
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with closing(Progress(path, ABOUT)) as again:
            assert again.verdicts.items() <= {("greedy", 0): Score(0.5, {"a": 1.0}, "why")}.items()
            assert len(again.responses) < 2
            assert all(ids.tolist() in ([5, 7], []) for ids in again.responses.values())
    path.write_bytes(whole)
    with closing(Progress(path, {"iteration": 1})) as other:
        assert not other.responses and not other.verdicts


@pytest.mark.parametrize(
    "text",
    [
        '{"iteration":3}\n{"response":["greedy",0],"token_ids":[1]}',
        "[1]",
        "{",
        "[" * 100_000,
        '{"response":3,"token_ids":[1]}',
        '{"response":["greedy",0]}',
        '{"response":["greedy",0],"token_ids":["a"]}',
        '{"response":["greedy",0],"token_ids":[99999999999]}',
        '{"response":[[],0],"token_ids":[1]}',
        '{"verdict":["greedy",0],"values":1}',
    ],
)
def test_a_line_of_something_else_counts_as_damage_although_its_checksum_is_right(tmp_path, text):
    path = tmp_path / "evaluation.jsonl"
    with closing(Progress(path, ABOUT)) as progress:
        progress.ended(("greedy", 0), np.array([5, 7], np.int32))
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write(f"{_C.crc32c(text.encode()):08x} {text}\n")
        file.write(sealed_line({"response": ["greedy", 1], "token_ids": [8]}))
    with closing(Progress(path, ABOUT)) as again:
        assert list(again.responses) == [("greedy", 0)] and not again.verdicts
    assert path.read_bytes() == whole


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = tmp_path_factory.mktemp("work") / "tiny.toml"
    path.write_text(TINY)
    with closing(build(load_config(path, ["prompts.held_out=11", "rollout.batch_rows=4"]))) as made:
        made.loop.start()
        yield made


def timeless(metrics: EvaluationMetrics) -> EvaluationMetrics:
    return replace(metrics, wall_s=0.0)


def cut_off(evaluator: Evaluator, calls: int, asked: list[str]) -> Evaluator:
    """An evaluator whose reward function is killed at the next verdict but ``calls``."""
    plain = evaluator.reward

    def reward(prompt, text):
        if len(asked) == calls:
            raise KeyboardInterrupt
        asked.append(text)
        return plain(prompt, text)

    return replace(evaluator, reward=reward)


@pytest.mark.parametrize("keep", [False, True])
def test_a_kill_at_any_response_changes_no_number(parts: Parts, tmp_path, monkeypatch, keep):
    evaluator = replace(parts.evaluator, keep_responses=keep)
    wanted = timeless(evaluator.evaluate(iteration=0, seed=5))
    path, sampled = tmp_path / "evaluation.jsonl", []
    plain, tries = Progress.ended, 0

    def dies(self, key, token_ids):
        plain(self, key, token_ids)
        sampled.append(key)
        if len(sampled) % 5 == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "ended", dies)
        for _ in range(99):
            tries += 1
            try:
                with closing(Progress(path, ABOUT)) as progress:
                    found = evaluator.evaluate(iteration=0, seed=5, progress=progress)
                    progress.remove()
                break
            except KeyboardInterrupt:
                continue
    assert timeless(found) == wanted
    assert tries > 3 and not path.exists()
    # Blocks of 4: one that was cut off is sampled again, unless its responses are kept.
    assert len(sampled) == 22 if keep else 22 < len(sampled) <= 22 + 4 * tries


def test_verdicts_are_not_asked_for_a_second_time(parts: Parts, tmp_path, monkeypatch):
    monkeypatch.setattr("kimi_core.evaluation.held_out.JUDGED", 4)
    monkeypatch.setattr("kimi_core.evaluation.held_out.JUDGED_PER_WORKER", 1)
    wanted = timeless(parts.evaluator.evaluate(iteration=0, seed=5))
    asked: list[str] = []
    for calls in (6, 15, 99):
        evaluator = cut_off(parts.evaluator, calls, asked)
        with closing(Progress(tmp_path / "evaluation.jsonl", ABOUT)) as progress:
            try:
                found = evaluator.evaluate(iteration=0, seed=5, progress=progress)
            except KeyboardInterrupt:
                continue
    assert timeless(found) == wanted
    assert len(asked) == 22 + 2 + 2  # Verdicts of the blocks of 4 that were cut off.


@pytest.mark.nightly
def test_a_run_whose_every_process_dies_in_its_evaluation_gets_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    config = load_config(
        "tiny.toml", ["iterations=1", "prompts.held_out=9", "rollout.batch_rows=2"]
    )
    quiet = Console(file=StringIO())
    wanted = read_metrics(train(config, console=quiet) / "metrics.jsonl")[1]
    (tmp_path / "runs").rename(tmp_path / "unbroken")
    plain, ended = Progress.ended, []

    def dies(self, key, token_ids):
        plain(self, key, token_ids)
        ended.append(key)
        if len(ended) % 5 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "ended", dies)
    for _ in range(40):
        try:
            folder = train(config, console=quiet, resume=True)
            break
        except KeyboardInterrupt:
            assert (tmp_path / "runs" / "think" / module.EVALUATION).is_file()
    found = read_metrics(folder / "metrics.jsonl")[1]
    assert list(map(timeless, found)) == list(map(timeless, wanted))
    assert len(ended) > 36 and not (folder / module.EVALUATION).exists()
