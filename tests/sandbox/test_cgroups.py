"""Where the cgroup of a slot goes: in folders that look like cgroupfs, and in the real one."""

import os
from pathlib import Path

import pytest

from kimi_core.sandbox import cgroups
from kimi_core.sandbox.cgroups import Cgroup
from kimi_core.sandbox.program import MB, Limits


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    mounts: dict[str, Path] = {}
    monkeypatch.setattr(cgroups, "_mounts", lambda: mounts)
    monkeypatch.setattr(cgroups, "_own_paths", lambda: {"": "user/scope", "memory": "deep"})
    return mounts


def v2(tmp_path: Path, controllers: str) -> Path:
    own = tmp_path / "user" / "scope"
    own.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text(controllers)
    (own / "cgroup.subtree_control").chmod(0o444)
    return own


def test_v2_is_taken_where_its_controllers_are_delegated(
    mounted: dict[str, Path], tmp_path: Path
) -> None:
    own = v2(tmp_path, "cpu memory pids")
    mounted[""] = tmp_path
    folder = own / "kimi-sandbox-7"
    folder.mkdir()
    for name, text in {
        "cgroup.procs": "",
        "memory.max": "",
        "memory.swap.max": "",
        "memory.oom.group": "",
        "memory.peak": "",
        "memory.events": "low 0\noom 3\noom_kill 2\n",
        "pids.max": "",
        "cpu.stat": "usage_usec 1500000\nuser_usec 1\n",
    }.items():
        (folder / name).write_text(text)
    group = Cgroup("7")
    assert group.v2 and set(group.folders.values()) == {folder}
    group.begin(Limits(memory_bytes=64 * MB, processes=5))
    written = {path.name: path.read_text() for path in folder.iterdir()}
    assert written["memory.max"] == str(64 * MB)
    assert (written["memory.swap.max"], written["memory.oom.group"]) == ("0", "1")
    assert written["pids.max"] == str(5 + cgroups.OVERHEAD)
    (folder / "cpu.stat").write_text("usage_usec 1750000\n")
    assert group.cpu_s() == pytest.approx(0.25)
    assert not group.out_of_memory()
    (folder / "memory.events").write_text("oom 4\noom_kill 3\n")
    assert group.out_of_memory()


def test_v1_is_taken_where_v2_has_no_controllers(mounted: dict[str, Path], tmp_path: Path) -> None:
    mounted[""] = tmp_path / "unified"
    v2(mounted[""], "hugetlb")
    for name in ("memory", "pids", "cpuacct"):
        mounted[name] = tmp_path / name
        (mounted[name] / ("deep" if name == "memory" else "")).mkdir(parents=True, exist_ok=True)
    found, parents = cgroups._parents()
    assert not found
    assert parents == {
        "memory": tmp_path / "memory" / "deep",
        "pids": tmp_path / "pids",
        "cpuacct": tmp_path / "cpuacct",
    }


def test_what_is_missing_is_named(mounted: dict[str, Path], tmp_path: Path) -> None:
    mounted["memory"] = tmp_path
    with pytest.raises(OSError, match=r"no v1 hierarchy of pids, cpuacct"):
        Cgroup("7")


def test_a_cgroup_is_made_and_removed() -> None:
    try:
        group = Cgroup(f"test-{os.getpid()}")
    except OSError as error:
        pytest.skip(f"no cgroup for this user: {error}")
    folders = set(group.folders.values())
    assert all(folder.is_dir() for folder in folders)
    group.begin(Limits())
    pid = os.fork()
    if pid == 0:
        for fd in group.procs:
            os.write(fd, b"0")
        while True:
            os.getpid()
    while not any(cgroups._members(folder) for folder in folders):
        pass
    group.kill()
    assert os.waitpid(pid, 0)[1] == 9
    assert group.cpu_s() > 0
    group.close()
    assert not any(folder.exists() for folder in folders)
