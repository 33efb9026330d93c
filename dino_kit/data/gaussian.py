"""Pillow's Gaussian blur: three passes of a box, whose width may be a fraction.

Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
filtering".
"""

from __future__ import annotations

import math

import numpy as np

PASSES = 3


def box(radius: float) -> tuple[int, float]:
    """The box of which three passes have the deviation ``radius``, in pixels.

    That is how many pixels to each side it takes in whole, and the share of the next ones.
    """
    variance = radius * radius / PASSES
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole, part / (6 * (variance - (whole + 1) ** 2))


def kernel(radius: float) -> np.ndarray:
    """The three passes as one, (n,) float32 of odd n, which sums to 1."""
    whole, part = box(radius)
    one = np.ones(2 * whole + 3)
    one[0] = one[-1] = part
    three = np.convolve(np.convolve(one, one), one)
    return (three / three.sum()).astype(np.float32)
