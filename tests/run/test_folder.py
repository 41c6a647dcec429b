"""The run folder: no crash and no full disk loses a state, and no run is taken for another."""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from warm import Warm

import kimi_core
from kimi_core.config import Config
from kimi_core.run.config_file import dump_toml, load_config
from kimi_core.run.folder import RunFolder

# Saves states whose every file says which iteration it is of, so that a mix would show.
SAVE_LOOP = """
    import sys
    from itertools import count
    import torch
    from safetensors.torch import save_file
    from kimi_core.config import Config
    from kimi_core.run.folder import RunFolder

    run = RunFolder.create(sys.argv[1], Config())
    for i in count():
        run.save_state(
            i,
            [
                lambda folder: save_file(
                    {"w": torch.full((50_000,), float(i))}, folder / "tensors.safetensors"
                ),
                lambda folder: (folder / "buffer.bin").write_bytes(
                    i.to_bytes(8, "little") * 10_000
                ),
            ],
            {"i": i},
        )
        print(i, flush=True)
"""


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Subprocesses import the package that these tests run on."""
    root = str(Path(kimi_core.__file__).parents[1])
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def save(run: RunFolder, iteration: int, fingerprint: str = "") -> Path:
    def write(folder: Path) -> None:
        (folder / "buffer.bin").write_bytes(bytes([iteration]) * 100)

    state = run.save_state(iteration, [write], {"i": iteration}, fingerprint)
    run.states.wait()
    return state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- settings


@given(
    config=st.builds(
        Config,
        name=st.from_regex(r"[a-z0-9_.-]+", fullmatch=True),
        samples=st.none() | st.integers(1),
        runs=st.text(st.characters(exclude_categories=["Cs"])),
        rollout=st.fixed_dictionaries(
            {"stop": st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5))}
        ),
        trainer=st.fixed_dictionaries(
            {
                "learning_rate": st.floats(1e-300, 1),
                "memory_gb": st.sampled_from([None, 0.5, 8.0]),
                "max_staleness": st.none() | st.integers(0),
            }
        ),
    )
)
def test_saved_settings_load_back_equal(
    config: Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(path) == config


def test_create_saves_the_settings(tmp_path: Path) -> None:
    config = Config(seed=7, rollout={"stop": ["\n"], "token_budget": 24})
    with RunFolder.create(tmp_path / "run", config) as run:
        assert load_config(run.path / "config.toml") == config


# ---- who may write


def test_a_second_process_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with (
        RunFolder.create(tmp_path, Config()),
        pytest.raises(ValueError, match=rf"pid {os.getpid()}: .*name="),
    ):
        RunFolder.create(tmp_path, Config())


def test_the_lock_goes_with_the_process_that_held_it(tmp_path: Path) -> None:
    holder = Warm(["-c", textwrap.dedent(SAVE_LOOP), tmp_path])
    try:
        holder.stdout.readline()
        with pytest.raises(ValueError, match=f"pid {holder.pid}"):
            RunFolder.resume(tmp_path, Config())
    finally:
        holder.kill()
    holder.wait(60)
    RunFolder.resume(tmp_path, Config()).close()


def test_a_folder_that_could_not_be_opened_is_not_left_locked(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 3)
    with pytest.raises(ValueError, match=r"reached iteration 3: .*--resume.*name="):
        RunFolder.create(tmp_path, Config())
    with pytest.raises(ValueError, match="seed: saved 0, given 1"):
        RunFolder.resume(tmp_path, Config(seed=1))
    RunFolder.resume(tmp_path, Config()).close()


# ---- create and resume


@pytest.mark.parametrize("trace", ["summary.json", "metrics.jsonl", "checkpoint"])
def test_create_never_overwrites_results(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).mkdir()
    with pytest.raises(ValueError, match=rf"{trace} of an earlier run.*name="):
        RunFolder.create(tmp_path, Config())


def test_a_run_stopped_before_its_first_state_starts_again(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, Config()).close()
    with pytest.raises(ValueError, match="start it again without --resume"):
        RunFolder.resume(tmp_path, Config())
    RunFolder.create(tmp_path, Config(seed=1)).close()


def test_resume_needs_a_run_and_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No run to resume"):
        RunFolder.resume(tmp_path / "nothing", Config())
    assert names(tmp_path) == []


def test_resume_names_every_setting_that_differs(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 1)
    other = Config(seed=1, trainer={"tau": 0.5}, rollout={"token_budget": 24})
    with pytest.raises(ValueError, match="other settings") as fault:
        RunFolder.resume(tmp_path, other)
    for line in (
        "seed: saved 0, given 1",
        "trainer.tau: saved 0.01, given 0.5",
        "rollout.token_budget: saved None, given 24",
    ):
        assert line in str(fault.value)


def test_resume_takes_settings_that_change_no_iteration(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 1)
    longer = Config(iterations=90, samples=5, save_every=2, runs="x", evaluation={"every": 3})
    with RunFolder.resume(tmp_path, longer):
        assert load_config(tmp_path / "config.toml") == longer


# ---- states


def test_a_state_comes_back_as_it_was_given(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        writers = [lambda folder: (folder / "x.bin").write_bytes(b"x" * 9)]
        run.save_state(4, writers, {"rng": [1, 2]}, "llama 3x96")
        saved = run.load_state("llama 3x96")
    assert (saved.number, saved.record["state"]) == (4, {"rng": [1, 2]})
    assert (saved.folder / "x.bin").read_bytes() == b"x" * 9


def test_the_newest_two_states_stay(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        assert run.states.latest() is None
        for iteration in (0, 1, 9, 10):
            save(run, iteration)
        assert run.states.latest() == (10, tmp_path / "states" / "000010")
        assert names(run.states.folder) == ["000009", "000010"]


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 5)
        run.save_state(5, [], {"i": "again"})
        run.states.wait()
        assert run.load_state().record["state"] == {"i": "again"}
        assert names(run.states.folder) == ["000005"]


def test_the_state_being_replaced_counts_until_the_new_one_stands(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        old = save(run, 5)
        old.rename(old.with_suffix(".old"))  # Killed between the two renames.
        assert run.load_state().record["state"] == {"i": 5}
        save(run, 6)
        save(run, 7)
        assert names(run.states.folder) == ["000006", "000007"]


def test_half_a_state_is_never_chosen(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        whole = save(run, 5)
        (run.states.folder / "000006.tmp").mkdir()
        (run.states.folder / "000006.tmp" / "state.json").write_bytes(
            (whole / "state.json").read_bytes()
        )
        assert run.states.latest() == (5, whole)
        save(run, 6)
        assert names(run.states.folder) == ["000005", "000006"]


DAMAGES = {
    "a bit of a file": lambda state: flip(state / "buffer.bin"),
    "a digit of state.json": lambda state: flip(state / "state.json"),
    "state.json cut": lambda state: cut(state / "state.json", 0.5),
    "state.json empty": lambda state: cut(state / "state.json", 0),
    "a file cut": lambda state: cut(state / "buffer.bin", 0.9),
    "a file missing": lambda state: (state / "buffer.bin").unlink(),
    "checksums empty": lambda state: cut(state / "checksums.json", 0),
    "checksums missing": lambda state: (state / "checksums.json").unlink(),
    "checksums of another kind": lambda state: (state / "checksums.json").write_text("[1]"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_found_and_the_one_before_is_used(tmp_path: Path, damage) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 5)
        damage(save(run, 6))
    with RunFolder.resume(tmp_path, Config()) as run:
        saved = run.load_state()
        assert (saved.number, saved.record["state"]) == (5, {"i": 5})
        assert "000006" in saved.remark and "continuing from the state of 5" in saved.remark
        save(run, 6)  # It replaces the damaged one.
        assert run.load_state().number == 6 and not run.load_state().remark
        damage(run.states.folder / "000005")
        damage(run.states.folder / "000006")
        with pytest.raises(ValueError, match=r"000006.*000005.*Put the files back"):
            run.load_state()


def test_a_damaged_state_is_not_one_of_the_two_kept(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 5)
        flip(save(run, 10) / "state.json")
    with RunFolder.resume(tmp_path, Config()) as run:
        assert run.load_state().number == 5
        assert run.states.latest() == (5, run.states.folder / "000005")
        save(run, 6)
        assert names(run.states.folder) == ["000005", "000006", "000010.damaged"]
        flip(run.states.folder / "000006" / "buffer.bin")
    with RunFolder.resume(tmp_path, Config()) as run:
        assert run.load_state().number == 5
        assert names(run.states.folder) == ["000005", "000006.damaged", "000010.damaged"]
        for iteration in range(6, 13):
            save(run, iteration)
        assert names(run.states.folder) == ["000011", "000012"]


def test_nothing_is_renamed_where_no_state_is_whole(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        flip(save(run, 5) / "state.json")
    with pytest.raises(ValueError, match="No state to resume from"):
        RunFolder.resume(tmp_path, Config()).load_state()
    assert names(tmp_path / "states") == ["000005"]


@pytest.mark.parametrize(
    "lost", [lambda path: path.unlink(missing_ok=True), lambda path: path.write_text("[[")]
)
def test_settings_that_are_lost_are_in_the_state(tmp_path: Path, lost) -> None:
    config = Config(seed=3)
    with RunFolder.create(tmp_path, config) as run:
        save(run, 5)
    lost(tmp_path / "config.toml")
    with pytest.raises(ValueError, match="seed: saved 3, given 4"):
        RunFolder.resume(tmp_path, Config(seed=4))
    lost(tmp_path / "config.toml")
    with RunFolder.resume(tmp_path, config) as run:
        assert run.load_state().number == 5
    assert load_config(tmp_path / "config.toml") == config


def test_settings_that_errors_advise_to_change_may_change(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 1)
    other = Config(trainer={"learning_rate": 1e-5}, reward={"workers": 8, "judge": {"url": "x"}})
    with RunFolder.resume(tmp_path, other) as run:
        assert run.changed == {
            "trainer.learning_rate": [1e-4, 1e-5],
            "reward.workers": [1, 8],
            "reward.judge.url": ["", "x"],
        }
        save(run, 2)
    with RunFolder.resume(tmp_path, other) as run:
        assert not run.changed


def test_another_model_is_refused(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 5, "llama 3x96")
        with pytest.raises(ValueError, match=r"'llama 3x96'.*'llama 4x96'.*name="):
            run.load_state("llama 4x96")


def test_a_fault_in_a_writer_leaves_the_previous_state(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "buffer.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 5)
        with pytest.raises(KeyboardInterrupt):
            run.save_state(6, [fail], {})
        assert names(run.states.folder) == ["000005"]


# ---- crashes and full disks


@pytest.mark.slow
def test_a_killed_save_loop_always_leaves_a_whole_state(tmp_path: Path) -> None:
    """What was acknowledged on stdout is not lost, and what is found is not torn."""
    moment = random.Random(0)
    for trial in range(8):
        folder = tmp_path / str(trial)
        process = Warm(["-c", textwrap.dedent(SAVE_LOOP), folder])
        process.stdout.readline()  # Into the loop.
        time.sleep(moment.uniform(0, 0.3))
        process.kill()
        acknowledged = [0, *map(int, process.stdout.read().split())][-1]
        with RunFolder.resume(folder, Config()) as run:
            saved = run.load_state()
            i = saved.number
            assert i >= acknowledged
            assert saved.record["state"] == {"i": i}
            tensors = load_file(saved.folder / "tensors.safetensors")
            assert torch.equal(tensors["w"], torch.full((50_000,), float(i)))
            expected = i.to_bytes(8, "little") * 10_000
            assert (saved.folder / "buffer.bin").read_bytes() == expected
            save(run, i + 1)
            assert names(run.states.folder) == [f"{i:06d}", f"{i + 1:06d}"]


NO_ROOM = """
    import json, sys
    import numpy as np
    from safetensors.numpy import save_file
    from kimi_core.config import Config
    from kimi_core.run.folder import RunFolder

    def tensors(size):
        ones = {"w": np.ones(size, np.float32)}
        return lambda folder: save_file(ones, folder / "tensors.safetensors")

    run = RunFolder.create(sys.argv[1], Config())
    small, big = tensors(100), tensors(1_000_000)
    run.save_state(1, [small], {"i": 1})
    if sys.argv[2] == "rlimit":
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    faults = []
    buffer = lambda folder: (folder / "buffer.bin").write_bytes(bytes(4_000_000))
    for writers in ([big], [small, buffer]):
        try:
            run.save_state(2, writers, {"i": 2})
        except OSError as error:
            faults.append([error.errno, str(error)])
    run.load_state()
    run.save_state(2, [small], {"i": 2})
    print(json.dumps(faults))
