"""Work in another process, for tests that kill it."""

import os


def in_child(work, *arguments) -> int:
    """Run ``work`` in a forked process, which starts quickly, and return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        finally:
            os._exit(1)  # Skips pytest's exit; the child should only end by a kill.
    return pid
