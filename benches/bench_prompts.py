"""The start of a run with a million prompts, and what an iteration spends on their number.

A child process makes the start, up to the first rollout, from a JSONL file of made prompts, with a
byte-level tokenizer and a tiny model: reading, split, overlaps, parts, buffer and first state. The
CPU seconds leave out the imports, which are the same for any prompts; the memory is all of the
process's. An iteration's share is the draw of 256 prompts, the record of 2,048 responses, and the
curriculum and checksums in the state, when as many prompts as 1,000 iterations draw have been
tried. Tokenizing the drawn prompts is no part of it: it does not depend on how many there are.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kimi_core.run import state
from kimi_core.run.build import Parts, build
from kimi_core.run.config_file import load_config
from kimi_core.run.fine_tuning import say_overlaps

PROMPTS = 1_000_000
DRAWN, SAMPLES, ITERATIONS = 256, 8, 1000
CPU_S, GB, SHARE_S = 10.0, 1.0, 0.05
"""The bars: CPU seconds and memory of the start, CPU seconds of an iteration's share."""

NAMES = ["Anna", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Gita", "Hugo", "Ines", "Kofi", "Nils"]
THINGS = ["apples", "pears", "books", "coins", "stamps", "marbles", "tickets", "pencils", "cards"]


def test_a_million_prompts(benchmark, ratios, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl")
    write_model(tmp_path / "model")
    command = [sys.executable, __file__, str(tmp_path)]
    run = benchmark.pedantic(
        lambda: subprocess.run(command, check=True, capture_output=True, text=True), rounds=1
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["prompts"] == PROMPTS
    parts = ", ".join(f"{name} {s:.1f}" for name, s in found["parts"].items())
    cpu_s, gb, share_s = sum(found["parts"].values()), found["gb"], found["share_s"]
    ratios.record(
        "start with a million prompts",
        f"{CPU_S:.0f} CPU-s",
        CPU_S / cpu_s,
        minimum=1,
        detail=f"{cpu_s:.1f} CPU-s: {parts}; imports {found['imports_s']:.1f} more",
    )
    ratios.record("its memory", f"{GB:.0f} GB", GB / gb, minimum=1, detail=f"{gb:.2f} GB")
    ratios.record(
        "an iteration's share",
        f"{1000 * SHARE_S:.0f} ms",
        SHARE_S / share_s,
        minimum=1,
        detail=f"{1000 * share_s:.1f} CPU ms",
    )


def write_prompts(path: Path) -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(PROMPTS):
            a, b, c = rng.randrange(2, 999), rng.randrange(2, 99), rng.randrange(2, 99)
            text = (
                f"{rng.choice(NAMES)} has {a} {rng.choice(THINGS)}, buys {b} boxes of {c} each and "
                f"gives {c} of them to {rng.choice(NAMES)}. How many are left at the end?"
            )
            difficulty = round(rng.random(), 3)
            line = {"prompt": text, "answer": f"{a + b * c - c}", "difficulty": difficulty}
            file.write(json.dumps(line | {"source": "made"}) + "\n")


def write_model(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 1024, "eos_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape, **heads)).save_pretrained(folder)


def start(folder: Path) -> None:
    """What the child process does; prints what it took as JSON."""
    imports_s = time.process_time()
    torch.set_num_threads(1)
    settings = [
        f"model.name={folder}/model",
        f"prompts.source={folder}/prompts.jsonl",
        f"rollout.prompts_per_iteration={DRAWN}",
        f"rollout.samples_per_prompt={SAMPLES}",
        "rollout.max_response_tokens=512",
        "reward.function=match",
        "sft.data=none",
        "model.device=cpu",
    ]
    config = load_config(None, settings)
    took = {}
    began = time.process_time()
    parts = build(config)
    took["build"] = time.process_time() - began
    began = time.process_time()
    say_overlaps(parts, Console(stderr=True))
    took["overlaps"] = time.process_time() - began
    began = time.process_time()
    with tempfile.TemporaryDirectory() as run:
        parts.loop.buffer = state.start(Path(run) / "buffer.bin", parts.new_buffer)
        parts.loop.start()
        np.save(Path(run) / state.PROMPTS, state.prompts_of(parts.loop))
        took["state"] = time.process_time() - began
        gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        share_s = share(parts, Path(run))
    count = len(parts.train_prompts) + len(parts.evaluator.prompts)
    found = {"prompts": count, "imports_s": imports_s, "parts": took, "gb": gb, "share_s": share_s}
    print(json.dumps(found))


def share(parts: Parts, folder: Path) -> float:
    """CPU seconds that an iteration spends on the prompts; the median of nine."""
    loop = parts.loop
    ids = parts.train_prompts.facts.ids  # type: ignore[attr-defined]
    for row in range(DRAWN * ITERATIONS):
        loop.curriculum.record(ids[row], 0.5)
    seconds = []
    for iteration in range(9):
        began = time.process_time()
        rng = np.random.default_rng(iteration)
        drawn = loop.curriculum.draw(DRAWN, iteration=iteration, rng=rng)
        for prompt in drawn * SAMPLES:
            loop.curriculum.record(prompt.id, 1.0)
        np.save(folder / state.PROMPTS, state.prompts_of(loop))
        np.savez(folder / state.CURRICULUM, **loop.curriculum.state())
        seconds.append(time.process_time() - began)
    return float(np.median(seconds))


if __name__ == "__main__":
    start(Path(sys.argv[1]))
