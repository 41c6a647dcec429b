"""The simulation of a rollout phase compared with two measured worker processes.

    pytest benches/bench_simulation.py           # about 1 CPU-minute, best on an idle machine

1. The costs of a worker are fitted to calls in which all rows have one context and one length, in
   CPU seconds of two worker processes. Rows of mixed lengths cost more a step, so the costs are
   multiplied by what a small mixed phase takes.
2. The two answer 160 requests of other contexts and lengths, which are known beforehand.
3. The simulation of these requests has to give the decode steps and the CPU seconds of both
   workers, within 20 %. The seconds of the phase count on a machine that does nothing else.
"""

import os
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from bench_fleet import VOCAB, model  # noqa: F401 - a fixture
from simulation import Costs, Faults, Master, Phase, Rollout

from kimi_core.config import RolloutConfig
from kimi_core.rollout.fleet import Fleet, linger_s
from kimi_core.rollout.load import load_engine
from kimi_core.types import Request, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, LONGEST = 16, 420
SAMPLING = Sampling(1.0, seed=1, stop_token_ids=frozenset(), stream_tokens=64)


def requests_of(contexts: list[int], wanted: list[int]) -> list[Request]:
    """Requests with contexts of their own, which all get what they want."""
    rng = np.random.default_rng(0)
    return [
        Request(key, rng.integers(2, VOCAB, context).astype(np.int32), context, n, LONGEST)
        for key, (context, n) in enumerate(zip(contexts, wanted, strict=True))
    ]


def workload(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Contexts, and lognormal lengths with a long tail."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(60 * np.exp(0.7 * rng.standard_normal(n)), 2, 300).astype(int)
    return rng.integers(10, 80, n).tolist(), lengths.tolist()


def cpu_s(pids: list[int]) -> float:
    """CPU seconds that the workers have used, of all threads."""
    threads = [one for pid in pids for one in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(one.read_text().split()[0]) for one in threads) / 1e9


def used(fleet: Fleet, requests: list[Request]) -> tuple[float, int]:
    """CPU seconds of both workers over one call, and its tokens."""
    pids = [worker.pid for worker in fleet._workers]  # type: ignore[attr-defined]
    before = cpu_s(pids)
    tokens = sum(len(one.token_ids) for one in fleet.generate(requests, SAMPLING))
    return cpu_s(pids) - before, tokens


def positive_fit(terms: np.ndarray) -> list[float]:
    """Coefficients ≥ 0 with which the columns add up to 1 in every row, as nearly as possible."""
    used = list(range(terms.shape[1]))
    while True:
        found = np.linalg.lstsq(terms[:, used], np.ones(len(terms)), rcond=None)[0]
        if found.min() >= 0:
            return [found[used.index(n)] if n in used else 0.0 for n in range(terms.shape[1])]
        del used[int(found.argmin())]


def fitted(fleet: Fleet) -> Costs:
    """The costs that explain calls in which each worker has n rows of one context and length."""
    shapes = [(1, 20, 60), (4, 160, 40), (8, 10, 90), (16, 20, 50), (16, 160, 30), (16, 300, 1)]
    shapes += [(1, 200, 1)]
    best = np.full(len(shapes), np.inf)
    for _ in range(2):
        for place, (n, context, wanted) in enumerate(shapes):
            asked = requests_of([context] * 2 * n, [wanted] * 2 * n)
            best[place] = min(best[place], used(fleet, asked)[0] / 2)
    terms = [
        [wanted, wanted * n, n * wanted * (context + wanted / 2), n * context, 1]
        for n, context, wanted in shapes
    ]
    # Relative errors count, so that short calls count as much as long ones.
    step, row, position, prefill, enter = positive_fit(np.array(terms) / best[:, None])
    costs = Costs(step, row, position, prefill, enter_s=enter)
    mixed = workload(64, seed=5)
    factor = used(fleet, requests_of(*mixed))[0] / simulated(*mixed, costs).busy_s
    return Costs(*(factor * one for one in astuple(costs)))


def simulated(contexts: list[int], wanted: list[int], costs: Costs) -> Phase:
    return Rollout(
        list(zip(contexts, wanted, strict=True)),
        engines=2,
        rows=ROWS,
        costs=costs,
        master=Master(linger_s=linger_s(2), asks=False),
        faults=Faults(),
        rng=np.random.default_rng(0),
    ).run()


def test_two_workers_are_as_the_simulation_says(model, ratios):  # noqa: F811
    contexts, wanted = workload(160, seed=2)
    settings = RolloutConfig(workers=2, batch_rows=ROWS)
    fleet, publisher = load_engine(model, settings, LONGEST, exact=False)
    publisher.publish(model.named_parameters(), 0)
    fleet.serve(0)
    wall, found = np.inf, []
    try:
        for _ in range(3):  # Other work on the machine slows both, so they alternate.
            said = simulated(contexts, wanted, fitted(fleet))
            start, before = time.perf_counter(), fleet.decode_steps
            cost, tokens = used(fleet, requests_of(contexts, wanted))
            wall = min(wall, time.perf_counter() - start)
            found.append((cost / said.busy_s, cost, said, fleet.decode_steps - before))
    finally:
        fleet.close()
        publisher.close()
    assert tokens == sum(wanted) == said.tokens
    _, cost, said, steps = sorted(found, key=lambda one: one[0])[1]
    detail = f"{said.steps} simulated, {steps} made"
    ratios.record("decode steps", "simulation", steps / said.steps, 1 / 1.2, detail)
    ratios.record("simulation", "decode steps", said.steps / steps, 1 / 1.2)
    detail = f"{said.busy_s:.2f} s simulated, {cost:.2f} s used by both workers"
    ratios.record("CPU seconds", "simulation", cost / said.busy_s, 1 / 1.2, detail)
    ratios.record("simulation", "CPU seconds", said.busy_s / cost, 1 / 1.2)
    load = os.getloadavg()[0]
    detail = f"{said.seconds:.2f} s simulated, {wall:.2f} s on the clock; load {load:.1f}"
    alone = 1 / 1.2 if load < 3 else None  # Other work makes the clock's seconds longer.
    ratios.record("seconds", "simulation", wall / said.seconds, alone, detail)
    ratios.record("simulation", "seconds", said.seconds / wall, alone)
