"""The page on which attention is explored, explored in a browser."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from browser import Browser, in_a_browser
from test_attention_page import COLOURS, HEADS, HOSTILE, Read, attention, photo

from dino_kit.attention_page import exhibit, page
from dino_kit.evaluators.attention import threshold_mask

pytestmark = in_a_browser
READY = "document.getElementById('high').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    try:
        made.attach()
        yield made
    finally:
        made.close()


GRIDS = [(3, 4), (5, 2), (24, 24)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A page of three images, with two prefix tokens."""
    exhibits = [
        exhibit(f"image {place}", photo(grid[0] * 40, grid[1] * 40),
                attention(grid, 2, seed=place), grid, f"Note {place}.")
        for place, grid in enumerate(GRIDS)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "attention.html"
    path.write_text(page("Attention", HOSTILE, exhibits, COLOURS), encoding="utf-8")
    return path


@pytest.fixture
def tab(browser, file):
    """The page, opened; at the end it must have met no error."""
    browser.faults.clear()
    browser.open(file, READY)
    yield browser
    assert browser.js("typeof window.hostile") == "undefined"
    assert not browser.faults


@pytest.fixture(scope="module")
def maps(file):
    """Each image's maps (heads, T, N) as the page holds them."""
    read = Read(file.read_text(encoding="utf-8"))
    return [read.rows(place) for place in range(len(GRIDS))]


def centre(patch: int, grid=GRIDS[0]) -> tuple[float, float]:
    row, column = divmod(patch, grid[1])
    return (column + 0.5) / grid[1], (row + 0.5) / grid[0]


def place(patch: int, grid=GRIDS[0]) -> str:
    row, column = divmod(patch, grid[1])
    return f"row {row + 1}, column {column + 1}"


def said(tab, token: int, values: np.ndarray, grid=GRIDS[0]) -> bool:
    """Whether the read-out says of the row ``values`` what there is to say."""
    names = ["Class token", "Extra token 1"]
    name = names[token] if token < 2 else f"Patch in {place(token - 2, grid)}"
    best = int(values.argmax())
    half = int(threshold_mask(torch.from_numpy(values.copy())[None].float(), 0.5).sum())
    share = re.search(r"\(([\d.]+) %\)", readout := tab.text("#readout"))
    return (
        readout.startswith(f"{name} looks most at {place(best, grid)} (")
        and readout.endswith(f"lies on {half} of {len(values)}")
        and float(share[1]) == pytest.approx(100 * values[best], rel=0.06)
        and tab.text("#high") == f"{share[1]} %"
    )


def shows(pixels: np.ndarray, values: np.ndarray, kept=None) -> bool:
    """Whether pixels (h, w, 4) are ``values`` in colours, from 0 to the largest, or black."""
    table = COLOURS["inferno"].astype(int)
    levels = np.rint(255 * values / values.max()).astype(int)
    near = [table[np.clip(levels + shift, 0, 255)] for shift in (-1, 0, 1)]  # rounding
    if kept is not None:
        near = [np.where(kept[:, None], colours, 0) for colours in near]
    found = pixels.reshape(-1, 4).astype(int)
    same = [(found[:, :3] == colours).all(axis=1) for colours in near]
    return bool(np.any(same, axis=0).all() and (found[:, 3] == 255).all())


def head_canvas(head: int) -> str:
    return f"#heads button:nth-child({head + 2}) canvas"


def test_the_page_unpacks_and_begins_with_the_class_tokens_mean(tab, maps):
    assert said(tab, 0, maps[0].mean(axis=0)[0])
    assert tab.text("#name") == "image 0" and tab.text("#note") == "Note 0."
    assert shows(tab.canvas(head_canvas(-1)), maps[0].mean(axis=0)[0])
    for head in range(HEADS):
        assert shows(tab.canvas(head_canvas(head)), maps[0][head, 0])
    assert HOSTILE in tab.text("main")


@pytest.mark.parametrize("side", ["#left .picture", "#right .picture"])
def test_pointing_at_a_patch_shows_where_it_looks(tab, maps, side):
    before = tab.canvas("#heat")
    for patch in (6, 0, 11):
        tab.mouse("mouseMoved", side, *centre(patch))
        assert said(tab, 2 + patch, maps[0].mean(axis=0)[2 + patch])
        assert shows(tab.canvas(head_canvas(1)), maps[0][1, 2 + patch])
        after = tab.canvas("#heat")
        assert not np.array_equal(after, before)
        before = after
    for figure in ("#left", "#right"):
        picture, cursor = tab.js(f"""[".picture", ".cursor"].map((part) => {{
            const box = document.querySelector("{figure} " + part).getBoundingClientRect();
            return [box.left, box.top, box.right, box.bottom];
        }})""")
        assert cursor[2:] == pytest.approx(picture[2:], abs=1)  # the last patch is in the corner
        size = [cursor[2] - cursor[0], cursor[3] - cursor[1]]
        whole = [picture[2] - picture[0], picture[3] - picture[1]]
        assert size == pytest.approx([whole[0] / 4, whole[1] / 3], abs=1)


def test_the_strongest_patch_is_the_most_opaque(tab, maps):
    tab.mouse("mouseMoved", "#right .picture", *centre(5))
    values = maps[0].mean(axis=0)[7]
    alpha = tab.canvas("#heat")[..., 3].ravel().astype(int)
    assert np.array_equal(np.argsort(alpha, kind="stable"), np.argsort(values, kind="stable"))


def test_the_head_slider_and_the_small_maps_choose_a_head(tab, maps):
    mean = tab.canvas("#heat")
    tab.focus("#head")
    tab.press("ArrowRight")
    assert said(tab, 0, maps[0][0, 0]) and tab.text("#head-name") == "0"
    assert not np.array_equal(tab.canvas("#heat"), mean)
    tab.press("End")
    assert said(tab, 0, maps[0][HEADS - 1, 0]) and tab.text("#head-name") == str(HEADS - 1)
    tab.click("#heads button:nth-child(3)")
    assert said(tab, 0, maps[0][1, 0])
    assert tab.js("document.getElementById('head').value") == "1"
    tab.click("#heads button:nth-child(1)")
    assert said(tab, 0, maps[0].mean(axis=0)[0]) and np.array_equal(tab.canvas("#heat"), mean)


def test_the_threshold_slider_keeps_what_the_masks_keep(tab, maps):
    whole = tab.canvas("#heat")
    tab.focus("#keep")
    for share in (0.99, 0.98, 0.97):
        tab.press("ArrowLeft")
        assert tab.text("#keep-name") == f"{round(100 * share)} %"
        for head in range(HEADS):
            row = maps[0][head, 0]
            (kept,) = threshold_mask(torch.from_numpy(row.copy())[None], share).numpy()
            assert shows(tab.canvas(head_canvas(head)), row, kept)
    assert not np.array_equal(tab.canvas("#heat"), whole)
    tab.press("Home")  # 1 %: what alone holds that much
    assert (tab.canvas(head_canvas(0))[..., :3].any(axis=-1)).sum() == 1


def test_a_page_begins_with_the_share_of_the_masks(tab, tmp_path):
    given = attention(GRIDS[0], 2)
    given[1] = 1 / 14
    one = exhibit("a", photo(12, 16), given, GRIDS[0])
    path = tmp_path / "page.html"
    path.write_text(page("Attention", "", [one], COLOURS, 0.6), encoding="utf-8")
    tab.open(path, READY)
    assert tab.text("#keep-name") == "60 %" and tab.js("$('keep').value") == "60"
    assert tab.js("$('images').hidden")
    for head in (1, 2):  # of equal ones, too, the same are kept
        row = Read(path.read_text(encoding="utf-8")).rows(0)[head, 0]
        (kept,) = threshold_mask(torch.from_numpy(row.copy())[None], 0.6).numpy()
        assert 0 < kept.sum() < 12 and shows(tab.canvas(head_canvas(head)), row, kept)


def test_a_click_pins_a_patch_and_another_click_frees_it(tab, maps):
    mean = maps[0].mean(axis=0)
    tab.click("#right .picture", *centre(6))
    assert "pinned" in tab.text("#hint")
    tab.mouse("mouseMoved", "#right .picture", *centre(0))
    assert said(tab, 2 + 6, mean[2 + 6])
    tab.click("#left .picture", *centre(9))  # moves the pin
    tab.mouse("mouseMoved", "#right .picture", *centre(0))
    assert said(tab, 2 + 9, mean[2 + 9])
    tab.click("#left .picture", *centre(9))
    assert tab.text("#hint") == "click to pin a patch"
    tab.mouse("mouseMoved", "#right .picture", *centre(0))
    assert said(tab, 2, mean[2])


def test_a_finger_chooses_a_patch_and_pins_nothing(tab, maps):
    tab.send("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        for patch in (6, 1):
            left, top, width, height = tab.box("#right .picture")
            across, down = centre(patch)
            point = {"x": left + across * width, "y": top + down * height}
            tab.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
            tab.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            assert said(tab, 2 + patch, maps[0].mean(axis=0)[2 + patch])
            assert "pinned" not in tab.js("document.getElementById('stage').className")
    finally:
        tab.send("Emulation.setTouchEmulationEnabled", enabled=False)


def test_keys_move_the_patch_pin_it_and_choose_the_class_token(tab, maps):
    mean = maps[0].mean(axis=0)
    tab.focus("#stage")
    tab.press("ArrowLeft")  # from the class token to the middle
    assert said(tab, 2 + 6, mean[2 + 6])
    tab.press("ArrowUp", "ArrowLeft")
    assert said(tab, 2 + 1, mean[2 + 1])
    tab.press("ArrowUp", "ArrowLeft", "ArrowLeft")  # no further than the edge
    assert said(tab, 2, mean[2])
    tab.press(*["ArrowDown"] * 5, *["ArrowRight"] * 5)
    assert said(tab, 2 + 11, mean[2 + 11])
    tab.press("Enter")
    tab.mouse("mouseMoved", "#right .picture", *centre(0))
    assert said(tab, 2 + 11, mean[2 + 11])
    for key in ("c", "C"):  # with the capitals locked too
        tab.press(key)
        assert said(tab, 0, mean[0])
        tab.press("ArrowUp")


def test_every_prefix_token_has_a_button(tab, maps):
    tab.click("#tokens button:nth-child(2)")
    assert said(tab, 1, maps[0].mean(axis=0)[1])
    assert tab.js("document.querySelector('#right .cursor').hidden")
    pressed = tab.js("[...$('tokens').children].map((one) => one.ariaPressed)")
    assert pressed == ["false", "true"]


def test_images_are_switched(tab, maps):
    assert tab.js("document.querySelectorAll('#images button').length") == len(GRIDS)
    tab.click("#right .picture", *centre(6))
    for index in (1, 2, 0):
        tab.click(f"#images button:nth-child({index + 1})")
        tab.until(f"$('name').textContent === 'image {index}'")
        assert said(tab, 0, maps[index].mean(axis=0)[0], GRIDS[index])
        assert tab.canvas("#heat").shape == (*GRIDS[index], 4)
        current = "[...$('images').children].findIndex((one) => one.ariaCurrent === 'true')"
        assert tab.js(current) == index and tab.text("#note") == f"Note {index}."
        assert tab.js(f"$('plain').src === data.images[{index}].src")
        patch = GRIDS[index][1]  # the first of the second row
        tab.mouse("mouseMoved", "#left .picture", *centre(patch, GRIDS[index]))
        assert said(tab, 2 + patch, maps[index].mean(axis=0)[2 + patch], GRIDS[index])


def test_the_image_chosen_last_is_shown_though_another_unpacks_longer(tab, maps):
    tab.js("""
        const unpackNow = unpack;
        let release, first = new Promise((done) => { release = done; });
        unpack = async (text) => {
            const maps = await unpackNow(text), waits = first;
            first = null;
            await waits;
            return maps;
        };
        show(2); 0
    """)
    tab.until("first === null")
    tab.js("show(1)")
    tab.until("$('name').textContent === 'image 1'")
    tab.js("release(), new Promise((done) => setTimeout(done))")
    assert tab.text("#name") == "image 1"
    assert said(tab, 0, maps[1].mean(axis=0)[0], GRIDS[1])


def test_colours_can_be_chosen(tab):
    seen = [tab.canvas("#heat")]
    assert tab.js("[...$('colours').options].map((one) => one.value)") == [*COLOURS, "spotlight"]
    tab.focus("#colours")
    for _ in range(2):
        tab.press("ArrowDown")
        seen.append(tab.canvas("#heat"))
    assert not np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[1], seen[2])
    assert (seen[2][..., :3] == 0).all()  # a spotlight is darkness with holes in it
    tab.click("#smooth")
    assert tab.js("getComputedStyle($('heat')).imageRendering") == "auto"


def test_maps_that_cannot_be_unpacked_are_said_so(tab, file, tmp_path):
    text = file.read_text(encoding="utf-8")
    path = tmp_path / "page.html"
    path.write_text(re.sub(r'(id="maps-1">)[^<]+', r"\1AAAA", text), encoding="utf-8")
    tab.open(path, READY)
    tab.click("#images button:nth-child(2)")
    tab.until("$('readout').textContent.includes('cannot be unpacked')")


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("grid", [(3, 4), (2, 40), (40, 2), (10, 10)])
def test_no_picture_makes_the_page_wider_than_its_window(tab, tmp_path, width, grid):
    name = "a_name_without_any_place_to_break_it_" * 4
    one = exhibit(name, photo(grid[0] * 16, grid[1] * 16), attention(grid), grid)
    path = tmp_path / "page.html"
    path.write_text(page("Attention", name, [one] * 30, COLOURS), encoding="utf-8")
    tab.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
             mobile=False)  # fmt: skip
    try:
        tab.open(path, READY)
        tab.js("document.querySelector('details').open = true")
        assert tab.js("document.scrollingElement.scrollWidth") == width
        left, _, drawn, high = tab.box("#right .picture")
        assert drawn / high == pytest.approx(grid[1] / grid[0], rel=0.02)
        assert high <= 800 and left >= 0 and left + drawn <= width
        for selector in ("#name", "#high", "#scale", "#readout", "#keep"):
            left, _, wide, high = tab.box(selector)
            assert wide > 0 and high > 0 and left >= 0 and left + wide <= width, selector
        assert tab.box("#high")[3] < 30, "the number is broken in two"
        if width == 1280 and grid == (2, 40):  # a strip takes all the room there is
            assert drawn > 1000
    finally:
        tab.send("Emulation.clearDeviceMetricsOverride")


def test_the_page_is_dark_where_that_is_wished_and_the_text_stands_out_in_both(tab):
    light = []
    for scheme in ("light", "dark"):
        tab.send("Emulation.setEmulatedMedia",
                 features=[{"name": "prefers-color-scheme", "value": scheme}])  # fmt: skip
        style = "getComputedStyle(document.body)"
        for part in ("backgroundColor", "color"):
            light.append(sum(map(int, re.findall(r"\d+", tab.js(f"{style}.{part}")))) / 3)
    tab.send("Emulation.setEmulatedMedia", features=[])
    paper, ink, dark_paper, light_ink = light
    assert min(paper, light_ink) > 200 and max(ink, dark_paper) < 60
