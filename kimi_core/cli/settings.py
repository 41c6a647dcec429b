"""From the arguments of a command to its ``Config``, and from an error to its exit status."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from kimi_core.cli.parser import Parser, fail
from kimi_core.config import Config
from kimi_core.config.names import meant, settings
from kimi_core.run.config_file import load_config
from kimi_core.run.out_of_memory import advice, is_out_of_memory

CONFIGS = Path(__file__).parent.parent / "configs"
"""The configs that ship with the package."""


def config_parser(name: str, description: str) -> Parser:
    """A parser of at most one config and any overrides, in any order."""
    parser = parser_of(name, description)
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG | key=value",
        help=f"a TOML file or one of {', '.join(shipped())}, and settings to override; "
        "key=none unsets a setting",
    )
    return parser


def parser_of(name: str, description: str) -> Parser:
    return Parser(
        prog=f"kimi {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def may_accept_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume also if prompts or files that the run reads have changed",
    )


def with_config(
    arguments: Sequence[str], run: Callable[[Config], None], *, default: str = "think"
) -> int:
    """Load the config, apply the overrides, call ``run``, and return the exit status."""
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    try:
        _refuse_bare_settings(arguments)
        if len(files) > 1:
            raise ValueError(f"One config at a time, not {len(files)}: {', '.join(files)}")
        config = load_config(find_config(files[0] if files else default), overrides)
    except ValueError as error:
        return fail(str(error), 2)
    # Only now, because torch takes seconds to load: --help and a misspelt key need not wait.
    from kimi_core.reward.base import RewardOutage
    from kimi_core.rollout.engine import EngineFailed
    from kimi_core.run.stop import Stopped
    from kimi_core.trainer.ranks import RankFailed
    from kimi_core.trainer.trainer import LogprobMismatch, TrainingDiverged

    stops = (RewardOutage, TrainingDiverged, LogprobMismatch, EngineFailed, RankFailed, OSError)
    try:
        run(config)
    except ValueError as error:
        return fail(str(error), 2)
    except stops as error:
        return fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return fail(advice(error, config), 1)
    except KeyboardInterrupt as error:
        said = str(error) or (
            "interrupted: what was saved is kept; the same command (kimi train and kimi sft: with "
            "--resume) goes on from there"
        )
        print(said, file=sys.stderr)
        return error.status if isinstance(error, Stopped) else 130
    return 0


def _refuse_bare_settings(words: Sequence[str]) -> None:
    """Raise ValueError if a word is meant for a setting and has no ``=``."""
    for word, behind in pairwise([*words, "..."]):
        section, dot, _ = word.rpartition(".")
        known = settings().get(word)
        likely = [word] if known and not known.is_section else []
        if dot and section in settings() and not known:
            likely = meant(word)
        if likely and "=" not in word and not Path(word).is_file():
            value = "..." if "=" in behind else behind
            written = " or ".join(f"{key}={value}" for key in likely)
            raise ValueError(f"{word}: settings are key=value; write {written}")


def find_config(name: str) -> Path:
    """The file of that name, or else the config of that name that ships with the package.

    Raises:
        ValueError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    stem = name.removesuffix(".toml")
    if stem in shipped():
        return CONFIGS / f"{stem}.toml"
    near = difflib.get_close_matches(stem, shipped(), 1)
    meant_one = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"No config file {name}{meant_one}; give the path of a TOML file, or one of "
        f"{', '.join(shipped())}"
    )


def shipped() -> list[str]:
    """Names of the configs that ship with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))
