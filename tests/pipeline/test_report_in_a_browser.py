"""report.html in a real browser: it draws, asks for nothing, opens what is clicked, fits the dark, a phone and paper."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.pipeline.page.write import write_page
from tests.helpers.chromium import Browser, chromium
from tests.helpers.reports import answer_otherwise, finished_run, write_front

OPENED = "[...document.querySelectorAll('details[open]')].map((box) => box.id)"
EVIL = "<script>document.title = 'attacked'</script>"
# The place of a point in the window: of the trace with a name, in the plot with an id.
POINT = """(() => {{
  const plot = document.getElementById("{plot}");
  const index = plot.data.findIndex((trace) => trace.name === "{trace}");
  plot.scrollIntoView({{block: "center", behavior: "instant"}});
  const place = plot.querySelectorAll(".scatterlayer .trace")[index].querySelector(".points path").getBoundingClientRect();
  return [place.x + place.width / 2, place.y + place.height / 2];
}})()"""
TEXT_COLOUR = "getComputedStyle(document.querySelector('#front-bytes .xtitle')).fill"
GROUND = "getComputedStyle(document.body).backgroundColor"
PLOTS = "[...document.querySelectorAll('.plot .main-svg:first-child')].map((drawn) => +drawn.getAttribute('width'))"


@pytest.fixture(scope="module")
def report(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with candidates of a search, changed answers, and texts that would be scripts."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("report") / "tiny"))
    settings = json.dumps({"widths": [8, 16], "note": EVIL})
    write_front(folder, "03-prune", *((f"candidate {place}", EVIL, "int8", 0.4 * place, 9000 * place, 10, 10, 0.9, 20, 1,
                                       "kept", settings) for place in range(1, 8)))
    run = finished_run(folder)
    labels = run.validation.labels.tolist()
    answer_otherwise(folder, "06-package", {image: (label + 1) % 4 for image, label in enumerate(labels)})
    card = run.card.model_copy(update={"class_names": [EVIL, "a \"quoted\" class", "class_002", "a" * 120]})
    write_page(dataclasses.replace(run, card=card, warnings=[EVIL, "/a/path/" + "x" * 200],
                                   config=run.config.model_copy(update={"name": "\"it's\" " + EVIL})))
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def shown(browser: Browser, report: Path) -> Browser:
    """The browser with the page as a desktop shows it."""
    browser.look(1280, 900)
    browser.open(report)
    return browser


def test_it_draws_without_a_complaint_or_a_request(shown: Browser, report: Path) -> None:
    assert shown.value("document.querySelectorAll('.plot .main-svg').length") >= 4
    traces = shown.value("document.querySelectorAll('#front-bytes .scatterlayer .trace').length")
    assert traces == 8  # the front, the candidates, six stages
    assert shown.value("document.querySelectorAll('#front-latency .errorbar').length") >= 12
    assert shown.value("document.querySelectorAll('#curves-loss .scatterlayer .trace').length") == 6
    assert shown.value("[...document.images].every((image) => image.naturalWidth === 8)")
    assert shown.value("document.title").startswith("\"it's\" <script>")
    assert shown.complaints() == [] and shown.requests() == [report.absolute().as_uri()]
    # The policy of the page keeps even a script that got in from running, and from asking for anything.
    shown.value("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))")
    assert shown.value("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'kept')") == "kept"
    assert shown.value("document.title").startswith("\"it's\" <script>")


def test_a_click_opens_the_stage_or_the_candidate(shown: Browser) -> None:
    shown.look(1280, 900, prefers_reduced_motion="reduce")  # no smooth scrolling while the next place is clicked
    assert shown.value(OPENED) == []
    shown.click(*shown.value(POINT.format(plot="front-bytes", trace="float")))
    assert shown.value(OPENED) == ["stage-1"]
    assert shown.value("document.activeElement === document.querySelector('#stage-1 > summary')")
    shown.click(*shown.value(POINT.format(plot="front-latency", trace="int8 candidate")))
    assert shown.value(OPENED) == ["stage-1", "stage-3"]
    assert shown.value("document.activeElement.id") == "stage-3-candidate-1"
    assert shown.value("document.querySelector('.found').textContent").startswith("candidate 1")
    shown.value("document.querySelector('#ledger a[href=\"#stage-2\"]').click()")
    assert shown.value(f"new Promise((done) => setTimeout(() => done({OPENED}), 50))") == ["stage-1", "stage-2", "stage-3"]


def test_an_address_that_names_nothing_is_no_complaint(shown: Browser) -> None:
    shown.value("new Promise((done) => { location.hash = '#%'; setTimeout(() => done(true), 50); })")
    assert shown.complaints() == [] and shown.value(OPENED) == []


def test_the_dark_reaches_the_plots(shown: Browser) -> None:
    light = shown.value(TEXT_COLOUR), shown.value(GROUND)
    shown.look(1280, 900, prefers_color_scheme="dark")
    dark = shown.value(TEXT_COLOUR), shown.value(GROUND)
    assert dark == ("rgb(155, 165, 175)", "rgb(21, 24, 27)") and light == ("rgb(89, 99, 110)", "rgb(251, 251, 250)")


def test_nothing_is_wider_than_a_phone(shown: Browser, report: Path) -> None:
    shown.look(390, 844)
    shown.open(report)
    shown.value("document.querySelectorAll('details').forEach((box) => { box.open = true; })")
    assert shown.value("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    assert max(shown.value(PLOTS)) <= 390
    assert shown.value("(() => { const box = document.querySelector('#ledger .scroll');"
                       " return box.scrollWidth > box.clientWidth; })()")


def test_paper_gets_everything_in_the_colours_of_the_day(shown: Browser) -> None:
    shown.look(1280, 900, prefers_color_scheme="dark")
    shown.value("document.getElementById('stage-2').open = true")
    shown.look(1280, 900, prefers_color_scheme="dark", type="print")
    assert shown.value("[...document.querySelectorAll('details')].every((box) => box.open)")
    assert shown.value(TEXT_COLOUR) == "rgb(89, 99, 110)" and shown.value(GROUND) == "rgb(251, 251, 250)"
    assert shown.value(PLOTS) == [680] * 4
    shown.look(1280, 900)
    assert shown.value(OPENED) == ["stage-2"]
    assert shown.pdf().startswith(b"%PDF")
    assert shown.complaints() == []
