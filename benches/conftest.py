"""What the benchmarks share: ratios to a peer, printed as one table, required minima enforced.

    pytest benches/ [--write-baseline]

Absolute times do not survive a change of machine, so a bench records ratios measured in one run.
`--write-baseline` keeps this run's in `baselines/`, one file for each kind of hardware; a later run
on the same hardware prints them beside its own.
"""

import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch

BASELINES = Path(__file__).parent / "baselines"


@dataclass(frozen=True)
class Ratio:
    """How much better ours is than ``peer``: above 1 is better."""

    name: str
    peer: str
    ratio: float
    minimum: float | None
    detail: str

    @property
    def missed(self) -> bool:
        return self.minimum is not None and not self.ratio >= self.minimum


@dataclass
class Ratios:
    """Collects the ratios of a session."""

    all: list[Ratio] = field(default_factory=list)

    def record(
        self, name: str, peer: str, ratio: float, minimum: float | None = None, detail: str = ""
    ) -> None:
        """Add a line to the table; below ``minimum`` (None: for information) the session fails.

        A ratio of NaN is a peer that is missing; ``detail`` says how to get it.
        """
        self.all.append(Ratio(name, peer, ratio, minimum, detail))


RATIOS = pytest.StashKey[Ratios]()
BEFORE = pytest.StashKey[dict[str, dict]]()


@pytest.fixture(scope="session")
def ratios(pytestconfig: pytest.Config) -> Ratios:
    return pytestconfig.stash[RATIOS]


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """CPU seconds mean something only without threads that spin while they wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-baseline", action="store_true", help="keep this run's ratios in benches/baselines/"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RATIOS] = Ratios()
    config.stash[BEFORE] = _baseline()


def pytest_sessionfinish(session: pytest.Session) -> None:
    ratios = session.config.stash[RATIOS].all
    if any(ratio.missed for ratio in ratios) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if ratios and session.config.getoption("--write-baseline"):
        before = session.config.stash[BEFORE]
        found = {_key(ratio): asdict(ratio) for ratio in ratios if not math.isnan(ratio.ratio)}
        baseline = {**before, **found}
        BASELINES.mkdir(exist_ok=True)
        _baseline_path().write_text(json.dumps(baseline, indent=1, ensure_ascii=False) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stash = terminalreporter.config.stash
    ratios, baseline = stash[RATIOS].all, stash[BEFORE]
    if not ratios:
        return
    write: Callable[..., None] = terminalreporter.write_line
    terminalreporter.section(f"ratios on {_hardware()}")
    width = max(len(_key(ratio)) for ratio in ratios)
    write(f"{'ours / peer':{width}}  {'ratio':>6} {'needed':>6} {'before':>6}")
    for ratio in ratios:
        needed = "" if ratio.minimum is None else f"{ratio.minimum:.2f}"
        old = f"{baseline[_key(ratio)]['ratio']:.2f}" if _key(ratio) in baseline else ""
        line = f"{_key(ratio):{width}}  {ratio.ratio:6.2f} {needed:>6} {old:>6}  {ratio.detail}"
        write(line + "  MISSED" if ratio.missed else line, red=ratio.missed)


def _key(ratio: Ratio) -> str:
    return f"{ratio.name} / {ratio.peer}"


def _hardware() -> str:
    """What the machine computes with, as `AMD EPYC, 2 cores` or the GPU's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        model = found[1]
    return f"{model}, {os.cpu_count()} cores"


def _baseline_path() -> Path:
    return BASELINES / (re.sub(r"\W+", "-", _hardware()).strip("-").lower() + ".json")


def _baseline() -> dict[str, dict]:
    path = _baseline_path()
    return json.loads(path.read_text()) if path.exists() else {}
