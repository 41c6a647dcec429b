"""What a run learns from, and the tokenizer that a scratch model gets from it."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from kimi_core import cli
from kimi_core.config import Config
from kimi_core.prompts.load import load_prompts
from kimi_core.run.data import load_data, scratch_tokenizer
from kimi_core.run.given import Given
from kimi_core.tasks import multiply
from kimi_core.types import Prompt

WORDS = [Prompt(row, word, word[::-1]) for row, word in enumerate(["ab", "bc", "cd", "dé"])]


def config(**settings) -> Config:
    settings.setdefault("prompts", {"held_out": 1})
    return Config(**settings)


def tokenizer_for(settings: Config, given: Given, saved: Path | None = None):
    return scratch_tokenizer(settings, load_data(settings, given), saved)


def characters(tokenizer) -> str:
    return "".join(sorted(tokenizer.get_vocab().keys() - {"<pad>", "<eos>"}))


def words(**given) -> Given:
    return Given(prompts=WORDS, **given)


def test_prompts_answers_and_examples_make_the_alphabet():
    settings = words(examples=[("ab", "x→y")]).named_in(config())
    assert characters(tokenizer_for(settings, words(examples=[("ab", "x→y")]))) == "abcdxyé→"
    off = settings.model_copy(update={"sft": settings.sft.model_copy(update={"steps": 0})})
    assert characters(tokenizer_for(off, words(examples=[("ab", "x→y")]))) == "abcdé"


def test_a_built_in_task_keeps_its_own_notation_whatever_the_examples_are():
    plain = config(prompts={"held_out": 600})
    mixed = config(prompts={"held_out": 600}, sft={"data": "multiply"})
    alphabet = "".join(sorted(multiply.ALPHABET))
    assert characters(tokenizer_for(plain, Given())) == alphabet
    assert characters(tokenizer_for(mixed, Given())) == alphabet


def test_conversations_get_a_chat_template():
    settings = config(prompts={"held_out": 1, "chat": True, "system": "Be brief."})
    tokenizer = tokenizer_for(words().named_in(settings), words())
    data = load_data(words().named_in(settings), words())
    text = tokenizer.apply_chat_template(
        [dict(one) for one in data.prompts[0].messages], tokenize=False, add_generation_prompt=True
    )
    assert text == "system: Be brief.\nuser: ab\nassistant: "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_trained_vocabulary_takes_any_later_text():
    settings = config(model={"scratch": {"vocabulary": 300}})
    tokenizer = tokenizer_for(words().named_in(settings), words())
    assert tokenizer.decode(tokenizer.encode("漢字 <eos>")) == "漢字 <eos>"


def test_a_run_that_goes_on_keeps_its_tokenizer_and_names_new_characters(tmp_path):
    saved = tmp_path / "tokenizer.json"
    settings = words().named_in(config())
    first = tokenizer_for(settings, words())
    saved.write_text(first.backend_tokenizer.to_str())
    fewer = Given(prompts=WORDS[:3])
    assert tokenizer_for(settings, fewer, saved).get_vocab() == first.get_vocab()
    other = Given(prompts=[*WORDS, Prompt(9, "zü", "ü")])
    with pytest.raises(ValueError, match=r"have 'z', 'ü', which this run's model does not know"):
        tokenizer_for(settings, other, saved)


def test_what_a_program_gave_must_be_given_again():
    settings = words().named_in(config())
    assert settings.prompts.source == "given"
    with pytest.raises(ValueError, match=r"prompts.source = 'given': .* with prompts=\.\.\."):
        load_data(settings)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[]", "examples.py:make: found \\[\\]; expected a non-empty list"),
        ("[('a', '')]", r"at index 0: found \('a', ''\); expected \(prompt, response\)"),
        ("1 / 0", "examples.py:make raised ZeroDivisionError"),
    ],
)
def test_a_function_for_sft_must_return_pairs(tmp_path, monkeypatch, returned, message):
    monkeypatch.chdir(tmp_path)
    Path("examples.py").write_text(f"def make(prompts):\n    return {returned}\n")
    with pytest.raises(ValueError, match=message):
        load_data(config(sft={"data": "examples.py:make"}))


def test_a_function_for_sft_gets_the_training_prompts_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(
        "".join(json.dumps({"prompt": word, "answer": word}) + "\n" for word in "abcd")
    )
    Path("examples.py").write_text("def make(ps):\n    return [(p.text, '!') for p in ps]\n")
    settings = config(
        prompts={"source": "p.jsonl", "held_out": 1}, sft={"data": "examples.py:make"}
    )
    data = load_data(settings)
    assert [text for text, _ in data.examples] == [prompt.text for prompt in data.train]
    assert len(data.train) == 3 and len(load_prompts(settings.prompts)) == 4


TINY = """
iterations = 1
model = { device = "cpu", scratch = { layers = 1, width = 16, heads = 2, context = 256 } }
prompts.held_out = 2
sft.steps = 2
rollout = { prompts_per_iteration = 2, samples_per_prompt = 2, max_response_tokens = 8 }
"""


def runs(source: str, *settings: str) -> bool:
    """Whether `kimi train` goes through with this file as prompts and as SFT examples."""
    Path("tiny.toml").write_text(TINY)
    words = [f"prompts.source={source}", f"sft.data={source}", f"name={Path(source).stem}"]
    return cli.main(["train", "tiny.toml", *words, *settings]) == 0


@pytest.mark.slow
def test_a_file_like_gsm8k_trains_without_a_line_of_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [
        {"question": f"Ann has {n} eggs and buys 2. How many?", "answer": f"{n}+2.\n#### {n + 2}"}
        for n in range(8)
    ]
    Path("g.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runs("g.jsonl")
    assert "6 prompts to train on, 2 held out, 8 SFT examples" in capsys.readouterr().out
    assert runs("g.jsonl", "name=bpe", "model.scratch.vocabulary=300")


@pytest.mark.slow
def test_a_parquet_of_messages_trains_without_a_line_of_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"{n}+2?"}], "answer": n + 2, "response": str(n)}
        for n in range(8)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), "m.parquet")
    assert runs("m.parquet", "resume=exact")
    assert "8 SFT examples" in capsys.readouterr().out
    assert cli.main(["replay", "runs/m", "--iteration", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal"
