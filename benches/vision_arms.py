"""What RL on images adds to RL on text: three arms of ``configs/vision.toml`` from the same start.

    python benches/vision_arms.py runs/vision-0 sft --seed 0      # once: the weights to start from
    python benches/vision_arms.py runs/vision-0 joint --seed 0    # then each arm and seed
    python benches/vision_arms.py runs/vision-0 text --seed 0     # the control saw no image
    python benches/vision_arms.py runs/vision-0 images --seed 0

Each arm trains on its share of the training prompts, and is evaluated on all that are held out.
``results.jsonl`` in the folder gets a line per arm.
"""

import argparse
import json
import resource
from contextlib import closing
from pathlib import Path

from rich.console import Console

from kimi_core.config import Config
from kimi_core.metrics import EvaluationMetrics, to_record
from kimi_core.prompts.curriculum import Curriculum
from kimi_core.run.build import Parts, build
from kimi_core.run.config_file import load_config
from kimi_core.run.fine_tuning import fine_tune
from kimi_core.run.report import progress_line
from kimi_core.run.run import EVALUATION_SEED
from kimi_core.trainer.trainer import PARAMETERS

ARMS = {
    "joint": lambda prompt: True,
    "text": lambda prompt: not prompt.images,
    "images": lambda prompt: bool(prompt.images),
}


def evaluate(parts: Parts, config: Config) -> EvaluationMetrics:
    seed = config.seed + EVALUATION_SEED
    return parts.evaluator.evaluate(iteration=parts.loop.iteration, seed=seed)


def run(folder: Path, arm: str, config: Config) -> EvaluationMetrics:
    """SFT, or RL from its weights; returns the evaluation at the end."""
    console = Console()
    with closing(build(config)) as parts:
        loop = parts.loop
        if arm == "sft":
            fine_tune(parts, config, console)
            folder.mkdir(parents=True, exist_ok=True)
            loop.trainer.save(folder)
            loop.start()
            return evaluate(parts, config)
        loop.trainer.load(folder)
        loop.curriculum = Curriculum([*filter(ARMS[arm], parts.train_prompts)], config.curriculum)
        loop.start()
        while loop.iteration < config.iterations:
            console.print(progress_line(loop.iterate(), config.iterations, float("nan")))
        return evaluate(parts, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("arm", choices=["sft", *ARMS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", help="as for kimi train, such as iterations=2")
    given = parser.parse_intermixed_args()  # Options may stand between settings.
    if given.arm != "sft" and not (given.folder / PARAMETERS).is_file():
        parser.error(f"no weights in {given.folder}: run the arm sft there first")
    config = load_config(Path("configs/vision.toml"), [f"seed={given.seed}", *given.settings])
    found = to_record(run(given.folder, given.arm, config))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found |= {"arm": given.arm, "cpu_s": round(usage.ru_utime + usage.ru_stime)}
    with (given.folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
