"""A photograph that is decoded only as far as its crops need.

libjpeg decodes at 1/2, 1/4 and 1/8 of an image's size in less time, and there is less to resize. What
it leaves out are frequencies that a crop does not show, if its box is large enough after that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from dino_kit.data.augment import CropParameters
from dino_kit.data.bands import Bands
from dino_kit.data.decode import decode_jpeg, decode_raster, jpeg_size
from dino_kit.data.pixels import RGB, Pixels
from dino_kit.data.raster import Raster, Reduced

REDUCTIONS = (8, 4, 2)
# How many times as large as its crop a box has to be in both directions, once reduced. At 2 crops of
# sharp photographs differ by 0.7 to 0.9 of 255 from those of the whole, at 1.5 by 1.2 to 1.7.
MARGIN = 2.0


class Photograph:
    """A JPEG in colours of which only the header was read; its pixels may still be broken."""

    def __init__(self, data: bytes, name: str, pixels: Pixels, height: int, width: int):
        self._data, self._name, self._pixels = data, name, pixels
        self.height, self.width = height, width

    def decoded(self, crops: Iterable[CropParameters]) -> Raster | Reduced:
        """For these crops, the largest reduction that they allow; else the whole.

        Raises:
            BadImage: it cannot be read as an image.
        """
        reduction = reduction_for(crops)
        if reduction > 1:
            size = self.height, self.width
            colours = decode_jpeg(self._data, size, reduction)
            if colours is not None:
                return Reduced(colours, reduction, *size)
        return decode_raster(self._data, self._name, self._pixels)


def open_raster(
    data: bytes | np.ndarray | Image.Image, name: str, pixels: Pixels = RGB
) -> Photograph | Raster | Bands:
    """As :func:`~dino_kit.data.decode.decode_raster`, but what can be reduced is not yet decoded.

    :func:`for_crops` does that.

    Raises:
        BadImage: as there, if it is decoded here.
    """
    size = jpeg_size(data, pixels)
    return Photograph(data, name, pixels, *size) if size else decode_raster(data, name, pixels)


def for_crops(image: Any, crops: Iterable[CropParameters]) -> Any:
    """``image`` with pixels to make ``crops`` of; raises what :meth:`Photograph.decoded` does."""
    return image.decoded(crops) if isinstance(image, Photograph) else image


def reduction_for(crops: Iterable[CropParameters]) -> int:
    """8, 4 or 2, the largest at which every crop's box is ``MARGIN`` times the crop; else 1.

    Crops without resizing are as large as their boxes, so always 1.
    """
    room = min((min(crop.box[2:]) / crop.size for crop in crops), default=1.0)
    return next((r for r in REDUCTIONS if room >= MARGIN * r), 1)
