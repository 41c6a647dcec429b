"""Train a reasoning model by reinforcement learning, as the Kimi k1.5 report does (section 2.3).

    python python/train.py                                     # configs/think.toml, minutes on a laptop
    python python/train.py configs/smollm2.toml seed=1         # a real pretrained model
    python python/train.py --dry-run trainer.tau=0.1           # what would run, and its memory
    python python/train.py --resume                            # go on after Ctrl-C or a crash

Any setting is overridden as section.key=value; kimi_core/config.py describes each of them.
"""

import argparse
import sys
from pathlib import Path

from kimi_core.config import load_config

DEFAULT = Path(__file__).parent.parent / "configs" / "think.toml"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="*", metavar="CONFIG.toml or key=value")
    parser.add_argument("--resume", action="store_true", help="continue runs/NAME from its last state")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and exit")
    given = parser.parse_args()
    files = [argument for argument in given.arguments if "=" not in argument]
    overrides = [argument for argument in given.arguments if "=" in argument]
    try:
        if len(files) > 1:
            raise ValueError(f"One config at a time, not {len(files)}: {', '.join(files)}")
        config = load_config(files[0] if files else DEFAULT, overrides)
        # Imported only now: torch takes seconds to load, and --help should not.
        from kimi_core.plan import describe
        from kimi_core.run import train
        from kimi_core.trainer.trainer import LogprobMismatch, TrainingDiverged

        if given.dry_run:
            print(describe(config))
            return 0
        print(f"run folder: {train(config, resume=given.resume)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingDiverged, LogprobMismatch, OSError) as error:
        print(f"stopped: {error}\nThe last saved state is intact: --resume", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
