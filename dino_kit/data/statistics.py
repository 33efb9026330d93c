"""Each channel's mean and deviation, measured on a sample of the images."""

from __future__ import annotations

import numpy as np

from dino_kit.data.decode import decode
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.source import Source
from dino_kit.errors import BadImage, UserError

SAMPLE = 512  # images; the mean of so many is known to a twentieth of the deviation or better


def measure(source: Source, pixels: Pixels) -> tuple[list[float], list[float], int]:
    """Means and deviations, (C) each, of pixels in [0, 1], to four digits, and of how many images.

    Of at most :data:`SAMPLE` images, evenly spread over the source, and of all their pixels; large
    and small images count alike, as they do when crops are made of them. Those that cannot be used
    are left out. The sums are in float64 and in the order of the images.

    Raises:
        UserError: no image can be used; the sentence says why for the last.
    """
    count = min(SAMPLE, len(source))
    used, fault = 0, None
    sums = np.zeros((2, pixels.in_chans))
    for place in range(count):
        index = place * len(source) // count
        try:
            image = decode(source.read(index), source.name(index), pixels)
        except BadImage as error:
            fault = error
            continue
        used += 1
        values = np.asarray(image).reshape(-1, pixels.in_chans).astype(np.float64)
        if pixels.in_chans == 3:
            values /= 255
        sums += values.mean(axis=0), (values**2).mean(axis=0)
    if not used:
        raise UserError(f"None of {count:,} images of {source.root} can be used. {fault}")
    mean, square = sums / used
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return _rounded(mean), _rounded(deviation), used


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
