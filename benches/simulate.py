"""How the loop behaves on 8 to 1,024 GPUs, by simulation.

    python benches/simulate.py                  # all tables of docs/scaling.md: minutes
    python benches/simulate.py budgets          # one of them

Nothing of the large tables ran on a GPU. ``simulation.py`` has what is simulated, docs/scaling.md
the formulas and what follows from the tables.
"""

import argparse
from dataclasses import dataclass

import numpy as np
from simulation import Costs, Faults, Master, Phase, Rollout

BANDWIDTH = 0.6 * 3.35e12
"""Bytes a second that decoding reads on an H100: 60 % of the peak (assumed)."""
FLOPS = 0.4 * 990e12
"""Of training and prefill in bfloat16 on an H100: 40 % of the peak (assumed)."""
MEMORY = 72e9
"""Bytes of an H100 for weights, keys and values (assumed)."""
NETWORK = 40e9
"""Bytes a second of a GPU's network link (assumed)."""
CHECKSUM = 9.5e9
"""Bytes a second that one thread sums and stores (a trial on two shared cores)."""
LAUNCH_S = 0.005
"""Of a decode step (assumed)."""
GPU_FAULT_S = 5e4 * 3600
"""Mean time between two faults of one GPU: 419 in 54 days on 16,384 GPUs (Llama 3 report)."""


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    active: float
    """Parameters that one token uses."""
    layers: int
    width: int
    position_bytes: int
    """Keys and values of one position."""
    parameter_bytes: int
    gpus: int
    """Of one engine (tensor parallel)."""


MODELS = {
    "8B": Model("8B", 8.0e9, 8.0e9, 32, 4096, 131_072, 2, 1),
    "70B": Model("70B", 70.6e9, 70.6e9, 80, 8192, 327_680, 2, 4),
    "1T": Model("1T MoE, 32B active, fp8", 1.0e12, 32e9, 61, 7168, 70_272, 1, 16),
}


@dataclass(frozen=True)
class Lengths:
    """Responses: lognormal, cut at ``longest``, after prompts of 512 tokens."""

    median: float
    sigma: float
    longest: int
    prompt: int = 512

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        drawn = self.median * np.exp(self.sigma * rng.standard_normal(n))
        return np.clip(drawn, 1, self.longest).astype(np.int64)


LENGTHS = {"4k": Lengths(4_000, 0.8, 32_768), "32k": Lengths(32_000, 0.7, 131_072)}


def open_trajectories(
    lengths: Lengths, n: int, budget: int | None, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """``n`` open trajectories of a loop that has run for long: (context, tokens in this phase).

    A response of length L is open in ⌈L/budget⌉ phases, so it is met that often.
    """
    if budget is None:
        return [(lengths.prompt, int(length)) for length in lengths.draw(n, rng)]
    drawn = lengths.draw(4 * n, rng)
    phases = -(-drawn // budget)
    chosen = rng.choice(len(drawn), n, p=phases / phases.sum())
    done = budget * (rng.random(n) * phases[chosen]).astype(np.int64)
    wanted = np.minimum(budget, drawn[chosen] - done)
    return list(zip((lengths.prompt + done).tolist(), wanted.tolist(), strict=True))


def costs_of(model: Model) -> Costs:
    """Decoding is bound by the bytes that it reads, prefill by arithmetic."""
    reads = model.gpus * BANDWIDTH
    computes = model.gpus * FLOPS
    return Costs(
        step_s=model.parameters * model.parameter_bytes / reads + LAUNCH_S,
        row_s=2 * model.active / computes,
        context_s=model.position_bytes / reads,
        prefill_s=2 * model.active / computes,
        prefill_pair_s=4 * model.layers * model.width / computes,
    )


def positions_of(model: Model) -> int:
    """Keys and values that fit into an engine."""
    weights = model.parameters * model.parameter_bytes
    return int((model.gpus * MEMORY - weights) / model.position_bytes)


@dataclass(frozen=True)
class Iteration:
    """Seconds of one iteration in which all GPUs sample first and train then (hybrid)."""

    engines: int
    rows: int
    phase: Phase
    train_s: float
    weights_s: float

    @property
    def seconds(self) -> float:
        return self.phase.seconds + self.train_s + self.weights_s


def iteration(
    model: Model,
    lengths: Lengths,
    gpus: int,
    *,
    budget: int | None = 8192,
    master: Master | None = None,
    faults: Faults | None = None,
    slots: int = 2,
    seed: int = 0,
) -> Iteration:
    """Simulate one iteration of a loop that has run for long.

    Args:
        slots: open trajectories for each that fits into an engine at a time.
    """
    rng = np.random.default_rng(seed)
    engines = gpus // model.gpus
    sample = open_trajectories(lengths, 20_000, budget, rng)
    mean_context = float(np.mean([context + wanted / 2 for context, wanted in sample]))
    rows = int(positions_of(model) / mean_context)
    work = open_trajectories(lengths, slots * engines * rows, budget, rng)
    # At most 500 messages a second reach the master.
    master = master or Master(linger_s=max(1.0, engines / 500))
    phase = Rollout(
        work,
        engines=engines,
        rows=1024,
        positions=positions_of(model),
        costs=costs_of(model),
        master=master,
        faults=faults or Faults(mean_s=GPU_FAULT_S / model.gpus),
        rng=rng,
    ).run()
    # In the steady state as many tokens end in an iteration as are sampled.
    pairs = 6 * model.layers * model.width * (mean_context + lengths.prompt)
    train_s = phase.tokens * (6 * model.active + pairs) / (gpus * FLOPS)
    weights = model.parameters * model.parameter_bytes
    links = min(8, gpus) * NETWORK
    weights_s = weights / links + weights / (8 * CHECKSUM)
    return Iteration(engines, rows, phase, train_s, weights_s)


def table(*head: str) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))


def row(*cells: object) -> None:
    texts = [f"{one:,.3g}" if isinstance(one, float) else f"{one}" for one in cells]
    print("| " + " | ".join(texts) + " |", flush=True)


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %"


def sizes() -> None:
    """All models and lengths on 8 to 1,024 GPUs."""
    table("model", "responses", "GPUs", "rollout s", "train s", "weights s", "tok/s/GPU", "master")
    for model in MODELS.values():
        for name, lengths in LENGTHS.items():
            for gpus in (8, 64, 1024):
                if gpus < model.gpus:
                    continue
                one = iteration(model, lengths, gpus)
                phase, rate = one.phase, one.phase.tokens / one.seconds / gpus
                busy = share(phase.master_s, phase.seconds)
                row(model.name, name, gpus, phase.seconds, one.train_s, one.weights_s, rate, busy)


def budgets() -> None:
    """What a token budget is worth, and what it costs in prefill."""
    table("responses", "budget", "rollout s", "tok/s/GPU in rollout", "prefill", "idle engines")
    for name, lengths in LENGTHS.items():
        for budget in (None, 16_384, 8_192, 4_096, 2_048):
            one = iteration(MODELS["8B"], lengths, 64, budget=budget)
            phase = one.phase
            engine_s = one.engines * phase.seconds
            rate = phase.tokens / engine_s
            prefill, idle = (
                share(phase.prefill_s, engine_s),
                share(engine_s - phase.busy_s, engine_s),
            )
            row(name, budget or "none", phase.seconds, rate, prefill, idle)


TABLES = {"sizes": sizes, "budgets": budgets}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", choices=TABLES, help="(all)")
    given = parser.parse_args().table
    for name in [given] if given else TABLES:
        TABLES[name]()


if __name__ == "__main__":
    main()
