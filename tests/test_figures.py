"""Attention maps as pictures, and the files they are written to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dino_kit.figures import colour_table, heat, masked, overlay, save_attention, sheet

COLOURS = colour_table()


def photo(rows: int, columns: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (rows, columns, 3)).astype(np.uint8))


def attention(*shape: int) -> np.ndarray:
    rows = np.random.default_rng(sum(shape)).random(shape).astype("f4")
    return rows / rows.sum(axis=(-2, -1), keepdims=True)


@pytest.mark.parametrize("name", ["inferno", "viridis", "gray"])
def test_a_colour_table_goes_from_dark_to_bright(name):
    table = colour_table(name)
    assert table.shape == (256, 3) and table.dtype == np.uint8
    light = table @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(light) > -0.5).all() and light[-1] - light[0] > 150


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.integers(0, 99))
def test_a_raw_map_has_one_square_of_one_colour_for_each_patch(rows, columns, patch, seed):
    values = np.random.default_rng(seed).random((rows, columns)).astype("f4")
    drawn = np.asarray(heat(values, (rows * patch, columns * patch), COLOURS))
    assert drawn.shape == (rows * patch, columns * patch, 3)
    span = np.ptp(values) or 1.0
    levels = ((values - values.min()) / span * 255).round().astype(int)
    assert np.array_equal(drawn, COLOURS[levels].repeat(patch, axis=0).repeat(patch, axis=1))


def test_a_map_is_scaled_from_its_smallest_value_to_its_largest():
    drawn = np.asarray(heat(np.array([[0.011, 0.012, 0.013]], "f4"), (1, 3), COLOURS))
    assert np.array_equal(drawn[0, [0, 2]], COLOURS[[0, 255]])
    flat = np.asarray(heat(np.full((2, 2), 0.25, "f4"), (4, 4), COLOURS))
    assert (flat == COLOURS[0]).all()


def test_on_the_image_a_map_glows_where_it_is_strong_and_only_dims_where_it_is_weak():
    image, values = photo(40, 60), np.zeros((4, 6), "f4")
    dimmed = np.asarray(overlay(image, values, COLOURS)).astype(int)
    assert (dimmed <= np.asarray(image).max(axis=-1, keepdims=True)).all()
    values[1, 2] = 0.7
    drawn = np.asarray(overlay(image, values, COLOURS)).astype(int)
    assert drawn.shape == (40, 60, 3)
    far = np.s_[30:, 45:]
    assert np.array_equal(drawn[far], dimmed[far])
    # The middle of the patch in row 1, column 2.
    distance = abs(drawn[14:16, 24:26] - COLOURS[255].astype(int)).max()
    assert distance < 60 < abs(dimmed[14:16, 24:26] - COLOURS[255].astype(int)).max()


def test_on_the_image_a_map_is_smooth_between_patches():
    gray = Image.new("RGB", (80, 80), (128, 128, 128))
    values = np.zeros((4, 4), "f4")
    values[1:3, 1:3] = 1.0
    smooth = np.asarray(overlay(gray, values, COLOURS)).astype(int)
    raw = np.asarray(heat(values, (80, 80), COLOURS)).astype(int)
    steps = [abs(np.diff(drawn, axis=1)).max() for drawn in (smooth, raw)]
    assert steps[0] < 0.3 * steps[1]


def test_a_mask_keeps_the_pixels_of_its_patches_outlines_them_and_dims_the_rest():
    image, mask = photo(60, 80), np.zeros((3, 4), bool)
    mask[1, 1:3] = True
    drawn, pixels = np.asarray(masked(image, mask)), np.asarray(image)
    inside = np.zeros((60, 80), bool)
    inside[20:40, 20:60] = True
    core = np.zeros_like(inside)
    core[21:39, 21:59] = True
    assert np.array_equal(drawn[core], pixels[core])
    assert len(np.unique(drawn[inside & ~core], axis=0)) == 1
    gray = np.asarray(image.convert("L")).astype("f4")
    expected = (0.35 * gray).round()[~inside]
    assert np.array_equal(drawn[~inside], expected[:, None].repeat(3, axis=1))


def test_a_mask_of_all_patches_is_the_image_and_one_of_none_has_no_colour():
    image = photo(12, 12)
    whole = np.asarray(masked(image, np.ones((3, 3), bool)))
    assert np.array_equal(whole, np.asarray(image))
    none = np.asarray(masked(image, np.zeros((3, 3), bool)))
    assert (none == none[..., :1]).all() and none.max() < 0.36 * 255


def written(monkeypatch, *arguments) -> tuple[Image.Image, list[tuple[str, tuple]]]:
    """A sheet, and the texts on it with their boxes (left, top, right, bottom)."""
    texts, draw = [], ImageDraw.ImageDraw.text

    def spy(self, place, text, fill, font, **options):
        texts.append((text, self.textbbox(place, text, font, **options)))
        draw(self, place, text, fill, font, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", spy)
        return sheet(*arguments), texts


def apart(one, other) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


SUBTITLE = "A sentence of some length, for which a sheet of narrow pictures has no room. " * 4


@pytest.mark.parametrize("count", [3, 6, 9, 15])
@pytest.mark.parametrize("width, height", [(120, 120), (20, 200), (200, 20), (3, 3), (300, 40)])
def test_on_a_sheet_nothing_lies_on_anything_else(monkeypatch, width, height, count):
    tints = [(250, 10 + place, 20) for place in range(count)]
    panels = [
        ("mean, on the image", "480 × 320", Image.new("RGB", (width, height), tint))
        for tint in tints
    ]
    drawn, texts = written(monkeypatch, "Title", SUBTITLE, panels)
    pixels = np.asarray(drawn)
    boxes = [box for _, box in texts]
    for tint in tints:
        found = np.argwhere((pixels == tint).all(axis=-1))
        assert len(found) == width * height, "a picture is covered"
        (top, left), (bottom, right) = found.min(axis=0), found.max(axis=0) + 1
        assert (bottom - top, right - left) == (height, width)
        boxes.append((left, top, right, bottom))
    for place, one in enumerate(boxes):
        assert min(one) >= 0 and one[2] <= drawn.width and one[3] <= drawn.height
        assert all(apart(one, other) for other in boxes[:place])


def test_a_sheets_subtitle_is_never_cut(monkeypatch):
    for width in (4, 90, 400):
        panels = [("a", "", Image.new("RGB", (width, width)))] * 3
        _, texts = written(monkeypatch, "Title", SUBTITLE, panels)
        title, *lines = [text for text, _ in texts if text != "a" and text]
        assert title == "Title" and " ".join(lines) == SUBTITLE.strip()


def test_a_title_that_is_too_long_or_has_line_breaks_stays_one_line(monkeypatch):
    panels = [("a", "", Image.new("RGB", (90, 90)))] * 3
    _, texts = written(monkeypatch, "name " * 60, SUBTITLE, panels)
    assert texts[0][0].startswith("name name") and texts[0][0].endswith(" …")
    _, texts = written(monkeypatch, "two\nlines", SUBTITLE, panels)
    assert texts[0][0] == "two lines"


@pytest.mark.parametrize("panels, columns", [(4, 2), (6, 3), (9, 3), (15, 5)])
def test_a_sheet_of_square_pictures_is_a_full_grid(panels, columns):
    picture = Image.new("RGB", (200, 200), (1, 200, 3))
    pixels = np.asarray(sheet("", "", [("", "", picture)] * panels))
    found = (pixels == (1, 200, 3)).all(axis=-1)
    assert found.any(axis=0).sum() == columns * 200
    assert found.any(axis=1).sum() == panels // columns * 200


@pytest.fixture
def saved(tmp_path):
    maps, image = attention(2, 3, 5), photo(24, 40)
    masks = np.random.default_rng(0).random((3, 3, 5)) > 0.5
    paths = save_attention(
        tmp_path / "new/folder", image, maps,
        title="picture", masks=masks, keep=0.6, facts={"epoch": 7, "path": "a"},
    )  # fmt: skip
    return paths, maps, image, masks


def test_every_picture_and_the_numbers_are_written(saved, tmp_path):
    paths, maps, image, masks = saved
    names = ["head0", "head1", "mean"]
    expected = [f"{kind}{name}.png" for name in names for kind in ("attn-", "overlay-")]
    expected += [f"mask_th0.6_{name}.png" for name in names]
    assert paths[0].name == "sheet.png"
    assert {path.name for path in paths} == {*expected, "sheet.png", "img.png", "attention.npz"}
    assert set(paths) == set((tmp_path / "new/folder").iterdir())

    def read(name: str) -> np.ndarray:
        with Image.open(tmp_path / "new/folder" / name) as one:
            assert one.format == "PNG" and one.mode == "RGB"
            return np.asarray(one)

    assert np.array_equal(read("img.png"), np.asarray(image))
    for name, one, mask in zip(names, [*maps, maps.mean(axis=0)], masks, strict=True):
        assert np.array_equal(read(f"attn-{name}.png"), np.asarray(heat(one, (24, 40), COLOURS)))
        assert np.array_equal(read(f"overlay-{name}.png"), np.asarray(overlay(image, one, COLOURS)))
        assert np.array_equal(read(f"mask_th0.6_{name}.png"), np.asarray(masked(image, mask)))
    with np.load(paths[-1]) as arrays:
        assert set(arrays.files) == {"attention", "epoch", "path"}
        assert np.array_equal(arrays["attention"], maps) and arrays["attention"].dtype == "f4"
        assert arrays["epoch"] == 7 and arrays["path"] == "a"


def test_the_sheet_shows_the_image_and_every_map(saved):
    paths, maps, image, _ = saved
    with Image.open(paths[0]) as one:
        pixels = np.asarray(one)
    height, width = 3 * (232 // 5), 5 * (232 // 5)
    large, mean = image.resize((width, height), Image.Resampling.NEAREST), maps.mean(axis=0)
    panels = [heat(one, (height, width), COLOURS) for one in (*maps, mean)]
    for panel in map(np.asarray, [large, overlay(large, mean, COLOURS), *panels]):
        corners = np.argwhere((pixels == panel[0, 0]).all(axis=-1))
        assert any(np.array_equal(pixels[y : y + height, x : x + width], panel) for y, x in corners)


def test_the_sheet_says_height_before_width_as_the_flag_does(monkeypatch, tmp_path):
    texts = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text",
        lambda self, place, text, *rest, **options: (
            texts.append(text), draw(self, place, text, *rest, **options),
        ),
    )  # fmt: skip
    save_attention(tmp_path, photo(24, 40), attention(1, 3, 5), title="picture")
    assert "24 × 40" in texts and "in 3 × 5 patches" in " ".join(texts)


def test_without_masks_none_are_written(tmp_path):
    paths = save_attention(tmp_path, photo(8, 8), attention(1, 2, 2), title="picture")
    assert not any(path.name.startswith("mask") for path in paths) and len(paths) == 7


@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 1, 9), (1, 60, 1)])
def test_maps_of_one_patch_and_of_strips_are_drawn(tmp_path, shape):
    image = photo(shape[1] * 4, shape[2] * 4)
    assert len(save_attention(tmp_path, image, attention(*shape), title="picture")) == (
        2 * (shape[0] + 1) + 3
    )


def test_a_disk_that_fails_leaves_what_was_there_and_no_leftovers(tmp_path, monkeypatch):
    image, maps = photo(8, 8), attention(1, 2, 2)
    save_attention(tmp_path, image, maps, title="picture")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*arguments, **options):
        arguments[0].write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", lambda self, file, **options: fails(file))
    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OSError, match="disk is full"):
        save_attention(tmp_path, photo(8, 8, seed=1), maps, title="picture")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OSError, match="disk is full"):
        save_attention(tmp_path, image, 2 * maps, title="picture")
    assert (tmp_path / "attention.npz").read_bytes() == before["attention.npz"]
    assert {path.name for path in tmp_path.iterdir()} == set(before)
