"""Pictures inside a page: as small as they can be shown, and all of them within a bound."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, features

from dino_kit.data.decode import decode
from dino_kit.data.sources.source import read_file
from dino_kit.errors import UserError
from dino_kit.report.record import Record, number

MOST_FRAMES = 24
FILM_BYTES = 3 << 20  # of all frames, before they become text, which is a third more
# Sides in pixels and qualities of a frame, the first that lets the film fit is taken.
_FITS = ((900, 82), (900, 65), (720, 60), (540, 50), (360, 40))
_TINY = 64  # pixels: up to here a picture is stored without loss, and enlarged in squares


class Frame(NamedTuple):
    """One sheet of the film."""

    source: str  # a data: address
    step: int
    facts: dict[str, Any]  # epoch, knn, rank, retrieval, as far as they are known


class Film(NamedTuple):
    frames: list[Frame]
    taken: int  # sheets that there were
    size: tuple[int, int]  # width and height of a frame, whose proportions all have
    missing: int  # sheets that the probe wrote down, and that cannot be read


def film(record: Record) -> Film | None:
    """The sheets of a run's probes in order, at most :data:`MOST_FRAMES`; None where there is none.

    The first and the last are always among them.
    """
    named = [(probe, path) for probe in record.probes if (path := _sheet(record.folder, probe))]
    there = [(probe, path) for probe, path in named if path.is_file()]
    shown = [there[place] for place in evenly(len(there), MOST_FRAMES)]
    opened = [(probe, image) for probe, path in shown if (image := _opened(path))]
    missing = len(named) - len(there) + len(shown) - len(opened)
    if not named:
        return None
    stored = _fitted([image for _, image in opened])
    frames = [
        Frame(address(data), probe["step"], _facts(probe))
        for (probe, _), data in zip(opened, stored, strict=True)
    ]
    size = opened[-1][1].size if opened else (1, 1)
    return Film(frames, len(there), size, missing)


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` places of ``count``, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def small(image: Image.Image, side: int) -> str:
    """``image`` as an address, its longer side ``side`` pixels at most."""
    image = shrunk(image.convert("RGB"), side)
    return address(_png(image) if max(image.size) <= _TINY else lossy(image, 82))


def plain(image: Image.Image) -> str:
    """``image`` as an address, pixel by pixel."""
    return address(_png(image))


def address(data: bytes) -> str:
    """A picture's bytes as a ``data:`` address."""
    kinds = {b"\x89PNG": "png", b"RIFF": "webp"}
    kind = kinds.get(data[:4], "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def lossy(image: Image.Image, quality: int) -> bytes:
    """As WebP where this Pillow has it, else as JPEG."""
    stored = io.BytesIO()
    if features.check("webp"):
        image.save(stored, "WEBP", quality=quality, method=4)
    else:
        image.save(stored, "JPEG", quality=quality)
    return stored.getvalue()


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """``image`` with a longer side of ``side`` pixels, or as it is where that is less."""
    longer = max(image.size)
    if longer <= side:
        return image
    size = tuple(max(1, round(n * side / longer)) for n in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def _png(image: Image.Image) -> bytes:
    stored = io.BytesIO()
    image.save(stored, "PNG", optimize=True)
    return stored.getvalue()


def _fitted(sheets: Sequence[Image.Image]) -> list[bytes]:
    """The sheets stored so that together they keep to :data:`FILM_BYTES`, if that can be."""
    for side, quality in _FITS:
        stored = [lossy(shrunk(sheet, side), quality) for sheet in sheets]
        if sum(map(len, stored)) <= FILM_BYTES:
            break
    return stored


def _sheet(folder: Path, probe: dict[str, Any]) -> Path | None:
    """The picture that a probe names; a name that leads out of the run's folder is none."""
    name = probe.get("sheet")
    if not isinstance(name, str) or not name:
        return None
    try:
        path = (folder / name).resolve()
        return path if path.is_relative_to(folder.resolve()) else None
    except (OSError, ValueError, RuntimeError):
        return None


def _opened(path: Path) -> Image.Image | None:
    try:
        return shrunk(decode(read_file(path), str(path)), _FITS[0][0])
    except UserError:
        return None


def _facts(probe: dict[str, Any]) -> dict[str, Any]:
    names = {"epoch": "epoch", "knn": "knn_top1", "rank": "effective_rank",
             "retrieval": "view_retrieval"}  # fmt: skip
    found = {name: number(probe.get(key)) for name, key in names.items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}
