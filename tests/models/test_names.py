"""Names of tensors in files, against those that transformers writes."""

import pytest
import transformers as hf
import vision_families
import vision_testing
from safetensors.torch import load_file

from kimi_core.models.names import names_in_files


def text_model() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))


@pytest.mark.parametrize("kind", ["Llama", "scratch", "InternVL", "Qwen2.5-VL", "SmolVLM"])
def test_names_are_those_that_save_pretrained_writes(kind, tmp_path):
    if kind == "Llama":
        model = text_model()
    else:
        model = vision_testing.tiny() if kind == "scratch" else vision_families.built(kind)
        model = model[0]
    names = names_in_files(model, [name for name, _ in model.named_parameters()])
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert set(names.values()) == written.keys()
    assert all((written[names[name]] == value).all() for name, value in model.named_parameters())


def test_a_loaded_model_keeps_the_names_of_its_files_and_published_names_are_the_familys(tmp_path):
    model, _ = vision_testing.tiny()
    first = "model.vision_tower.embeddings.class_embedding"
    short, published = ("vision_tower.embeddings.class_embedding",) * 2
    published = published.replace("tower.", "tower.vision_model.")
    assert names_in_files(model, [first]) == {first: short}
    assert names_in_files(model, [first], published=True) == {first: published}
    assert names_in_files(model, [first]) == {first: short}  # Nothing of it stays.
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert names_in_files(loaded, [first]) == {first: short}
