"""Pictures of what is known of an image's patches besides each head's attention.

Each kind of map is a part: pictures, numbers and its share of one sheet. Similarities and rollout
are drawn as attention maps are. The rows of a token mixing have a sign, and so have the maps of
Re-Attention: their colours diverge from white, which is 0, as far on both sides; nothing is
smoothed.

Legend: H and W pixels, h and w patches, R rows of the mixing, A heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from dino_kit import figures, files

SIGNED_COLOURS = "RdBu_r"
_PAPER, _INK, _FRAME = (255, 255, 255), (24, 24, 27), (200, 200, 205)

Place = tuple[int, int]
Panel = tuple[str, str, Image.Image]  # as of figures.sheet


class Part(NamedTuple):
    """One kind of map of an image, drawn."""

    pictures: dict[str, Image.Image]  # by the names of their files
    arrays: dict[str, np.ndarray]  # by the names that they have in patches.npz
    panels: list[Panel]  # for the sheet
    columns: int | None  # in which those lie well; None where that is no matter
    sentence: str  # what they are, for the sheet


def signed(
    values: np.ndarray, size: tuple[int, int], colours: np.ndarray, at: Place | None = None
) -> Image.Image:
    """A map ``(h, w)`` in ``colours`` (256, 3), 0 in their middle, enlarged to ``size`` (H, W).

    Its largest absolute value has the colour at an end. ``at``, a patch down and across, is
    outlined.
    """
    limit = float(abs(values).max()) or 1.0
    levels = (128 + (values / limit * 127).round()).astype(np.uint8)
    drawn = Image.fromarray(colours[levels]).resize(size[::-1], Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(drawn)
    draw.rectangle((0, 0, size[1] - 1, size[0] - 1), outline=_FRAME)
    if at is not None:
        _outline(draw, at, values.shape, size)
    return drawn


def similarity(image: Image.Image, values: np.ndarray) -> Part:
    """The cosine of each patch with the pooled feature.

    ``similarity.png`` (raw), ``overlay-similarity.png`` (on the image); ``similarity`` (h, w). Here
    and below ``image`` (H, W), RGB, is what the network saw.
    """
    between = f"{values.min():.2f} to {values.max():.2f}".replace("-", "−")
    sentence = "Similarity: the cosine of each patch with the pooled feature; brighter is more."
    return _single("similarity", image, values, between, sentence)


def rollout(image: Image.Image, values: np.ndarray) -> Part:
    """What has come to the class token from each patch through all blocks.

    ``rollout.png`` (raw), ``overlay-rollout.png`` (on the image); ``rollout`` (h, w), from 0.
    """
    sentence = (
        "Rollout: how much of the class token has come from each patch after all blocks, if each "
        "keeps one half of every token and fills the other by its heads' mean attention; brighter "
        "is more. n×: the brightest has n times the average."
    )
    return _single("rollout", image, values, figures.peak(values), sentence)


def classattention(image: Image.Image, maps: np.ndarray) -> Part:
    """What the class token looks at in a block in which it alone attends.

    For each of A heads, its map in ``maps`` (A, h, w): ``classattention-headI.png``, counted from 0;
    their mean ``classattention-mean.png``, and on the image ``overlay-classattention.png``;
    ``classattention`` (A, h, w).
    """
    colours, size = figures.colour_table(), figures.panel_size(maps.shape[1:])
    mean, pixels = maps.mean(axis=0), image.size[::-1]
    named = {**{f"head{head}": one for head, one in enumerate(maps)}, "mean": mean}
    pictures = {
        f"classattention-{name}.png": figures.heat(one, pixels, colours)
        for name, one in named.items()
    }
    pictures["overlay-classattention.png"] = figures.overlay(image, mean, colours)
    panels = [
        (name.replace("head", "head "), figures.peak(one), figures.heat(one, size, colours))
        for name, one in named.items()
    ]
    small = figures.fitted(image, size)
    panels.append(("mean, on the image", "", figures.overlay(small, mean, colours)))
    sentence = (
        "Head: what the class token looks at in the last of the blocks in which it alone attends; "
        "brighter is more. n×: the brightest patch has n times the average."
    )
    return Part(pictures, {"classattention": maps}, panels, None, sentence)


def mixing(image: Image.Image, places: Sequence[Place], rows: np.ndarray) -> Part:
    """What every patch adds to some, by a token mixing.

    For each of R ``places``, its row in ``rows`` (R, h, w): ``mixing-rowI-columnJ.png``, counted
    from 1; ``mixing`` (R, h, w) and ``mixing_patches`` (R, 2), the places counted from 0.
    """
    named = [
        (f"mixing-row{row + 1}-column{column + 1}.png", f"row {row + 1}, column {column + 1}")
        for row, column in places
    ]
    arrays = {"mixing": rows, "mixing_patches": np.array(places)}
    sentence = (
        "Row and column: what every patch adds to the outlined one in the last token mixing, "
        "which is the same for every image; red adds, blue subtracts, and the deepest colours "
        "are the number at the right."
    )
    # As the patches lie in the image.
    columns = len({column for _, column in places})
    pictures, panels = _signed(image, named, rows, places)
    return Part(pictures, arrays, panels, columns, sentence)


def reattention(image: Image.Image, maps: np.ndarray) -> Part:
    """What the class token takes from each patch by Re-Attention.

    For each of A heads, its map in ``maps`` (A, h, w): ``reattention-headI.png``, counted from 0;
    ``reattention`` (A, h, w).
    """
    named = [(f"reattention-head{head}.png", f"head {head}") for head in range(len(maps))]
    sentence = (
        "Head: by how much the class token takes each patch's value in the last Re-Attention, "
        "which mixes and normalises the attention of all heads; red is above zero, blue below, "
        "and the deepest colours are the number at the right."
    )
    pictures, panels = _signed(image, named, maps)
    return Part(pictures, {"reattention": maps}, panels, None, sentence)


def save_patches(
    folder: str | Path,
    image: Image.Image,
    parts: Sequence[Part],
    *,
    title: str,
    facts: Mapping[str, object] | None = None,
) -> list[Path]:
    """Write every picture of one image's patches, and the numbers.

    ``img.png``; the pictures of each part; ``sheet.png``, all in one; ``patches.npz``, with the
    arrays of each part.

    Args:
        folder: made where it is missing.
        image: what the network saw, (H, W), RGB.
        parts: at least one, all of this image.
        title: stands above the sheet.
        facts: plain values to store in ``patches.npz`` beside the maps.

    Returns:
        The files written; the sheet first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures, arrays = {"img.png": image}, {}
    for part in parts:
        pictures |= part.pictures
        arrays |= part.arrays
    pictures = {"sheet.png": _overview(title, parts), **pictures}
    written = [figures.save(folder / name, one) for name, one in pictures.items()]
    with files.atomic_write(folder / "patches.npz") as file:
        np.savez_compressed(file, **arrays, **(facts or {}))
    return [*written, folder / "patches.npz"]


