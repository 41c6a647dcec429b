"""Damage to every region of every file of a run: what is resumed is whole, or refused by name.

A run is brought to the moment after a rollout, where everything that can be read is read. Then one
file at a time is flipped, cut, emptied or removed, and the run is resumed up to its next iteration.
What it would go on from must be, bit for bit, one of the points that were saved; or a message names
the file.
"""

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from io import StringIO
from pathlib import Path

import kills
import numpy as np
import pytest
from rich.console import Console
from tiny_runs import TINY

from kimi_core.config import Config
from kimi_core.run import identity, state
from kimi_core.run.build import Parts, build
from kimi_core.run.config_file import load_config
from kimi_core.run.fine_tuning import fine_tune
from kimi_core.run.folder import RunFolder
from kimi_core.run.report import Report
from kimi_core.run.run import train
from kimi_core.run.trajectories import TrajectoryFiles

QUIET = Console(file=StringIO())
SETTINGS = ["rollout.token_budget=7", "rollout.stream_tokens=2", "iterations=3", "sft.steps=3"]


class Run:
    """A run of three iterations whose process died after the rollout of a fourth."""

    def __init__(self, place: Path) -> None:
        os.chdir(place)
        Path("config.toml").write_text(kills.CONFIG)
        Path("reward.py").write_text(kills.REWARD)
        self.config = load_config("config.toml", SETTINGS)
        self.path = train(self.config, console=QUIET)
        self.parts = build(self.config)
        with self.opened() as folder:
            state.restore(self.parts.loop, folder)
            loop = self.parts.loop
            loop.on_rollout = lambda rollout: state.note_rollout(loop, rollout, folder.buffer)
            loop.iterate()
            loop.buffer.close()
        self.whole = place / "whole"
        shutil.copytree(self.path, self.whole)
        self.points = {self.start()[0]: "whole"}
        (self.path / "buffer.bin").unlink()
        self.points[self.start()[0]] = "without the rollout"
        self.put_back()
        shutil.rmtree(self.path / "states" / "000003")
        self.points[self.start()[0]] = "the state before"
        self.put_back()
        assert len(self.points) == 3

    def opened(self) -> RunFolder:
        folder = RunFolder.resume(self.path, self.config)
        identity.write_down(folder, self.config, self.parts)
        return folder

    def start(self) -> tuple[str, str]:
        """Digest of all that the next iteration goes on from, and what was said."""
        said = StringIO()
        self.parts.loop.trainer.published, self.parts.loop.engine.policy_version = None, 0
        with self.opened() as folder:
            sft_s, remark = state.restore(self.parts.loop, folder)
            loop, console = self.parts.loop, Console(file=said, width=999)
            with closing(loop.buffer):
                found = point(self.parts, sft_s)
            Report(self.path, total_iterations=9, start_iteration=loop.iteration, console=console)
            TrajectoryFiles(self.path, self.config.trajectories).read(loop.iteration)
        return found, remark + said.getvalue()

    def put_back(self) -> None:
        shutil.rmtree(self.path)
        shutil.copytree(self.whole, self.path)


def point(parts: Parts, sft_s: float) -> str:
    loop = parts.loop
    digest = hashlib.sha256(json.dumps([loop.state(), loop.steps_before, sft_s]).encode())
    for name, tensor in parts.model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    for name, rates in loop.curriculum.state().items():
        digest.update(name.encode() + np.asarray(rates).tobytes())
    for info in loop.buffer.trajectories():
        for value in vars(loop.buffer.read(info.trajectory_id)).values():
            digest.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    before = Path.cwd()
    made = Run(tmp_path_factory.mktemp("work"))
    yield made
    made.parts.close()
    os.chdir(before)


READ = ("buffer.bin", "rollout.json", "config.toml", "metrics.jsonl", "trajectories/000003.jsonl")
"""Files that a resume reads, except those of the state."""


def files_of(run: Run) -> list[str]:
    every = sorted((run.path / "states" / "000003").iterdir())
    return [*READ, *(str(file.relative_to(run.path)) for file in every)]


def damages(
    content: bytes, region: int, bits: int, chance: random.Random
) -> Iterator[tuple[str, bytes | None]]:
    """(Kind, what the file holds then; None: it is missing); ``bits`` flips in each region."""
    for start in range(0, len(content), region):
        for _ in range(bits):
            at = min(len(content) - 1, start + chance.randrange(region))
            flipped = bytearray(content)
            flipped[at] ^= 1 << chance.randrange(8)
            yield "flipped", bytes(flipped)
        if bits > 1:
            zeroed = content[:start] + bytes(len(content[start : start + region]))
            if zeroed + content[start + region :] != content:
                yield "zeroed", zeroed + content[start + region :]
    for share in (0.01, 0.5, 0.99):
        yield "cut", content[: int(share * len(content))]
    yield "cut", content[:-1]
    yield "longer", content + b"\0"
    yield "emptied", b""
    yield "missing", None


