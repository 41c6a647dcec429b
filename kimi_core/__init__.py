"""Reinforcement learning of long chains of thought, after the Kimi k1.5 report.

Begin with ``types.py`` (the nouns) and ``loop.py`` (the verbs). In a notebook::

    from kimi_core import Config, train

    train(Config(name="mine", iterations=20))
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent

try:
    from kimi_core import _C as _C
except ImportError as error:
    # `python -m kimi_core.x` in the repository, after a plain `pip install .`: Python finds this
    # folder first, which has no compiled core. The installed package is the one to use.
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]
    installed = PathFinder.find_spec("kimi_core", elsewhere)
    if installed is None or not installed.submodule_search_locations:
        raise ImportError(
            "kimi_core has no compiled core (kimi_core._C) for this Python: run `pip install .` in "
            f"the repository. ({error})"
        ) from error
    __path__[:] = installed.submodule_search_locations
    from kimi_core import _C as _C

_EXPORTS = {
    "Config": "kimi_core.config",
    "Prompt": "kimi_core.types",
    "Score": "kimi_core.types",
    "train": "kimi_core.run.api",
}


def __getattr__(name: str) -> Any:
    """Load what a notebook needs when it is asked for: torch takes seconds."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kimi_core' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
