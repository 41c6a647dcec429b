"""What the drivers in ``python/`` share: a config file and overrides in, an exit status out."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from kimi_core.config import Config, load_config

DEFAULT = Path("configs/think.toml")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Takes at most one config file, and overrides, in any order."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG.toml | key=value",
        help=f"the run's config (default: {DEFAULT}) and settings to override",
    )
    return result


def main(
    given: argparse.Namespace, run: Callable[[Config], None], *, default: Path = DEFAULT
) -> int:
    """Load the config (``default`` where none is given) and call ``run``; returns the exit status.

    0: all went well; 1: a run had to stop; 2: bad input; 130: Ctrl-C. Errors that a user can act on
    are printed in one line, without a traceback.
    """
    files = [argument for argument in given.arguments if "=" not in argument]
    overrides = [argument for argument in given.arguments if "=" in argument]
    try:
        if len(files) > 1:
            raise ValueError(f"One config at a time, not {len(files)}: {', '.join(files)}")
        config = load_config(files[0] if files else default, overrides)
    except ValueError as error:
        return _fail(error, 2)
    # Only now: torch takes seconds to load, and neither --help nor a misspelt key should.
    from kimi_core.reward.base import RewardOutage
    from kimi_core.rollout.engine import EngineFailed
    from kimi_core.trainer.trainer import LogprobMismatch, TrainingDiverged

    try:
        run(config)
    except ValueError as error:
        return _fail(error, 2)
    except (RewardOutage, TrainingDiverged, LogprobMismatch, EngineFailed, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:  # During SFT or an evaluation; an iteration ends cleanly by itself.
        print(
            "interrupted: --resume goes on from the last state, if one was saved", file=sys.stderr
        )
        return 130
    return 0


def _fail(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status