def try_all(run: Run, regions: int, bits: int) -> Counter[tuple[str, str]]:
    """Counts of (kind of damage, what came of it) over all files."""
    counts, chance = Counter[tuple[str, str]](), random.Random(0)
    for name in files_of(run):
        path = run.path / name
        whole = path.read_bytes()
        for kind, content in damages(whole, max(16, len(whole) // regions), bits, chance):
            path.write_bytes(content) if content is not None else path.unlink()
            try:
                found, said = run.start()
                outcome = run.points.get(found, "DAMAGE TRAINED ON")
            except ValueError as error:
                outcome = "refused"
                said = str(error)
            assert outcome != "DAMAGE TRAINED ON", (name, kind)
            if outcome in ("the state before", "refused"):
                assert name in said or (name.startswith("states") and "states/000003" in said), said
            counts[kind, outcome] += 1
            run.put_back()
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{count:6} {kind:8} {outcome}")
    return counts


@pytest.mark.nightly
def test_every_region_of_every_file(run):
    counts = try_all(run, regions=12, bits=1)
    assert counts["flipped", "the state before"] >= 60 and counts["flipped", "refused"] > 10
    assert counts["missing", "the state before"] == 6


@pytest.mark.nightly
def test_many_places_in_every_region_of_every_file(run):
    counts = try_all(run, regions=30, bits=2)
    assert counts.total() > 500


def test_where_no_state_is_whole_all_are_named(run):
    for number in (2, 3):
        tensors = run.path / "states" / f"{number:06d}" / "tensors.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"000003/tensors.*000002/tensors.*Put the files back"):
        run.start()
    run.put_back()


def test_every_file_of_a_state_of_sft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text(kills.CONFIG)
    Path("reward.py").write_text(kills.REWARD)
    config = load_config("config.toml", ["sft.steps=3", "sft.save_every=1"])
    chance = random.Random(0)
    with closing(build(config)) as parts, RunFolder.create("runs/killed", config) as folder:
        fine_tune(parts, config, QUIET, folder)
        newest = folder.sft_states.latest()[1]
        for file in sorted(newest.iterdir()):
            whole = file.read_bytes()
            for kind, content in damages(whole, max(16, len(whole) // 12), 1, chance):
                file.write_bytes(content) if content is not None else file.unlink()
                saved = folder.sft_states.load()
                assert saved.number == 1 and "000002" in saved.remark, (file.name, kind)
                file.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_itself_goes_on_to_the_same_bits(tmp_path):
    """One damage to each file of the last state of an ended run, and the run ends again."""
    marks, chance = kills.Marks(), random.Random(3)
    wanted, _ = kills.unbroken(tmp_path / "run", "budget", fresh=False)
    whole, folder = tmp_path / "whole", tmp_path / "run" / "runs" / "killed"
    shutil.copytree(folder, whole)
    for name in sorted(path.name for path in (folder / "states" / "000005").iterdir()):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        path = folder / "states" / "000005" / name
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        assert os.waitpid(kills.start(tmp_path / "run", "budget", marks, fresh=False), 0)[1] == 0
        shutil.rmtree(folder / "states" / "000005.damaged", ignore_errors=True)
        found = kills.left(tmp_path / "run")
        assert [key for key in wanted if found.get(key) != wanted[key]] == [], name


def test_states_that_are_missing_have_one_way_out(tmp_path, monkeypatch):
    """Without ``states/`` nothing can go on; what the message says works."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)

    def command(*settings: str) -> Path:
        return train(load_config("tiny.toml", ["iterations=1", *settings]), resume=True)

    folder = command()
    shutil.rmtree(folder / "states")
    with pytest.raises(
        ValueError, match=r"holds checkpoint, summary.json, metrics.jsonl.*name="
    ) as e:
        command()
    assert "remove that folder" in str(e.value)
    command("name=another")
    shutil.rmtree(folder)
    command()


def test_a_config_that_is_damaged_is_not_believed(run):
    """A digit of it may be another: the newest state knows."""
    path = run.path / "config.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 1"))
    assert run.points[run.start()[0]] == "whole"
    assert load_config(path) == run.config != Config()
    run.put_back()
