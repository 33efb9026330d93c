"""Pictures of what is known of an image's patches without attention.

Similarities are drawn as attention maps are. The rows of a token mixing have a sign, and so have the
maps of Re-Attention: their colours diverge from white, which is 0, as far on both sides; nothing is
smoothed.

Legend: H and W pixels, h and w patches, R rows of the mixing, A heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dino_kit import figures, files

SIGNED_COLOURS = "RdBu_r"
_PAPER, _INK, _FRAME = (255, 255, 255), (24, 24, 27), (200, 200, 205)

Place = tuple[int, int]


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


def save_patches(
    folder: str | Path,
    image: Image.Image,
    *,
    title: str,
    similarity: np.ndarray | None = None,
    mixing: tuple[Sequence[Place], np.ndarray] | None = None,
    reattention: np.ndarray | None = None,
    facts: Mapping[str, object] | None = None,
) -> list[Path]:
    """Write every picture of one image's patches, and the numbers.

    ``img.png``; ``similarity.png`` (raw) and ``overlay-similarity.png`` (on the image); for each
    patch of the mixing ``mixing-rowI-columnJ.png``, counted from 1; for each head
    ``reattention-headI.png``, counted from 0; ``sheet.png``, all in one; ``patches.npz`` with
    ``similarity`` (h, w), ``mixing`` (R, h, w), ``mixing_patches`` (R, 2), their places counted from
    0, and ``reattention`` (A, h, w).

    Args:
        folder: made where it is missing.
        image: what the network saw, (H, W), RGB.
        title: stands above the sheet.
        similarity: ``(h, w)``, the cosine of each patch with the pooled feature.
        mixing: places of R patches, and for each what every patch adds to it, ``(R, h, w)``.
        reattention: what the class token takes from each patch, head by head, ``(A, h, w)``.
        facts: plain values to store in ``patches.npz`` beside the maps.

    Returns:
        The files written; the sheet first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = image.size[::-1]
    pictures, arrays = {"img.png": image}, {}
    if similarity is not None:
        colours = figures.colour_table()
        pictures["similarity.png"] = figures.heat(similarity, size, colours)
        pictures["overlay-similarity.png"] = figures.overlay(image, similarity, colours)
        arrays["similarity"] = similarity
    if mixing is not None:
        colours = figures.colour_table(SIGNED_COLOURS)
        for place, row in zip(*mixing, strict=True):
            name = f"mixing-row{place[0] + 1}-column{place[1] + 1}.png"
            pictures[name] = signed(row, size, colours, place)
        arrays |= {"mixing": mixing[1], "mixing_patches": np.array(mixing[0])}
    if reattention is not None:
        colours = figures.colour_table(SIGNED_COLOURS)
        for head, one in enumerate(reattention):
            pictures[f"reattention-head{head}.png"] = signed(one, size, colours)
        arrays["reattention"] = reattention
    overview = _overview(title, image, similarity, mixing, reattention)
    pictures = {"sheet.png": overview, **pictures}
    written = [figures.save(folder / name, one) for name, one in pictures.items()]
    with files.atomic_write(folder / "patches.npz") as file:
        np.savez_compressed(file, **arrays, **(facts or {}))
    return [*written, folder / "patches.npz"]


def _overview(
    title: str,
    image: Image.Image,
    similarity: np.ndarray | None,
    mixing: tuple[Sequence[Place], np.ndarray] | None,
    reattention: np.ndarray | None,
) -> Image.Image:
    maps = (similarity, reattention, None if mixing is None else mixing[1])
    grid = next(one for one in maps if one is not None).shape[-2:]
    size = figures.panel_size(grid)
    panels, columns = [], 3
    sentences = [f"{grid[0]} × {grid[1]} patches."]
    if similarity is not None:
        colours = figures.colour_table()
        small = figures.fitted(image, size)
        between = f"{similarity.min():.2f} to {similarity.max():.2f}".replace("-", "−")
        panels = [
            ("image", f"{image.height} × {image.width}", small),
            ("similarity, on the image", "", figures.overlay(small, similarity, colours)),
            ("similarity", between, figures.heat(similarity, size, colours)),
        ]
        sentences.append(
            "Similarity: the cosine of each patch with the pooled feature; brighter is more."
        )
    if mixing is not None:
        colours = figures.colour_table(SIGNED_COLOURS)
        for (row, column), values in zip(*mixing, strict=True):
            label = f"row {row + 1}, column {column + 1}"
            end = f"±{abs(values).max():#.2g}"
            panels.append((label, end, signed(values, size, colours, (row, column))))
        # As the patches lie in the image, where that leaves no gap.
        across = len({column for _, column in mixing[0]})
        columns = across if similarity is None or len(panels) - len(mixing[0]) == across else None
        sentences.append(
            "Row and column: what every patch adds to the outlined one in the last token mixing, "
            "which is the same for every image; red adds, blue subtracts, and the deepest colours "
            "are the number at the right."
        )
    if reattention is not None:
        colours, columns = figures.colour_table(SIGNED_COLOURS), None
        for head, values in enumerate(reattention):
            end = f"±{abs(values).max():#.2g}"
            panels.append((f"head {head}", end, signed(values, size, colours)))
        sentences.append(
            "Head: by how much the class token takes each patch's value in the last Re-Attention, "
            "which mixes and normalises the attention of all heads; red is above zero, blue below, "
            "and the deepest colours are the number at the right."
        )
    return figures.sheet(title, " ".join(sentences), panels, columns)


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
