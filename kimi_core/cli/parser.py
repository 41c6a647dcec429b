"""The options of a command, and what to write in place of one that it does not have."""

import argparse
import difflib
import sys
from typing import Any

from kimi_core.config.names import meant, settings


class Parser(argparse.ArgumentParser):
    """Options and other words in any order; an option that is meant for a setting is explained."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._refuse_foreign(list(args or ()))
        return super().parse_args(args, namespace)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._refuse_foreign(list(args or ()))
        return super().parse_intermixed_args(args, namespace)

    def _refuse_foreign(self, words: list[str]) -> None:
        for at, word in enumerate(words):
            option, _, value = word.partition("=")
            behind = words[at + 1] if at + 1 < len(words) else ""
            if option.startswith("--") and not self._knows(option):
                self.exit(fail(self._way_out(option, value or behind), 2))

    def _knows(self, option: str) -> bool:
        return any(one.startswith(option) for one in self._option_string_actions)

    def _way_out(self, option: str, value: str) -> str:
        own = [one for one in self._option_string_actions if one.startswith("--")]
        if option == "--config":
            return f"{self.prog} has no --config: write `{self.prog} {value or 'CONFIG'}`"
        name = option[2:].replace("-", "_")
        likely = [name] if name in settings() else meant(name)
        if near := difflib.get_close_matches(option, own, 1, 0.75):
            return f"{self.prog} has no {option}; did you mean {near[0]}?"
        if likely:
            written = " or ".join(f"{key}={value or '...'}" for key in likely)
            return f"{self.prog} has no {option}: settings are key=value; write {written}"
        return (
            f"{self.prog} has no {option}; its options are {', '.join(own)}, and settings are "
            "key=value (`kimi config` lists them)"
        )


def fail(message: str, status: int) -> int:
    """Print an error, and return the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return status
