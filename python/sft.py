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

    from kimi_core.run.build import build
    from kimi_core.run.folder import RunFolder
    from kimi_core.run.report import Report
    from kimi_core.run.run import evaluate, fine_tune

    console = Console()
    with (
        closing(build(config)) as parts,
        RunFolder.create(Path(config.runs) / config.name, config) as folder,
    ):
        with Report(folder.path, total_iterations=0, console=console) as report:
            fine_tune(parts, config, console)
            parts.loop.start()
            evaluate(parts, config, report)
        print(f"checkpoint: {folder.save_checkpoint(parts.model, parts.tokenizer)}")


if __name__ == "__main__":
    sys.exit(main(parser(__doc__).parse_args(), run))
