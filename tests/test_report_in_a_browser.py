"""A run's page in a browser: every figure is drawn, fits, and answers to mouse, finger and keys."""

from __future__ import annotations

import json
import re

import pytest
import synthetic_run
from browser import Browser, in_a_browser
from synthetic_run import COLLAPSES, EACH, settings, write_lines
from test_report import EVERY, HOSTILE, NOTHING, tiles, write_knn

from dino_kit.report import record
from dino_kit.report.page import page

pytestmark = in_a_browser
READY = "document.documentElement.dataset.ready === 'yes' && drawnAll()"
# The charts are drawn when their sizes are known.
DRAWN = (
    "window.drawnAll = () => [...document.querySelectorAll('.chart')]"
    ".every((one) => one.querySelector('svg'))"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    try:
        made.attach()
        made.send("Page.addScriptToEvaluateOnNewDocument", source=DRAWN)
        yield made
    finally:
        made.close()


def write(run, looks=NOTHING):
    path = run / "report.html"
    path.write_text(page(record.read(run), looks, "Made by a test from what was there at"), "utf-8")
    return path


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    run = synthetic_run.make(tmp_path_factory.mktemp("runs") / "healthy")
    write_knn(run / "knn.json", 800)
    return write(run, tiles())


@pytest.fixture
def tab(browser, healthy):
    """The page of a healthy run; whatever the test does, no error may have been met."""
    browser.faults.clear()
    browser.open(healthy, READY)
    yield browser
    assert browser.faults == []


def open_at(tab, path, width: int, scheme: str = "light"):
    tab.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
             mobile=False)  # fmt: skip
    tab.send("Emulation.setEmulatedMedia",
             features=[{"name": "prefers-color-scheme", "value": scheme}])  # fmt: skip
    tab.open(path, READY)


@pytest.fixture
def any_size(tab):
    yield tab
    tab.send("Emulation.clearDeviceMetricsOverride")
    tab.send("Emulation.setEmulatedMedia", features=[])


def curves_of(tab, key: str) -> int:
    return tab.js(f"document.querySelectorAll('#chart-{key} .curve').length")


def readout(tab, key: str) -> str:
    return tab.text(f"#chart-{key} output")


def test_every_figure_is_drawn(tab):
    keys = tab.js("[...document.querySelectorAll('.chart')].map((one) => one.dataset.key)")
    assert set(keys) == EVERY and len(keys) == len(EVERY)
    two = {"information", "knn", "rank", "retrieval"}
    for key in EVERY:
        assert curves_of(tab, key) == (2 if key in two else 1), key
        assert re.search(r"\d", readout(tab, key)), key
        height = tab.js(f"document.querySelector('#chart-{key} .curve').getBBox().height")
        assert height > 5, key
    assert tab.js("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
    for selector in ("#movie", "#seen", "#nearest", "#results table", "#differences"):
        assert tab.box(selector)[2] > 200, selector


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 390, 768, 1280, 2000])
def test_the_page_fits_its_window(any_size, healthy, width, scheme):
    tab = any_size
    open_at(tab, healthy, width, scheme)
    tab.js("document.querySelector('details').open = true")
    assert tab.js("document.scrollingElement.scrollWidth") == width
    # No label of a figure leaves its card, and no two of an axis touch.
    out = tab.js("""[...document.querySelectorAll('.chart')].flatMap((chart) => {
        const card = chart.getBoundingClientRect();
        return [...chart.querySelectorAll('svg text')].filter((text) => {
            const box = text.getBoundingClientRect();
            return box.left < card.left || box.right > card.right || box.bottom > card.bottom;
        }).map((text) => `${chart.id}: ${text.textContent}`);
    })""")
    assert out == []
    touching = tab.js("""[...document.querySelectorAll('.chart')].filter((chart) => {
        const boxes = [...chart.querySelectorAll('svg text')].map((one) => one.getBoundingClientRect());
        const foot = Math.max(...boxes.map((box) => box.bottom));
        const axis = boxes.filter((box) => box.bottom > foot - 3).sort((a, b) => a.left - b.left);
        return axis.some((box, place) => place && box.left < axis[place - 1].right + 2);
    }).map((chart) => chart.id)""")
    assert touching == []
    # A curve's dot stands beside its name, and top-1 is seen without scrolling.
    apart = tab.js("""[...document.querySelectorAll('.chart .key')].filter((key) => {
        const word = (key.closest('i, b') || key.nextElementSibling).getBoundingClientRect();
        const dot = key.getBoundingClientRect();
        return dot.bottom < word.top || dot.top > word.bottom || word.height > 30;
    }).map((key) => key.closest('.chart').id)""")
    assert apart == []
    assert tab.js("""(() => { const head = document.querySelector('#results th.number');
        const card = head.closest('.card').getBoundingClientRect();
        return head.textContent === 'top-1, %' && head.getBoundingClientRect().right < card.right; })()""")
    # The text is large enough to be read on a phone.
    smallest = tab.js("""Math.min(...[...document.querySelectorAll('p, td, figcaption, svg text')]
        .map((one) => parseFloat(getComputedStyle(one).fontSize)))""")
    assert smallest >= 11
    style = "getComputedStyle(document.body)"
    paper, ink = (
        sum(map(int, re.findall(r"\d+", tab.js(f"{style}.{part}")))) / 3
        for part in ("backgroundColor", "color")
    )
    assert (paper > 200 and ink < 60) if scheme == "light" else (paper < 60 and ink > 200)


