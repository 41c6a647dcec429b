"""Accuracy of a model on the held-out prompts of a config, greedy and sampled.

    python python/evaluate.py model.name=runs/think/checkpoint
    python python/evaluate.py configs/smollm2.toml seed=1 prompts.held_out=400

Prints one JSON line; the numbers are those of an evaluation line of metrics.jsonl.
"""

import json
import sys
from contextlib import closing
from dataclasses import asdict

from kimi_core.cli import main, parser
from kimi_core.config import Config


def run(config: Config) -> None:
    from kimi_core.run import EVALUATION_SEED, build

    parts = build(config)
    with closing(parts.loop):
        done = parts.evaluator.evaluate(iteration=0, seed=config.seed + EVALUATION_SEED)
    print(json.dumps(asdict(done)))


if __name__ == "__main__":
    sys.exit(main(parser(__doc__).parse_args(), run))
