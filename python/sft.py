"""Supervised fine-tuning alone (section 2.2): packed sequences, loss on the responses.

    python python/sft.py name=warm                             # configs/think.toml's SFT phase
    python python/sft.py my.toml model.name=smollm2-135m sft.data=chains.jsonl

Writes runs/NAME/checkpoint in Hugging Face format, which train.py takes as model.name (with
sft.data=none), and evaluates it on the held-out prompts.
"""

import sys
from contextlib import closing
from pathlib import Path

from kimi_core.cli import main, parser
from kimi_core.config import Config


def run(config: Config) -> None:
    from rich.console import Console

    from kimi_core.metrics import MetricsWriter
    from kimi_core.run.folder import RunFolder
    from kimi_core.run.run import build, evaluate, fine_tune

    console = Console()
    with (
        closing(build(config)) as parts,
        RunFolder.create(Path(config.runs) / config.name, config) as folder,
    ):
        with MetricsWriter(folder.path, total_iterations=0, console=console) as metrics:
            fine_tune(parts.model, parts.codec, config, parts.train_prompts, console)
            evaluate(parts, config, metrics)
        print(f"checkpoint: {folder.save_checkpoint(parts.model, parts.tokenizer)}")


if __name__ == "__main__":
    sys.exit(main(parser(__doc__).parse_args(), run))
