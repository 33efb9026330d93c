"""Sizes of images that a library's model takes, told where one is asked for that it does not take.

Which they are is known by trying alone: some models are built for one size, others divide their maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from dino_kit.errors import UserError

_TRIED = 4  # sizes on either side of one that does not pass


def near(size: int, step: int, native: int) -> list[int]:
    """Sides in pixels to be tried: multiples of ``step`` near ``size``, and the ``native`` one."""
    nearby = [size // step * step + step * away for away in range(1 - _TRIED, 1 + _TRIED)]
    return [side for side in nearby if side > 0] + [native] * (native not in nearby)


def refused(name: str, size: int, legal: Iterable[int], way_out: str = "") -> UserError:
    """What to raise of a ``size`` in pixels; ``way_out`` ends the sentence."""
    shown = ", ".join(map(str, legal))
    takes = f"near it, it takes {shown}" if shown else "and of none near it"
    return UserError(f"{name} takes no images of {size} pixels a side; {takes}{way_out}.")


def built(build: Callable[[int | None], nn.Module], name: str, size: int | None) -> nn.Module:
    """``build(size)``, a backbone; where it is for its size that it is refused, with sizes that are not.

    Args:
        build: of the side of images in pixels, None for that which the model is made for.
        name: what a sentence calls the model.
        size: the side that is asked for.

    Raises:
        UserError: what ``build`` raises, or that it takes no images of ``size``.
    """
    try:
        return build(size)
    except UserError as error:
        own = None if size is None else _without_memory(build, None)
        if own is None or _without_memory(build, size) is not None:  # it is for something else
            raise
        tried = near(size, own.patch_size, own.image_size)
        legal = [side for side in tried if _without_memory(build, side) is not None]
        raise refused(name, size, legal) from error


def _without_memory(build: Callable[[int | None], nn.Module], size: int | None) -> nn.Module | None:
    """What is built on the device that computes nothing; None where it is refused."""
    try:
        with torch.device("meta"):
            return build(size)
    except (RuntimeError, UserError):  # the first of what that device cannot do
        return None
