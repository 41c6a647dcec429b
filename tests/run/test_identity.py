"""What a run reads besides its config: helper files of functions are part of it."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import TINY

from kimi_core.run.config_file import load_config
from kimi_core.run.identity import imported_files
from kimi_core.run.run import train


def test_files_that_a_file_imports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "more"))
    for name, text in {
        "reward.py": "import torch, helper\nfrom package import part\nimport kimi_core.types\n",
        "helper.py": "def f():\n    global a\n    from far import away  # Not at the top.\n",
        "package/__init__.py": "from . import inner\n",
        "package/part.py": "import reward  # A circle.\n",
        "package/inner.py": "",
        "more/far.py": "this is no Python",
        "other.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found = [str(path.relative_to(tmp_path)) for path in imported_files(Path("reward.py"))]
    assert found == [
        "helper.py", "more/far.py", "package/__init__.py", "package/inner.py", "package/part.py",
    ]  # fmt: skip


def test_a_helper_that_changes_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    Path("reward.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport helper_of_reward\n"
        "def f(prompt, text):\n    return helper_of_reward.value\n"
    )
    Path("helper_of_reward.py").write_text("value = 1.0\n")
    settings = ["reward.function=reward.py:f", "sft.steps=1"]
    quiet = Console(file=StringIO())
    train(load_config("tiny.toml", [*settings, "iterations=1"]), console=quiet)
    Path("helper_of_reward.py").write_text("value = 0.5\n")
    config = load_config("tiny.toml", [*settings, "iterations=2"])
    with pytest.raises(ValueError, match=r"helper_of_reward\.py\. Put the old content back"):
        train(config, console=quiet, resume=True)
    train(config, console=quiet, resume=True, accept_changes=True)