def _overview(title: str, parts: Sequence[Part]) -> Image.Image:
    rows, columns = next(iter(parts[0].arrays.values())).shape[-2:]
    sentences = [f"{rows} × {columns} patches.", *(part.sentence for part in parts)]
    panels = [panel for part in parts for panel in part.panels]
    # Where they do not agree, a row would have a gap.
    agreed = len({part.columns for part in parts}) == 1
    return figures.sheet(title, " ".join(sentences), panels, parts[0].columns if agreed else None)


def _single(
    name: str, image: Image.Image, values: np.ndarray, beside: str, sentence: str
) -> Part:
    """A map ``(h, w)`` that is drawn as attention is."""
    colours, size = figures.colour_table(), figures.panel_size(values.shape)
    small = figures.fitted(image, size)
    pictures = {
        f"{name}.png": figures.heat(values, image.size[::-1], colours),
        f"overlay-{name}.png": figures.overlay(image, values, colours),
    }
    panels = [
        ("image", f"{image.height} × {image.width}", small),
        (f"{name}, on the image", "", figures.overlay(small, values, colours)),
        (name, beside, figures.heat(values, size, colours)),
    ]
    return Part(pictures, {name: values}, panels, len(panels), sentence)


def _signed(
    image: Image.Image,
    named: Sequence[tuple[str, str]],
    maps: np.ndarray,
    places: Sequence[Place] | None = None,
) -> tuple[dict[str, Image.Image], list[Panel]]:
    """Pictures and panels of ``maps`` (n, h, w) by their files' names and their labels."""
    colours, size = figures.colour_table(SIGNED_COLOURS), figures.panel_size(maps.shape[1:])
    pictures, panels = {}, []
    for (name, label), values, place in zip(named, maps, places or [None] * len(maps), strict=True):
        pictures[name] = signed(values, image.size[::-1], colours, place)
        end = f"±{abs(values).max():#.2g}"
        panels.append((label, end, signed(values, size, colours, place)))
    return pictures, panels


def _outline(draw: ImageDraw.ImageDraw, at: Place, grid: Place, size: tuple[int, int]) -> None:
    """Black around the patch, and white around that, to be seen on any colour.

    At an edge of the map the black lies within it.
    """
    top, bottom = (round((at[0] + end) * size[0] / grid[0]) for end in (0, 1))
    left, right = (round((at[1] + end) * size[1] / grid[1]) for end in (0, 1))
    width = max(1, max(size) // 230)
    for colour, out in ((_INK, width), (_PAPER, 2 * width)):
        box = [left - out, top - out, right - 1 + out, bottom - 1 + out]
        if colour == _INK:
            box = [max(0, box[0]), max(0, box[1]), min(size[1] - 1, box[2]), min(size[0] - 1, box[3])]
        draw.rectangle(box, outline=colour, width=width)
