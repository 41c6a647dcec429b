"""Prompts and examples from CSV, Parquet and Arrow files, data sets, and columns of any name."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv, ipc, parquet

from kimi_core.config import Config, PromptsConfig
from kimi_core.prompts.columns import Columns
from kimi_core.prompts.examples import sft_examples
from kimi_core.prompts.load import load_prompts
from kimi_core.types import Prompt

GSM8K = [
    {"question": "Ann has 3 eggs and buys 4. How many?", "answer": "3+4=<<3+4=7>>7\n#### 7"},
    {"question": "Bo runs 1,000 m twice. How far?", "answer": "2*1000=2,000\n#### 2,000"},
]
ROWS = [{"prompt": "1+1=", "answer": 2, "level": 1}, {"prompt": "1+2=", "answer": 3, "level": 2}]
PROMPTS = [Prompt(0, "1+1=", "2", tags={"level": "1"}), Prompt(1, "1+2=", "3", tags={"level": "2"})]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict]) -> str:
    """The rows in the format that the name asks for."""
    table = pa.Table.from_pylist(rows)
    if name.endswith(".jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".csv"):
        csv.write_csv(table, name)
    elif name.endswith(".parquet"):
        parquet.write_table(table, name)
    else:
        new = ipc.new_file if name.startswith("file") else ipc.new_stream
        with new(name, table.schema) as writer:
            writer.write_table(table)
    return name


def load(source: str, **settings) -> list[Prompt]:
    return list(load_prompts(PromptsConfig(source=source, **settings)))


def examples(source: str, **fields: str) -> list:
    return sft_examples(Config(sft={"data": source, "fields": fields}), [])


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet", "file.arrow", "stream.arrow"])
def test_every_format_gives_the_same_prompts(name):
    assert load(write(name, ROWS)) == PROMPTS


@pytest.mark.parametrize("name", ["g.jsonl", "g.csv", "g.parquet"])
def test_gsm8k_is_read_as_it_is(name):
    write(name, GSM8K)
    assert [(one.text, one.answer) for one in load(name)] == [
        (GSM8K[0]["question"], "7"),
        (GSM8K[1]["question"], "2,000"),
    ]
    assert examples(name) == [(one["question"], one["answer"]) for one in GSM8K]


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_conversations(name):
    asked = [{"role": "user", "content": "1+1?"}]
    answered = [*asked, {"role": "assistant", "content": "It is 2."}]
    (prompt,) = load(write(name, [{"messages": asked, "answer": "2"}]))
    assert (prompt.text, prompt.messages, prompt.answer) == ("1+1?", tuple(asked), "2")
    ((messages, response),) = examples(write(name, [{"messages": answered}]))
    assert (list(messages), response) == (asked, "It is 2.")


@pytest.mark.parametrize("name", ["q.jsonl", "q.csv", "q.parquet"])
def test_fields_and_template(name):
    rows = [{"ask": "1+1", "solution": "One more is two. #### 2", "topic": "sums"}]
    write(name, rows)
    settings = {"fields": {"answer": "solution"}, "template": "{topic}: {ask}="}
    (prompt,) = load(name, **settings)
    assert (prompt.text, prompt.answer, prompt.tags["topic"]) == ("sums: 1+1=", "2", "sums")
    assert examples(name, prompt="ask", response="solution") == [("1+1", rows[0]["solution"])]


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    write("p.csv", ROWS)
    with pytest.raises(
        ValueError, match=r"p.csv, row 1: no column 'quest'; it has prompt, answer, level; mend"
    ):
        load("p.csv", fields={"prompt": "quest"})
    with pytest.raises(ValueError, match="no column 'x', which the template names"):
        load("p.csv", template="{x}")
    with pytest.raises(ValueError, match=r"prompts.source = 'multiply' has no columns"):
        load("multiply", template="{x}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"", "p.csv has no rows"),
        ("p.csv", b"prompt,answer\n", "p.csv has no rows"),
        ("p.csv", b"prompt,answer\n1,2,3\n", "row 2: it has another number of cells"),
        ("p.csv", b"prompt,answer\n\xff,2\n", "p.csv is not CSV in UTF-8"),
        ("p.parquet", b"not parquet", "p.parquet cannot be read"),
        ("p.arrow", b"ARROW1 no", "p.arrow cannot be read"),
        ("p.arrow", b"nor this one", "p.arrow cannot be read"),
        ("p.jsonl", b'{"prompt": "a", "answer": true}', '"answer" is true; allowed is'),
    ],
)
def test_a_damaged_file_is_named(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(name)


def test_a_file_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"No file .*p.parquet"):
        load("p.parquet")


def test_a_folder_of_datasets():
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(ROWS)
    part.save_to_disk("one")
    assert load("one") == PROMPTS
    datasets.DatasetDict({"train": part, "test": part.select([0])}).save_to_disk("two")
    assert load("two") == PROMPTS and load("two", split="test") == PROMPTS[:1]
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, test"):
        load("two", split="dev")


def test_without_its_package_a_source_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs datasets .*pip install 'kimi-core\[data\]'"):
        load("hub:openai/gsm8k:main")


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=4), st.text())
def test_no_text_in_a_template_or_a_column_runs(record, template):
    try:
        found = Columns(template=template).prompt(record)
    except ValueError:
        return
    assert not template or isinstance(found["prompt"], str)