def test_pointing_at_a_figure_shows_the_values_of_that_step_in_all(tab, healthy):
    lines = record.read(healthy.parent).lines
    assert readout(tab, "loss") == f"{lines[-1]['loss']:.2f} nats"
    left, right = tab.js("(({left, right}) => [left, right])"
                         "(document.querySelector('#chart-loss').geometry)")  # fmt: skip
    width = tab.js("document.querySelector('#chart-loss .plot').clientWidth")
    tab.mouse("mouseMoved", "#chart-loss .plot", (left + 0.25 * (right - left)) / width, 0.5)
    at = next(line for line in lines if line["step"] == 200)
    assert readout(tab, "loss") == f"{at['loss']:.2f} nats"
    assert readout(tab, "spread") == f"{at['spread']:.2f}"
    assert readout(tab, "wait") == f"{100 * at['data_wait']:.0f} %".replace("-", "−")
    assert "epoch 5.0, step 200, learning" in tab.text("#chart-loss .pointer")
    assert "epoch 5.0" in tab.text("#chart-kl .pointer")
    tab.mouse("mouseMoved", "h1")
    tab.until("!document.querySelector('#chart-loss .pointer').childElementCount")
    assert readout(tab, "loss") == f"{lines[-1]['loss']:.2f} nats"


