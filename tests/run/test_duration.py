"""The time that a run is said to take: its work is what a run does, and its speed is measured."""

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from tiny_runs import SCRATCH

from kimi_core.config import Config
from kimi_core.run import duration, speed
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.run.dry_run import describe
from kimi_core.run.run import train
from kimi_core.run.speed import measure
from kimi_core.run.work import Lengths, Work, evaluation, iteration, whole

SMALL = [
    *SCRATCH,
    "rollout.prompts_per_iteration=3",
    "rollout.samples_per_prompt=2",
    "rollout.max_response_tokens=20",
    "prompts.held_out=4",
]


def config(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


@pytest.mark.parametrize("budget", ["none", "8"])
def test_the_work_of_an_iteration_is_what_a_run_does(budget):
    """Nothing ends a response early, so its length is known: 20 tokens."""
    given = config(f"rollout.token_budget={budget}")
    parts = build(given)
    parts.loop.sampling = replace(parts.loop.sampling, stop_token_ids=frozenset())
    for _ in range(4):  # With a budget of 8, the first response ends in the third one.
        metrics = parts.loop.iterate()
    outcome = parts.loop.latest
    prompts = [group.trajectories[0].prompt_length for group in outcome.groups]
    sampled = sum(one.response_length for group in outcome.groups for one in group.trajectories)
    found = iteration(given, Lengths(sum(prompts) / 3, 20, 20))
    assert found.sampled == metrics.tokens_sampled == 6 * 20
    assert found.steps == metrics.decode_steps == (20 if budget == "none" else 8)
    assert found.trained == sum(prompts) + sampled
    assert found.updates == given.trainer.updates_per_iteration
    again = 0 if budget == "none" else 6 * (2 * sum(prompts) / 3 + 8 + 16)
    assert found.read == pytest.approx(sum(prompts) + again)


@pytest.mark.parametrize("rows", [3, 64])
def test_the_work_of_an_evaluation_is_what_the_engine_does(rows):
    given = config(f"rollout.batch_rows={rows}", "evaluation.samples=2")
    parts = build(given)
    evaluator = replace(parts.evaluator, stop_token_ids=frozenset())
    evaluator.evaluate(iteration=0, seed=0)
    found = evaluation(given, Lengths(6, 20, 20), prompts=4, samples=2)
    assert found.steps == evaluator.engine.decode_steps
    assert found.sampled == 4 * 3 * 20


def test_the_work_of_a_whole_run_has_all_of_its_phases():
    given = config("iterations=10", "evaluation.every=4", "evaluation.prompts=2", "sft.steps=5")
    lengths = Lengths(6, 20, 20)
    found = whole(given, lengths, 12.0, held_out=4, sets=[(3, 1)])
    of_four, of_two, of_others = (evaluation(given, lengths, n, 1) for n in (4, 2, 3))
    every = [(10, iteration(given, lengths)), (2, of_four), (2, of_two), (4, of_others)]
    for name in ("steps", "sampled", "read"):
        assert getattr(found, name) == sum(n * getattr(one, name) for n, one in every)
    assert found.updates == 5 + 10 * given.trainer.updates_per_iteration
    assert found.trained == 5 * given.sft.batch_size * 12 + 10 * iteration(given, lengths).trained
    fewer = whole(given.model_copy(update={"samples": 13}), lengths, 0, held_out=4, sets=[])
    assert fewer.updates == 3 * given.trainer.updates_per_iteration  # 6 samples an iteration.
    sft_alone = whole(given.model_copy(update={"iterations": 0}), lengths, 12.0, 4, [])
    assert (sft_alone.updates, sft_alone.steps) == (5, of_four.steps)


def test_a_model_of_many_layers_is_measured_with_few(monkeypatch):
    """On a machine whose times are linear in the layers the result is exact."""
    wide, taken = config("trainer.trainable_layers=3", "model.scratch.layers=10"), []
    architecture = build(wide).model.config

    def linear(_, __, ___, layers: int) -> Work:
        taken.append(layers)
        return Work(1 + layers, 2 * layers, 3 * layers, 4 + 4 * layers, 5 + 6 * layers)

    monkeypatch.setattr(speed, "_measured", linear)
    found = measure(architecture, wide, Lengths(6, 20, 20))
    assert taken == [1, 4]
    # Seven layers are frozen: their tokens are read, not trained.
    assert found == pytest.approx((11, 20, 30, 4 + 12, 5 + 18 + 21))


@pytest.mark.parametrize("settings", [[], ["model.scratch.layers=5", "trainer.trainable_layers=2"]])
def test_each_time_is_measured_with_engine_and_trainer(settings):
    parts = build(config(*settings))
    before = [one.clone() for one in parts.model.parameters()]
    found = measure(parts.model.config, config(*settings), Lengths(6, 20, 20))
    assert all(math.isfinite(one) and one >= 0 for one in found) and sum(found) > 0
    assert all((a == b).all() for a, b in zip(before, parts.model.parameters(), strict=True))


def said(given: Config) -> str:
    [line] = [one for one in describe(given).splitlines() if one.startswith("# Time: ")]
    return line.removeprefix("# Time: ")


def test_a_dry_run_and_the_header_of_a_run_say_the_time(tmp_path):
    given = config("iterations=1", "sft.steps=0", f"runs={tmp_path}")
    assert said(given) == "less than a minute, without rewards."
    output = io.StringIO()
    train(given, console=Console(file=output, width=200))
    assert "time     less than a minute, without rewards\n" in output.getvalue()
    longer = said(config("iterations=500", "sft.data=multiply"))
    assert "as long as the SFT examples (" in longer and "as long as allowed (20)" in longer
    assert "as long as the answers (" in said(config("iterations=500"))


@pytest.mark.parametrize(
    "settings", [["rollout.engine=vllm"], ["trainer.ranks=2"], ["rollout.max_response_tokens=90"]]
)
def test_what_cannot_be_measured_has_no_time_and_no_error(settings, monkeypatch):
    def refuse(*_) -> Work:
        raise ValueError("no such model")

    monkeypatch.setattr(duration, "measure", refuse)
    found = said(config("iterations=500", *settings))
    assert found.startswith("not known: ")
