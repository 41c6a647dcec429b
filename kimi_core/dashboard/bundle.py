"""A static copy of the dashboard, which needs no server: files to open or to publish.

A browser lets a page from ``file://`` neither fetch nor import modules. So every answer of the
server becomes a script that hands its value over, and the modules become one script.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from shutil import copyfile
from typing import Any

from kimi_core.dashboard.missing import Missing
from kimi_core.dashboard.runs import Run, Runs
from kimi_core.dashboard.server import PAGE, as_json

ENTRY = "app.js"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'"
)

IMPORT = re.compile(r'^import \{(.*?)\} from "(.*?)";$', re.MULTILINE | re.DOTALL)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const) (\w+))", re.MULTILINE)


def write_bundle(runs: Runs, out: Path, iterations: Iterable[int] = ()) -> int:
    """Write the pages and the data of all runs to a new folder; returns the number of answers.

    Args:
        iterations: those whose responses are copied; empty: all.

    Raises:
        ValueError: there is no run, or ``out`` has files already.
        OSError: the disk is full or has another fault.
    """
    found = runs.all()
    if not found:
        raise ValueError(f"There is no run in {runs.folder}: nothing to copy")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give a new folder for the copy")
    out.mkdir(parents=True, exist_ok=True)
    _write_page(out, [run.name for run in found])
    _write_answer(out, "runs", runs.summary())
    count = 1
    for at, run in enumerate(found):
        shown: set[str] = set()
        for name, value in _answers(run, set(iterations)):
            _write_answer(out, f"{at}/{name}", value)
            count += 1
            if "/groups/" in name:
                shown.update(*(one["images"] for one in value["responses"]))
        _copy_pictures(run, shown, out / "data" / str(at) / "images")
    return count


def one_script(folder: Path, entry: str = ENTRY) -> str:
    """The modules as one script: each a function that returns its exports, those it needs first.

    The modules import names from relative paths, and export functions, classes and constants where
    they are declared.
    """
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done:
            return
        done[name] = ""
        text = (folder / name).read_text()
        needed = {path: _next_to(name, path) for _, path in IMPORT.findall(text)}
        for path in needed.values():
            add(path)
        body = IMPORT.sub(lambda m: f"const {{{m[1]}}} = modules[{needed[m[2]]!r}];", text)
        names = ", ".join(EXPORT.findall(text))
        module = f"{EXPORT.sub('', body)}\nreturn {{ {names} }};"
        done[name] = f"modules[{name!r}] = (() => {{\n{module}\n}})();\n"
        done[name] = done.pop(name)  # Behind those that it needs.

    add(entry)
    return "const modules = {};\n" + "\n".join(done.values())


def _next_to(name: str, path: str) -> str:
    """The module that ``path`` means in the module ``name``: ("pages/a.js", "../b.js") → "b.js"."""
    parts = name.split("/")[:-1]
    for part in path.split("/"):
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _write_page(out: Path, names: list[str]) -> None:
    copyfile(PAGE / "style.css", out / "style.css")
    bundle = f"globalThis.KIMI_BUNDLE = {json.dumps({'runs': names})};\n"
    (out / "page.js").write_text(bundle + one_script(PAGE))
    page = (PAGE / "index.html").read_text()
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    page = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{policy}')
    script = '<script defer src="page.js"></script>'
    (out / "index.html").write_text(
        page.replace(f'<script type="module" src="{ENTRY}"></script>', script)
    )


def _answers(run: Run, wanted: set[int]) -> Iterable[tuple[str, Any]]:
    """Every answer about a run with its path; files that are damaged have none."""
    yield "settings", run.settings()
    yield "metrics", run.metrics()
    yield "prompts", run.prompts()
    there = [number for number in run.iterations() if not wanted or number in wanted]
    yield "iterations", there
    for number in there:
        summary = run.iteration(number)
        yield f"iterations/{number}", summary
        columns = summary["columns"]
        for group in dict.fromkeys(columns["group_id"]):
            yield f"iterations/{number}/groups/{group}", run.group(number, group)
        for one in columns["trajectory_id"]:
            yield f"iterations/{number}/responses/{one}", run.response(number, one)
    try:
        buffer = run.waiting()
    except (Missing, ValueError):
        return
    yield "buffer", buffer
    for row in buffer["rows"]:
        yield f"buffer/{row['trajectory_id']}", run.waiting_response(row["trajectory_id"])


def _copy_pictures(run: Run, digests: set[str], to: Path) -> None:
    """Copy the images that the responses name, as far as the run has them."""
    for digest in digests:
        with suppress(Missing, ValueError):
            content = run.picture(digest)
            to.mkdir(exist_ok=True)
            (to / f"{digest}.png").write_bytes(content)


def _write_answer(out: Path, name: str, value: Any) -> None:
    path = out / "data" / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"kimiData(" + json.dumps(name).encode() + b"," + as_json(value) + b");\n")
