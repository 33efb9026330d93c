"""A crop as parameters: what to do with an image, drawn before any pixel is touched.

Whoever renders a crop, on the CPU or on a device, takes the same parameters. The distributions are
those of the reference (Caron et al. 2021, appendix A "Data augmentation", after BYOL); the box is
drawn as in torchvision's ``RandomResizedCrop``, the colours as in its ``ColorJitter``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dino_kit.data import augment
from dino_kit.data.augment import CropParameters

_BOX_TRIES = 10


@dataclass(frozen=True)
class View:
    """How the crops of one kind are drawn, and how they are rendered.

    Args:
        size: side of the crop in pixels.
        scale: smallest and largest share of the image's area in the box; None for a box of
            ``size`` × ``size`` pixels, which is not resized.
        ratio: smallest and largest width / height of the box, drawn on a log scale.
        flip_prob: probability of a horizontal flip.
        jitter_prob: probability that brightness, contrast, saturation and hue change.
        brightness, contrast, saturation: factors are uniform in ``[max(0, 1 - x), 1 + x]``.
        hue: shift is uniform in ``[-x, x]`` of a turn, at most 0.5.
        gray_prob, blur_prob, solarize_prob: probabilities of these operations.
        blur_radius: smallest and largest deviation of the Gaussian, in pixels.
        solarize_threshold: 8-bit values from here on are inverted.
        vflip_prob, rotate90_prob: probabilities of a vertical flip, and of a turn by 90, 180 or
            270 degrees.
        render: makes the pixels from ``(image, parameters)``: (S, S, C) uint8, or floats in
            [0, 1]; a tensor has them as (C, S, S). :func:`~dino_kit.data.augment.geometry` leaves
            all but the geometry to a device. A function of your own must be importable by
            name where workers are spawned.
    """

    size: int
    scale: tuple[float, float] | None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_prob: float = 0.2
    blur_prob: float = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.0
    solarize_threshold: float = 128
    vflip_prob: float = 0.0
    rotate90_prob: float = 0.0
    render: Callable[[Any, CropParameters], Any] = augment.render


def sample_crop(
    view: View, height: int, width: int, rng: np.random.Generator, name: str = "An image"
) -> CropParameters:
    """Draw what to do with an image of ``height`` × ``width`` pixels for one crop of ``view``.

    Always so many numbers are drawn at once, each with a meaning of its own: a crop of a view that
    leaves something out is otherwise the same, and so is the next that is drawn from ``rng``.

    Raises:
        BadImage: the crop is not to be resized, and the image, ``name``, is smaller.
    """
    require_crops((view,), height, width, name)
    n = _Numbers(rng.random(_DRAWN).tolist())
    return CropParameters(
        size=view.size,
        box=_sample_box(view, height, width, n),
        flip=n.flip < view.flip_prob,
        jitter=_sample_jitter(view, n) if n.jitter < view.jitter_prob else (),
        gray=n.gray < view.gray_prob,
        blur_radius=_uniform(n.radius, *view.blur_radius) if n.blur < view.blur_prob else None,
        solarize_threshold=view.solarize_threshold if n.solarize < view.solarize_prob else None,
        vflip=n.vflip < view.vflip_prob,
        quarter_turns=1 + int(3 * n.turns) if n.rotate90 < view.rotate90_prob else 0,
    )


def require_crops(views: Sequence[View], height: int, width: int, name: str) -> None:
    """Raises :class:`BadImage` where a view that does not resize does not fit into an image."""
    for view in views:
        if view.scale is None:
            augment.require_room(height, width, view.size, view.size, name)


class _Numbers:
    """Uniform in [0, 1), by what they decide."""

    def __init__(self, n: list[float]):
        self.flip, self.jitter, self.gray, self.blur, self.radius, self.solarize = n[:6]
        self.vflip, self.rotate90, self.turns = n[6:9]
        self.factors, self.order, self.boxes = n[9:13], n[13:17], n[17:]  # boxes: 4 for each try


_DRAWN = 17 + 4 * _BOX_TRIES


def _uniform(number: float, low: float, high: float) -> float:
    return low + (high - low) * number


def _sample_box(view: View, height: int, width: int, n: _Numbers) -> tuple[int, int, int, int]:
    if view.scale is None:
        top, left = n.boxes[:2]
        return (
            int(top * (height - view.size + 1)), int(left * (width - view.size + 1)),
            view.size, view.size,
        )  # fmt: skip
    area = height * width
    low, high = map(math.log, view.ratio)
    smallest, largest = view.scale
    for start in range(0, 4 * _BOX_TRIES, 4):
        share, shape, top, left = n.boxes[start : start + 4]
        target = area * _uniform(share, smallest, largest)
        ratio = math.exp(_uniform(shape, low, high))
        box_width = round(math.sqrt(target * ratio))
        box_height = round(math.sqrt(target / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            return (
                int(top * (height - box_height + 1)), int(left * (width - box_width + 1)),
                box_height, box_width,
            )  # fmt: skip
    # No box fitted: the largest central one whose shape is allowed.
    box_height, box_width = height, width
    if width / height < view.ratio[0]:
        box_height = max(1, min(height, round(width / view.ratio[0])))
    elif width / height > view.ratio[1]:
        box_width = max(1, min(width, round(height * view.ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _sample_jitter(view: View, n: _Numbers) -> tuple[tuple[str, float], ...]:
    """The colour operations in the order in which they are applied, each with its factor."""
    ranges = (
        ("brightness", view.brightness, 1.0),
        ("contrast", view.contrast, 1.0),
        ("saturation", view.saturation, 1.0),
        ("hue", view.hue, 0.0),
    )
    drawn = []
    for key, number, (name, strength, middle) in zip(n.order, n.factors, ranges, strict=True):
        if strength > 0:
            low = max(0.0, middle - strength) if middle else -strength
            drawn.append((key, (name, _uniform(number, low, middle + strength))))
    return tuple(operation for _, operation in sorted(drawn))
