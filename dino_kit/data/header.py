"""What a file says of its image beside the pixels: size, mode, format, and what a reader leaves out."""

from __future__ import annotations

import io
import math
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from dino_kit.data import tiff
from dino_kit.data.bands import Bands
from dino_kit.data.decode import decode, is_cut_to_8_bits
from dino_kit.data.pixels import Pixels

_ORIENTATION = 0x0112  # of EXIF


class Header(NamedTuple):
    """Of one image."""

    width: int
    height: int
    mode: str  # Pillow's; of arrays and bands such as "uint16 × 13"
    format: str  # JPEG, PNG …; empty where there is no file
    turned: bool = False  # EXIF says that it lies on its side, or is mirrored
    frames: int = 1  # pictures in the file, of which the first is read
    cut: bool = False  # of 16 bits a channel, of which Pillow reads 8
    transparent: bool = False


def header(
    data: bytes | np.ndarray | Image.Image,
    name: str,
    pixels: Pixels,
    decoded: Image.Image | Bands | None = None,
) -> Header:
    """What is said of ``data``, by its header alone where Pillow has one.

    Args:
        data, name, pixels: as for :func:`~dino_kit.data.decode.decode`.
        decoded: what that made of it, where it is known already.

    Raises:
        BadImage: Pillow does not know it, and it is no array or bands either.
    """
    if isinstance(data, np.ndarray):
        channels = data.shape[2] if data.ndim == 3 else 1
        return Header(data.shape[1], data.shape[0], f"{data.dtype} × {channels}", "")
    if isinstance(data, Image.Image):
        return _of_picture(data, b"")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.format == "TIFF" and tiff.leaves_out(image, pixels):
                    return Header(*image.size, tiff.describe(data, pixels.in_chans), "TIFF")
                return _of_picture(image, data)
    except Exception:  # noqa: BLE001  # what Pillow does not read may be an array, or bands
        size = (decode(data, name, pixels) if decoded is None else decoded).size
    if tiff.is_tiff(data):
        return Header(*size, tiff.describe(data, pixels.in_chans), "TIFF")
    array = np.load(io.BytesIO(data), allow_pickle=False)
    return Header(*size, f"{array.dtype} × {array.size // math.prod(size)}", "NPY")


def _of_picture(image: Image.Image, data: bytes) -> Header:
    return Header(
        *image.size,
        image.mode,
        image.format or "",
        # Pillow turns a TIFF by itself.
        turned=image.format != "TIFF" and _orientation(image) in range(2, 9),
        frames=_frames(image),
        cut=image.format == "PNG" and bool(data) and is_cut_to_8_bits(data),
        transparent="A" in image.mode or "transparency" in image.info,
    )


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # notes that cannot be read say nothing
        return 1


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # noqa: BLE001  # those behind the first are not read, and may be broken
        return 1
