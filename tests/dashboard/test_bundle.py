"""A static copy holds what the server answers, and one script in place of the modules."""

import json
import re

import hostile_images
import pytest
from made_runs import make_run

from kimi_core import cli
from kimi_core.dashboard.bundle import one_script
from kimi_core.dashboard.runs import Runs
from kimi_core.dashboard.server import PAGE


def answer(path):
    """Name and value that a script of the copy hands over."""
    text = path.read_text()
    assert text.startswith("kimiData(") and text.endswith(");\n")
    return json.loads(f"[{text[9:-3]}]")


def test_the_copy_has_every_answer(trained, tmp_path, capsys):
    out = tmp_path / "copy"
    assert cli.main(["dashboard", str(trained), "--bundle", str(out)]) == 0
    files = sorted((out / "data").rglob("*.js"))
    assert f"static copy: {out / 'index.html'} ({len(files)} answers)" in capsys.readouterr().out
    run = Runs(trained).all()[0]
    numbers = run.iterations()
    for number in numbers:
        assert answer(out / f"data/0/iterations/{number}.js") == [
            f"0/iterations/{number}",
            json.loads(json.dumps(run.iteration(number))),
        ]
        for one in run.iteration(number)["columns"]["trajectory_id"]:
            _, found = answer(out / f"data/0/iterations/{number}/responses/{one}.js")
            assert found == json.loads(json.dumps(run.response(number, one)))
    assert answer(out / "data/runs.js")[1]["runs"][0]["name"] == "tiny"
    assert len(list((out / "data/0/buffer").iterdir())) == run.waiting()["trajectories"]


def test_some_iterations_are_enough(tmp_path):
    run = make_run(tmp_path / "run", iterations=4)
    out = tmp_path / "copy"
    arguments = ["dashboard", str(run), "--bundle", str(out), "--iterations", "2", "4"]
    assert cli.main(arguments) == 0
    assert answer(out / "data/0/iterations.js")[1] == [2, 4]
    assert len(answer(out / "data/0/metrics.js")[1]["lines"]) == 6
    assert sorted(path.name for path in (out / "data/0/iterations").iterdir()) == [
        "2",
        "2.js",
        "4",
        "4.js",
    ]


def test_the_copy_has_the_images_that_a_run_writes_and_no_others(tmp_path):
    run = hostile_images.pictured_run(tmp_path / "run")
    out = tmp_path / "copy"
    assert cli.main(["dashboard", str(run), "--bundle", str(out)]) == 0
    copied = {path.name: path.read_bytes() for path in (out / "data/0/images").iterdir()}
    shown = hostile_images.SHOWN.items()
    assert copied == {f"{hostile_images.digest(name)}.png": content for name, content in shown}


def test_a_folder_with_files_is_left_alone(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    arguments = ["dashboard", str(tmp_path / "runs"), "--bundle", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert "is not empty: give a new folder for the copy" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["dashboard", str(tmp_path / "empty"), "--bundle", str(tmp_path / "x")]) == 2
    assert "There is no run in" in capsys.readouterr().err


def test_every_module_is_in_the_script_once_and_behind_those_it_needs():
    script = one_script(PAGE)
    order = re.findall(r"^modules\['(.*?)'\] = ", script, re.MULTILINE)
    modules = sorted(path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*.js"))
    assert sorted(order) == modules and order[-1] == "app.js"
    assert not re.search(r"^(import|export) ", script, re.MULTILINE)
    for number, part in enumerate(script.split("\nmodules[")[1:]):
        needed = re.findall(r"^const \{.*?\} = modules\['(.*?)'\];", part, re.MULTILINE | re.DOTALL)
        assert set(needed) <= set(order[:number]), order[number]


@pytest.mark.parametrize(
    "word",
    [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
        "createContextualFragment",
        "setHTML",
        "srcdoc",
        "style=",
    ],
)
def test_no_page_makes_markup_or_code_from_text(word):
    assert [path.name for path in PAGE.rglob("*.js") if word in path.read_text()] == []


def test_nothing_is_fetched_from_elsewhere():
    for path in PAGE.rglob("*.*"):
        urls = re.findall(r"(?:https?:)?//[\w.]+\.\w+[\w/]*", path.read_text())
        assert [url for url in urls if "www.w3.org" not in url] == [], path
