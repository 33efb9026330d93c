"""The most images at a time that a step has the memory for, found by trying."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from dino_kit.errors import is_out_of_memory

_SECONDS = 60.0  # after which what is known to fit is good enough


def most_that_fit(take: Callable[[int], None], too_many: int) -> int:
    """The most images for which ``take`` does not run out of memory; 0 where not one fits.

    It is halved until some fit, and then narrowed down from both sides.
    """
    fit, began = 0, time.monotonic()
    while too_many - fit > 1 and time.monotonic() - began < _SECONDS:
        images = (fit + too_many) // 2
        if _fits(take, images):
            fit = images
        else:
            too_many = images
    return fit


def _fits(take: Callable[[int], None], images: int) -> bool:
    fits = True
    try:
        _apart(take, images)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    set_free()
    return fits


def _apart(take: Callable[[int], None], images: int) -> None:
    """Try on a thread of its own.

    Where it once got no memory for its code, oneDNN makes none on that thread any more.
    """
    if torch.cuda.is_available():  # whose current device is the thread's
        take(images)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(take, images).result()


def set_free() -> None:
    """Give back what nothing refers to any more; to be called when the exception is gone, too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
