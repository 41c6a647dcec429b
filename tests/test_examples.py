"""The examples run: scripts and the notebook, with a tiny model and few steps."""

import ast
import json
from pathlib import Path

import pytest

from kimi_core import Config, train
from kimi_core.plugins import load_function

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
TINY = {
    "iterations": 1,
    "model": {"device": "cpu", "scratch": {"layers": 1, "width": 16, "heads": 2, "context": 64}},
    "sft": {"steps": 2},
    "prompts": {"held_out": 4},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("script", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_a_script_runs_and_its_examples_are_what_it_says(script):
    parts = vars_of(EXAMPLES / f"{script}.py")
    rollout = parts["RUN"]["rollout"] | {"prompts_per_iteration": 2, "samples_per_prompt": 2}
    config = Config.model_validate(parts["RUN"] | TINY | {"rollout": rollout})
    given = {name: parts[name] for name in ("prompts", "reward", "examples")}
    result = train(config, **given)
    assert [one.n for one in result.evaluations] == [4, 4]
    prompts = parts["prompts"]()
    by_text = {prompt.text: prompt for prompt in prompts}
    pairs = parts["examples"](prompts)
    right = [parts["reward"](by_text[text], response) for text, response in pairs]
    half_wrong = "Half of the examples are wrong" in parts["__doc__"]
    assert 0.4 < sum(right) / len(right) < 0.6 if half_wrong else min(right) == 1
    assert max(len(response) for _, response in pairs) < config.rollout.max_response_tokens


def vars_of(path: Path) -> dict:
    """What a script defines, without running it as a script."""
    return load_function(f"{path}:prompts").__globals__


def test_the_notebook_runs(capsys, draw_curves, monkeypatch):
    monkeypatch.setattr("kimi_core.run.curves.draw_curves", draw_curves)
    space: dict = {}
    last = None
    for cell in json.loads((EXAMPLES / "own_task.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            last = run_cell("".join(cell["source"]), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space |= {"sft_steps": 2, "iterations": 1}
    assert isinstance(last, str)
    assert "greedy accuracy" in capsys.readouterr().out
    assert space["result"].curves.is_file()


def run_cell(source: str, space: dict) -> object:
    """What a notebook shows under a cell: the value of its last line, if that is an expression."""
    *lines, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        lines, last = [*lines, last], None
    exec(compile(ast.Module(lines, []), "cell", "exec"), space)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), space) if last else None
