"""Training data that contains held-out prompts is counted, and said at the start of a run."""

import json
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kimi_core.prompts.load import split
from kimi_core.prompts.overlap import overlaps
from kimi_core.prompts.telling import TellingAnswers, words_of
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.tasks import multiply
from kimi_core.types import Prompt


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(number, text, "12") for number, text in enumerate(texts)]


def test_no_overlap_says_nothing():
    assert overlaps(prompts("3*4="), prompts("4*3="), [("5*3=", "15")]) == []


def test_prompts_that_differ_in_case_or_space_are_the_same():
    train, held_out = prompts("Three  times\nfour?", "x"), prompts("three times four?", "y")
    assert overlaps(train, held_out, []) == ["1 of 2 held-out prompts are also training prompts"]


def test_examples_with_held_out_prompts_and_answers_are_counted():
    asked = ({"role": "system", "content": "Hi"}, {"role": "user", "content": "3*4="})
    examples = [("3*4=", "it is 12"), ("3*4=", "it is 122"), (asked, "12"), ("5*4=", "20")]
    twins = [*prompts("3*4="), Prompt(1, "3*4=", "another answer")]
    assert overlaps([], twins, examples) == [
        "3 SFT examples have a held-out prompt, 2 of them with its answer"
    ]


LONG = "A train leaves the station at nine and arrives at noon: how long does it take?"


def test_punctuation_around_words_makes_no_difference():
    train, held_out = prompts("“What is 3+4?”"), prompts("what is 3+4")
    assert overlaps(train, held_out, []) == ["1 of 1 held-out prompts are also training prompts"]
    assert overlaps(prompts("what is 3-4"), held_out, []) == []


def test_long_prompts_are_found_inside_longer_texts():
    quoted = f"Example. {LONG.upper()} Three hours. Now you."
    assert overlaps(prompts(quoted), prompts(LONG), []) == [
        "1 training prompts contain a held-out prompt"
    ]
    examples = [("Solve.", f"{LONG} It takes 12."), (quoted, "?"), (LONG[:-20], "12")]
    assert overlaps([], prompts(LONG), examples) == [
        "2 SFT examples have a held-out prompt, 1 of them with its answer"
    ]


def test_short_prompts_stand_in_other_texts_by_chance():
    assert overlaps([], prompts("three times four"), [("three times four is", "12")]) == []


ELSEWHERE = (
    "{} SFT examples have the answer to a held-out prompt under another prompt, "
    "to {} held-out prompts"
)


def held(*answers: str) -> list[Prompt]:
    return [Prompt(number, f"question {number}?", text) for number, text in enumerate(answers)]


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("The Treaty of Kiel was signed", "so: the treaty of **Kiel** was signed."),
        ("1234567890123", "hence $n = 1,234,567,890,123$."),
        ("1,234,567,890,123", "\\boxed{1234567890123}"),
        (r"\frac{1234567}{7654321}", r"it is \dfrac{1234567}{7654321}"),
        ("def shift(x):\n    return x + offset", "```\ndef shift(x): return x + offset\n```"),
        ("Ｔｈｅ Treaty of Kiel was signed", "The treaty of Kiel was signed"),
        ("北京是中国的首都", "答:北京是中国的首都。"),
    ],
)
def test_a_telling_answer_is_found_under_another_prompt(answer, response):
    answers = held(answer, "another answer to another question")
    assert overlaps([], answers, [("other", response), ("more", "?")]) == [ELSEWHERE.format(1, 1)]
    assert overlaps([], answers, [(response, "?")]) == [ELSEWHERE.format(1, 1)]


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("12", "it is 12"),
        ("1000000000000", "it is 1000000000000"),
        ("0.333333333333", "it is 0.333333333333"),
        (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{2}"),
        ("photosynthesis", "by photosynthesis"),
        ("True", "True"),
        ("", ""),
        ("1234567890123", "12345678901234"),
        ("The Treaty of Kiel was signed", "The Treaty of Kiel was never signed"),
    ],
)
def test_a_trivial_answer_is_not_looked_for(answer, response):
    assert overlaps([], held(answer), [("other", response)]) == []


def test_an_answer_under_its_own_prompt_counts_there():
    telling = "The Treaty of Kiel was signed"
    assert overlaps([], held(telling), [("Question 0", telling)]) == [
        "1 SFT examples have a held-out prompt, 1 of them with its answer"
    ]
    twins = held(telling, telling)
    assert overlaps([], twins, [("Question 0", telling)])[1:] == [ELSEWHERE.format(1, 2)]


def test_an_answer_that_stands_everywhere_tells_nothing():
    answers = held("There is not enough information", "The Treaty of Kiel was signed")
    examples = [(f"other {n}", "There is not enough information.") for n in range(30)]
    said = overlaps([], answers, [*examples, ("more", answers[1].answer)])
    assert said[0] == ELSEWHERE.format(1, 1)
    assert said[1].startswith("1 held-out answers stand in more than 10 SFT examples of other")


@given(st.lists(st.text("ab1 ,.", max_size=30)), st.lists(st.text("ab1 ,.", max_size=60)))
def test_answers_are_those_of_a_plain_search(answers, texts):
    """Every telling answer is found where its words stand in a row, and nowhere else."""
    prompts = {str(number): [answer] for number, answer in enumerate(answers)}
    found = TellingAnswers(prompts)
    for text in texts[:10]:
        found.look(text, [])
    plain = {
        number
        for number, text in enumerate(texts[:10])
        for answer in found.prompts
        if f" {' '.join(answer)} " in f" {' '.join(words_of(text))} "
    }
    assert found.found()[0] == plain


def test_a_run_says_it_before_anything_is_trained(tmp_path):
    _, held_out = split(multiply.prompts(), 6, 0)
    pairs = tmp_path / "sft.jsonl"
    lines = [json.dumps({"prompt": one.text, "response": one.answer}) + "\n" for one in held_out]
    pairs.write_text("".join(lines))
    printed = StringIO()
    overrides = [
        "model.scratch.layers=1", "model.scratch.width=16", "model.scratch.heads=2",
        "model.scratch.context=64", "model.device=cpu", "prompts.held_out=6", "iterations=1",
        "rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=2", "sft.steps=1",
        "rollout.max_response_tokens=8", f"runs={tmp_path}", f"sft.data={pairs}",
    ]  # fmt: skip
    train(load_config(None, overrides), console=Console(file=printed, width=200))
    said = printed.getvalue()
    assert f"{len(held_out)} SFT examples have a held-out prompt, {len(held_out)} of them" in said
    assert said.index("held-out prompt") < said.index("sft 1/1")
    again = StringIO()
    train(load_config(None, overrides), resume=True, console=Console(file=again, width=200))
    assert "SFT examples have a held-out prompt" in again.getvalue()
