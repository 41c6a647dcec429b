"""The pages in a headless Chromium: what they show, what keys do, and that texts stay texts."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from dashboards import dashboard
from hostile_images import NAMES, SHOWN, pictured_run
from hostile_texts import HOSTILE
from made_runs import make_run

from kimi_core import cli
from kimi_core.run.trajectories import visible

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

ADDRESSES = {
    "": "Runs",
    "#/run/tiny": None,
    "#/compare/tiny/made": "Compare",
    "#/run/tiny/iteration": "Iteration 3",
    "#/run/tiny/iteration/2": "Iteration 2",
    "#/run/tiny/buffer": "Buffer now",
    "#/run/tiny/prompts": "Prompts",
    "#/run/made/iteration/1/group/1": "Group 1",
    "#/run/made/iteration/2/response/7": "Response 7",
    "#/run/made/buffer": "Nothing to show",
    "#/run/nothing": "Nothing to show",
    "#/run/made/iteration/77": "Nothing to show",
    "#/%E0%A4%A/%": "Runs",
}
"""Address → heading."""


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser) -> Iterator[object]:
    """A page that fails its test if a script fails, or if something is fetched from elsewhere."""
    context = browser.new_context(viewport={"width": 1300, "height": 850})
    found = context.new_page()
    faults: list[str] = []
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}"))
    found.on("popup", lambda popup: faults.append(f"popup {popup.url}"))
    found.on("request", lambda request: _is_ours(request.url) or faults.append(request.url))
    yield found
    context.close()
    assert faults == []


def _is_ours(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "file:///", "data:,"))


def show(page, address: str) -> None:
    page.goto(address)
    hash_ = address.partition("#")[2]
    page.wait_for_function("hash => document.body.dataset.ready === '#' + hash", arg=hash_ or "/")


def heading(page) -> str | None:
    found = page.query_selector("h1")
    return found.inner_text() if found else None


@pytest.mark.parametrize(("address", "expected"), ADDRESSES.items())
def test_every_page_opens_by_its_address(page, served, address, expected):
    show(page, served + address)
    assert heading(page) == expected
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, f"{wide} pixels stand out on the right"


def test_the_way_from_all_runs_down_to_a_token_and_back_by_keys(page, served):
    show(page, served)
    assert "finished" in page.inner_text("tr:has-text('tiny')")
    for key in ("j", "j", "Enter"):  # deep/hostile, made
        page.keyboard.press(key)
    page.wait_for_selector("figure svg")
    assert page.url.endswith("#/run/made")
    page.keyboard.press("i")
    page.wait_for_selector("h1:text('Iteration 3')")
    page.keyboard.press("[")
    page.wait_for_selector("h1:text('Iteration 2')")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:text('Group')")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:text('Response')")
    page.keyboard.press("3")
    assert "?colour=version" in page.url
    page.keyboard.press("ArrowRight")
    assert "token" in page.inner_text(".tip") and "version" in page.inner_text(".tip")
    for expected in ("Group", "Iteration 2"):
        page.keyboard.press("u")
        page.wait_for_selector(f"h1:text('{expected}')")
    page.keyboard.press("r")
    page.wait_for_selector("h1:text('Runs')")


def test_a_click_on_a_curve_opens_its_iteration(page, served):
    show(page, served + "#/run/made")
    box = page.query_selector("figure .chart svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 10, box["y"] + 40)
    assert "iteration 3" in page.text_content(".cursor")
    page.mouse.click(box["x"] + box["width"] - 10, box["y"] + 40)
    page.wait_for_selector("h1:text('Iteration 3')")


def test_other_evaluation_sets_have_a_tile_and_curves(page, served):
    show(page, served + "#/run/tiny?search=easy.pass")
    assert "pass@2" in page.inner_text(".tile:has-text('easy, sampled')")
    names = [one.inner_text() for one in page.query_selector_all("figcaption b")]
    assert names == ["evaluation.sets.easy.pass at k.1", "evaluation.sets.easy.pass at k.2"]


def test_search_and_smoothing_of_curves(page, served):
    show(page, served + "#/run/tiny")
    page.keyboard.press("/")
    page.keyboard.type("logprob_gap")
    names = page.eval_on_selector_all("figcaption b", "all => all.map((one) => one.textContent)")
    assert names and all("logprob gap" in name for name in names)
    page.fill("input[type=search]", "xyz")
    assert "No metric has that name" in page.inner_text("main")


def test_a_bar_of_rewards_keeps_its_groups(page, served):
    show(page, served + "#/run/made/iteration/1")
    rows = page.locator("tbody tr").count()
    dots = json.loads(page.evaluate(_ask("made/iterations/1")))["columns"]
    wrong = {g for g, r in zip(dots["group_id"], dots["reward"], strict=True) if r == 0}
    page.locator(".bar").first.click()
    assert page.locator("tbody tr").count() == len(wrong) <= rows == 2
    page.locator(".bar.chosen").click()
    assert page.locator("tbody tr").count() == rows


def _ask(path: str) -> str:
    return f"fetch('data/runs/{path}').then((answer) => answer.text())"


def test_tokens_have_the_class_of_their_numbers(page, served):
    show(page, served + "#/run/made/iteration/2/response/7?colour=mismatch")
    record = json.loads(page.evaluate(_ask("made/iterations/2/responses/7")))
    classes = page.eval_on_selector_all(".tokens .t", "all => all.map((one) => one.className)")
    edges = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]
    pairs = zip(record["engine_logprobs"], record["trainer_logprobs"], strict=True)
    gaps = [abs(a - b) for a, b in pairs]
    assert classes == [f"t m{sum(gap >= edge for edge in edges)}" for gap in gaps]
    page.keyboard.press("3")
    classes = page.eval_on_selector_all(".tokens .t", "all => all.map((one) => one.className)")
    assert classes == [f"t v{v % 8}" for v, count in record["versions"] for _ in range(count)]
    text = page.eval_on_selector(".tokens", "one => one.textContent")
    assert text == record["response"].replace("\n", "⏎\n")


def test_a_live_run_is_followed(page, tmp_path):
    run = make_run(tmp_path / "runs" / "live", iterations=2)
    with dashboard(run.parent) as address:
        show(page, address + "#/run/live")
        assert page.inner_text(".tile b") == "2"
        lines = (run / "metrics.jsonl").read_text().splitlines()
        line = json.loads(next(one for one in lines if '"iteration"' in one and '"loss"' in one))
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line | {"iteration": 3}) + "\n")
        page.wait_for_function("() => document.querySelector('.tile b').textContent === '3'")


def test_a_folder_without_runs_and_a_server_that_is_gone(page, tmp_path):
    with dashboard(tmp_path) as address:
        show(page, address)
        assert heading(page) == "No runs yet"
    page.evaluate("location.hash = '#/run/x'")
    page.wait_for_selector("text=The server does not answer")


def test_dark_or_light_by_the_system_by_a_key_and_remembered(browser, served):
    def background(page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    show(page, served)
    dark = background(page)
    page.keyboard.press("d")
    light = background(page)
    assert dark != light
    page.reload()
    page.wait_for_selector("h1")
    assert background(page) == light
    context.close()


def test_markup_from_text_is_refused_by_the_browser_itself(page, served):
    show(page, served)
    said = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } }"
    )
    assert said == "TypeError"


INERT = """
() => ({
  hacked: window.hacked ?? null,
  tags: [...new Set([...document.querySelectorAll("main *")].map((one) => one.localName))],
  wide: document.documentElement.scrollWidth - innerWidth,
  title: document.title,
})
"""

OURS = {
    *("section", "div", "h1", "h2", "span", "button", "pre", "article", "header", "b", "a", "p"),
    *("aside", "dl", "dt", "dd", "meter", "svg", "rect", "title", "i"),
}


def assert_inert(page) -> None:
    found = page.evaluate(INERT)
    assert found["hacked"] is None
    assert set(found["tags"]) <= OURS
    assert found["wide"] <= 0
    assert "http" not in found["title"]


@pytest.mark.parametrize("place", ["server", "copy"])
def test_40_hostile_texts_are_shown_and_never_run(page, served, trained, tmp_path, place):
    assert len(HOSTILE) == 40
    address = served
    if place == "copy":
        hostile = trained.parent / "deep"
        assert cli.main(["dashboard", str(hostile), "--bundle", str(tmp_path / "copy")]) == 0
        address = (tmp_path / "copy" / "index.html").as_uri()
    run = quote("deep/hostile" if place == "server" else "hostile", safe="")
    show(page, f"{address}#/run/{run}/iteration/1/group/0")
    texts = page.eval_on_selector_all(".card .text", "all => all.map((one) => one.textContent)")
    assert len(texts) == 40
    assert_inert(page)
    for number, hostile in enumerate(HOSTILE):
        show(page, f"{address}#/run/{run}/iteration/1/response/{number}")
        text = page.eval_on_selector_all("main .text", "all => all[1].textContent")
        expected = visible(hostile)
        assert text == expected or (len(hostile) > 200_000 and text[:200_000] == expected[:200_000])
        assert_inert(page)


@pytest.mark.parametrize("place", ["server", "copy"])
def test_images_of_a_prompt_are_shown_if_a_run_may_have_written_them(page, served, tmp_path, place):
    address = served
    if place == "copy":
        run = pictured_run(tmp_path / "pictured")
        assert cli.main(["dashboard", str(run), "--bundle", str(tmp_path / "copy")]) == 0
        address = (tmp_path / "copy" / "index.html").as_uri()
    for where in ("group/0", "response/0"):
        show(page, f"{address}#/run/pictured/iteration/1/{where}")
        page.wait_for_function(
            "n => document.querySelectorAll('.pictures .note').length === n", arg=len(NAMES)
        )
        page.wait_for_function(
            "n => document.querySelectorAll('.pictures img.small').length === n", arg=len(SHOWN)
        )
        widths = page.eval_on_selector_all("main img", "all => all.map((one) => one.naturalWidth)")
        assert widths == [40] * len(SHOWN)
        assert page.evaluate("window.hacked ?? null") is None


def test_a_megabyte_in_one_line_comes_in_parts(page, served):
    show(page, f"{served}#/run/deep%2Fhostile/iteration/1/response/39")
    block = page.locator("main .text").nth(1)
    assert len(block.text_content()) < 300_000
    block.locator(".more").click()
    assert 300_000 < len(block.text_content()) < 500_000


def test_a_copy_opens_from_files(page, trained, tmp_path):
    out = tmp_path / "copy with spaces #1"
    assert cli.main(["dashboard", str(trained.parent), "--bundle", str(out)]) == 0
    address = Path(out / "index.html").as_uri()
    for where, expected in ADDRESSES.items():
        show(page, address + where)
        assert heading(page) == expected, where
    assert "static copy" in page.inner_text("header")
