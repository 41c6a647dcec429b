"""What breaks around a run: kills between states and evaluations, other prompts, other settings,
damage on the disk, functions that never return, full disks, and weights that are not finite."""

import json
import os
import shutil
import signal
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY, make_folder
from warm import Warm

from kimi_core.cli import settings
from kimi_core.metrics import read_metrics
from kimi_core.prompts.many import ById
from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.judging import judge_all
from kimi_core.reward.threads import Calls
from kimi_core.run import report
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.run.state import curriculum_in
from kimi_core.types import Prompt

FOLDER = Path("runs/think")


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A config in a fresh folder, with overrides."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    return lambda *overrides: load_config("tiny.toml", ["sft.steps=2", *overrides])


def run(config, **options) -> str:
    """Train quietly; return what was said."""
    said = StringIO()
    train(config, console=Console(file=said, width=500), **options)
    return said.getvalue()


def evaluations() -> list[tuple[int, int]]:
    return [(one.iteration, one.n) for one in read_metrics(FOLDER / "metrics.jsonl")[1]]


def drop_lines(kind: str, iteration: int) -> None:
    """As if the run had been killed before it wrote them."""
    path = FOLDER / "metrics.jsonl"
    kept = [
        line
        for line in path.read_text().splitlines(keepends=True)
        if (json.loads(line)["kind"], json.loads(line)["iteration"]) != (kind, iteration)
    ]
    path.write_text("".join(kept))


class TestEvaluations:
    def test_a_resumed_run_evaluates_only_where_that_is_due(self, given):
        run(given("iterations=2", "evaluation.every=3"))
        drop_lines("evaluation", 2)  # It was the last one only because the run ended there.
        run(given("iterations=4", "evaluation.every=3"), resume=True)
        assert evaluations() == [(0, 4), (3, 2), (4, 4)]

    def test_the_last_one_has_all_prompts_also_after_a_kill(self, given):
        run(given())
        drop_lines("evaluation", 2)
        shown = FOLDER / "samples" / "000002.txt"
        before = shown.read_text()
        shown.unlink()
        run(given(), resume=True)
        assert evaluations() == [(0, 4), (2, 4)]
        assert shown.read_text() == before

    def test_the_first_one_comes_again(self, given):
        run(given("iterations=1"))
        drop_lines("evaluation", 0)
        drop_lines("evaluation", 1)
        config = given("iterations=2", "evaluation.every=1")
        with pytest.raises(ValueError, match=r"Changed since .*metrics\.jsonl.*--accept-changes"):
            run(config, resume=True)  # State 1 was saved after the first evaluation was written.
        run(config, resume=True, accept_changes=True)
        assert evaluations() == [(1, 2), (2, 4)]


LINES = [json.dumps({"prompt": f"{n}*3=", "answer": str(3 * n)}) for n in range(1, 9)]


class TestOtherPrompts:
    def config(self, given, tmp_path, *overrides):
        given()  # Writes the config that make_folder reads.
        folder = tmp_path / "model"
        if not folder.exists():
            make_folder(folder)
        source = ("prompts.source=p.jsonl", f"model.name={folder}", "prompts.held_out=2")
        return given(*source, "sft.data=none", *overrides)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda lines: lines[:-1], "5 now"),
            (lambda lines: [*lines, '{"prompt": "9*3=", "answer": "27"}'], "7 now"),
            (lambda lines: [line.replace("*3", "*4") for line in lines], "6 of the first 6 differ"),
        ],
    )
    def test_they_are_named_before_anything_is_trained(self, given, tmp_path, change, said):
        Path("p.jsonl").write_text("\n".join(LINES))
        run(self.config(given, tmp_path, "iterations=1"))
        Path("p.jsonl").write_text("\n".join(change(LINES)))
        with pytest.raises(ValueError, match=f"prompts have changed.*{said}"):
            run(self.config(given, tmp_path, "iterations=2"), resume=True)
        Path("p.jsonl").write_text("\n".join(LINES))
        run(self.config(given, tmp_path, "iterations=2"), resume=True)

    def test_success_rates_go_with_what_a_prompt_asks(self, given, tmp_path):
        """The order is reversed, and one prompt is new: its id is that of an old one."""
        Path("p.jsonl").write_text("\n".join(LINES))
        budget = ("rollout.token_budget=3", "prompts.held_out=1")
        before = build(self.config(given, tmp_path, *budget)).loop.prompts
        run(self.config(given, tmp_path, *budget, "iterations=2"))
        old = rates(2, before)
        assert sum(old.values())
        lines = [line.replace('"2*3="', '"5*5="') for line in LINES]
        Path("p.jsonl").write_text("\n".join(lines[::-1]))
        config = self.config(given, tmp_path, *budget, "iterations=3")
        with pytest.raises(ValueError, match=r"give --accept-changes"):
            run(config, resume=True)
        said = run(config, resume=True, accept_changes=True)
        assert "changed since the last state: the training prompts: 7 before, 7, success" in said
        new = rates(3, build(config).loop.prompts)
        both = old.keys() & new.keys()
        assert len(both) >= 5
        assert all(new[text] >= old[text] for text in both)
        run(self.config(given, tmp_path, *budget, "iterations=4"), resume=True)


