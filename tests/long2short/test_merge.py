"""Merged models against plain averages of whole models, and what cannot be merged."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kimi_core.long2short.merge import merge

VOCAB = 24


def save(folder, seed, *, dtype=torch.float32, shard="50GB", vocab=VOCAB, **settings):
    config = hf.LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "tie_word_embeddings": True,
            **settings,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    words = Tokenizer(WordLevel({str(number): number for number in range(vocab)}, unk_token="0"))
    hf.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return model


def averaged(models, shares):
    """The slow twin: every tensor of every model at once, in float64."""
    parts = [model.state_dict() for model in models]
    return {
        name: sum(share * part[name].double() for share, part in zip(shares, parts, strict=True))
        for name in parts[0]
    }


def assert_loads_as(folder, expected, dtype=torch.float32):
    loaded, report = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, value in loaded.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, expected[name].to(dtype)), name
    assert len(hf.AutoTokenizer.from_pretrained(folder)) == VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [("50GB", "50GB"), ("8KB", "8KB"), ("8KB", "50GB")])
def test_the_average_of_two(tmp_path, dtype, tied, shards):
    kinds = {"dtype": dtype, "tie_word_embeddings": tied}
    models = [
        save(tmp_path / str(seed), seed, shard=shard, **kinds) for seed, shard in enumerate(shards)
    ]
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert_loads_as(tmp_path / "out", averaged(models, [0.5, 0.5]), dtype)
    files = sorted(path.name for path in (tmp_path / "out").glob("model*"))
    assert files == sorted(path.name for path in (tmp_path / "0").glob("model*"))
    assert (len(files) > 3) == (shards[0] == "8KB")


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=4))
def test_any_number_and_any_weights(tmp_path_factory, weights):
    work = tmp_path_factory.mktemp("models")
    folders = [work / str(seed) for seed in range(len(weights))]
    models = [save(folder, seed) for seed, folder in enumerate(folders)]
    merge(folders, work / "out", weights)
    shares = [weight / sum(weights) for weight in weights]
    assert_loads_as(work / "out", averaged(models, shares))


MEASURED = """
import sys, threading
from pathlib import Path
from kimi_core.long2short.merge import merge

def own_kb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])

small, *models, out = map(Path, sys.argv[1:])
merge([small, small], out / "small")  # Loads what is loaded once.
before, most, ended = own_kb(), 0, threading.Event()

def watch():
    global most
    while not ended.wait(0.001):
        most = max(most, own_kb())

watcher = threading.Thread(target=watch)
watcher.start()
merge(models, out / "large")
ended.set()
watcher.join()
print(most - before)
"""


@pytest.mark.nightly
def test_no_whole_model_is_in_memory(tmp_path):
    """Pages of a mapped file belong to the system, which takes them back when it needs them."""
    save(tmp_path / "small", 0)
    folders = [tmp_path / "a", tmp_path / "b"]
    save(folders[0], 0, hidden_size=256, intermediate_size=512, num_hidden_layers=25)
    shutil.copytree(folders[0], folders[1])
    size = (folders[0] / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURED, tmp_path / "small", *folders, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert size > 60e6
    assert 1024 * int(done.stdout) < 0.3 * size


def test_unlike_models_are_named_and_nothing_is_written(tmp_path):
    save(tmp_path / "a", 0)
    save(tmp_path / "deep", 0, num_hidden_layers=3)
    save(tmp_path / "half", 0, dtype=torch.bfloat16)
    save(tmp_path / "words", 0, vocab=VOCAB - 1)
    save(tmp_path / "missing", 0)
    path = tmp_path / "missing" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, path)
    save(tmp_path / "wide", 0)
    path = tmp_path / "wide" / "model.safetensors"
    save_file({k: torch.cat([v, v]) for k, v in tensors.items()}, path)
    said = {
        "deep": "num_hidden_layers is 2 and 3; only models of one architecture",
        "half": r"of F32 and \[.*\] of BF16; save both",
        "words": "token '23' is number 23 and None",
        "missing": r"layers\.1.* is in one of them only",
        "wide": r"is \[24, 32\] of F32 and \[48, 32\] of F32",
    }
    for name, message in said.items():
        with pytest.raises(ValueError, match=message):
            merge([tmp_path / "a", tmp_path / name], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_lost_shard_and_lost_folders_are_named(tmp_path):
    save(tmp_path / "a", 0)
    save(tmp_path / "b", 0, shard="8KB")
    lost = sorted((tmp_path / "b").glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name}, which is not there"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    index = tmp_path / "b" / "model.safetensors.index.json"
    for damaged in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=f"{index.name} is damaged .*copy it again"):
            merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(ValueError, match="No model folder"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -0.5], [1.0, float("nan")]])
def test_weights_that_are_none(tmp_path, weights):
    with pytest.raises(ValueError, match="give one above 0 for each"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights)


def test_one_model_is_not_merged(tmp_path):
    with pytest.raises(ValueError, match="at least two models, and got 1"):
        merge([tmp_path / "a"], tmp_path / "out")


def test_whole_numbers_must_agree(tmp_path):
    for name, number in (("a", 1), ("same", 1), ("other", 2)):
        save(tmp_path / name, 0)
        path = tmp_path / name / "model.safetensors"
        save_file({**load_file(path), "steps": torch.tensor([number])}, path, {"format": "pt"})
    merge([tmp_path / "a", tmp_path / "same"], tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["steps"].tolist() == [1]
    with pytest.raises(ValueError, match=r"steps holds torch\.int64, which has no average"):
        merge([tmp_path / "a", tmp_path / "other"], tmp_path / "second")


def test_settings_of_saving_may_differ(tmp_path):
    models = [save(tmp_path / name, seed) for seed, name in enumerate("ab")]
    path = tmp_path / "b" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "0"}))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert_loads_as(tmp_path / "out", averaged(models, [0.5, 0.5]))
