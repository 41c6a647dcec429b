"""What the README and docs say holds: commands, links, configs and the examples of one's own."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from warm import Warm

from kimi_core.config import ModelConfig
from kimi_core.metrics import read_metrics
from kimi_core.models.scratch import scratch_model
from kimi_core.run.config_file import load_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))

TRAIN = "pip install . && python python/train.py"
TEST = "pip install '.[test]' && pytest"

EXAMPLES = {
    before or inside: text
    for before, inside, text in re.findall(
        r"(?:<!-- (\S+) -->\n)?```\w+\n(?:# (\S+\.\w+)\n)?(.*?)```", README, re.DOTALL
    )
}
"""The fenced blocks by file name: in a comment on the first line, or before a block of JSON, which
knows no comments."""


def commands() -> list[str]:
    """The indented lines of the README."""
    return re.findall(r"^ {4}(\S.*)$", README, re.MULTILINE)


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_two_commands_come_first_and_are_what_the_check_runs():
    assert commands()[:2] == [TRAIN, TEST]
    check = (ROOT / ".ci/run").read_text()
    assert "'.[test]'" in check and "python python/train.py" in check
    assert re.search(r"^section \S+ limited \d+ pytest$", check, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"test", "smollm2"} <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    "script", sorted({script for c in commands() for script in re.findall(r"python/\w+\.py", c)})
)
def test_drivers_exist_and_explain_themselves(script: str):
    result = run([script, "--help"], ROOT)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python ")])
def test_settings_on_command_lines_exist(command: str):
    words = command.split()[2:]
    files = [word for word in words if word.endswith(".toml")]
    assert all(file in EXAMPLES or (ROOT / file).exists() for file in files)
    load_config(None, [word for word in words if "=" in word])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_load_and_fit_on_a_page(path: Path):
    load_config(path)
    assert len(path.read_text().splitlines()) <= 50


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if "://" not in link]
    missing = [link for link in local if link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [[], ["prompts.source=my_prompts.py:prompts"]],
    ids=["prompts from JSONL", "prompts from a function"],
)
def test_an_experiment_of_ones_own_runs(tmp_path: Path, overrides: list[str]):
    """With a tiny model in place of SmolLM2: a scratch checkpoint, so a pretrained folder."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    alphabet = "".join(chr(code) for code in range(32, 127)) + "\n"
    model, tokenizer = scratch_model(
        ModelConfig(scratch={"layers": 4, "width": 16, "heads": 2}), alphabet, seed=0
    )
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    tiny = ["model.name=tiny", "iterations=1", "rollout.prompts_per_iteration=2"]
    train = Warm([ROOT / "python/train.py", "my_run.toml", *tiny, *overrides], cwd=tmp_path)
    output, errors = train.communicate(timeout=300)
    assert train.returncode == 0, output + errors
    iterations, evaluations = read_metrics(tmp_path / "runs/mine/metrics.jsonl")
    assert [one.samples_trained for one in iterations] == [2 * 8]
    assert [one.iteration for one in evaluations] == [0, 1]


@pytest.mark.nightly
def test_the_script_of_the_readme_runs(tmp_path: Path):
    """With a tiny model and few steps."""
    tiny = "model={'device': 'cpu', 'scratch': {'layers': 1, 'width': 16, 'heads': 2}}"
    few = "rollout={'prompts_per_iteration': 2, 'samples_per_prompt': 2}"
    script = EXAMPLES["reverse.py"].replace("Config(", f"Config({tiny}, {few}, ")
    (tmp_path / "reverse.py").write_text(script.replace("200", "2"))
    result = run(["reverse.py"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Result(folder='runs/reverse', iterations=5" in result.stdout


def test_the_reward_of_the_readme_tells_right_from_wrong(tmp_path: Path):
    from kimi_core.plugins import load_function
    from kimi_core.types import Prompt

    (tmp_path / "my_reward.py").write_text(EXAMPLES["my_reward.py"])
    reward = load_function("my_reward.py:reward", tmp_path)
    assert reward(Prompt(0, "3+4=", "7"), " 7") == 1.0
    assert reward(Prompt(0, "3+4=", "7"), "7 or 8") == reward(Prompt(0, "3+4=", "7"), "") == 0.0
