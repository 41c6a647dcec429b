"""Trackers: the numbers of a run go to wandb, trackio, MLflow, or a function of the user's.

All of them are one hook: a function that is called once with the run folder and the settings, and
returns what is called with ``(numbers, iteration)`` for every record. If what it returns has a
``close``, that is called at the end.

A tracker works in a thread, so a service that is slow or away does not hold a run up. Its first
error is said in one warning and ends the tracker, never the run.
"""

import re
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from kimi_core.metrics import EvaluationMetrics, IterationMetrics, leaves, to_record
from kimi_core.plugins import load_function

PROJECT = "kimi_core"
"""The project, or experiment, that runs are part of."""

CLOSE_S = 30.0
"""Seconds that a tracker has at the end of a run to send what is left."""

PARAMETERS_AT_ONCE = 100
"""The most settings that MLflow takes in one call."""

Log = Callable[[dict[str, float], int], object]
Start = Callable[[Path, dict[str, Any]], Log]


def load_tracker(name: str) -> Start:
    """The hook that ``tracker`` names.

    Raises:
        ValueError: the name is unknown, its package is missing, or the file has no such function.
    """
    if ".py:" in name:
        return load_function(name)
    if name not in BUILT_IN:
        raise ValueError(
            f"tracker = {name!r}; allowed are {', '.join(BUILT_IN)} and file.py:function"
        )
    if find_spec(name) is None:
        raise ValueError(f"tracker = {name!r} needs that package: pip install {name}")
    return BUILT_IN[name]


class Tracker:
    """Hands the numbers of every record to a tracker, in a thread.

    Args:
        name: what ``tracker`` says.
        folder: of the run.
        settings: of the run, by dotted name.
        warn: says a line.

    Raises:
        ValueError: as ``load_tracker``.
    """

    def __init__(
        self, name: str, folder: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._name, self._warn = name, warn
        self._records: SimpleQueue[tuple[dict[str, float], int] | None] = SimpleQueue()
        start = load_tracker(name)
        self._thread = Thread(target=self._work, args=(start, folder, dict(settings)), daemon=True)
        self._thread.start()

    def take(self, kind: str, metrics: IterationMetrics | EvaluationMetrics) -> None:
        """Pass a record on. Returns at once."""
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in leaves(to_record(metrics))
            if isinstance(value, int | float) and name != "iteration"
        }
        self._records.put((numbers, metrics.iteration))

    def close(self) -> None:
        """Wait for what is left, at most ``CLOSE_S`` seconds."""
        self._records.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._warn(
                f"warning: tracker {self._name} has not taken everything in {CLOSE_S:g} s; the "
                "run's own files have it"
            )

    def _work(self, start: Start, folder: Path, settings: dict[str, Any]) -> None:
        try:
            log = start(folder, settings)
            while (record := self._records.get()) is not None:
                log(*record)
            close = getattr(log, "close", None)
            if close is not None:
                close()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it must not stop a run.
            self._warn(
                f"warning: tracker {self._name} failed and is left out from here on "
                f"({type(error).__name__}: {error}); the run goes on"
            )


class _Calls:
    """A log with a ``close``."""

    def __init__(self, log: Log, close: Callable[[], object]) -> None:
        self._log, self.close = log, close

    def __call__(self, numbers: dict[str, float], iteration: int) -> object:
        return self._log(numbers, iteration)


def _wandb(folder: Path, settings: dict[str, Any]) -> Log:
    import wandb  # Slow to load, and optional.

    run = wandb.init(
        project=PROJECT,
        name=folder.name,
        id=re.sub(r"\W", "-", str(folder.resolve()))[-100:],  # A resumed run goes on with it.
        resume="allow",
        dir=folder,
        config=settings,
        settings=wandb.Settings(silent=True, console="off"),
    )
    return _Calls(lambda numbers, iteration: run.log(numbers, step=iteration), run.finish)


def _trackio(folder: Path, settings: dict[str, Any]) -> Log:
    import trackio  # Slow to load, and optional.

    run = trackio.init(
        PROJECT, name=folder.name, config=settings, resume="allow", embed=False, auto_log_gpu=False
    )
    return _Calls(lambda numbers, iteration: run.log(numbers, step=iteration), trackio.finish)


def _mlflow(folder: Path, settings: dict[str, Any]) -> Log:
    from mlflow import MlflowClient  # Slow to load, and optional.
    from mlflow.entities import Metric, Param

    client, place = MlflowClient(), str(folder.resolve())
    experiment = client.get_experiment_by_name(PROJECT)
    number = experiment.experiment_id if experiment else client.create_experiment(PROJECT)
    tag = "kimi_core.folder"
    found = [one for one in client.search_runs([number]) if one.data.tags.get(tag) == place]
    run = found[0] if found else client.create_run(number, run_name=folder.name, tags={tag: place})
    parameters = [] if found else [Param(key, str(value)) for key, value in settings.items()]
    for at in range(0, len(parameters), PARAMETERS_AT_ONCE):
        client.log_batch(run.info.run_id, params=parameters[at : at + PARAMETERS_AT_ONCE])

    def log(numbers: dict[str, float], iteration: int) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(re.sub(r"[^\w/. -]", "_", key), value, now, iteration)
            for key, value in numbers.items()
        ]
        client.log_batch(run.info.run_id, metrics=metrics)

    return _Calls(log, lambda: client.set_terminated(run.info.run_id))


BUILT_IN: dict[str, Start] = {"wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}
