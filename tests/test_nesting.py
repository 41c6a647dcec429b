"""A file whose brackets nest too deeply for the parser gets an error that names it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_core.evaluation.benchmarks import load_benchmark
from kimi_core.evaluation.record import Record
from kimi_core.metrics import read_metrics
from kimi_core.prompts.jsonl import load_examples, read_prompts
from kimi_core.reward.code.problem import problem_of
from kimi_core.reward.code.testgen import read_sources
from kimi_core.reward.judges.labelled import load_labelled
from kimi_core.run.config_file import load_config
from kimi_core.types import Prompt

DEEP = "[" * 100_000 + "]" * 100_000

READERS: dict[str, Callable[[Path], object]] = {
    "prompts": lambda path: list(read_prompts(path)),
    "examples": load_examples,
    "metrics": read_metrics,
    "answers": Record,
    "sources": lambda path: list(read_sources(path)),
    "labelled": load_labelled,
    "benchmark": lambda path: load_benchmark("gsm8k", [path]),
}


@pytest.mark.parametrize("content", [DEEP, DEEP[:100_000], f'{{"prompt": {DEEP}}}'])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_json(tmp_path, read, content):
    path = tmp_path / "deep.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(ValueError, match=r"deep\.jsonl"):
        read(path)


@pytest.mark.parametrize("content", [f"seed = {DEEP}", "a = " + "{a=" * 5000, "[" + "a." * 5000])
def test_toml(tmp_path, content):
    path = tmp_path / "deep.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"deep\.toml"):
        load_config(path)


@pytest.mark.parametrize("setting", [f"seed={DEEP}", "a." * 5000 + "b=1", "seed=" + "{a=" * 5000])
def test_a_setting(setting):
    with pytest.raises(ValueError, match=r"^(seed|Unknown key)") as found:
        load_config(None, [setting])
    assert len(str(found.value)) < 1000


def test_tests_of_a_prompt():
    with pytest.raises(ValueError, match='Prompt 3: "tests" is not JSON'):
        problem_of(Prompt(3, "Add.", "", tags={"tests": DEEP}))
