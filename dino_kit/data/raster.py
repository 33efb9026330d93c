"""An RGB image of 8 bits as an array: what Pillow does with it, by vector instructions.

Resizing is PyTorch's for 8 bits, which samples and rounds as Pillow does; colours and blur are
OpenCV's. Against Pillow a crop differs by rounding: by 0.1 of 255 on average where it is resized, by
less than 0.7 after each operation on colours, without a bias. Of a reduced image it differs by less
than 1 on average, where a box is twice as large there as its crop or larger.

Legend: H and W pixels, S pixels of a crop's side.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dino_kit.data import gaussian

# Worker processes are what runs side by side; threads of a library that forked would not be there.
cv2.setNumThreads(1)

_MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
_LEVELS = np.arange(256, dtype=np.uint8)
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)
_TURN = 360.0  # of a hue, in degrees
# OpenCV rounds, Pillow cuts off: a blend's fraction, and half a step of its 255 hues on average.
CUT = -0.499
_HUE_CUT = -_TURN / 255 / 2
_HALVES = -0.42


class Raster:
    """Pixels (H, W, 3) uint8, with those of Pillow's methods that crops need."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        return self.pixels if dtype is None else self.pixels.astype(dtype)

    def crop(self, box: tuple[int, int, int, int]) -> Raster:
        """``box`` is left, top, right, bottom, within the image."""
        left, top, right, bottom = box
        return Raster(self.pixels[top:bottom, left:right])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Raster:
        """To (width, height), with antialiasing."""
        # A copy in one piece: PyTorch takes neither memory that is not to be written to, as
        # Pillow's, nor strides below 0; and nothing here may change the image.
        whole = np.array(self.pixels, order="C")
        if size == self.size:
            return Raster(whole)
        return Raster(_resampled(whole, resample, size=size[::-1]))

    def flipped(self) -> Raster:
        return Raster(cv2.flip(self.pixels, 1))

    def flipped_vertically(self) -> Raster:
        return Raster(cv2.flip(self.pixels, 0))

    def turned(self, quarter_turns: int) -> Raster:
        return Raster(np.ascontiguousarray(np.rot90(self.pixels, quarter_turns)))

    def brightened(self, factor: float) -> Raster:
        return Raster(cv2.convertScaleAbs(self.pixels, alpha=factor, beta=CUT))

    def contrasted(self, factor: float) -> Raster:
        mean = int(cv2.mean(self._luma())[0] + 0.5)
        # Of an image and itself: what is below 0 or above 255 becomes that.
        return Raster(
            cv2.addWeighted(self.pixels, factor, self.pixels, 0.0, (1.0 - factor) * mean + CUT)
        )

    def saturated(self, factor: float) -> Raster:
        if factor == 0:
            return self.gray()
        return Raster(cv2.transform(self.pixels, saturation_mix(factor)))

    def hue_shifted(self, shift: float) -> Raster:
        """By ``int(255 * shift)`` of 256 steps, as Pillow's 8 bits have it."""
        hsv = cv2.cvtColor(np.float32(self.pixels), cv2.COLOR_RGB2HSV)
        hsv[..., 0] += np.float32(hue_turn(shift))
        # Hues beyond a turn are taken back by it.
        return Raster(cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=hsv)))

    def gray(self) -> Raster:
        return Raster(cv2.cvtColor(self._luma(), cv2.COLOR_GRAY2RGB))

    def blurred(self, radius: float) -> Raster:
        kernel, delta = gaussian.kernel(radius), blur_offset(radius)
        return Raster(
            cv2.sepFilter2D(
                self.pixels, -1, kernel, kernel, delta=delta, borderType=cv2.BORDER_REPLICATE
            )
        )

    def solarized(self, threshold: float) -> Raster:
        return Raster(cv2.LUT(self.pixels, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS)))

    def _luma(self) -> np.ndarray:
        return cv2.cvtColor(self.pixels, cv2.COLOR_RGB2GRAY)


def saturation_mix(factor: float) -> np.ndarray:
    """By how much each channel goes into each, (3, 3) float32, and in a fourth column what is added."""
    mixed = np.empty((3, 4), np.float32)
    mixed[:, :3] = (1.0 - factor) * _LUMA
    mixed[:, 3] = CUT
    mixed[0, 0] += factor
    mixed[1, 1] += factor
    mixed[2, 2] += factor
    return mixed


def hue_turn(shift: float) -> float:
    """The degrees, from 0 on and below 360, by which ``shift`` turns a hue as Pillow would."""
    return (int(255 * shift) * (_TURN / 256) + _HUE_CUT) % _TURN


def blur_offset(radius: float) -> float:
    """What is added to a blurred value before it is rounded."""
    # Of a radius of 1 the boxes are 1 2 1, and their many halves Pillow rounds down.
    return _HALVES if radius == 1 else 0.0


class Reduced:
    """An image of H × W pixels that was decoded at a smaller scale: what a crop of it needs.

    Args:
        pixels: (⌈H/reduction⌉, ⌈W/reduction⌉, 3) uint8. What is beyond H and W is in the last ones.
        reduction: pixels of the image side by side in one of those.
        height, width: H and W; ``crop`` and ``size`` are in such pixels too.
    """

    def __init__(self, pixels: np.ndarray, reduction: int, height: int, width: int):
        self.pixels, self.reduction = pixels, reduction
        self.height, self.width = height, width

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def crop(self, box: tuple[int, int, int, int]) -> Reduced:
        """``box`` is left, top, right, bottom, within the image; it may begin within a pixel."""
        left, top, right, bottom = box
        r, height, width = self.reduction, bottom - top, right - left
        pixels = self.pixels[top // r : -(-bottom // r), left // r : -(-right // r)]
        # What is interpolated here loses the highest frequencies, which no crop of half the size has.
        if left % r:
            pixels = _filtered(pixels, _shift(left % r / r)[None])
        if top % r:
            pixels = _filtered(pixels, _shift(top % r / r)[:, None])
        return Reduced(pixels[: -(-height // r), : -(-width // r)], r, height, width)

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Raster:
        """To (width, height), with antialiasing."""
        # By the image's own factors: its last pixels here may be whole where the box's are not.
        # PyTorch rounds down what it makes of them to a size, so what is below it by 1e-16 as well.
        width, height = size
        factors = (height * self.reduction / self.height, width * self.reduction / self.width)
        factors = tuple(factor * (1 + 1e-9) for factor in factors)
        whole = np.ascontiguousarray(self.pixels)
        return Raster(_resampled(whole, resample, scale_factor=factors)[:height, :width])


def _resampled(pixels: np.ndarray, resample: Image.Resampling, **to: tuple) -> np.ndarray:
    """(H, W, 3), in one piece, to a size or by factors, (vertical, horizontal)."""
    # In this order of memory there are vector instructions for three channels at once.
    planes = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)  # (1, 3, H, W)
    resized = F.interpolate(planes, mode=_MODES[resample], antialias=True, **to)
    return resized[0].permute(1, 2, 0).numpy()


@lru_cache
def _shift(offset: float) -> np.ndarray:
    """Weights (6,) of the pixels -2 … 3 for the value at ``offset``, in (0, 1): Lanczos'."""
    distances = np.arange(-2, 4) - offset
    weights = np.sinc(distances) * np.sinc(distances / 3)
    return (weights / weights.sum()).astype(np.float32)


def _filtered(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """``kernel`` is a row or a column of six."""
    rows, columns = kernel.shape
    anchor = (2 if columns > 1 else 0, 2 if rows > 1 else 0)
    return cv2.filter2D(pixels, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
