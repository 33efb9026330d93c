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
    title: str, subtitle: str, panels: Sequence[tuple[str, str, Image.Image]]
) -> Image.Image:
    """Pictures of one size in a labelled grid; a panel is (label, what stands beside it, picture)."""
    columns = _columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = panels[0][2].size
    line = width + _GAP
    whole = Image.new(
        "RGB",
        (
            max(2 * _MARGIN + columns * line - _GAP, 420),
            2 * _MARGIN + 62 + rows * (height + _LINE + _GAP) - _GAP,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(whole)
    room = whole.width - 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN - 6), _cut(draw, title, 20, room), _INK, _font(20))
    draw.text((_MARGIN, _MARGIN + 26), _cut(draw, subtitle, 13, room), _PALE, _font(13))
    for place, (label, beside, picture) in enumerate(panels):
        row, column = divmod(place, columns)
        x, y = _MARGIN + column * line, _MARGIN + 62 + row * (height + _LINE + _GAP)
        draw.text((x, y), label, _INK, _font(13))
        if draw.textlength(label + "  " + beside, _font(13)) <= width:
            draw.text((x + width, y), beside, _PALE, _font(13), anchor="ra")
        whole.paste(picture, (x, y + _LINE))
    return whole


def save_attention(
    folder: str | Path,
    image: Image.Image,
    attention: np.ndarray,
    *,
    title: str,
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
        masks: ``(heads + 1, h, w)`` bool, of each head and of the mean.
        keep: the share of the attention that the masks hold.
        facts: plain values to store in ``attention.npz`` beside the maps.

    Returns:
        The files written; the sheet first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    colours = colour_table()
    heads, rows, columns = attention.shape
    maps = [*attention, attention.mean(axis=0)]
    names = [*(f"head{head}" for head in range(heads)), "mean"]
    pictures = {"img.png": image}
    for name, one in zip(names, maps, strict=True):
        pictures[f"attn-{name}.png"] = heat(one, image.size[::-1], colours)
        pictures[f"overlay-{name}.png"] = overlay(image, one, colours)
    for name, mask in zip(names, masks if masks is not None else (), strict=False):
        pictures[f"mask_th{keep}_{name}.png"] = masked(image, mask)
    overview = _overview(title, image, maps, colours)
    written = [_save(folder / name, one) for name, one in {"sheet.png": overview, **pictures}.items()]
    with files.atomic_write(folder / "attention.npz") as file:
        np.savez_compressed(file, attention=attention, **(facts or {}))
    return [*written, folder / "attention.npz"]


def _overview(
    title: str, image: Image.Image, maps: Sequence[np.ndarray], colours: np.ndarray
) -> Image.Image:
    rows, columns = maps[0].shape
    patch = max(1, round(_SIGHT / max(rows, columns)))
    size = (rows * patch, columns * patch)
    enlarged = size[0] > image.height
    small = image.resize(size[::-1], Image.Resampling[("LANCZOS", "NEAREST")[enlarged]])
    panels = [
        ("image", f"{image.width} × {image.height}", small),
        ("mean, on the image", "", overlay(small, maps[-1], colours)),
        ("mean of heads", _peak(maps[-1]), heat(maps[-1], size, colours)),
    ]
    panels += [
        (f"head {head}", _peak(one), heat(one, size, colours))
        for head, one in enumerate(maps[:-1])
    ]
    subtitle = (
        f"What the class token looks at, {rows} × {columns} patches; bright is much. "
        "n×: the brightest gets n times an even share."
    )
    return sheet(title, subtitle, panels)


def _peak(attention: np.ndarray) -> str:
    even = float(attention.mean())
    times = float(attention.max()) / even if even > 0 else 0.0
    return f"{times:.0f}×" if times >= 10 else f"{times:.1f}×"


def _unit(attention: np.ndarray) -> np.ndarray:
    """Scaled to 0 … 1, float32; all 0 where every value is the same."""
    low, high = float(attention.min()), float(attention.max())
    return ((attention - low) / (high - low if high > low else 1.0)).astype(np.float32)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """``mask`` without the pixels that have a neighbour outside of it; the border counts as inside."""
    around = np.pad(mask, 1, mode="edge")
    return (
        mask & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    )


def _columns(panels: int) -> int:
    """Of a grid that is wider than high, with few empty places."""
    return min(
        range(1, panels + 1),
        key=lambda columns: (
            abs(columns - 1.6 * math.ceil(panels / columns))
            + 0.5 * (-panels % columns)
        ),
    )


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font has few letters beyond English; matplotlib brings one with many.
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def _cut(draw: ImageDraw.ImageDraw, text: str, size: int, room: int) -> str:
    if draw.textlength(text, _font(size)) <= room:
        return text
    while text and draw.textlength(text + " …", _font(size)) > room:
        text = text[:-1]
    return text + " …"


def _save(path: Path, picture: Image.Image) -> Path:
    with files.atomic_write(path) as file:
        picture.save(file, format="PNG")
    return path
