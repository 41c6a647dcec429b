"""Accuracy of a model on the held-out prompts of a config, greedy and sampled, or on HumanEval.

    python python/evaluate.py model.name=runs/think/checkpoint
    python python/evaluate.py configs/smollm2.toml seed=1 prompts.held_out=400
    python python/evaluate.py --task humaneval model.name=smollm2-135m
    python python/evaluate.py --task humaneval --solutions canonical

Prints one JSON line; the numbers are those of an evaluation line of metrics.jsonl or, for
HumanEval (whose default config is configs/humaneval.toml), the counts of verdicts and pass@1.
"""

import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from kimi_core.cli import DEFAULT, main, parser
from kimi_core.config import Config

arguments = parser(__doc__)
arguments.add_argument("--task", choices=["held-out", "humaneval"], default="held-out")
arguments.add_argument(
    "--solutions",
    choices=["canonical", "empty"],
    help="score these in place of a model's (humaneval)",
)
arguments.add_argument("--limit", type=int, metavar="N", help="only the first N problems")


def evaluate_held_out(config: Config, limit: int | None) -> None:
    from kimi_core.run.build import build
    from kimi_core.run.run import EVALUATION_SEED

    seed = config.seed + EVALUATION_SEED
    with closing(build(config)) as parts:
        parts.loop.start()
        done = parts.evaluator.evaluate(iteration=0, seed=seed, limit=limit)
    print(json.dumps(asdict(done)))


if __name__ == "__main__":
    given = arguments.parse_intermixed_args()  # Options may stand between settings.

    def run(config: Config) -> None:
        if given.task == "held-out":
            evaluate_held_out(config, given.limit)
            return
        from kimi_core.evaluation.humaneval import evaluate
        from kimi_core.reward.code.reward import code_reward

        with closing(code_reward(config.reward.sandbox)) as reward:
            found = evaluate(config, reward, solutions=given.solutions, limit=given.limit)
        print(json.dumps(found))

    humaneval = Path("configs/humaneval.toml")
    sys.exit(main(given, run, default=humaneval if given.task == "humaneval" else DEFAULT))
