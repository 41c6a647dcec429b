"""Memory that runs out: the message says in which phase, and what to lower to what."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import TINY

from kimi_core.cli import settings
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.run.run import train
from kimi_core.trainer.policy import Policy


@pytest.mark.parametrize(
    ("owner", "method", "said"),
    [
        (TorchEngine, "generate", "in rollout (no memory). Give rollout.batch_rows=8 (now 16)."),
        (
            Policy,
            "omd_loss",
            "in training (no memory). Give trainer.tokens_per_micro_batch=500 (now 1000), "
            "trainer.head_chunk=512 (now 1024), trainer.memory_gb=0.5 (now 1.0).",
        ),
    ],
)
def test_it_names_settings_with_numbers_and_the_run_goes_on(
    tmp_path, monkeypatch, capsys, owner, method, said
):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    given = [
        "tiny.toml", "rollout.batch_rows=16", "trainer.tokens_per_micro_batch=1000",
        "trainer.memory_gb=1.0", "sft.steps=1", "iterations=1", "evaluation.prompts=1",
    ]  # fmt: skip
    plain, calls = getattr(owner, method), []

    def fails(self, *args, **kwargs):
        calls.append(1)
        # The engine answers the evaluation first, twice.
        if len(calls) == (3 if owner is TorchEngine else 1):
            raise RuntimeError("no memory")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(settings, "is_out_of_memory", lambda error: "no memory" in str(error))
    monkeypatch.setattr(owner, method, fails)
    quiet = Console(file=StringIO())
    status = settings.with_config(given, lambda c: train(c, console=quiet) and None)
    complaint = capsys.readouterr().err.partition("error: ")[2]
    assert status == 1 and f"Out of memory {said} --resume takes them" in complaint, complaint
    lower = ["rollout.batch_rows=8", "trainer.tokens_per_micro_batch=500", "trainer.memory_gb=0.5"]
    status = settings.with_config(
        [*given, *lower], lambda c: train(c, console=quiet, resume=True) and None
    )
    assert status == 0, capsys.readouterr().err
