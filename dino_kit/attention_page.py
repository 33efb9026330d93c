"""Attention to explore in a browser: one page that holds everything and asks for nothing.

The maps are stored in 8 bits, each row divided by its largest value, and unpacked by the browser.

Legend: N patches, P prefix tokens (the class token first), T = P+N.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from PIL import Image

# Of one image: more patches make a page of tens of megabytes, and too small to point at.
MOST_PATCHES = 1024
# Of all images together, in bytes before compression; a browser has to hold and unpack them.
_MOST_BYTES = 48 << 20
_FEWEST_PATCHES = 196
_LONGEST_SIDE = 1200  # pixels of an image on the page
_TINY = 128  # pixels: up to here an image is enlarged in squares, and stored without loss


@dataclass(frozen=True)
class Exhibit:
    """One image with its maps, packed."""

    name: str
    picture: str  # a data: address
    size: tuple[int, int]  # height and width of the picture
    grid: tuple[int, int]  # patches down and across
    heads: int
    prefix: int
    scales: bytes  # float32, little-endian, (heads, T): the largest value of every row
    maps: bytes  # zlib, of uint8 (heads, T, N)
    note: str


def exhibit(
    name: str, image: Image.Image, rows: np.ndarray, grid: tuple[int, int], note: str = ""
) -> Exhibit:
    """Pack an image and its attention for the page.

    Args:
        name: what the image is called.
        image: the picture, which the grid of patches covers exactly; of any size.
        rows: ``(heads, T, N)``, from 0; what every token gives each patch. The rows of the prefix
            tokens come first; T - N of them.
        grid: patches down and across; their product is N.
        note: a sentence on how the maps of this image were made, if there is something to say.
    """
    heads, tokens, patches = rows.shape
    scales = rows.max(axis=2).astype("<f4")  # (heads, T)
    divisor = np.where(scales > 0, scales, 1.0)[..., None]
    levels = (rows / divisor * 255).round().astype(np.uint8)
    return Exhibit(
        name,
        _address(image),
        image.size[::-1],
        grid,
        heads,
        tokens - patches,
        scales.tobytes(),
        zlib.compress(levels.tobytes(), 9),
        note,
    )


def patches_for(images: int, heads: int) -> tuple[int, int]:
    """How many patches of an image, and how many of ``images``, fit on one page.

    The more images there are the fewer patches each may have, down to a grid of 14 × 14; then
    images are left out.
    """
    each = math.isqrt(_MOST_BYTES // (heads * images))
    if each >= _FEWEST_PATCHES:
        return min(each, MOST_PATCHES), images
    return _FEWEST_PATCHES, max(1, _MOST_BYTES // (heads * _FEWEST_PATCHES**2))


def page(
    title: str,
    origin: str,
    exhibits: Sequence[Exhibit],
    colours: Mapping[str, np.ndarray],
    keep: float | None = None,
    block: str = "the last block",
) -> str:
    """The page as HTML.

    Args:
        title: of the browser's window.
        origin: a sentence on which network the maps are of.
        exhibits: at least one; all of the same network.
        colours: tables ``(256, 3)`` uint8 by name, from low to high; the first is chosen at first.
        keep: the share of attention to which the slider is set at first; None is all of it.
        block: which block of the network the maps are of.
    """
    first = exhibits[0]
    data = {
        "heads": first.heads,
        "prefix": ["Class token", *(f"Extra token {n}" for n in range(1, first.prefix))],
        "keep": 1.0 if keep is None else keep,
        "colours": {name: _text(table.tobytes()) for name, table in colours.items()},
        "images": [
            {
                "name": one.name,
                "src": one.picture,
                "height": one.size[0],
                "width": one.size[1],
                "rows": one.grid[0],
                "columns": one.grid[1],
                "scales": _text(one.scales),
                "note": one.note,
            }
            for one in exhibits
        ],
    }
    maps = [
        f'<script type="text/plain" id="maps-{place}">{_text(one.maps)}</script>'
        for place, one in enumerate(exhibits)
    ]
    filling = {
        "title": html.escape(title),
        "origin": html.escape(origin),
        "block": html.escape(block),
        "rest": "the class token" + " and the extra tokens" * (first.prefix > 1),
        # A name with "</script>" in it must not end the element that it stands in.
        "data": json.dumps(data, ensure_ascii=True).replace("<", "\\u003c"),
        "maps": "\n".join(maps),
    }
    template = resources.files("dino_kit").joinpath("attention_page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filling[found[1]], template)


def _address(image: Image.Image) -> str:
    """The picture itself as an address: small ones without loss, others as JPEG."""
    image = image.convert("RGB")
    stored = io.BytesIO()
    if max(image.size) <= _TINY:
        image.save(stored, "PNG")
        return f"data:image/png;base64,{_text(stored.getvalue())}"
    if max(image.size) > _LONGEST_SIDE:
        scale = _LONGEST_SIDE / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    image.save(stored, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{_text(stored.getvalue())}"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
