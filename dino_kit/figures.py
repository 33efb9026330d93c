"""Attention maps as pictures.

Raw maps are drawn as they are, one square of one colour for each patch; only on top of an image are
they smoothed. Every map is scaled by itself, from its smallest value to its largest.

Legend: H and W pixels, h and w patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dino_kit import files

COLOURS = "inferno"
_SIGHT = 232  # pixels of a picture's longer side in the sheet, about
_GAP, _MARGIN, _LINE = 18, 28, 22  # pixels
_PAPER, _INK, _PALE, _EDGE = (255, 255, 255), (24, 24, 27), (113, 113, 122), (255, 176, 32)


def colour_table(name: str = COLOURS) -> np.ndarray:
    """Matplotlib's colours of that name from low to high, ``(256, 3)`` uint8."""
    from matplotlib import colormaps

    return (colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def heat(attention: np.ndarray, size: tuple[int, int], colours: np.ndarray) -> Image.Image:
    """A raw map ``(h, w)`` in ``colours`` (256, 3), its patches enlarged to ``size`` (H, W)."""
    levels = (_unit(attention) * 255).round().astype(np.uint8)
    return Image.fromarray(colours[levels]).resize(size[::-1], Image.Resampling.NEAREST)


def overlay(image: Image.Image, attention: np.ndarray, colours: np.ndarray) -> Image.Image:
    """``image`` (H, W), dimmed, under a map ``(h, w)`` in ``colours``, smoothed between patches."""
    smooth = Image.fromarray(_unit(attention)).resize(image.size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(smooth), 0.0, 1.0)  # (H, W)
    pixels = np.asarray(image, dtype=np.float32)
    gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    base = 0.6 * (0.3 * pixels + 0.7 * gray)
    glow = colours[(level * 255).round().astype(np.uint8)]
    share = 0.85 * np.sqrt(level)[..., None]
    return Image.fromarray((base * (1 - share) + glow * share).round().astype(np.uint8))


def masked(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """``image`` (H, W) where ``mask`` (h, w) holds, outlined; the rest is dimmed."""
    inside = np.asarray(
        Image.fromarray(mask.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    ).astype(bool)
    pixels = np.asarray(image, dtype=np.float32)
    gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    drawn = np.where(inside[..., None], pixels, 0.35 * gray).round().astype(np.uint8)
    core = inside.copy()
    for _ in range(max(1, max(image.size) // 240)):
        core = _eroded(core)
    drawn[inside & ~core] = _EDGE
    return Image.fromarray(drawn)


def sheet(
    title: str,
    subtitle: str,
    panels: Sequence[tuple[str, str, Image.Image]],
    columns: int | None = None,
) -> Image.Image:
    """Pictures of one size in a labelled grid, of so many ``columns`` or of what looks best.

    A panel is (label, what stands at its right where there is room, picture). A title that is too
    long is cut, a subtitle goes on in the next line.
    """
    first = panels[0][2]
    width = max(first.width, *(math.ceil(width_of(label)) for label, _, _ in panels))
    height = _LINE + first.height
    columns = columns or _columns(len(panels), height / width)
    rows = math.ceil(len(panels) / columns)
    room = max(columns * (width + _GAP) - _GAP, 420)
    lines = _wrapped(subtitle, room)
    top = _MARGIN + 26 + len(lines) * _LINE + 14
    size = (room + 2 * _MARGIN, top + rows * (height + _GAP) - _GAP + _MARGIN)
    whole = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(whole)
    draw.text((_MARGIN, _MARGIN - 6), _cut(title, room), _INK, _font(20))
    for place, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + 26 + place * _LINE), line, _PALE, _font(13))
    for place, (label, beside, picture) in enumerate(panels):
        row, column = divmod(place, columns)
        x, y = _MARGIN + column * (width + _GAP), top + row * (height + _GAP)
        draw.text((x, y), label, _INK, _font(13))
        if width_of(f"{label}  {beside}") <= width:
            draw.text((x + width, y), beside, _PALE, _font(13), anchor="ra")
        whole.paste(picture, (x, y + _LINE))
    return whole


def save_attention(
    folder: str | Path,
    image: Image.Image,
    attention: np.ndarray,
    *,
    title: str,
    block: str = "",
    masks: np.ndarray | None = None,
    keep: float | None = None,
    facts: Mapping[str, object] | None = None,
) -> list[Path]:
    """Write every picture of one image's attention, and the numbers.

    ``img.png``; for each head N and for their mean ``attn-headN.png`` (raw) and
    ``overlay-headN.png`` (on the image), ``attn-mean.png`` and so on; with ``masks`` also
    ``mask_thKEEP_headN.png``; ``sheet.png``, all in one; ``attention.npz``.

    Args:
        folder: made where it is missing.
        image: what the network saw, (H, W), RGB.
        attention: ``(heads, h, w)``, the class token's attention to each patch.
        title: stands above the sheet.
        block: which one it is of, such as "block 3 of 0 to 11", where that is not the last.
        masks: ``(heads + 1, h, w)`` bool, of each head and of the mean.
        keep: the share of the attention that the masks hold.
        facts: plain values to store in ``attention.npz`` beside the maps.

    Returns:
        The files written; the sheet first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    colours = colour_table()
    maps = [*attention, attention.mean(axis=0)]
    names = [*(f"head{head}" for head in range(len(attention))), "mean"]
    pictures = {"img.png": image}
    for name, one in zip(names, maps, strict=True):
        pictures[f"attn-{name}.png"] = heat(one, image.size[::-1], colours)
        pictures[f"overlay-{name}.png"] = overlay(image, one, colours)
    for name, mask in zip(names, masks if masks is not None else (), strict=False):
        pictures[f"mask_th{keep}_{name}.png"] = masked(image, mask)
    overview = _overview(title, image, maps, colours, block)
    pictures = {"sheet.png": overview, **pictures}
    written = [save(folder / name, one) for name, one in pictures.items()]
    with files.atomic_write(folder / "attention.npz") as file:
        np.savez_compressed(file, attention=attention, **(facts or {}))
    return [*written, folder / "attention.npz"]


def _overview(
    title: str, image: Image.Image, maps: Sequence[np.ndarray], colours: np.ndarray, block: str
) -> Image.Image:
    rows, columns = maps[0].shape
    size = panel_size(maps[0].shape)
    small = fitted(image, size)
    panels = [
        ("image", f"{image.height} × {image.width}", small),
        ("mean, on the image", "", overlay(small, maps[-1], colours)),
        ("mean of heads", peak(maps[-1]), heat(maps[-1], size, colours)),
    ]
    panels += [
        (f"head {head}", peak(one), heat(one, size, colours)) for head, one in enumerate(maps[:-1])
    ]
    subtitle = (
        f"What the class token looks at{block and f' in {block}'}, in {rows} × {columns} patches; "
        "brighter is more. "
        "n×: the brightest gets n times the average."
    )
    return sheet(title, subtitle, panels)


def panel_size(grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a sheet's picture of so many patches, each of whole pixels."""
    patch = max(1, round(_SIGHT / max(grid)))
    return grid[0] * patch, grid[1] * patch


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``image`` at ``size`` (H, W); pixels of a small one stay squares."""
    enlarged = size[0] > image.height
    return image.resize(size[::-1], Image.Resampling[("LANCZOS", "NEAREST")[enlarged]])


def peak(attention: np.ndarray) -> str:
    """How many times the average of a map from 0 its brightest patch has, as a label."""
    even = float(attention.mean())
    times = float(attention.max()) / even if even > 0 else 0.0
    return f"{times:.0f}×" if times >= 10 else f"{times:.1f}×"


def _unit(attention: np.ndarray) -> np.ndarray:
    """Scaled to 0 … 1, float32; all 0 where every value is the same."""
    low, high = float(attention.min()), float(attention.max())
    return ((attention - low) / (high - low if high > low else 1.0)).astype(np.float32)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """``mask`` without pixels that have a neighbour outside of it; the border counts as inside."""
    around = np.pad(mask, 1, mode="edge")
    return mask & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]


def _columns(panels: int, shape: float) -> int:
    """Of a grid wider than high, with few empty places, each ``shape`` times as high as wide."""
    return min(
        range(1, panels + 1),
        key=lambda columns: (
            abs(columns - 1.4 * shape * math.ceil(panels / columns)) + 0.5 * (-panels % columns)
        ),
    )


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font has few letters beyond English; matplotlib brings one with many.
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def width_of(text: str, size: int = 13) -> float:
    """Pixels of a label."""
    return _font(size).getlength(text)


def _cut(title: str, room: int) -> str:
    title = " ".join(title.split())  # the name of a file may hold a line break
    if width_of(title, 20) <= room:
        return title
    while title and width_of(f"{title} …", 20) > room:
        title = title[:-1]
    return f"{title} …"


def shortened(name: str, room: float) -> str:
    """The end of ``name``, which tells most of a path, as far as there is room in a label."""
    name = " ".join(name.split())
    if width_of(name) <= room:
        return name
    while name and width_of(f"…{name}") > room:
        name = name[1:]
    return f"…{name}"


def _wrapped(text: str, room: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if width_of(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save(path: Path, picture: Image.Image) -> Path:
    with files.atomic_write(path) as file:
        picture.save(file, format="PNG")
    return path
