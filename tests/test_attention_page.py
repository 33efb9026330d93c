"""What the page holds on which attention is explored; what it does is tested in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dino_kit.attention_page import MOST_PATCHES, exhibit, page, patches_for
from dino_kit.figures import colour_table

COLOURS = {name: colour_table(name) for name in ("inferno", "gray")}
HEADS = 3


def attention(grid: tuple[int, int], prefix: int = 1, seed: int = 0) -> np.ndarray:
    """Rows (heads, T, N) as a softmax over all tokens gives them, without the prefix tokens."""
    patches = grid[0] * grid[1]
    logits = np.random.default_rng(seed).normal(0, 2, (HEADS, prefix + patches, prefix + patches))
    whole = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    return whole[:, :, prefix:].astype("f4")


def photo(rows: int, columns: int) -> Image.Image:
    rng = np.random.default_rng(rows)
    return Image.fromarray(rng.integers(0, 256, (rows, columns, 3)).astype(np.uint8))


class Read(HTMLParser):
    """The page's elements and the content of its scripts, as a browser finds them."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.scripts, self.body = [], [], ""
        self.feed(text)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data
        else:
            self.body += data

    def rows(self, place: int) -> np.ndarray:
        """The maps (heads, T, N) of an image, unpacked as the browser does it."""
        image, heads = self.data["images"][place], self.data["heads"]
        patches = image["rows"] * image["columns"]
        tokens = len(self.data["prefix"]) + patches
        levels = np.frombuffer(zlib.decompress(base64.b64decode(self.scripts[1 + place])), "u1")
        scales = np.frombuffer(base64.b64decode(image["scales"]), "<f4")
        return levels.reshape(heads, tokens, patches) * scales.reshape(heads, tokens, 1) / 255


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prefix", [1, 2])
def test_the_maps_are_within_a_255th_of_each_rows_largest(prefix):
    grids = [(3, 4), (1, 1), (5, 2)]
    given = [attention(grid, prefix, seed) for seed, grid in enumerate(grids)]
    given[2][1, 3] = 0.0  # a token that gives patches nothing
    exhibits = [
        exhibit(f"image {place}", photo(grid[0] * 4, grid[1] * 4), rows, grid)
        for place, (grid, rows) in enumerate(zip(grids, given, strict=True))
    ]
    read = Read(page("Attention", "", exhibits, COLOURS))
    for place, (grid, rows) in enumerate(zip(grids, given, strict=True)):
        image = read.data["images"][place]
        assert (image["rows"], image["columns"]) == grid
        assert (image["height"], image["width"]) == (grid[0] * 4, grid[1] * 4)
        error = abs(read.rows(place) - rows)
        assert (error <= rows.max(axis=2, keepdims=True) / 255).all()
    names = ["Class token", "Extra token 1"]
    assert read.data["prefix"] == names[:prefix] and read.data["heads"] == HEADS


def test_the_page_asks_for_nothing_from_outside():
    text = page("Attention", "", [exhibit("a", photo(8, 8), attention((2, 2)), (2, 2))], COLOURS)
    read = Read(text)
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket", text)
    for tag, attributes in read.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert read.data["images"][0]["src"].startswith("data:image/png;base64,")
    policy = next(a["content"] for _, a in read.elements if "http-equiv" in a)
    assert "default-src 'none'" in policy and "img-src data:;" in policy


HOSTILE = "</script><script>window.hostile = 1</script><!-- \"'\\ & {{maps}} é \u2028"


def test_names_and_origins_cannot_end_their_element():
    one = exhibit(HOSTILE, photo(8, 8), attention((2, 2)), (2, 2), note=HOSTILE)
    plain = exhibit("a", photo(8, 8), attention((2, 2)), (2, 2))
    read = Read(page(HOSTILE, HOSTILE, [one], COLOURS))
    expected = Read(page("a", "a", [plain], COLOURS))
    assert [tag for tag, _ in read.elements] == [tag for tag, _ in expected.elements]
    assert read.data["images"][0]["name"] == read.data["images"][0]["note"] == HOSTILE
    assert read.body.count(HOSTILE) == 2  # the window's title, and the origin


def test_settings_and_colours_are_handed_on():
    one = exhibit("a", photo(8, 8), attention((2, 2)), (2, 2), "A note.")
    data = Read(page("Attention", "", [one], COLOURS, 0.6)).data
    assert data["keep"] == 0.6 and data["images"][0]["note"] == "A note."
    assert Read(page("Attention", "", [one], COLOURS)).data["keep"] == 1.0
    assert list(data["colours"]) == list(COLOURS)
    for name, table in COLOURS.items():
        assert base64.b64decode(data["colours"][name]) == table.tobytes()


def stored(image: Image.Image) -> tuple[str, Image.Image]:
    address = exhibit("a", image, attention((2, 2)), (2, 2)).picture
    kind, _, text = address.partition(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_small_picture_is_stored_without_loss_and_a_large_one_smaller():
    kind, found = stored(photo(128, 100))
    assert kind == "data:image/png" and np.array_equal(found, photo(128, 100))
    kind, found = stored(photo(60, 300))
    assert kind == "data:image/jpeg" and found.size == (300, 60)
    assert stored(photo(600, 2400))[1].size == (1200, 300)
    assert stored(Image.new("L", (40, 30)))[1].mode == "RGB"


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_a_page_stays_within_bounds_whatever_it_is_to_show(images, heads):
    most, shown = patches_for(images, heads)
    assert 14 * 14 <= most <= MOST_PATCHES and 1 <= shown <= images
    assert shown == 1 or shown * heads * most**2 <= 48 << 20
    # Images are left out only where each has few patches already.
    assert shown == images or most == 14 * 14
    assert patches_for(images + 1, heads)[0] <= most


def test_a_few_images_have_all_the_patches_there_may_be():
    assert patches_for(1, 6) == (MOST_PATCHES, 1) and patches_for(8, 6) == (MOST_PATCHES, 8)
    assert patches_for(1000, 6) == (14 * 14, 218)