def rates(iteration: int, prompts: ById) -> dict[str, float]:
    """What a prompt asks → attempts in a state; attempts only grow."""
    path = FOLDER / "states" / f"{iteration:06d}"
    tried = curriculum_in(path, {})
    found = dict(zip(tried["rows"].tolist(), tried["attempts"].tolist(), strict=True))
    return {prompt.text: found.get(row, 0.0) for row, prompt in enumerate(prompts.prompts)}


class TestWhatIsReported:
    def test_time_of_iterations_that_run_again_counts(self, given):
        run(given("iterations=3", "save_every=9"))
        spent = sum(line.wall_s for line in read_metrics(FOLDER / "metrics.jsonl")[0][1:])
        for state in (FOLDER / "states").iterdir():
            if state.name == "000003":  # As if the run had been killed before it was saved.
                shutil.rmtree(state)
        run(given("iterations=3", "save_every=9"), resume=True)
        lines = [json.loads(line) for line in (FOLDER / "metrics.jsonl").open()]
        (resumed,) = [line for line in lines if line["kind"] == "resume"]
        assert resumed["iteration"] == 0 and resumed["lost_s"] > spent
        summary = json.loads((FOLDER / "summary.json").read_text())
        counted = sum(line.get("wall_s") or 0 for line in lines)
        assert summary["wall_s"] > counted + resumed["lost_s"]  # And SFT.

    def test_time_of_an_iteration_that_was_cut_off_counts(self, given):
        run(given("iterations=1"))
        reported = (FOLDER / "metrics.jsonl").stat().st_mtime
        os.utime(FOLDER / "buffer.bin", (0, reported + 7))  # Tokens came for 7 s; then the kill.
        run(given("iterations=2"), resume=True)
        lines = [json.loads(line) for line in (FOLDER / "metrics.jsonl").open()]
        (resumed,) = [line for line in lines if line["kind"] == "resume"]
        assert resumed["lost_s"] == pytest.approx(7, abs=1e-3)
        counted = sum(line.get("wall_s") or 0 for line in lines)
        assert json.loads((FOLDER / "summary.json").read_text())["wall_s"] > counted + 7


class TestOtherSettings:
    def test_a_lower_rate_is_taken_and_written_down(self, given):
        run(given("iterations=1"))
        lower = ["trainer.learning_rate=1e-5", "reward.workers=2"]
        run(given("iterations=2", *lower), resume=True)
        lines = [json.loads(line) for line in (FOLDER / "metrics.jsonl").open()]
        changes = [line for line in lines if line["kind"] == "change"]
        assert changes == [
            {"kind": "change", "iteration": 1, "setting": "reward.workers", "before": 1, "now": 2},
            {"kind": "change", "iteration": 1, "setting": "trainer.learning_rate",
             "before": 1e-4, "now": 1e-5},
        ]  # fmt: skip
        run(given("iterations=3", *lower), resume=True)
        iterations, _ = read_metrics(FOLDER / "metrics.jsonl")
        assert [line.iteration for line in iterations] == [1, 2, 3]


class TestDamage:
    def test_a_run_goes_on_from_the_state_before_and_says_so(self, given):
        run(given("iterations=3"))
        straight = load_file(FOLDER / "checkpoint" / "model.safetensors")
        tensors = FOLDER / "states" / "000003" / "tensors.safetensors"
        content = bytearray(tensors.read_bytes())
        content[-5] ^= 1
        tensors.write_bytes(content)
        said = run(given("iterations=3"), resume=True)
        assert "000003/tensors.safetensors is damaged" in said
        assert "continuing from the state of 2" in said
        again = load_file(FOLDER / "checkpoint" / "model.safetensors")
        assert all(torch.equal(straight[name], again[name]) for name in straight)

    def test_config_toml_is_not_needed(self, given):
        run(given("iterations=1"))
        (FOLDER / "config.toml").unlink()
        run(given("iterations=2"), resume=True)
        assert (FOLDER / "config.toml").is_file()

    def test_a_missing_metrics_file_is_said_and_left_overs_go(self, given):
        run(given("iterations=2"))
        (FOLDER / "metrics.jsonl").unlink()
        for name in ("summary.json.tmp", "trajectories/000002.jsonl.tmp", "states/000003.tmp"):
            (FOLDER / name).touch()
        said = run(given("iterations=3"), resume=True)
        assert "metrics.jsonl lacks 2 of the 2 iterations done, the first 1" in said
        assert not list(FOLDER.rglob("*.tmp"))

    def test_a_cut_metrics_file_is_named(self, given):
        run(given("iterations=1"))
        path = FOLDER / "metrics.jsonl"
        path.write_text("{" + path.read_text()[5:])
        for accept in (False, True):
            with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not JSON"):
                run(given("iterations=2"), resume=True, accept_changes=accept)