"""


@pytest.mark.parametrize("means", ["rlimit", "tmpfs"])
def test_no_room_leaves_the_previous_state_and_says_so(tmp_path: Path, means: str) -> None:
    command = python(NO_ROOM, tmp_path / "run", means)
    if means == "tmpfs":
        # A mount of a namespace of its own goes when the process does.
        mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"'
        command = [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            mount,
            "-",
            *command,
        ]
        probe = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "-", "true"]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a tmpfs here")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    faults = json.loads(done.stdout)
    assert len(faults) == 2
    for _, message in faults:
        assert "Cannot save the state of iteration 2" in message
        assert "MB are free" in message
        assert "state of iteration 1 is intact: make room there, then --resume" in message


# ---- checkpoint


class Saves:
    """Stands in for a model and for a tokenizer."""

    def __init__(self, name: str, content: str, fault: OSError | None = None) -> None:
        self.name, self.content, self.fault = name, content, fault

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text(self.content)
        if self.fault:
            raise self.fault


def test_a_checkpoint_is_replaced_in_one_piece(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        for content in ("one", "two"):
            run.save_checkpoint(Saves("model", content), Saves("tokenizer", content))
            assert (run.checkpoint / "model").read_text() == content
            assert names(run.checkpoint) == ["model", "tokenizer"]
        with pytest.raises(OSError, match="Cannot save the checkpoint"):
            run.save_checkpoint(Saves("model", "three", OSError(28, "full")), None)
        assert (run.checkpoint / "model").read_text() == "two"
        assert not [name for name in names(tmp_path) if name.startswith("checkpoint.")]


def test_a_checkpoint_swap_that_was_cut_is_undone(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 1)
        run.save_checkpoint(Saves("model", "one"), Saves("tokenizer", "one"))
        run.checkpoint.rename(tmp_path / "checkpoint.old")
    with RunFolder.resume(tmp_path, Config()) as run:
        assert (run.checkpoint / "model").read_text() == "one"


@pytest.mark.parametrize("name", ["checkpoint", "best"])
def test_what_a_cut_swap_has_replaced_goes(tmp_path: Path, name: str) -> None:
    with RunFolder.create(tmp_path, Config()) as run:
        save(run, 1)
        run.save_checkpoint(Saves("model", "two"), Saves("tokenizer", "two"), name=name)
        shutil.copytree(tmp_path / name, tmp_path / f"{name}.old")  # Killed before it was removed.
        before = names(tmp_path)
    RunFolder.resume(tmp_path, Config()).close()
    assert names(tmp_path) == sorted(set(before) - {f"{name}.old"})
    assert (tmp_path / name / "model").read_text() == "two"


# ---- a folder in use


def test_a_fork_of_a_dead_process_that_holds_the_lock_is_named(tmp_path: Path) -> None:
    """A run was killed, and a process that it had forked lives on with its lock."""
    script = """
        import os, sys, time
        from kimi_core.config import Config
        from kimi_core.run.folder import RunFolder

        run = RunFolder.create(sys.argv[1], Config())
        child = os.fork()
        if child:
            print(os.getpid(), child, flush=True)
            os._exit(0)
        os.close(1)
        time.sleep(600)
    """
    done = subprocess.run(
        python(script, tmp_path), stdout=subprocess.PIPE, env=environment(), check=True
    )
    dead, child = map(int, done.stdout.split())
    try:
        with pytest.raises(ValueError, match=f"a fork of the dead process {dead}.* pid {child}"):
            RunFolder.create(tmp_path, Config())
    finally:
        os.kill(child, 9)
    deadline = time.monotonic() + 60
    while True:  # Until the kernel has ended it.
        try:
            living = RunFolder.create(tmp_path, Config())
            break
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with living, pytest.raises(ValueError, match=f"by the process with pid {os.getpid()}"):
        RunFolder.create(tmp_path, Config())
