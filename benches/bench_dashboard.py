"""How long the dashboard takes to show a run of 100,000 responses of 2,000 tokens, in Chromium.

The run is made: 250 iterations of 50 groups of 8, 4.5 GB. The server is a process that has just
started, so no file is indexed. A page counts from the click until it has been drawn: the frame
after the one in which its content was put in. The bars are held by CPU time, of the server and of
all of Chromium's processes together, which is more than the wall-clock time of a machine that has
nothing else to do. Wall-clock time is shown as well; it means nothing on a busy machine.

    pytest benches/bench_dashboard.py
    PYTHONPATH=tests python benches/bench_dashboard.py FOLDER    # prints a table; keeps the run
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from dashboards import dashboard
from made_runs import make_run

ITERATIONS, GROUPS, SAMPLES, TOKENS = 250, 50, 8, 2000
FIRST_PAINT_MS, GROUP_MS = 1000.0, 200.0
"""The bars."""

SHOWN = """
(hash) => new Promise((resolve) => {
  const start = performance.now();
  const drawn = () => setTimeout(() => resolve(performance.now() - start));
  const seen = new MutationObserver(() => document.body.dataset.ready === hash &&
    (seen.disconnect(), requestAnimationFrame(drawn)));
  seen.observe(document.body, { attributes: true });
  location.hash = hash;
})
"""


@dataclass
class Times:
    """Milliseconds of one page, once for each round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def test_a_large_run(ratios, tmp_path):
    times = measure(make(tmp_path / "runs"))
    for name, bar in (("first paint", FIRST_PAINT_MS), ("group", GROUP_MS)):
        cpu, wall = median(times[name].cpu), median(times[name].wall)
        detail = f"median {cpu:.0f} ms of CPU time, {wall:.0f} ms by the clock"
        ratios.record(f"dashboard, {name}", f"{bar:.0f} ms", bar / cpu, minimum=1, detail=detail)


def make(runs: Path) -> Path:
    """The folder with the large run."""
    if not (runs / "large").is_dir():
        shape = {"iterations": ITERATIONS, "groups": GROUPS, "samples": SAMPLES, "tokens": TOKENS}
        make_run(runs / "large", **shape)
    return runs


def measure(runs: Path, rounds: int = 5) -> dict[str, Times]:
    """Name of a page → milliseconds; each round looks at an iteration that none has looked at."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))))
    times: dict[str, Times] = {}
    with sync_playwright() as driver, dashboard(runs) as address:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def timed(name: str, look: Callable[[], float]) -> None:
            before = _cpu_ms()
            wall = look()
            time.sleep(0.3)  # What is drawn after that frame counts as well.
            one = times.setdefault(name, Times())
            one.wall.append(wall)
            one.cpu.append(_cpu_ms() - before)

        for number in range(rounds):
            page = browser.new_page(viewport={"width": 1360, "height": 900})
            paint, show = partial(_first_paint_ms, page), partial(_shown_ms, page)
            timed("a text file, to compare with", partial(paint, address + "style.css"))
            timed("first paint", partial(paint, address))
            iteration = 1 + number * (ITERATIONS // rounds)
            group, response = (iteration - 1) * GROUPS + 7, ((iteration - 1) * GROUPS + 7) * SAMPLES
            timed("curves", partial(show, ""))
            timed(
                "group, its file not indexed",
                partial(show, f"/iteration/{iteration}/group/{group}"),
            )
            timed("iteration", partial(show, f"/iteration/{iteration}"))
            timed("group", partial(show, f"/iteration/{iteration}/group/{group + 1}"))
            timed(
                "response of 2,000 tokens",
                partial(show, f"/iteration/{iteration}/response/{response}"),
            )
            timed("prompts", partial(show, "/prompts"))
            page.close()
        browser.close()
    return times


def _cpu_ms() -> float:
    """CPU time of the server and of Chromium, with all their processes and threads."""
    ticks = 0
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            command = (process / "cmdline").read_bytes() if process.name.isdecimal() else b""
            if b"chromium" in command or b"kimi_core.cli" in command:
                facts = (process / "stat").read_text().rpartition(")")[2].split()
                ticks += int(facts[11]) + int(facts[12])
    return 1000 * ticks / os.sysconf("SC_CLK_TCK")


def _shown_ms(page, path: str) -> float:
    """From the change of the address until the page of the large run is drawn."""
    return page.evaluate(SHOWN, f"#/run/large{path}")


def _first_paint_ms(page, address: str) -> float:
    """From the start of the navigation; the page is empty until its runs are there."""
    page.goto(address)
    page.wait_for_function("() => performance.getEntriesByName('first-contentful-paint').length")
    return page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")


def table(times: dict[str, Times]) -> str:
    """Lines of Markdown with the times of each page."""
    lines = ["| page | CPU, median | CPU, worst | clock, median |", "|---|---|---|---|"]
    for name, found in times.items():
        numbers = (median(found.cpu), max(found.cpu), median(found.wall))
        lines.append(f"| {name} | " + " | ".join(f"{one:.0f} ms" for one in numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(table(measure(make(Path(sys.argv[1] if len(sys.argv) > 1 else place)))))
