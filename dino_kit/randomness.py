"""Random numbers as a pure function of what they are for.

No generator in the project carries state from one step to the next: each draw names its purpose
and its indices (seed, epoch, sample, view …) and gets a fresh stream. A run that was interrupted
therefore draws what the uninterrupted one draws, and neither the number of workers nor of
processes changes it.
"""

from __future__ import annotations

import zlib

import numpy as np


def stream(purpose: str, *indices: int) -> np.random.Generator:
    """A generator that depends on nothing but ``purpose`` and the non-negative ``indices``.

    A purpose always has the same number of indices, each below 2**32.
    """
    key = np.random.SeedSequence([zlib.crc32(purpose.encode()), *indices])
    return np.random.Generator(np.random.Philox(key))
