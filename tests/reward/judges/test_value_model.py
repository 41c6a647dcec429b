"""The scalar reward model, its calibration, and the labelled set it is compared on."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import CHATML, tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM

from kimi_core.cli.data import reward_parser
from kimi_core.config import ModelConfig
from kimi_core.models.codec import Codec
from kimi_core.models.scratch import scratch_model
from kimi_core.prompts.load import split
from kimi_core.reward.judges import compare
from kimi_core.reward.judges.labelled import (
    ALPHABET,
    TEMPLATE,
    VERDICT,
    Labelled,
    load_labelled,
    split_labelled,
    sums,
)
from kimi_core.reward.judges.value_model import (
    HEAD_FILE,
    ValueModel,
    brier,
    expected_calibration_error,
    load_value_model,
    train_value,
)
from kimi_core.tasks import multiply

TINY = ModelConfig(scratch={"layers": 1, "width": 16, "heads": 2, "context": 32}, device="cpu")


def tiny():
    model, tokenizer = scratch_model(TINY, "ab", seed=0)
    return ValueModel(model), tokenizer


def texts_and_labels(count: int) -> tuple[list[np.ndarray], list[bool]]:
    """Right where the last character is a `b` (token 3)."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 4, rng.integers(1, 9)).astype(np.int32) for _ in range(count)]
    return texts, [bool(ids[-1] == 3) for ids in texts]


def test_it_begins_undecided():
    value_model, _ = tiny()
    assert value_model.probabilities(texts_and_labels(3)[0]).tolist() == [0.5] * 3
    assert value_model.probabilities([]).tolist() == []


def test_padding_changes_nothing():
    value_model, _ = tiny()
    torch.nn.init.normal_(value_model.head.weight)
    texts, _ = texts_and_labels(9)
    together = value_model.probabilities(texts)
    alone = np.concatenate([value_model.probabilities([ids]) for ids in texts])
    by_four = value_model.probabilities(texts, batch_size=4)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(together, by_four, atol=1e-6)
    assert len(set(np.round(together, 4))) > 1


def test_it_learns_saves_and_loads(tmp_path):
    value_model, tokenizer = tiny()
    texts, labels = texts_and_labels(64)
    losses = []
    train_value(
        value_model, texts, labels, steps=60, batch_size=16, learning_rate=1e-2, seed=0,
        report=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    probabilities = value_model.probabilities(texts)
    assert ((probabilities > 0.5) == np.array(labels)).all()
    value_model.save(tmp_path, tokenizer)
    loaded, _ = load_value_model(tmp_path, device="cpu")
    np.testing.assert_allclose(loaded.probabilities(texts), probabilities, atol=1e-6)
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(ValueError, match=HEAD_FILE):
        load_value_model(tmp_path, device="cpu")


def test_the_same_seed_trains_the_same_model():
    texts, labels = texts_and_labels(32)
    found = []
    for seed in (0, 0, 1):
        value_model, _ = tiny()
        train_value(
            value_model, texts, labels, steps=5, batch_size=8, learning_rate=1e-2, seed=seed
        )
        found.append(value_model.probabilities(texts).tolist())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("texts", "labels"), [([], []), ([np.array([2])], [])])
def test_examples_and_labels_must_match(texts, labels):
    with pytest.raises(ValueError, match="labels; give one label"):
        train_value(tiny()[0], texts, labels, steps=1, batch_size=1, learning_rate=1e-3, seed=0)


def test_a_loss_that_is_not_finite_stops_the_training():
    value_model, _ = tiny()
    torch.nn.init.constant_(value_model.head.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="Step 1"):
        train_value(
            value_model, *texts_and_labels(8), steps=2, batch_size=4, learning_rate=1e-3, seed=0
        )


def test_calibration_of_a_worked_example():
    probabilities = np.array([0.9, 0.9, 0.9, 0.9, 0.3, 0.3])
    labels = np.array([1, 1, 1, 0, 0, 1])
    # Confidence 0.9 at accuracy 3/4, and 0.7 at accuracy 1/2.
    assert expected_calibration_error(probabilities, labels) == pytest.approx(
        (4 * 0.15 + 2 * 0.2) / 6
    )
    assert brier(probabilities, labels) == pytest.approx((3 * 0.01 + 0.81 + 0.09 + 0.49) / 6)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_calibration_is_bounded_and_does_not_depend_on_which_label_is_one(drawn):
    probabilities = np.array([p for p, _ in drawn])
    labels = np.array([label for _, label in drawn], float)
    for measure in (brier, expected_calibration_error):
        assert 0 <= measure(probabilities, labels) <= 1
    assert brier(1 - probabilities, 1 - labels) == pytest.approx(brier(probabilities, labels))
    assert brier(labels, labels) == expected_calibration_error(labels, labels) == 0


