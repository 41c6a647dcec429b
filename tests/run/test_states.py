"""Damage to the files of a state: it is found, named, and never trained on."""

import random
import shutil
from collections import Counter
from io import StringIO
from pathlib import Path
from threading import Event

import pytest
from rich.console import Console
from tiny_runs import TINY

import kimi_core.run.states
from kimi_core.config import Config
from kimi_core.run.config_file import load_config
from kimi_core.run.files import sync_tree
from kimi_core.run.folder import RunFolder
from kimi_core.run.run import train
from kimi_core.run.states import States

REGION = 256
"""Bytes of a file of which one is flipped."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run with two states."""
    work = tmp_path_factory.mktemp("work")
    (work / "tiny.toml").write_text(TINY)
    settings = [f"runs={work}", "rollout.token_budget=5", "iterations=2"]
    return train(load_config(work / "tiny.toml", settings), console=Console(file=StringIO()))


def damages(content: bytes, chance: random.Random):
    """(Kind, what the file holds then) for flips in all regions, cuts, and nothing."""
    for start in range(0, len(content), REGION):
        at = min(len(content) - 1, start + chance.randrange(REGION))
        flipped = bytearray(content)
        flipped[at] ^= 1 << chance.randrange(8)
        yield "flipped", bytes(flipped)
    for share in (0.01, 0.5, 0.99):
        yield "cut", content[: int(share * len(content))]
    yield "cut", content[:-1]
    yield "emptied", b""


def test_every_region_of_every_file(run, tmp_path):
    states = States(run / "states", "iteration")
    newest = states.latest()[1]
    chance, counts = random.Random(0), Counter()
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for kind, content in damages(whole, chance):
            file.write_bytes(content)
            found = states.load()
            assert found.number == 1 and "000002" in found.remark, (file.name, kind)
            counts[kind] += 1
        file.unlink()
        assert states.load().number == 1
        counts["missing"] += 1
        file.write_bytes(whole)
    assert states.load().number == 2 and not states.load().remark
    print(dict(counts))
    assert counts["flipped"] > 100
    for number in (1, 2):  # Where no state is whole, it is refused by name.
        shutil.copytree(run / "states" / f"{number:06d}", tmp_path / f"{number:06d}")
        (tmp_path / f"{number:06d}" / "checksums.json").write_text("{}")
    with pytest.raises(ValueError, match=r"000002/checksums.json does not list .*000001"):
        States(tmp_path, "iteration").load()


def test_keep_states_stay(run, tmp_path):
    states = States(tmp_path / "states", "iteration", keep=3)
    for number in range(6):
        states.save(number, [], {})
    states.wait()
    assert names(states) == ["000003", "000004", "000005"]


def names(states: States) -> list[str]:
    return sorted(path.name for path in states.folder.iterdir())


def test_no_state_goes_before_a_newer_one_is_on_the_disk(tmp_path, monkeypatch):
    asked, allowed = Event(), Event()

    def slow(folder):
        asked.set()
        assert allowed.wait(60)
        sync_tree(folder)

    states = States(tmp_path / "states", "iteration", keep=1)
    states.save(1, [], {})
    states.wait()
    monkeypatch.setattr(kimi_core.run.states, "sync_tree", slow)
    states.save(2, [], {"i": 2})
    assert asked.wait(60) and names(states) == ["000001", "000002"]
    assert states.load().record == {"i": 2}  # The death of the process would not lose it.
    monkeypatch.setattr(kimi_core.run.states, "DISK_S", 0.01)
    with pytest.raises(TimeoutError, match=r"states in 0\.01 s"):
        states.wait()
    monkeypatch.undo()
    allowed.set()
    states.wait()
    assert names(states) == ["000002"]


def test_a_disk_that_does_not_take_a_state_is_an_error_of_the_next_wait(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    with RunFolder.create(tmp_path, Config()) as run:
        run.save_state(1, [], {})
        run.states.wait()
        monkeypatch.setattr(kimi_core.run.states, "sync_tree", full)
        said = r"Cannot save the state of iteration 2 .*The state of iteration 1 is intact: make"
        run.save_state(2, [], {})
        with pytest.raises(OSError, match=said):
            run.save_state(3, [], {})
        assert names(run.states) == ["000001"]
        run.save_state(2, [], {})
        with pytest.raises(OSError, match=said):
            run.close()
    RunFolder.resume(tmp_path, Config()).close()  # It is not left locked.


def test_a_record_is_one_line_without_blanks(run):
    assert b" " not in (run / "states" / "000002" / "checksums.json").read_bytes()
    assert b"\n" not in (run / "states" / "000002" / "state.json").read_bytes()
