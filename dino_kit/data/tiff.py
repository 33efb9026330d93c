"""Bands and pages of a TIFF, which Pillow reads only in part.

``tifffile`` reads them; some ways to compress (LZW, JPEG …) it knows only beside ``imagecodecs``.
"""

from __future__ import annotations

import io
import math
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dino_kit.data.pixels import Pixels

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage, TiffPageSeries

_BITS, _ORIENTATION, _SAMPLES, _KIND = 258, 274, 277, 339  # tags
# By how much at most a way to compress makes bytes fewer; of others it is not known.
_MOST_FEWER = {1: 1, 5: 2731, 8: 1032, 32773: 64, 32946: 1032}  # none, LZW, Deflate, PackBits
_LITTLE = 1 << 28  # bytes that may be taken for an image of which little was stored
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF


def is_tiff(data: bytes) -> bool:
    return data[:4] in _MAGIC


def leaves_out(image: Image.Image, pixels: Pixels) -> bool:
    """Whether Pillow, which opened ``image``, would give less of a TIFF than is asked for.

    Never of a file of 8 bits for three channels, which is read as the reference reads it.
    """
    channels = pixels.in_chans
    deep = max(image.tag_v2.get(_BITS, (1,))) > 8
    samples = image.tag_v2.get(_SAMPLES, 1)
    if channels == 3 and not deep:
        return False
    if samples > 1 and deep:
        return channels != 3 or pixels.value_range is not None
    if samples == 1 and image.n_frames == channels > 1:
        return True
    return channels == samples != len(image.getbands())


def stored_type(image: Image.Image) -> np.dtype:
    """Of the values of an image of one channel."""
    kind = {1: "u", 2: "i", 3: "f"}.get(image.tag_v2.get(_KIND, (1,))[0], "u")
    return np.dtype(f"{kind}{image.tag_v2.get(_BITS, (8,))[0] // 8}")


def describe(data: bytes, in_chans: int) -> str:
    """Type of the values and number of the channels that :func:`read` would give, as "uint16 × 4"."""
    with _opened(data) as file:
        part, _, _ = _part(file, in_chans)
        return f"{part.dtype} × {_channels(part)}"


def read(data: bytes, in_chans: int) -> np.ndarray:
    """The first image's channels, (C, H, W), of the type that they are stored in.

    Its bands; or its pages, where those are as many as ``in_chans`` or each is of one band. Turned
    as the file says, which Pillow does with every TIFF. Where C is not what is asked for, planes of
    no pixels.

    Raises:
        ValueError: it is too large, or more than can be stored in so few bytes; or whatever tifffile
            raises of a broken file.
    """
    with _opened(data) as file:
        part, first, extent = _part(file, in_chans)
        channels = _channels(part)
        if channels not in (in_chans, 1 if in_chans == 3 else in_chans):
            return np.empty((channels, 0, 0), part.dtype)  # so many, which is all that is needed
        _require_plausible(data, first, part.dtype.itemsize * channels * extent)
        array, axes = part.asarray(), part.axes
        orientation = first.tags.valueof(_ORIENTATION, default=1)
    order = [place for place, axis in enumerate(axes) if axis not in "YX"]
    array = array.transpose(*order, axes.index("Y"), axes.index("X"))
    return oriented(array.reshape(-1, *array.shape[-2:]), int(orientation))


def _opened(data: bytes) -> TiffFile:
    """The file, whose pages come to an end: tifffile would go round in a circle of them for ever.

    Raises:
        ValueError: they do not.
    """
    from tifffile import TiffFile

    order, big = "<" if data[:2] == b"II" else ">", b"+" in data[2:4]
    number, entries, size = (f"{order}Q", f"{order}Q", 20) if big else (f"{order}I", f"{order}H", 12)
    at, seen = 8 if big else 4, set()
    with suppress(struct.error, OverflowError):  # what is cut off is an end, too
        while page := struct.unpack_from(number, data, at)[0]:
            if page in seen:
                raise ValueError("its pages follow each other in a circle")
            seen.add(page)
            count = struct.unpack_from(entries, data, page)[0]
            at = page + struct.calcsize(entries) + count * size
    return TiffFile(io.BytesIO(data))


def _part(file: TiffFile, in_chans: int) -> tuple[TiffPage | TiffPageSeries, TiffPage, int]:
    """The first page, or all of them where they are the channels; the first page; its pixels.

    Of tiles that are larger than the page, those of a tile.
    """
    series, first = file.series[0], file.pages[0]
    sizes = dict(zip(series.axes, series.shape, strict=True))
    height, width, bands = sizes["Y"], sizes["X"], sizes.get("S", 1)
    pages = math.prod(series.shape) // (height * width * bands)
    tile = first.tilewidth * first.tilelength * first.tiledepth if first.is_tiled else 0
    if max(height * width, tile) > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        tiles = f" in tiles of {first.tilewidth} × {first.tilelength}" if tile else ""
        raise ValueError(f"{width} × {height} pixels{tiles} could exhaust the memory")
    # Where nothing fits, what comes nearest, of which a sentence can tell.
    all_pages = bands != in_chans and (
        pages * bands == in_chans or bands == 1 and in_chans not in (1, 3)
    )
    return series if all_pages else first, first, max(height * width, tile)


def _channels(part: TiffPage | TiffPageSeries) -> int:
    height, width = (part.shape[part.axes.index(axis)] for axis in "YX")
    return math.prod(part.shape) // (height * width)


def _require_plausible(data: bytes, page: TiffPage, size: int) -> None:
    """Raises ValueError where ``size`` bytes of values cannot come of so few that are stored."""
    packed = size * page.bitspersample // (8 * page.dtype.itemsize)
    fewer = _MOST_FEWER.get(page.compression, math.inf)
    if packed > max(_LITTLE, fewer * len(data)):
        raise ValueError(
            f"its header tells of {packed:,} bytes of values, more than its {len(data):,} can hold"
        )


def oriented(planes: np.ndarray, orientation: int) -> np.ndarray:
    """Planes (C, H, W), stored by one of the eight EXIF orientations, the right way up."""
    if orientation in (5, 6, 7, 8):
        planes = planes.transpose(0, 2, 1)
    if orientation in (2, 3, 6, 7):
        planes = planes[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        planes = planes[:, ::-1]
    return planes
