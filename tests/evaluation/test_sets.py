"""Named evaluation sets, and several samples to a prompt, in the evaluations of a run."""

import json
import math
from contextlib import closing
from dataclasses import replace
from io import StringIO
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY

from kimi_core.evaluation.progress import Progress
from kimi_core.evaluation.sets import evaluate
from kimi_core.metrics import EvaluationMetrics, read_metrics
from kimi_core.rollout.texts import complete
from kimi_core.run.build import Parts, build
from kimi_core.run.config_file import dump_toml, load_config
from kimi_core.run.run import evaluate_alone, train

SETS = """
[evaluation.sets.gsm]
source = "gsm8k:gsm.jsonl"
samples = 2

[evaluation.sets.easy]
source = "easy.csv"
template = "{a}*{b}="
fields = {answer = "c"}
samples = 5
prompts = 3
"""
SETTINGS = ["evaluation.samples=3", "model.scratch.context=256", "reward.function=reward.py:some"]
REWARD = """
def some(prompt, response):
    return float(sum(map(ord, response)) % 3 == 0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sets")
    (path / "tiny.toml").write_text(TINY + SETS)
    (path / "reward.py").write_text(REWARD)
    (path / "gsm.jsonl").write_text('{"question": "2+3?", "answer": "It is 5. #### 5"}\n')
    (path / "easy.csv").write_text("a,b,c\n2,3,6\n4,5,20\n7,1,7\n9,9,81\n")
    return path


@pytest.fixture
def work(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def parts(folder):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        with closing(build(load_config("tiny.toml", SETTINGS))) as made:
            made.loop.start()
            yield made


def timeless(found: EvaluationMetrics) -> EvaluationMetrics:
    sets = {name: {**numbers, "wall_s": 0.0} for name, numbers in found.sets.items()}
    return replace(found, wall_s=0.0, sets=sets)


def test_each_set_has_its_prompts_and_its_reward(parts: Parts):
    gsm, easy = parts.sets["gsm"], parts.sets["easy"]
    assert [one.answer for one in gsm.prompts] == ["5"]
    assert gsm.prompts[0].text.startswith("2+3?\n\nReason step by step")
    assert gsm.reward(gsm.prompts[0], "\\boxed{5.0}") == 1.0
    assert [one.text for one in easy.prompts] == ["2*3=", "4*5=", "7*1="]
    assert easy.reward is parts.reward


def test_the_numbers_are_those_of_plain_counting(parts: Parts):
    """One response after another, and pass@k over all subsets."""
    easy = parts.sets["easy"]
    rights = np.zeros((3, 5))
    sampling = easy._sampling(7, greedy=False)
    for sample in range(5):
        for at, prompt in enumerate(easy.prompts):
            (one,) = complete(
                easy.engine, [easy.encode(prompt)], sampling, max_tokens=8, ids=[3 * sample + at]
            )
            rights[at, sample] = sum(map(ord, easy.response_text(one.token_ids))) % 3 == 0
    found = easy.evaluate(iteration=0, seed=7)
    assert 0 < found.accuracy_sampled < 1
    assert found.accuracy_sampled == pytest.approx(rights.mean())
    for k in (1, 2, 4, 5):
        drawn = list(combinations(range(5), k))
        plain = np.mean([[row[list(some)].any() for some in drawn] for row in rights])
        assert found.pass_at_k[str(k)] == pytest.approx(plain)
    one = replace(easy, samples=1).evaluate(iteration=0, seed=7)
    assert one.accuracy_sampled == pytest.approx(rights[:, 0].mean()) and one.pass_at_k == {}


def test_a_kill_at_any_response_changes_no_number(parts: Parts, tmp_path, monkeypatch):
    def whole(progress=None):
        options = {"iteration": 0, "seed": 5, "limit": 2, "progress": progress}
        kept = {name: replace(one, keep_responses=True) for name, one in parts.sets.items()}
        return evaluate(replace(parts.evaluator, keep_responses=True), kept, **options)

    wanted, plain, ended = timeless(whole()), Progress.ended, []

    def dies(self, key, token_ids):
        plain(self, key, token_ids)
        ended.append(key)
        if len(ended) % 7 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "ended", dies)
    for _ in range(99):
        try:
            with closing(Progress(tmp_path / "evaluation.jsonl", {"iteration": 0})) as progress:
                found = whole(progress)
            break
        except KeyboardInterrupt:
            continue
    assert timeless(found) == wanted
    assert len(set(ended)) == 2 * (1 + 3) + 1 * (1 + 2) + 3 * (1 + 5)


def test_a_run_reports_them_everywhere(work):
    said = StringIO()
    config = load_config("tiny.toml", [*SETTINGS, "iterations=1"])
    done = train(config, console=Console(file=said, width=200))
    evaluations = read_metrics(done / "metrics.jsonl")[1]
    assert [list(one.sets) for one in evaluations] == [["gsm", "easy"]] * 2
    last = evaluations[-1]
    assert last.sets["easy"]["n"] == 3 and last.value("easy/pass@4") <= last.value("easy/pass@5")
    summary = json.loads((done / "summary.json").read_text())
    assert summary["last_evaluation"]["sets"]["easy"]["pass_at_k"].keys() == {"1", "2", "4", "5"}
    events = EventAccumulator(str(done / "tensorboard"))
    events.Reload()
    assert "evaluation/sets/easy/pass_at_k/4" in events.Tags()["scalars"]
    assert "also evaluated: gsm (1), easy (3)" in said.getvalue()
    assert "easy, sampled, n 3" in said.getvalue()
    alone = evaluate_alone(config.model_copy(update={"name": "alone"}))
    assert alone.sets.keys() == {"gsm", "easy"}
    assert load_config(None, []).evaluation.sets == {}
    (work / "again.toml").write_text(dump_toml(config))
    assert load_config("again.toml") == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluation.sets.easy.sampels=2", "did you mean evaluation.sets.easy.samples=2"),
        ("evaluation.sets.held_out.source=easy.csv", "letters, digits, _ and -, and is not held"),
        ("evaluation.sets.x.samples=2", "evaluation.sets.x.source is missing"),
        ("evaluation.best=easy/pass@3", "evaluation.best = 'easy/pass@3'; these settings measure"),
        ("evaluation.patience=2", "evaluation.patience = 2 without evaluation.best"),
    ],
)
def test_what_cannot_be_meant_is_explained(work, override, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        load_config("tiny.toml", [override])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gsm8k:none.jsonl", "evaluation.sets.new: .*none.jsonl"),
        ("multipy", "evaluation.sets.new: prompts.source = 'multipy'"),
    ],
)
def test_a_set_that_is_not_there_is_named_before_a_model_is_loaded(work, source, said):
    config = load_config("tiny.toml", [*SETTINGS, f"evaluation.sets.new.source={source}"])
    with pytest.raises(ValueError, match=said):
        build(config)


def test_a_number_that_was_not_measured_reads_back_as_nan(tmp_path):
    line = {
        "kind": "evaluation", "iteration": 0, "policy_version": 0, "accuracy_greedy": 0.5,
        "accuracy_sampled": None, "length_mean": 3.0, "n": 2, "seed": 1,
        "sets": {"easy": {"accuracy_greedy": None, "n": 1}},
    }  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    _, [found] = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(found.value("easy/greedy")) and found.value("held_out/greedy") == 0.5
    assert math.isnan(found.value("other/greedy"))
