"""An RGB image of 8 bits as an array: what Pillow does with it, by vector instructions.

Resizing is PyTorch's for 8 bits, which samples and rounds as Pillow does; colours and blur are
OpenCV's. Against Pillow a crop differs by rounding: by 0.1 of 255 on average where it is resized, by
less than 0.7 after each operation on colours, without a bias.

Legend: H and W pixels, S pixels of a crop's side.
"""

from __future__ import annotations

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
        # In this order of memory there are vector instructions for three channels at once.
        planes = torch.from_numpy(whole).unsqueeze(0).permute(0, 3, 1, 2)  # (1, 3, H, W)
        resized = F.interpolate(planes, size[::-1], mode=_MODES[resample], antialias=True)
        return Raster(resized[0].permute(1, 2, 0).numpy())

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
