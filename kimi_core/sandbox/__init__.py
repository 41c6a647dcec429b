"""Runs hostile programs, with bubblewrap, seccomp, rlimits and cgroups.

    kimi sandbox run program.py < input        # or: run COMMAND ARG ...
    kimi sandbox check

docs/sandbox.md has the threat model, and what stops which attack.
"""

from kimi_core.sandbox.cpp import compile_cpp
from kimi_core.sandbox.pool import Pool, check, run
from kimi_core.sandbox.program import Limits, Program, Result, SandboxUnavailable, Status

__all__ = [
    "Limits",
    "Pool",
    "Program",
    "Result",
    "SandboxUnavailable",
    "Status",
    "check",
    "compile_cpp",
    "run",
]
