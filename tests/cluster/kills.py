"""Kills processes of runs with two ranks and two workers at random moments, and compares the ends.

    python tests/cluster/kills.py --kills 20 --seed 0

There are three kinds of victims: a rollout worker, a rank of the trainer above 0, and the run's
process. Each kind has one run, of which processes are killed with ``kill -9`` until ``--kills``
have died. When the run's process has died, the same command goes on. Between two kills of a run
there is at least one whole iteration. In the end, all that was trained must be what the run
that nothing stopped has trained: tokens, versions and rewards, and losses within rounding.

Prints a line of counts as JSON; its exit status is 1 if a run was not as it should be.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rewarded_runs import children, command, iterations, sampled, write_files

KINDS = ("worker", "rank", "master")
SETTINGS = [
    "rollout.workers=2",
    "trainer.ranks=2",
    "rollout.stream_tokens=2",
    "evaluation.every=1000",
    "trainer.learning_rate=1e-4",
]
WAIT_S = 600
NURSERY, FOLLOWER = "kimi_core.rollout.torch.worker", "kimi_core.run.follower"
EQUAL_FOR = 20
"""Iterations whose losses are compared: rounding grows after that."""


def victims(kind: str, pid: int) -> list[int]:
    """Processes of that kind of a run whose process is ``pid``."""
    try:
        if kind == "worker":
            nurseries = children(pid, NURSERY)
            return [one for nursery in nurseries for one in children(nursery, NURSERY)]
        return children(pid, FOLLOWER) if kind == "rank" else [pid]
    except OSError:  # One has just ended.
        return []


def disturbed(kind: str, kills: int, settings: list[str], chance: random.Random) -> dict[str, int]:
    """A run of which ``kills`` processes are killed; how many were, and how often it was begun."""
    killed, starts = 0, 0
    ends_well = False
    while not ends_well:
        process = command(*settings, f"name={kind}")
        starts += 1
        try:
            before = len(iterations(kind))
            while process.poll() is None and killed < kills:
                wait_until_further(kind, before, process)
                shortest = min((one.wall_s for one in iterations(kind)), default=0.0)
                time.sleep(chance.uniform(0, 3 * shortest))
                before = len(iterations(kind))
                there = victims(kind, process.pid)
                if process.poll() is None and there:
                    os.kill(chance.choice(there), signal.SIGKILL)
                    killed += 1
                    print(f"{kind}: {killed} killed after iteration {before}", file=sys.stderr)
                    if kind == "master":
                        process.wait(WAIT_S)
            ends_well = process.wait(WAIT_S) == 0
        finally:
            process.kill()
            process.wait()
    return {"kills": killed, "starts": starts}


def wait_until_further(name: str, before: int, process: Any) -> None:
    """Until the run has recorded more iterations than ``before``, or its process has ended."""
    ends = time.monotonic() + WAIT_S
    while len(iterations(name)) <= before and process.poll() is None:
        if time.monotonic() > ends:
            raise TimeoutError(f"the run {name} did no iteration after {before} in {WAIT_S} s")
        time.sleep(0.005)


def differences(name: str) -> list[str]:
    """What differs from the run that nothing stopped."""
    found = ["trained"] * (sampled(name) != sampled("whole") or not sampled(name))
    for one, two in zip(iterations("whole"), iterations(name), strict=True):
        for key in ("tokens_sampled", "samples_trained_total", "trajectories_unfinished"):
            if getattr(one, key) != getattr(two, key):
                found.append(f"{key} of {one.iteration}")
        if one.iteration <= EQUAL_FOR and abs(one.loss - two.loss) > 1e-5:
            found.append(f"loss of {one.iteration}: {one.loss} and {two.loss}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    given = parser.parse_args()
    settings = [*SETTINGS, f"iterations={2 * given.kills + 10}"]
    counts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        write_files(Path())
        if command(*settings, "name=whole").wait(WAIT_S):
            raise RuntimeError("the run that nothing stops has failed")
        for kind in given.kinds:
            started = time.monotonic()
            one = disturbed(kind, given.kills, settings, random.Random(given.seed))
            differ = differences(kind)
            counts[kind] = one | {"differ": differ, "seconds": round(time.monotonic() - started)}
            print(f"{kind}: {counts[kind]}", file=sys.stderr)
        os.chdir("/")
    print(json.dumps(counts))
    right = all(one["kills"] == given.kills and not one["differ"] for one in counts.values())
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
