"""Commands to begin with: a new task, and what can be set."""

import difflib
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from kimi_core.cli.help import CONFIG, NEW
from kimi_core.cli.parser import fail
from kimi_core.cli.settings import parser_of
from kimi_core.config.names import meant, settings

TEMPLATE = Path(__file__).parent / "template"
"""The files of a new task."""


def new(arguments: Sequence[str]) -> int:
    parser = parser_of("new", NEW)
    parser.add_argument("folder", type=Path, help="to make; its last part names the run")
    folder: Path = parser.parse_args(arguments).folder
    name = folder.name
    if not re.fullmatch(r"\w[\w.-]*", name):
        better = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "mine"
        return fail(
            f"{name!r} cannot name a run: allowed are letters, digits and any of . _ -; write "
            f"`kimi new {folder.parent / better}`",
            2,
        )
    if folder.exists():
        return fail(f"{folder} exists already: nothing is written; choose another name", 2)
    try:
        folder.mkdir(parents=True)
        for file in ("task.py", "reward.py"):
            shutil.copyfile(TEMPLATE / file, folder / file)
        toml = (TEMPLATE / "run.toml").read_text().replace("NAME", name)
        (folder / f"{name}.toml").write_text(toml)
    except OSError as error:
        return fail(f"Cannot make {folder}: {error.strerror}", 1)
    print(
        f"{folder}/task.py    what is asked, and examples to imitate first\n"
        f"{folder}/reward.py  what a response is worth\n"
        f"{folder}/{name}.toml  every choice of the run\n\n"
        f"cd {folder} && kimi train {name}.toml"
    )
    return 0


def config(arguments: Sequence[str]) -> int:
    parser = parser_of("config", CONFIG)
    parser.add_argument("name", nargs="?", default="", help="a section or a setting; all")
    name: str = parser.parse_args(arguments).name
    known = settings()
    if name and name not in known:
        inside = name.rpartition(".")[0] in known
        near = (inside and meant(name)) or difflib.get_close_matches(name, known, 2) or meant(name)
        likely = " or ".join(f"`kimi config {one}`" for one in near)
        sections = ", ".join(key for key, one in known.items() if one.is_section)
        way_out = f"did you mean {likely}?" if likely else f"sections are {sections}"
        return fail(f"There is no setting {name}; {way_out}", 2)
    width = min(100, shutil.get_terminal_size().columns)
    for key, setting in known.items():
        if name and key != name and not key.startswith(f"{name}."):
            continue
        print(f"[{key}]" if setting.is_section else f"{key} = {_written(setting.default)}")
        text = " ".join(setting.description.split())
        indent = "    "
        if text:
            print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent))
    return 0


def _written(value: object) -> str:
    """A default as TOML has it; ``none`` if it is unset."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).replace("'", '"')
