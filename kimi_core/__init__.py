"""Reinforcement learning of long chains of thought, after the Kimi k1.5 report.

Begin with ``types.py`` (the nouns) and ``loop.py`` (the verbs).
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent

try:
    from kimi_core import _C as _C
except ImportError as error:
    # `python -m kimi_core.x` in the repository, after a plain `pip install .`: Python finds this
    # folder first, which has no compiled core. What it meant is the package that was installed.
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]
    installed = PathFinder.find_spec("kimi_core", elsewhere)
    if installed is None or not installed.submodule_search_locations:
        raise ImportError(
            "kimi_core has no compiled core (kimi_core._C) for this Python: run `pip install .` in "
            f"the repository. ({error})"
        ) from error
    __path__[:] = installed.submodule_search_locations
    from kimi_core import _C as _C
