"""What the figures of the report stand on: intervals, tasks, resumed runs, and clear failures."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import main
from figures import fig7, fig9, fig10, fig10_rest, tasks
from figures.runs import Runs
from figures.seeds import Mean, difference, table
from tiny_runs import TINY, make_folder

from kimi_core.long2short import METHODS
from kimi_core.long2short.comparison import Point
from kimi_core.metrics import EvaluationMetrics, to_record
from kimi_core.run.config_file import load_config
from kimi_core.tasks import multiply
from kimi_core.trainer.objectives import Responses


def test_an_interval_over_seeds_is_that_of_all_resamples():
    values = [0.1, 0.2, 0.5, 0.6, 0.9]
    grid = np.array(np.meshgrid(*[values] * 5)).reshape(5, -1).mean(axis=0)
    found = Mean.of(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx(np.quantile(grid, [0.025, 0.975]), abs=0.02)
    assert str(Mean.of([1.0])) == "1 [1, 1]"


def test_a_difference_pairs_the_seeds():
    assert str(difference([0.5, 0.7], [0.4, 0.6])) == "0.1 [0.1, 0.1]"
    assert table(["x"], {"ours": [[1.0, 1.0]]}).splitlines()[-1] == "| ours | 1 [1, 1] |"


def test_drafts_are_lognormal_with_a_tail_of_eight_medians():
    lengths = [len(text) + 1 for _, text in tasks.draft_examples(tasks.drafts())]
    median, tail = np.quantile(lengths, [0.5, 0.98])
    assert median == pytest.approx(tasks.MEDIAN, rel=0.05)
    assert tail == pytest.approx(tasks.MEDIAN * math.exp(2.054 * tasks.SIGMA), rel=0.1)
    assert max(lengths) == tasks.LONGEST == 8 * tasks.MEDIAN


def test_two_thirds_of_the_graded_prompts_are_easy_and_all_examples_are_right():
    prompts = tasks.graded()
    easy = [one for one in prompts if one.tags["domain"] == "easy"]
    assert len(easy) / len(prompts) == pytest.approx(2 / 3, abs=0.01)
    assert {one.id for one in prompts} == set(range(len(prompts)))
    for prompt, (text, response) in zip(prompts, tasks.graded_examples(prompts), strict=True):
        assert text == prompt.text and response.endswith(f"#{prompt.answer}")
    styles = multiply.MIXED
    terse = sum(response[0] == "#" for _, response in tasks.graded_examples(prompts))
    assert terse / len(prompts) == pytest.approx(styles["terse"], abs=0.03)


def test_sums_are_shown_both_ways_and_judged_by_their_last_number():
    prompts = tasks.sums()
    examples = tasks.sum_examples(prompts)
    assert len(examples) == 12 * len(prompts[::2])
    for number, (text, response) in enumerate(examples):
        prompt = prompts[::2][number // 12]
        assert sorted(text) == sorted(prompt.text) and response.count("=") in (0, 2)
        line = (text + response).strip("$")
        assert {eval(part) for part in line.split(" = ")} == {int(prompt.answer)}
    bare = sum("=" not in response for _, response in examples)
    assert bare / len(examples) == pytest.approx(2 / 3, abs=0.06)
    assert len({prompt.tags["problem"] for prompt in prompts}) == len(prompts) == 495
    right = prompts[0].answer
    assert tasks.last_number(prompts[0], f"2 + 1 + 1 = 3 + 1 = {right}") == 1
    assert tasks.last_number(prompts[0], f" {right}") == 1
    assert tasks.last_number(prompts[0], f"{right} = 5") == 0


def test_the_best_response_counts_once_a_prompt():
    """Averaged over the choice of one right response, in plain arithmetic."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    responses = Responses(
        ref_logprobs_t=torch.zeros(4),
        response_t=torch.tensor([0, 1, 1, 2]),
        groups_n=torch.tensor([7, 7, 8]),
        rewards_n=torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64),
        correctness_n=torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64),
        advantages_n=torch.zeros(3, dtype=torch.float64),
        # Three of group 7 are right; the third one is in another micro-batch.
        ended_rewards={7: torch.tensor([1.0, 1.0, 1.0, 0.0]), 8: torch.tensor([0.0, 0.0])},
    )
    assert tasks.best(logprobs, responses).tolist() == pytest.approx([1 / 3, 5 / 3, 0.0])


def point(method: str, tokens: float, accuracy: float) -> Point:
    return Point(method, 100, 1.0, accuracy, tokens, 20, 80, 1.0)


def test_of_accurate_settings_the_shortest_is_used_and_else_the_most_accurate():
    tried = [
        [point("long", 80, 0.97), point("rl", 60, 0.96), point("dpo", 40, 0.80)],
        [point("long", 80, 0.97), point("rl", 50, 0.955), point("dpo", 70, 0.94)],
        [point("long", 80, 0.97), point("rl", 30, 0.90), point("dpo", 20, 0.10)],
    ]
    assert fig7.choose("rl", tried) == 1 and fig7.choose("dpo", tried) == 1