def test_sums_are_labelled_with_the_truth():
    prompts = multiply.prompts()
    for example in sums(prompts, seed=3):
        total = sum(map(int, example.response.split("+")))
        assert (total == int(example.reference)) is example.correct
        assert ("#" in example.reasoning) is not example.correct
        assert set(example.prompt() + example.reasoning + VERDICT[example.correct]) <= set(ALPHABET)


def test_the_reasoning_adds_up():
    """Each column's claim, checked by arithmetic of another kind."""
    for example in sums(multiply.prompts()[:500], seed=4):
        digits, carries = "", [0]
        for step in example.reasoning.rstrip(";").split(";"):
            added, _, rest = step.partition("=")
            digit, carry, beside = rest[0], rest[2], rest[4:]
            assert sum(map(int, added.split("+"))) == int(digit) + 10 * int(carry)
            if len(carries) > 1:
                assert int(added.split("+")[-1]) == carries[-1]
            carries.append(int(carry))
            assert beside[0] == digit
            assert (beside[1] == "=") == (beside[2] == digit)
            digits = digit + digits
        assert int(digits) == sum(map(int, example.response.split("+"))) % 10_000


def test_sums_are_balanced_and_follow_their_seed():
    prompts = multiply.prompts()[:101]
    one, again, other = sums(prompts, seed=0), sums(prompts, seed=0), sums(prompts, seed=1)
    assert one == again != other
    assert sum(example.correct for example in one) == 51
    assert sorted(example.question for example in one) == sorted(p.text for p in prompts)


def test_train_and_test_share_no_problem():
    train, test = split(multiply.prompts(), 600, 0)
    questions = [{example.question for example in sums(part, seed=0)} for part in (train, test)]
    assert not questions[0] & questions[1]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), st.integers(1, 10))
def test_a_split_keeps_a_question_on_one_side(questions, held_out):
    examples = [Labelled(q, "1", str(n), n % 2 == 0) for n, q in enumerate(questions)]
    try:
        train, test = split_labelled(examples, held_out, seed=0)
    except ValueError:
        assert held_out > 1 or len(set(questions)) == 1
        return
    assert len(test) >= held_out
    assert not {e.question for e in train} & {e.question for e in test}
    assert sorted(e.response for e in train + test) == sorted(e.response for e in examples)


def test_labelled_files(tmp_path):
    path = tmp_path / "labelled.jsonl"
    good = {"question": "1+1", "reference": "2", "response": "two", "correct": True}
    path.write_text(json.dumps(good) + "\n")
    assert load_labelled(path) == [Labelled("1+1", "2", "two", True)]
    for bad in ({}, good | {"correct": 1}, good | {"mood": "fine"}, good | {"response": 2}, []):
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(ValueError, match="line 2"):
            load_labelled(path)
    with pytest.raises(ValueError, match="No file"):
        load_labelled(tmp_path / "none.jsonl")


def arguments(*given: str) -> argparse.Namespace:
    small = ["--layers", "1", "--width", "16", "--steps", "2", "--batch-size", "4"]
    return reward_parser().parse_args([*small, "--test", "8", "--examples", "16", *given])


def test_the_command_has_the_template_of_the_models():
    assert reward_parser().get_default("template") == TEMPLATE


def test_the_comparison_prints_both_side_by_side(capsys, tmp_path):
    compare.run(arguments("--save", str(tmp_path), "--seeds", "0", "1"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["kind"], line["seed"]) for line in lines] == [
        ("classic", 0), ("judge", 0), ("classic", 1), ("judge", 1),
    ]  # fmt: skip
    for line in lines:
        assert line["n"] + line.get("no_verdict", 0) == 8
        assert (line["accuracy"] is None) == (line["n"] == 0)
    value_model, tokenizer = load_value_model(tmp_path / "classic", device="cpu")
    ids = Codec(tokenizer, []).encode_prompt(multiply.prompts()[0])
    assert 0 < value_model.probabilities([ids])[0] < 1


def test_the_comparison_asks_a_chat_model_by_its_template(capsys, tmp_path):
    tokenizer = tokenizer_of("byte-level BPE, Llama 3", "bos", CHATML)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    for part in (LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    compare.run(arguments("--model", str(tmp_path / "model"), "--chat"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["classic", "judge"]


def test_the_comparison_takes_labelled_files(capsys, tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text(
        "".join(json.dumps(vars(e)) + "\n" for e in sums(multiply.prompts()[:40], seed=0))
    )
    compare.run(arguments("--data", str(path), "--kind", "classic"))
    assert json.loads(capsys.readouterr().out)["kind"] == "classic"
    with pytest.raises(ValueError, match="are left for training"):
        compare.run(arguments("--data", str(path), "--examples", "100"))
    plain = [vars(e) | {"reasoning": ""} for e in sums(multiply.prompts()[:40], seed=0)]
    path.write_text("".join(json.dumps(line) + "\n" for line in plain))
    with pytest.raises(ValueError, match="examples with reasoning"):
        compare.run(arguments("--data", str(path), "--kind", "judge"))