def test_a_finger_shows_values_and_they_stay(tab):
    last = readout(tab, "loss")
    tab.send("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        left, top, width, height = tab.box("#chart-loss .plot")
        point = {"x": left + 0.5 * width, "y": top + 0.5 * height}
        tab.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        tab.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        assert readout(tab, "loss") != last
        assert "epoch" in tab.text("#chart-loss .pointer")
    finally:
        tab.send("Emulation.setTouchEmulationEnabled", enabled=False)


def test_keys_go_along_the_curves(tab):
    tab.focus("#chart-loss")
    tab.press("Home")
    assert "step 0" in tab.text("#chart-loss .pointer")
    tab.press("ArrowRight", "ArrowRight")
    assert f"step {2 * 8}" in tab.text("#chart-loss .pointer")
    tab.press("End", "ArrowLeft")
    assert f"step {20 * EACH - 8}" in tab.text("#chart-loss .pointer")
    label = tab.js("document.querySelector('#chart-loss').getAttribute('aria-label')")
    assert re.fullmatch(r"Loss: [\d.]+ nats at epoch 19.8, step 792", label)


def caption(tab) -> str:
    return tab.text("#caption")


def test_the_film_is_played_and_sought_by_mouse_and_keys(tab):
    assert caption(tab) == "after epoch 20 · k-NN 93.8 % · rank 36.9 · retrieval 88 %"
    frames = tab.js("data.film.map((frame) => frame.source)")
    assert len(set(frames)) == 6 and tab.js("$('frame').src") == frames[-1]
    tab.focus("#movie")
    tab.press("Home")
    assert caption(tab).startswith("before training · k-NN 60.0 %")
    assert tab.js("$('frame').src") == frames[0]
    tab.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert caption(tab).startswith("after epoch 4 ·") and tab.js("$('seek').value") == "1"
    tab.click("#seek", 0.99)
    assert caption(tab).startswith("after epoch 20")
    tab.click("#play")  # from the end it begins again, and ends there
    assert caption(tab).startswith("before training")
    assert tab.js("$('play').getAttribute('aria-label')") == "Pause"
    tab.until("$('caption').textContent.startsWith('after epoch 4 ')")
    tab.until("$('caption').textContent.startsWith('after epoch 20')")
    tab.until("$('play').getAttribute('aria-label') === 'Play'")
    tab.click("#play")
    tab.click("#play")
    assert tab.js("$('play').getAttribute('aria-label')") == "Play"


@pytest.mark.parametrize("state", COLLAPSES)
def test_a_collapse_is_marked_along_the_time(tab, tmp_path, state):
    tab.open(write(synthetic_run.make(tmp_path / "run", state)), READY)
    assert tab.text("#verdict .state") == state
    assert state in tab.text("#legend") and "learning" in tab.text("#legend")
    heights = tab.js("[...document.querySelectorAll('#chart-loss .state')]"
                     ".map((one) => one.getBoundingClientRect().height)")  # fmt: skip
    assert len(heights) == 3 and heights[2] > heights[1] == heights[0]
    colours = tab.js("[...document.querySelectorAll('#chart-loss .state')]"
                     ".map((one) => getComputedStyle(one).fill)")  # fmt: skip
    assert len(set(colours)) == 3


SHORT = {"done": 0.03, "probes": 1}
OLD = {"health": False, "probes": 0}
KINDS = {
    "unlabelled": {"labels": False},
    "short": SHORT,
    "one line": {"done": 0.0126, "probes": 0},
    "nothing": {"done": 0.0, "probes": 0},
    "old": OLD,
    "in half an epoch": {"done": 0.02, "probes": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_kind_are_drawn_without_a_fault(any_size, tmp_path, kind):
    tab = any_size
    path = write(synthetic_run.make(tmp_path / "run", **KINDS[kind]))
    open_at(tab, path, 360)
    keys = tab.js("[...document.querySelectorAll('.chart')].map((one) => one.dataset.key)")
    assert bool(keys) == (kind != "nothing")
    for key in keys:
        assert curves_of(tab, key) >= 1, key
    assert not re.search(r"NaN|undefined|Infinity|null", tab.js("document.body.innerText"))
    assert tab.js("document.scrollingElement.scrollWidth") == 360


def test_gaps_and_constant_and_odd_values_are_drawn(tab, tmp_path):
    run = synthetic_run.make(tmp_path / "run", probes=0)
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    for place, row in enumerate(rows):
        row |= {"kl": 0.0, "grad_norm": 0.0 if place % 2 else 1e9, "spread": -1e-12, "loss": 1e300}
        if place % 5 == 0:
            del row["loss"]
            row["teacher_entropy"] = None
    write_lines(run / "metrics.jsonl", rows)
    tab.open(write(run), READY)
    path = tab.js("document.querySelector('#chart-entropy .curve').getAttribute('d')")
    assert path.count("M") > 10  # after each gap it begins again
    for key in EVERY - {"knn"}:
        shape = tab.js(f"document.querySelector('#chart-{key} svg').innerHTML")
        assert not re.search(r"NaN|undefined|Infinity", shape), key
    assert not re.search(r"NaN|undefined", tab.js("document.body.innerText"))


def test_a_huge_run_is_drawn_with_its_range(tab, tmp_path):
    path = write(synthetic_run.make(tmp_path / "run", lines=100_000, probes=0))
    assert path.stat().st_size < 600_000
    tab.open(path, READY)
    assert tab.js("document.querySelector('#chart-kl .range').getBBox().height") > 5
    assert "least to largest" in tab.text("#legend")
    assert tab.js("document.querySelectorAll('*').length") < 3000


def test_names_from_files_do_nothing(tab, tmp_path):
    run = synthetic_run.make(tmp_path / "run", config=settings(data_path=HOSTILE))
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [row | {"state": HOSTILE} for row in rows])
    tab.open(write(run, tiles(HOSTILE)), READY)
    assert tab.js("window.hostile === undefined")
    assert HOSTILE in tab.text("#legend") and tab.text("#verdict .state") == HOSTILE


def test_the_page_can_be_printed(tab):
    tab.js("dispatchEvent(new Event('beforeprint'))")
    assert tab.js("[...document.querySelectorAll('details')].every((one) => one.open)")
    tab.send("Emulation.setEmulatedMedia", media="print",
             features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
    try:
        assert tab.js("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        ink = re.findall(r"\d+", tab.js("getComputedStyle(document.body).color"))
        assert max(map(int, ink)) < 60
    finally:
        tab.send("Emulation.setEmulatedMedia", media="", features=[])
