"""What is seen of the images before anything is proposed: how many, how large, of what kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median_low

import numpy as np
from PIL import Image

from dino_kit.data.bands import Bands
from dino_kit.data.decode import decode
from dino_kit.data.header import header
from dino_kit.data.inspection import spread
from dino_kit.data.pixels import RGB, Pixels
from dino_kit.data.sources.digits import DigitsSource
from dino_kit.data.sources.source import Source
from dino_kit.errors import UserError

_SIZES, _PIXELS = 256, 64  # images whose header, and whose pixels too, are read
_GRAY_TOLERANCE = 8  # of 255: what JPEG makes of equal channels


@dataclass(frozen=True)
class Survey:
    """A collection of images, as far as a sample that is spread evenly over it shows it."""

    images: int
    sampled: int
    width: int  # the median, in pixels
    height: int
    shorter: tuple[int, int, int]  # shorter sides: smallest, median, largest
    gray: float = 0.0  # share of images without colour
    kinds: tuple[str, ...] = ()  # file formats, the most frequent first; none for arrays
    classes: int | None = None  # None where there are no labels
    digits: bool = False  # images of which it is known that a mirror makes others of them
    unreadable: tuple[str, ...] = ()  # sentences, one for each image of the sample
    channels: int = 3


def look(source: Source, pixels: Pixels = RGB) -> Survey:
    """Read the sizes of a sample of ``source``, and the pixels of a part of it as ``pixels`` says.

    Raises:
        UserError: most images of the sample cannot be used; the sentence says why for the first.
    """
    chosen = spread(len(source), _SIZES).tolist()
    with_pixels = set(chosen[:: -(-len(chosen) // _PIXELS)])
    sizes: list[tuple[int, int]] = []
    kinds: Counter[str] = Counter()
    without_colour: list[bool] = []
    unreadable: list[str] = []
    for index in chosen:
        try:
            data, name = source.read(index), source.name(index)
            seen = header(data, name, pixels)
            if index in with_pixels:
                without_colour.append(_is_gray(decode(data, name, pixels)))
        except UserError as error:
            unreadable.append(str(error))
            continue
        sizes.append((seen.width, seen.height))
        kinds[seen.format] += 1
    if len(unreadable) > len(sizes):
        raise UserError(
            f"{len(unreadable):,} of {len(chosen):,} images that were tried cannot be used. "
            f"{unreadable[0]}"
        )
    shorter = sorted(min(size) for size in sizes)
    return Survey(
        images=len(source),
        sampled=len(chosen),
        width=median_low([width for width, _ in sizes]),
        height=median_low([height for _, height in sizes]),
        shorter=(shorter[0], median_low(shorter), shorter[-1]),
        gray=sum(without_colour) / max(len(without_colour), 1),
        kinds=tuple(kind for kind, _ in kinds.most_common() if kind),
        classes=None if source.classes is None else len(source.classes),
        digits=isinstance(source, DigitsSource),
        unreadable=tuple(unreadable),
        channels=pixels.in_chans,
    )


def _is_gray(image: Image.Image | Bands) -> bool:
    """Whether the channels of an RGB image are equal, but for what compression does to them."""
    if isinstance(image, Bands):
        return False
    small = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    return bool((small.max(axis=2) - small.min(axis=2)).max() <= _GRAY_TOLERANCE)
