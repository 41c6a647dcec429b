"""What a fresh `pip install` must give, and what the repository promises about its layout."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import kimi_core

ROOT = Path(__file__).resolve().parents[1]

# Tools of the `test` extra stand beside the interpreter, also where nobody activated it.
TOOLS = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=TOOLS, capture_output=True, text=True, timeout=120)


def test_version_matches_the_metadata() -> None:
    assert metadata.version("kimi-core") == kimi_core.__version__


def test_stub_is_current(tmp_path: Path) -> None:
    """After a change to the bindings: `pybind11-stubgen kimi_core._C -o .`."""
    made = run(sys.executable, "-m", "pybind11_stubgen", "kimi_core._C", "-o", ".", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    committed = ROOT / "kimi_core" / "_C.pyi"
    assert (tmp_path / "kimi_core" / "_C.pyi").read_text() == committed.read_text()


def test_kernels_are_linked_into_the_package_once() -> None:
    link = ROOT / "kimi_core" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    shipped = Path(kimi_core.__file__).parent / "kernels"
    assert {path.name for path in shipped.glob("*.py")} == {
        path.name for path in (ROOT / "kernels").glob("*.py")
    }


def test_configs_are_linked_into_the_package_once() -> None:
    link = ROOT / "kimi_core" / "configs"
    assert link.is_symlink()
    assert link.readlink() == Path("../configs")
    shipped = Path(kimi_core.__file__).parent / "configs"
    assert {path.name for path in shipped.iterdir()} == {
        path.name for path in (ROOT / "configs").iterdir()
    }


def test_compiled_core_loads_without_torch(tmp_path: Path) -> None:
    """One wheel serves every torch: a linked libtorch would be missing here, or be mapped."""
    script = (
        "import sys, kimi_core._C\n"
        "assert 'torch' not in sys.modules\n"
        "if sys.platform == 'linux':\n"
        "    maps = open('/proc/self/maps').read()\n"
        "    assert '_C.' in maps and 'libtorch' not in maps and 'libc10' not in maps\n"
    )
    loaded = run(sys.executable, "-c", script, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr


def test_cuda_on_without_a_compiler_says_what_to_do(tmp_path: Path) -> None:
    configured = run(
        "cmake", "-S", str(ROOT), "-B", ".", "-G", "Ninja",
        "-DKIMI_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND", cwd=tmp_path,
    )  # fmt: skip
    assert configured.returncode != 0
    assert "KIMI_CUDA=ON, but there is no CUDA compiler" in configured.stderr


def test_package_without_its_core_names_the_command(tmp_path: Path) -> None:
    source = ROOT / "kimi_core" / "__init__.py"
    (tmp_path / "kimi_core").mkdir()
    (tmp_path / "kimi_core" / "__init__.py").write_text(source.read_text())
    script = "import sys; sys.path.insert(0, '.'); import kimi_core"
    # -S: an editable installation finds the core from anywhere.
    imported = run(sys.executable, "-S", "-c", script, cwd=tmp_path)
    assert imported.returncode != 0
    assert "pip install ." in imported.stderr


def test_a_module_started_in_the_source_folder_is_the_installed_one(tmp_path: Path) -> None:
    init = (ROOT / "kimi_core" / "__init__.py").read_text()
    source, installed = tmp_path / "source", tmp_path / "installed"
    for folder, files in (
        (source, {"__init__.py": init, "tool.py": "print('source')"}),
        (installed, {"__init__.py": init, "tool.py": "print('installed')", "_C.py": ""}),
    ):
        (folder / "kimi_core").mkdir(parents=True)
        for name, text in files.items():
            (folder / "kimi_core" / name).write_text(text)
    started = subprocess.run(
        [sys.executable, "-S", "-m", "kimi_core.tool"],  # -S: as in the test above.
        cwd=source,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.stdout == "installed\n", started.stderr
