"""A run of seconds, for the tests of whole runs."""

from pathlib import Path

from kimi_core.models.load import load_model
from kimi_core.run.config_file import load_config
from kimi_core.tasks import multiply

TINY = """
iterations = 2

[model.scratch]
layers = 1
width = 16
heads = 2
context = 32

[model]
device = "cpu"

[prompts]
held_out = 4

[rollout]
prompts_per_iteration = 2
samples_per_prompt = 2
max_response_tokens = 8

[evaluation]
prompts = 2
"""

SCRATCH = [
    "model.scratch.layers=2",
    "model.scratch.width=32",
    "model.scratch.heads=2",
    "model.scratch.context=96",
    "model.device=cpu",
]
"""Settings of a model from random weights, of two layers."""


def make_folder(path: Path, width: int = 16, seed: int = 0) -> Path:
    """A model folder; `tiny.toml` with `TINY` lies in the working folder."""
    given = load_config("tiny.toml", [f"model.scratch.width={width}"])
    model, tokenizer = load_model(given.model, alphabet=multiply.ALPHABET, seed=seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
