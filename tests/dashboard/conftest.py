"""Runs to look at, and a dashboard that serves them in a process."""

from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from dashboards import dashboard
from hostile_images import pictured_run
from hostile_texts import HOSTILE
from made_runs import make_run
from rich.console import Console
from tiny_runs import TINY

from kimi_core.run.config_file import load_config
from kimi_core.run.run import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of three iterations that was trained, with partial rollouts."""
    work = tmp_path_factory.mktemp("trained")
    (work / "tiny.toml").write_text(TINY)
    settings = [f"runs={work / 'runs'}", "name=tiny", "rollout.token_budget=5", "iterations=3"]
    easy = ["source=multiply", "prompts=3", "samples=2"]
    settings += ["sft.steps=2", *(f"evaluation.sets.easy.{one}" for one in easy)]
    config = load_config(work / "tiny.toml", settings)
    return train(config, console=Console(file=StringIO()))


@pytest.fixture(scope="session")
def served(trained) -> Iterator[str]:
    """The address of ``kimi dashboard`` over the runs ``tiny``, ``made``, ``pictured`` and
    ``deep/hostile``."""
    runs = trained.parent
    make_run(runs / "made", iterations=3)
    make_run(runs / "deep" / "hostile", iterations=1, groups=1, samples=len(HOSTILE), texts=HOSTILE)
    pictured_run(runs / "pictured")
    with dashboard(runs) as address:
        yield address
