"""The ``kimi`` command: its exit status, what it prints, and where it finds configs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kimi_core
from kimi_core import cli
from kimi_core.cli import settings
from kimi_core.config import names
from kimi_core.run.config_file import load_config


def test_an_interrupt_is_one_line_and_status_130(capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    assert settings.with_config([], interrupted) == 130
    assert capsys.readouterr().err.splitlines() == [
        "interrupted: what was saved is kept; the same command (kimi train and kimi "
        "sft: with --resume) goes on from there"
    ]


def test_config_and_overrides_in_any_order():
    seen = []
    assert settings.with_config(["seed=3", "smollm2", "trainer.tau=0.5"], seen.append) == 0
    assert (seen[0].name, seen[0].seed, seen[0].trainer.tau) == ("smollm2", 3, 0.5)


def test_two_configs_are_one_too_many(capsys):
    assert settings.with_config(["think", "smollm2"], lambda config: None) == 2
    assert "One config at a time, not 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "think --dry-run iterations=7",
        "--dry-run think iterations=7",
        "think iterations=7 --dry-run",
    ],
)
def test_options_and_settings_come_in_any_order(words, capsys):
    assert cli.main(["train", *words.split()]) == 0
    assert "iterations = 7" in capsys.readouterr().out


def test_a_file_comes_before_a_shipped_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        settings.find_config("think")
        == settings.find_config("think.toml")
        == settings.CONFIGS / "think.toml"
    )
    Path("think.toml").write_text("")
    assert settings.find_config("think.toml") == Path("think.toml")
    with pytest.raises(
        ValueError, match=r"No config file thing; .* benchmark, code, curate, humaneval, .*think"
    ):
        settings.find_config("thing")


@pytest.mark.parametrize("name", settings.shipped())
def test_every_shipped_config_is_valid_and_short(name):
    path = settings.CONFIGS / f"{name}.toml"
    assert load_config(path).name == name
    assert len(path.read_text().splitlines()) <= 50


def kimi(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command from a folder that knows nothing of the repository."""
    environment = os.environ | {"PYTHONPATH": str(Path(kimi_core.__file__).parents[1])}
    script = "import sys; from kimi_core.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_starts_in_any_folder(tmp_path):
    done = kimi("train", "--dry-run", "seed=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'name = "think"' in done.stdout and "seed = 4" in done.stdout


def test_help_names_every_command_and_loads_no_torch(tmp_path):
    code = (
        "import sys; from kimi_core.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert main(['--help']) == 0 and 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(kimi_core.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout
    assert "--resume" in done.stdout and "smollm2" in done.stdout


def test_an_unknown_command_lists_those_there_are(capsys):
    assert cli.main(["trian"]) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"did you mean train?; it has {', '.join(cli.COMMANDS)}\n")


def test_commands_hand_their_arguments_on(tmp_path, capsys):
    assert cli.main(["buffer", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["sandbox", "--help"])
    assert "kimi sandbox" in capsys.readouterr().out


def test_sft_writes_a_checkpoint_that_evaluate_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = ["model.scratch.layers=1", "model.scratch.width=16", "model.scratch.heads=2"]
    small = [*tiny, "sft.steps=2", "prompts.held_out=8", "model.device=cpu"]
    assert cli.main(["sft", "name=warm", *small]) == 0
    assert "checkpoint: runs/warm/checkpoint" in capsys.readouterr().out
    model = ["model.name=runs/warm/checkpoint", "prompts.held_out=8"]
    assert cli.main(["evaluate", *model, "--limit", "4", "seed=1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
    assert found["n"] == 4 and found["same_answer"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--config think", "kimi train has no --config: write `kimi train think`"),
        (
            "--trainer.learning_rate 1e-4",
            "settings are key=value; write trainer.learning_rate=1e-4",
        ),
        ("--seed 3", "settings are key=value; write seed=3"),
        ("--learning-rate=3", "write sft.learning_rate=3 or trainer.learning_rate=3"),
        ("--resme", "kimi train has no --resme; did you mean --resume?"),
        ("model=smollm2-135m", "model is a section; did you mean model.name=smollm2-135m?"),
        ("learning_rate=1e-4", "sft.learning_rate=0.0001 or trainer.learning_rate=0.0001?"),
        ("tau=0.1", "Unknown key tau = 0.1; did you mean trainer.tau=0.1?"),
        (
            "trainer.lr=1e-4",
            "did you mean trainer.learning_rate=0.0001? `kimi config trainer` lists",
        ),
        ("model.layers=3", "this key is now model.scratch.layers"),
        ("name=my_run/2", "write name=my_run-2"),
        ("thnik", "No config file thnik; did you mean think?"),
    ],
)
def test_a_mistyped_word_is_answered_with_what_to_type(words, said, capsys):
    try:
        status = cli.main(["train", *words.split()])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_name_with_a_space_is_answered_with_one_without(capsys):
    assert cli.main(["train", "name=my run"]) == 2
    assert "name = 'my run': allowed are letters" in (error := capsys.readouterr().err)
    assert error.endswith("write name=my-run\n")


def test_config_lists_every_setting_with_its_default_and_description(capsys):
    assert cli.main(["config"]) == 0
    listed = capsys.readouterr().out
    for key, setting in names.settings().items():
        assert (f"[{key}]" if setting.is_section else f"\n{key} = ") in f"\n{listed}"
    assert cli.main(["config", "trainer"]) == 0
    listed = capsys.readouterr().out
    assert "trainer.learning_rate = 0.0001\n    Learning rate of AdamW" in listed
    assert "rollout" not in listed
    assert cli.main(["config", "traner"]) == 2
    assert "did you mean `kimi config trainer`" in capsys.readouterr().err


def test_new_writes_three_files_that_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "mine"]) == 0
    assert "cd mine && kimi train mine.toml" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "mine")
    assert sorted(path.name for path in Path().iterdir()) == ["mine.toml", "reward.py", "task.py"]
    tiny = ["model.scratch.layers=1", "model.scratch.width=16", "model.scratch.heads=2"]
    few = ["sft.steps=2", "iterations=1", "rollout.prompts_per_iteration=2", "evaluation.prompts=4"]
    assert cli.main(["train", "mine.toml", *tiny, *few, "model.device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "from scratch" in said and "593 prompts to train on, 100 held out, 593 SFT" in said
    assert Path("runs/mine/checkpoint/config.json").is_file()
    again = next(line for line in said.splitlines() if line.startswith("again"))
    assert cli.main([*again.split()[2:], "--limit", "2"]) == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("there", "there exists already: nothing is written"),
        ("a b!", "'a b!' cannot name a run: .* write `kimi new a-b`"),
        ("..", "cannot name a run"),
        ("-x", ""),
    ],
)
def test_new_refuses_a_folder_that_is_there_and_a_name_that_cannot_be(
    tmp_path, monkeypatch, capsys, name, said
):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    try:
        status = cli.main(["new", name])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert re.search(said, capsys.readouterr().err)
    assert [path.name for path in Path().iterdir()] == ["there"]
