"""What a run consists of outside of its folder: the files that it reads, and where it computes."""

import ast
import hashlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from kimi_core.config import Config
from kimi_core.prompts.many import facts_of
from kimi_core.prompts.tables import KINDS
from kimi_core.run.build import Parts
from kimi_core.run.files import write_atomically
from kimi_core.run.folder import RunFolder

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")


def write_down(folder: RunFolder, config: Config, parts: Parts) -> None:
    """Have the states of ``folder`` hold all this, to be compared with that of a state.

    The tokenizer is written to the folder: for ``--resume`` and ``replay`` of a scratch model, and
    for the dashboard. One that is written in Python has no such form.
    """
    folder.data = data(config, parts)
    folder.environment = environment(parts.model.device)
    core = getattr(parts.tokenizer, "backend_tokenizer", None)
    if core is not None:
        write_atomically(folder.tokenizer, core.to_str())


def environment(device: torch.device) -> dict[str, str]:
    """What decides the last bits of a computation, by name.

    A run has the same bits again only where all of it is the same.
    """
    on_gpu = device.type == "cuda"
    return {
        **{name: version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def data(config: Config, parts: Parts) -> dict[str, str]:
    """Name → digest of what the run reads, without training prompts and model, which a state
    compares in other ways."""
    held_out = facts_of(parts.evaluator.prompts).checksums
    found = {"the held-out prompts": _digest(held_out.tobytes())}
    for name, one in parts.sets.items():
        checksums = facts_of(one.prompts).checksums
        found[f"the prompts of evaluation.sets.{name}"] = _digest(checksums.tobytes())
    if parts.images is not None and len(parts.images):
        found["the images"] = parts.images.fingerprint()
    functions = [config.reward.function, *(one.function for one in config.reward.functions)]
    for spec in (*functions, config.trainer.objective, config.sft.data):
        path = Path(spec.rpartition(":")[0] or spec)
        if path.suffix in (".py", ".jsonl", *KINDS) and path.is_file():
            found[str(path)] = _digest(path.read_bytes())
        if path.suffix == ".py" and path.is_file():
            helpers = imported_files(path)
            found |= {os.path.relpath(one): _digest(one.read_bytes()) for one in helpers}
    if config.model.name == "scratch":
        text = parts.tokenizer.backend_tokenizer.to_str()
        found["the tokenizer of the model"] = _digest(text.encode())
    return found | parts.given.digests()


def imported_files(path: Path) -> list[Path]:
    """The Python files that a file imports, and those that they import, sorted by name.

    They are looked for in the folder of the file that imports them, in the working folder and in
    ``PYTHONPATH``, so installed packages are not among them.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    places = [Path.cwd(), *map(Path, filter(None, given))]
    found, todo = set[Path](), [path.resolve()]
    while todo:
        one = todo.pop()
        if one in found:
            continue
        found.add(one)
        for name in _imports(one):
            for place in (one.parent, *places):
                stem = place.joinpath(*name.split("."))
                files = (stem.with_suffix(".py"), stem / "__init__.py")
                todo += [file.resolve() for file in files if file.is_file()]
    return sorted(found - {path.resolve()})


def _imports(path: Path) -> Iterator[str]:
    """Modules that a file imports. ``from a import b`` may mean ``a`` or ``a.b``: both."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # Whoever imports it says so.
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{one.name}".strip(".") for one in node.names)]
        else:
            continue
        yield from (name for name in names if name and not name.startswith("kimi_core"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or os.uname().machine
