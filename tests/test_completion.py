"""Bash completes commands, configs and settings with the script of ``kimi completion``."""

import shutil
import subprocess

import pytest

from kimi_core.cli import main


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _kimi; echo "${{COMPREPLY[@]}}"'
    command = ["bash", "--norc", "-c", script + ask]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def script(capsys):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


def test_words(script):
    assert completed(script, "kimi", "tr") == ["train"]
    assert completed(script, "kimi", "train", "smollm2-v") == ["smollm2-vllm"]
    assert completed(script, "kimi", "train", "trainer.lea") == ["trainer.learning_rate="]
    assert completed(script, "kimi", "train", "smollm2", "rollout.sto") == ["rollout.stop="]
    assert completed(script, "kimi", "train", "nothing") == []


def test_zsh_reads_the_same(capsys, script):
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.endswith(script)


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["completion", "fish"])
    assert ended.value.code == 2 and "bash" in capsys.readouterr().err
