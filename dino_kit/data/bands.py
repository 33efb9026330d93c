"""An image of any number of channels: what Pillow does with RGB images, for planes of floats.

Each operation is Pillow's own, channel by channel, or does the same up to 8 bits' rounding; only
contrast, whose centre in RGB images is their mean luma, has the mean of all channels instead.

Legend: C channels, H and W pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from dino_kit.data import gaussian


class Bands:
    """Planes (C, H, W) float32 in [0, 1], with those of Pillow's methods that crops need."""

    def __init__(self, planes: np.ndarray):
        self.planes = planes

    @property
    def channels(self) -> int:
        return self.planes.shape[0]

    @property
    def height(self) -> int:
        return self.planes.shape[1]

    @property
    def width(self) -> int:
        return self.planes.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """(H, W, C), as Pillow's images give themselves."""
        array = self.planes.transpose(1, 2, 0)
        return np.array(array, dtype) if copy or dtype not in (None, array.dtype) else array

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        """What lies within left, top, right, bottom; 0 where that is outside of the image."""
        left, top, right, bottom = box
        inside = self.planes[
            :, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)
        ]
        if inside.shape[1:] == (bottom - top, right - left):
            return Bands(inside)
        whole = np.zeros((self.channels, bottom - top, right - left), np.float32)
        y, x = max(-top, 0), max(-left, 0)
        whole[:, y : y + inside.shape[1], x : x + inside.shape[2]] = inside
        return Bands(whole)

    def resize(
        self,
        size: tuple[int, int],
        resample: Image.Resampling = Image.Resampling.BICUBIC,
        box: tuple[float, float, float, float] | None = None,
    ) -> Bands:
        """Resized to width and height; what a filter makes darker than 0 or lighter than 1 is cut."""
        width, height = size
        planes = np.empty((self.channels, height, width), np.float32)
        for plane, out in zip(self.planes, planes, strict=True):
            image = Image.fromarray(np.ascontiguousarray(plane))
            out[:] = np.asarray(image.resize((width, height), resample, box))
        return Bands(planes.clip(0, 1, out=planes))

    def turned(self, quarter_turns: int) -> Bands:
        """Turned by so many times 90 degrees, counter-clockwise."""
        return Bands(np.rot90(self.planes, quarter_turns, axes=(1, 2)))

    def flipped(self) -> Bands:
        return Bands(self.planes[:, :, ::-1])

    def flipped_vertically(self) -> Bands:
        return Bands(self.planes[:, ::-1])

    def brightened(self, factor: float) -> Bands:
        return Bands((self.planes * np.float32(factor)).clip(0, 1))

    def contrasted(self, factor: float) -> Bands:
        """Spread by ``factor`` about the mean of all channels."""
        mean = np.float32(self.planes.mean(dtype=np.float64))
        return Bands((mean + np.float32(factor) * (self.planes - mean)).clip(0, 1))

    def solarized(self, threshold: float) -> Bands:
        """Inverted from ``threshold`` on, which counts as in 8 bits."""
        return Bands(np.where(self.planes * 255 < threshold, self.planes, 1 - self.planes))

    def blurred(self, radius: float) -> Bands:
        """Pillow's Gaussian of that deviation: three passes of a box, edges going on outside."""
        whole, part = gaussian.box(radius)
        planes = self.planes
        for axis in (2, 1):
            for _ in range(gaussian.PASSES):
                planes = _box(planes, whole, part, axis)
        return Bands(planes)

    def picture(self) -> Image.Image:
        """An RGB image to look at: of one or two channels the first in gray, else the first three.

        Stretched, so that the darkest hundredth is black and the brightest white.
        """
        shown = self.planes[:3] if self.channels > 2 else self.planes[:1]
        low, high = np.percentile(shown, (1, 99))
        if high - low < 1e-6:
            low, high = 0.0, 1.0
        levels = ((shown - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)
        return Image.fromarray(np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)
                               .copy())  # fmt: skip


def _box(planes: np.ndarray, whole: int, part: float, axis: int) -> np.ndarray:
    """The mean over ``whole`` pixels to both sides, and a ``part`` of the next ones."""
    reach, length = whole + 1, planes.shape[axis]
    widths = [(reach, reach) if dimension == axis else (0, 0) for dimension in range(3)]
    padded = np.pad(planes, widths, mode="edge")

    def shifted(by: int) -> np.ndarray:
        start = reach + by
        return padded[:, start : start + length] if axis == 1 else padded[..., start : start + length]

    total = shifted(0).copy()
    for by in range(1, whole + 1):
        total += shifted(by)
        total += shifted(-by)
    if part:
        total += np.float32(part) * (shifted(reach) + shifted(-reach))
    return total / np.float32(2 * (whole + part) + 1)


def picture(image: Image.Image | Bands) -> Image.Image:
    """``image`` as an RGB image to look at."""
    return image.picture() if isinstance(image, Bands) else image.convert("RGB")
