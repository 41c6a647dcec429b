"""Whole runs of the command on conversations: template, end tokens and stop strings, by process."""

import json
from pathlib import Path

import pytest
import torch
from tokenizer_kinds import CHATML, LLAMA2_CHAT, tokenizer_of
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from warm import Warm

from kimi_core import cli
from kimi_core.run.trajectories import read_trajectories

SYSTEM = "the answer is"
TALKS = [[{"role": "user", "content": f"{a} + {b} ="}] for a in range(1, 6) for b in range(1, 6)]
TALKS[3] = [
    {"role": "user", "content": "1 + 1 ="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "3 + 4 ="},
]
REWARD = """
def reward(prompt, text):
    assert "a" not in text and "1" not in text, text
    assert prompt.messages[-1]["role"] == "user" and "system" not in prompt.text, prompt
    return float(len(text) % 2)
"""
CONFIG = """
name = "chat"
iterations = 3
[model]
name = "model"
device = "cpu"
[prompts]
source = "talks.jsonl"
held_out = 4
[sft]
data = "examples.jsonl"
steps = 4
batch_size = 4
[rollout]
prompts_per_iteration = 4
samples_per_prompt = 4
max_response_tokens = 24
token_budget = 10
stop = ["a", "1"]
[reward]
function = "reward.py:reward"
[trainer]
learning_rate = 1e-4
[evaluation]
every = 2
"""


def make_work(folder: Path, kind: str, template: str) -> None:
    """A model whose generation config ends responses with <unk> as well, and its data."""
    tokenizer = tokenizer_of(kind, "bos", template)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=[0, 2], bos_token_id=1)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"messages": talk, "answer": "5"}) for talk in TALKS]
    (folder / "talks.jsonl").write_text("\n".join(lines))
    answers = [[*talk, {"role": "assistant", "content": " 5 $"}] for talk in TALKS]
    lines = [json.dumps({"messages": talk}) for talk in answers]
    (folder / "examples.jsonl").write_text("\n".join(lines))
    (folder / "reward.py").write_text(REWARD)
    (folder / "chat.toml").write_text(CONFIG)


def kimi(folder: Path, *arguments: str) -> str:
    """What the command prints."""
    process = Warm(["-m", "kimi_core.cli", *arguments], cwd=folder)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_work(folder, "byte-level BPE, Llama 3", CHATML)
    kimi(folder, "train", "chat.toml", f"prompts.system={SYSTEM}")
    return folder


def test_the_model_reads_what_its_template_writes(work):
    tokenizer = tokenizer_of("byte-level BPE, Llama 3", "bos", CHATML)
    expected = {}
    for number, talk in enumerate(TALKS):
        messages = [{"role": "system", "content": SYSTEM}, *talk]
        expected[number] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
    files = sorted((work / "runs/chat/trajectories").glob("*.jsonl"))
    records = [record for path in files for record in read_trajectories(path)]
    assert len(files) == 3 and records
    for record in records:
        assert record.prompt_ids == expected[record.prompt_id]
        assert "im_start" not in record.prompt and SYSTEM not in record.prompt


def test_responses_end_with_every_end_token_and_stop_string(work):
    tokenizer = tokenizer_of("byte-level BPE, Llama 3", "bos", CHATML)
    ends = {0, 2, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    files = sorted((work / "runs/chat/trajectories").glob("*.jsonl"))
    reasons, versions = set(), set()
    for record in (record for path in files for record in read_trajectories(path)):
        *before, last = record.token_ids
        text = tokenizer.decode(before)
        assert not ends & set(before) and "a" not in text and "1" not in text
        assert tokenizer.decode(record.token_ids).startswith(record.response)
        assert not any(end in record.response for end in ("a", "1", "<|im_end|>", "</s>"))
        ended = last in ends or any(stop in tokenizer.decode([last]) for stop in "a1")
        assert (record.end_reason == "stop") == ended
        tokens = len(record.token_ids)
        assert len(record.engine_logprobs) == tokens == len(record.trainer_logprobs)
        assert len(record.entropies) == tokens and min(record.entropies) > 0
        reasons.add(record.end_reason)
        versions.add(len(record.versions))
    assert reasons == {"stop", "length"}
    assert versions == {1, 2, 3}  # Also responses that were cut by the token budget.


def test_the_checkpoint_has_template_and_end_tokens(work):
    checkpoint = work / "runs/chat/checkpoint"
    assert GenerationConfig.from_pretrained(checkpoint).eos_token_id == [0, 2]
    found = json.loads(kimi(work, "evaluate", "chat.toml", f"model.name={checkpoint}"))
    assert found["n"] == 4


def test_a_refused_role_and_a_missing_template_are_said_before_anything_is_trained(
    tmp_path, monkeypatch, capsys
):
    make_work(tmp_path, "SentencePiece, Llama 2", LLAMA2_CHAT)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "chat.toml", f"prompts.system={SYSTEM}"]) == 2
    said = capsys.readouterr().err
    assert "error: Prompt 0 is a conversation" in said
    assert "System role not supported" in said and "prompts.system" in said
    tokenizer_of("SentencePiece, Llama 2").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    for command in (["train"], ["sft"], ["evaluate"], ["train", "--dry-run"]):
        assert cli.main([*command, "chat.toml"]) == 2
        assert "has no chat template" in capsys.readouterr().err


def test_text_in_chat(tmp_path):
    """``prompts.chat`` turns text into user messages, in SFT and in evaluations too."""
    make_work(tmp_path, "SentencePiece, Llama 2", LLAMA2_CHAT)
    texts = [json.dumps({"prompt": f"{n} =", "answer": "5"}) for n in range(9)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    pairs = [json.dumps({"prompt": f"{n} =", "response": "5"}) for n in range(9)]
    (tmp_path / "examples.jsonl").write_text("\n".join(pairs))
    given = ["chat.toml", "prompts.source=texts.jsonl", "iterations=2", "prompts.chat=true"]
    kimi(tmp_path, "train", *given)
    (path, *_) = sorted((tmp_path / "runs/chat/trajectories").glob("*.jsonl"))
    tokenizer = tokenizer_of("SentencePiece, Llama 2", "bos", LLAMA2_CHAT)
    for record in read_trajectories(path):
        assert tokenizer.decode(record.prompt_ids) == f"<s> [INST] {record.prompt} [/INST]"
