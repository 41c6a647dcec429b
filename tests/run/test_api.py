"""``kimi_core.train`` with lists and functions of the calling program."""

import asyncio
import subprocess
import sys

import pytest

from kimi_core import Config, Prompt, train

WORDS = [(a + b + c, c + b + a) for a in "abc" for b in "abc" for c in "abc"]


def settings(name: str, **changes) -> Config:
    return Config(
        name=name,
        model={
            "device": "cpu",
            "scratch": {"layers": 1, "width": 16, "heads": 2, "context": 32},
        },
        prompts={"held_out": 4},
        sft={"steps": 2},
        rollout={"prompts_per_iteration": 2, "samples_per_prompt": 2, "max_response_tokens": 6},
        **{"iterations": 2} | changes,
    )


def starts_right(prompt: Prompt, response: str) -> float:
    return float(response[:1] == prompt.answer[:1])


def copies(prompts: list[Prompt]) -> list[tuple[str, str]]:
    return [(prompt.text, prompt.answer) for prompt in prompts]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_lists_and_functions_make_a_run_that_goes_on_bit_for_bit(capsys, draw_curves, monkeypatch):
    monkeypatch.setattr("kimi_core.run.curves.draw_curves", draw_curves)
    given = {"prompts": WORDS, "reward": starts_right, "examples": copies}
    whole = train(settings("whole", iterations=3), **given)
    train(settings("parts"), **given)
    parts = train(settings("parts", iterations=3), **given, resume=True)
    assert [one.iteration for one in parts.iterations] == [1, 2, 3]
    assert parts.evaluations[-1].iteration == 3 and parts.evaluations[-1].n == 4
    for file in ("model.safetensors", "tokenizer.json"):
        assert (parts.checkpoint / file).read_bytes() == (whole.checkpoint / file).read_bytes()
    assert parts.curves.is_file() and parts._repr_png_()[:4] == b"\x89PNG"
    assert "accuracy_greedy" in repr(parts) and "iter 3/3" in capsys.readouterr().out
    _, tokenizer = parts.load_model()
    assert len(tokenizer) == 5
    for changed, what in (
        ({"reward": lambda prompt, response: 1.0}, "the given reward function"),
        ({"examples": WORDS[:3]}, "the given SFT examples"),
        ({"prompts": WORDS[1:]}, "The prompts have changed"),
    ):
        with pytest.raises(ValueError, match=what):
            train(settings("parts", iterations=4), **given | changed, resume=True)


def test_an_async_reward_runs_inside_the_event_loop_of_a_notebook():
    async def patient(prompt: Prompt, response: str) -> float:
        await asyncio.sleep(0)
        return float(response == prompt.answer)

    async def cell():
        return train(settings("cell", iterations=1), prompts=lambda: WORDS, reward=patient)

    assert len(asyncio.run(cell()).iterations) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": "abc"}, "prompts = 'abc'; give a list of Prompt or"),
        ({"prompts": [("a", "b"), 7]}, "found 7 at index 1; expected a Prompt"),
        ({"prompts": []}, r"prompts: found \[\]"),
        ({"reward": "match"}, "reward = 'match'; give a function"),
        ({"examples": [("a",)]}, r"examples, at index 0: found \('a',\)"),
        ({"config": {"name": "x"}}, "give a kimi_core.Config"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_made(tmp_path, given, message):
    given = {"config": settings("bad"), "prompts": WORDS, "reward": starts_right} | given
    with pytest.raises(ValueError, match=message):
        train(**given)
    assert not (tmp_path / "runs").exists()


def test_the_package_loads_no_torch_until_it_is_needed():
    code = "import sys; from kimi_core import Config, Prompt; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
