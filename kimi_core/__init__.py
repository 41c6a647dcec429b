"""Reinforcement learning of long chains of thought, after the Kimi k1.5 report.

Begin with ``types.py`` (the nouns) and ``loop.py`` (the verbs).
"""

__version__ = "0.1.0"

try:
    from kimi_core import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        "kimi_core has no compiled core (kimi_core._C) for this Python: run `pip install .` in the "
        f"repository, and start Python outside of its source folder. ({error})"
    ) from error
