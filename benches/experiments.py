"""The report's figures, repeated in small, and the tables of docs/log.md.

    python benches/experiments.py fig7                # a figure: 5 seeds, table and plot
    python benches/experiments.py fig7 --seeds 0 1    # fewer
    python benches/experiments.py objectives          # a table of the log, 3 seeds

    fig3b     token budgets: tokens and seconds of an iteration
    fig5      accuracy and length over RL; fig5-smollm2: on a second task, with SmolLM2
    fig7      long2short by four methods
    fig9      uniform prompts, then hard ones, against uniform ones throughout
    fig10     mirror descent against ReST, which only fits right answers
    length    the length reward from the start, after a warm-up, and not at all

    think, smollm2         the runs of the README
    objectives, partial    mirror descent, REINFORCE, GRPO and ReST; token budgets and accuracy

Every run is one process with one thread, in runs/experiments. A run that has its summary is not run
again, and one that was cut off goes on. Tables are Markdown. docs/results.md has the outcomes.
"""

import argparse
from pathlib import Path

from figures import fig3b, fig5, fig7, fig9, fig10, length, sets
from figures.runs import Runs

FIGURES = {
    "fig3b": fig3b.run,
    "fig5": fig5.run,
    "fig5-smollm2": fig5.run_smollm2,
    "fig7": fig7.run,
    "fig9": fig9.run,
    "fig10": fig10.run,
    "length": length.run,
}
PLOTS = Path(__file__).parents[1] / "docs" / "figures"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*FIGURES, *sets.TABLES], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", help="(figures: 0 to 4; tables: 0 to 2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="their folder")
    parser.add_argument("--plots", type=Path, default=PLOTS, help="folder of plots (docs/figures)")
    given = parser.parse_args()
    seeds = given.seeds or range(5 if given.name in FIGURES else 3)
    runs = Runs(given.runs, given.jobs, tuple(seeds))
    if given.name in sets.TABLES:
        print(sets.TABLES[given.name](runs))
        return
    given.plots.mkdir(parents=True, exist_ok=True)
    print(FIGURES[given.name](runs, given.plots))


if __name__ == "__main__":
    main()