def finished(folder, accuracy=0.5):
    """What a run leaves behind that a figure reads: evaluations before and after."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    evaluations = [
        EvaluationMetrics(
            iteration=iteration,
            policy_version=0,
            accuracy_greedy=value,
            accuracy_sampled=value,
            length_mean=30.0,
            n=10,
            seed=0,
            sampled_by_domain={"hard": value, "easy": 1.0},
        )
        for iteration, value in ((0, 0.1), (40, accuracy))
    ]
    lines = [json.dumps(to_record(one) | {"kind": "evaluation"}) for one in evaluations]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def figure(name: str, tmp_path, monkeypatch, capsys) -> str:
    """What the command prints, from runs that are all there; it draws a picture."""
    given = [name, "--seeds", "0", "--runs", str(tmp_path), "--plots", str(tmp_path / "plots")]
    monkeypatch.setattr(sys, "argv", ["experiments.py", *given])
    main()
    assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return capsys.readouterr().out


def test_fig7_from_points_that_are_there(tmp_path, monkeypatch, capsys):
    for name in ("lengths-0", "lengths-short"):
        finished(tmp_path / name)
    for column in range(fig7.TRIED):
        out = tmp_path / f"fig7-{str(column) * len(METHODS)}"
        out.mkdir()
        some = [point("long", 80, 0.97), *(point(name, 50 + column, 0.97) for name in METHODS)]
        both = [asdict(one) | {"seed": seed} for one in some for seed in (0, 100)]
        (out / "summary.json").write_text(json.dumps({"points": both}))
    said = figure("fig7", tmp_path, monkeypatch, capsys)
    assert "| rl, 1 seeds | 1 [1, 1] | 0.97 [0.97, 0.97] | 50 [50, 50] |" in said


def test_fig5_and_length_from_runs_that_are_there(tmp_path, monkeypatch, capsys):
    for name, accuracy in {"short": 0, "plain": 0.6, "length-0": 0.4, "length-1": 0.5}.items():
        finished(tmp_path / f"{name}-0", accuracy)
    assert "gain, accuracy_sampled: 0.5 [0.5, 0.5]" in figure("fig5", tmp_path, monkeypatch, capsys)
    finished(tmp_path / "sums", 0)
    finished(tmp_path / "sums-0", 0.4)
    said = figure("fig5-smollm2", tmp_path, monkeypatch, capsys)
    assert "gain, accuracy_sampled: 0.3 [0.3, 0.3]" in said
    said = figure("length", tmp_path, monkeypatch, capsys)
    assert "with warm-up − without, accuracy_sampled: 0.1 [0.1, 0.1]" in said


def test_fig9_from_runs_that_are_there(tmp_path, monkeypatch, capsys):
    finished(tmp_path / "graded-0")
    for arm in range(len(fig9.ARMS)):
        finished(tmp_path / f"fig9-{arm}-0", 0.25 * (arm + 1))
    said = figure("fig9", tmp_path, monkeypatch, capsys)
    assert "uniform, then hard only − uniform, hard: 0.25 [0.25, 0.25]" in said


def test_fig10_takes_the_best_setting_of_each_method(tmp_path, monkeypatch, capsys):
    finished(tmp_path / f"short-{fig10.START_SEED}")
    for seed in (0, fig10.SEARCH_SEED):
        for method, settings in (("omd", fig10.MIRROR_DESCENT), ("rest", fig10.REST)):
            for number in range(len(settings)):
                finished(tmp_path / f"fig10-{method}-{number}-{seed}", 0.1 * (number + 1))
    said = figure("fig10", tmp_path, monkeypatch, capsys)
    assert len(fig10.MIRROR_DESCENT) == len(fig10.REST)
    best = list(fig10.MIRROR_DESCENT)[-1]
    assert f"| mirror descent, {best} |" in said
    assert "mirror descent − ReST, sampled: 0 [0, 0]" in said


def test_a_finished_run_is_kept_and_never_taken_for_another(tmp_path):
    runs = Runs(tmp_path, seeds=(0,))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text("{}")
    (tmp_path / "a.command").write_text("-m kimi_core.cli train think name=a")
    with pytest.raises(SystemExit, match="made by another command"):
        runs.train("a", "think", "trainer.tau=1")


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(SystemExit, match="tua"):
        Runs(tmp_path).train("bad", "think", "trainer.tua=1")


def test_rest_without_a_right_answer_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fig10_rest, "PROMPTS", 2)
    (tmp_path / "tiny.toml").write_text(TINY)
    model = make_folder(tmp_path / "model")
    config = load_config("tiny.toml", [f"model.name={model}"])
    with pytest.raises(SystemExit, match="none of 16 answers is right"):
        fig10_rest.right_answers(config, 1, tmp_path)


@pytest.mark.nightly
def test_every_bench_is_collected():
    """A bench that fails at import stops all of ``pytest benches/``."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "--collect-only", "benches"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-2000:]
