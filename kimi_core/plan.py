"""What a run would do and how much memory it would take, without doing it: ``--dry-run``."""

from kimi_core.config import Config


def describe(config: Config) -> str:
    return config.model_dump_json(indent=2)
