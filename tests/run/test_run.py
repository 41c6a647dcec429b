"""The driver itself, from a config to a trained model, in seconds.

A model that learned terse and worked answers is rewarded for working, whatever the result: what RL
has to find is the same as in think.toml, and is found in 8 iterations.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm import Warm

from kimi_core.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
REWARD = """
def works(prompt, text):
    work, _, answer = text.partition("#")
    return float(";" in work and answer.isdigit())
"""
CONFIG = """
name = "small"
iterations = 8

[model.scratch]
layers = 2
width = 48
heads = 2
context = 96

[model]
device = "cpu"

[prompts]
held_out = 100

[sft]
data = "multiply"
steps = 200
batch_size = 24

[rollout]
prompts_per_iteration = 16
samples_per_prompt = 6
max_response_tokens = 80
repeat_window = 12

[reward]
function = "reward.py:works"

[trainer]
learning_rate = 1e-3

[evaluation]
every = 4
prompts = 20
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    work = tmp_path_factory.mktemp("work")
    (work / "reward.py").write_text(REWARD)
    (work / "small.toml").write_text(CONFIG)
    process = Warm([ROOT / "python" / "train.py", "small.toml"], cwd=work)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "run folder: runs/small" in output
    return work / "runs" / "small"


def test_accuracy_rises(finished):
    _, evaluations = read_metrics(finished / "metrics.jsonl")
    first, last = evaluations[0], evaluations[-1]
    assert (first.iteration, last.iteration) == (0, 8)
    assert first.n == last.n == 100
    # 0.27 -> 0.93 and 0.30 -> 0.79 with two seeds when this was written.
    assert last.accuracy_sampled > first.accuracy_sampled + 0.2
    assert last.accuracy_greedy > first.accuracy_greedy + 0.2


def test_every_iteration_and_evaluation_is_reported(finished):
    iterations, evaluations = read_metrics(finished / "metrics.jsonl")
    assert [line.iteration for line in iterations] == list(range(1, 9))
    assert [(line.iteration, line.n) for line in evaluations] == [(0, 100), (4, 20), (8, 100)]
    assert all(line.samples_trained == 96 for line in iterations)
    assert iterations[-1].samples_trained_total == 8 * 96
    assert max(line.logprob_gap_max for line in iterations) < 1e-3
    assert not any(line.reference_recomputed for line in iterations)


def test_the_summary_agrees_with_the_metrics(finished):
    summary = json.loads((finished / "summary.json").read_text())
    iterations, evaluations = read_metrics(finished / "metrics.jsonl")
    assert summary["iterations"] == len(iterations)
    assert summary["last_evaluation"]["accuracy_sampled"] == evaluations[-1].accuracy_sampled
    measured = sum(line.wall_s for line in (*iterations, *evaluations))
    assert summary["wall_s"] > measured  # and the time of SFT


def test_files_for_readers(finished):
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    shown = sorted(path.name for path in (finished / "samples").iterdir())
    assert shown == ["000004.txt", "000008.txt"]
    text = (finished / "samples" / "000008.txt").read_text()
    assert "reward 1" in text
    assert "policy versions 7" in text
    (events,) = (finished / "tensorboard").glob("events.out.tfevents.*")
    assert b"accuracy" in events.read_bytes()


def test_the_checkpoint_is_an_ordinary_model(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(finished / "checkpoint")
    prompt = tokenizer("7*384=", return_tensors="pt", return_token_type_ids=False)
    answer = model.generate(**prompt, max_new_tokens=80, do_sample=False)
    text = tokenizer.decode(answer[0], skip_special_tokens=True)
    assert text.startswith("7*384=")
    assert "#" in text  # it learned to answer
