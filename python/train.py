"""Train a reasoning model by reinforcement learning, as the Kimi k1.5 report does (section 2.3).

    python python/train.py                                # configs/think.toml, minutes on a laptop
    python python/train.py configs/smollm2.toml seed=1    # a real pretrained model
    python python/train.py --dry-run trainer.tau=0.1      # what would run, and its memory
    python python/train.py --resume                       # start, or go on after a crash or Ctrl-C

Any setting is overridden as section.key=value; kimi_core/config.py describes each of them.
"""

import sys

from kimi_core.cli import main, parser
from kimi_core.config import Config

arguments = parser(__doc__)
arguments.add_argument(
    "--resume",
    action="store_true",
    help="continue runs/NAME from its last token, or start it where there is none yet",
)
arguments.add_argument("--dry-run", action="store_true", help="print the resolved run and exit")


if __name__ == "__main__":
    given = arguments.parse_args()

    def run(config: Config) -> None:
        from kimi_core.run.dry_run import describe
        from kimi_core.run.run import train

        if given.dry_run:
            print(describe(config))
        else:
            print(f"run folder: {train(config, resume=given.resume)}")

    sys.exit(main(given, run))
