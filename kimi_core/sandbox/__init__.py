"""Runs hostile programs: bubblewrap, seccomp, rlimits and cgroups below one small interface.

    python -m kimi_core.sandbox run program.py < input        # or: run COMMAND ARG ...
    python -m kimi_core.sandbox check

docs/sandbox.md has the threat model, and what stops what.
"""

from kimi_core.sandbox.cpp import compile_cpp
from kimi_core.sandbox.pool import Pool, check, run
from kimi_core.sandbox.program import Limits, Result, SandboxUnavailable, Status

__all__ = [
    "Limits",
    "Pool",
    "Result",
    "SandboxUnavailable",
    "Status",
    "check",
    "compile_cpp",
    "run",
]