def points(tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(FOLDER / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_is_made_again_from_the_metrics(given):
    run(given("iterations=2"))
    before = points("iteration/reward_mean")
    for file in (FOLDER / "tensorboard").iterdir():
        file.unlink()  # Killed before it was flushed.
    run(given("iterations=3"), resume=True)
    after = points("iteration/reward_mean")
    assert [step for step, _ in after] == [1, 2, 3] and after[:2] == before


def test_a_disk_that_is_full_at_the_end_hides_no_first_error(given, monkeypatch):
    Path("reward.py").write_text("def f(prompt, text):\n    return 1 / 0 if text else 0.0\n")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_atomically", full)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        run(given("reward.function=reward.py:f"))


class TestFunctionsThatNeverReturn:
    def test_they_are_given_up_and_the_others_go_on(self):
        def stuck(prompt, text):
            if text == "1":
                time.sleep(60)
            return float(text)

        responses = [(Prompt(0, "?", "!"), str(n)) for n in range(6)]
        found = judge_all(stuck, responses, workers=2, outage_from=3, timeout_s=0.5)
        assert [one and one.value for one in found] == [0, None, 2, 3, 4, 5]

    def test_async_ones_too(self):
        import asyncio

        async def stuck(prompt, text):
            await asyncio.sleep(60 * (text == "1"))
            return 1

        responses = [(Prompt(0, "?", "!"), str(n)) for n in range(3)]
        found = judge_all(stuck, responses, workers=2, outage_from=3, timeout_s=0.5)
        assert [one and one.value for one in found] == [1, None, 1]

    def test_the_message_names_what_did_not_return(self):
        calls = Calls(1)
        calls.add(time.sleep, 60, timeout_s=0.3, what="the function f")
        (found,) = calls.results()
        assert isinstance(found, InfrastructureError)
        assert str(found) == "the function f did not return in 0.3 s"

    def test_results_and_errors_stand_in_the_order_of_the_calls(self):
        calls = Calls(4)
        for n in range(4):
            calls.add([10, 11].__getitem__, n, timeout_s=9, what="f")
        ten, eleven, *errors = calls.results()
        assert (ten, eleven) == (10, 11)
        assert [type(error) for error in errors] == [IndexError, IndexError]

    @pytest.mark.parametrize("workers", [1, 4])
    def test_ctrl_c_ends_a_run_that_waits_for_one(self, given, workers):
        given()
        Path("reward.py").write_text(
            "import time\ndef f(prompt, text):\n    if text: open('waits', 'w').close()\n"
            "    time.sleep(600 if text else 0)\n    return 0.0\n"
        )
        command = ["-m", "kimi_core.cli", "train", "tiny.toml", "sft.steps=2"]
        chosen = ["reward.function=reward.py:f", f"reward.workers={workers}"]
        process = Warm([*command, *chosen])
        try:
            deadline = time.monotonic() + 120
            while not Path("waits").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130
        finally:
            process.kill()


class TestOneLine:
    def status(self, config, capsys) -> tuple[int, str]:
        status = settings.with_config(["tiny.toml", *config], lambda c: train(c, console=quiet()))
        _, error, said = capsys.readouterr().err.partition("error: ")
        return status, error + said

    def test_weights_that_are_not_finite(self, given, tmp_path, capsys):
        given()
        folder = make_folder(tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][3, 1] = torch.nan
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        status, said = self.status([f"model.name={folder}"], capsys)
        assert status == 2
        assert "not finite: model.layers.0.mlp.up_proj.weight has 1 of" in said

    def test_a_learning_rate_that_no_number_survives(self, given, capsys):
        given()
        status, said = self.status(["sft.steps=2", "trainer.learning_rate=1e38"], capsys)
        assert status in (1, 2) and "Traceback" not in said and "learning_rate" in said

    def test_a_prompt_function_that_raises(self, given, capsys):
        given()
        Path("p.py").write_text("def prompts():\n    return {}['x']\n")
        status, said = self.status(["prompts.source=p.py:prompts", "model.name=x"], capsys)
        assert status == 2 and said == "error: p.py:prompts raised KeyError: 'x'\n"

    @pytest.mark.parametrize(
        "error",
        [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
    )
    def test_memory_that_runs_out(self, given, capsys, error):
        given()

        def raises(config):
            raise error

        assert settings.with_config(["tiny.toml"], raises) == 1
        assert "rollout.batch_rows=512 (now 1024)" in capsys.readouterr().err


def quiet() -> Console:
    return Console(file=StringIO())
