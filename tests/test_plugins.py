import pytest

from kimi_core.plugins import load_function


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text("import dataclasses\nTEN = 10\ndef double(x): return 2 * x\n")
    return tmp_path


def test_relative_and_absolute(folder):
    assert load_function("mine.py:double", folder)(4) == 8
    assert load_function(f"{folder / 'mine.py'}:double")(4) == 8


@pytest.mark.parametrize("spec", ["mine.py", "mine:double", "mine.py:", "mine.py:a b", ":double"])
def test_spec_of_another_form(folder, spec):
    with pytest.raises(ValueError, match=r"name a function as file\.py:function"):
        load_function(spec, folder)


def test_missing_file(folder):
    with pytest.raises(ValueError, match=r"No file .*other\.py"):
        load_function("other.py:double", folder)


def test_missing_name_lists_what_is_there(folder):
    with pytest.raises(ValueError, match=r"mine\.py has no 'triple'; it has double"):
        load_function("mine.py:triple", folder)


def test_not_callable(folder):
    with pytest.raises(ValueError, match=r"mine\.py:TEN is 10, which is not callable"):
        load_function("mine.py:TEN", folder)


def test_what_the_file_raises_comes_through(folder):
    (folder / "bad.py").write_text("raise LookupError('mine')\n")
    with pytest.raises(LookupError, match="mine"):
        load_function("bad.py:anything", folder)


def test_dataclasses_with_postponed_annotations_can_be_defined(folder):
    (folder / "noted.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Pair:\n    a: int\n"
    )
    assert load_function("noted.py:Pair", folder)(3).a == 3
