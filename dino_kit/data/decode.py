"""An encoded file, or an array, → an RGB image, or bands where another number of channels is asked.

The rule, by the number of channels: a picture of 8 bits becomes what Pillow's ``convert`` makes of
it, to RGB (3), L (1), LA (2) or RGBA (4). What has more than 8 bits or another number of channels
has to have as many as are asked for, but for a single one, which also becomes three equal ones.
Three channels are always an RGB image of 8 bits. Of an animation, and of a file of several pages
that are no channels, it is the first.
"""

from __future__ import annotations

import io
import logging
import math
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from dino_kit.data import tiff
from dino_kit.data.bands import Bands
from dino_kit.data.pixels import RGB, Pixels
from dino_kit.data.raster import Raster
from dino_kit.errors import BadImage

# What readers log of a file would reach the terminal without its name; a fault is a sentence.
for _reader in ("PIL", "tifffile"):
    logging.getLogger(_reader).addHandler(logging.NullHandler())
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_NPY = b"\x93NUMPY"
_AVIF = (b"ftypavif", b"ftypavis")


def decode(data: bytes | np.ndarray | Image.Image, name: str, pixels: Pixels = RGB) -> Image.Image | Bands:
    """Decode ``data`` to what ``pixels`` asks for: an RGB image of three channels, else bands.

    Args:
        data: a file's bytes; an image of Pillow's; or an array: (H, W, C) float32 in [0, 1] are
            bands already, and any other, (H, W) among them, is what a file of such values is.
        name: what a sentence calls it.

    Raises:
        BadImage: ``name`` cannot be read as an image, or not as one of so many channels; the
            sentence says why.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, name, pixels)
    if isinstance(data, Image.Image):
        return _converted(data, name, pixels)
    try:
        with warnings.catch_warnings():
            # A large photograph, a transparent palette or odd EXIF is no fault, and a warning
            # names no file; what could exhaust the memory is an error below.
            warnings.simplefilter("ignore")
            if data.startswith(_NPY):
                planes = _planes(_read_npy(data), name, pixels)
            elif isinstance(read := _read(data, pixels), Image.Image):
                return convert(read, name, pixels)
            else:
                planes = read
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"{name} is too large to be read as an image: {error}") from error
    except Exception as error:  # broken data makes Pillow's readers raise almost anything
        raise BadImage(f"{name} cannot be read as an image: {_reason(data, error)}.") from error
    return _bands(planes, name, pixels)


def decode_raster(
    data: bytes | np.ndarray | Image.Image, name: str, pixels: Pixels = RGB
) -> Raster | Bands:
    """As :func:`decode`, the same pixels, with an RGB image of 8 bits as a raster."""
    is_array = isinstance(data, np.ndarray) and data.dtype == np.uint8
    if is_array and pixels.in_chans == 3 and data.shape[2:] == (3,):
        return Raster(data)
    if jpeg_size(data, pixels) and (colours := decode_jpeg(data)) is not None:
        return Raster(colours)
    image = decode(data, name, pixels)
    return image if isinstance(image, Bands) else Raster(np.asarray(image))


def jpeg_size(data: object, pixels: Pixels) -> tuple[int, int] | None:
    """Height and width of a JPEG in colours that :func:`decode_jpeg` may take; of what else, None."""
    if not (isinstance(data, bytes) and data.startswith(b"\xff\xd8")):
        return None
    if pixels.in_chans != 3 or pixels.exif != "ignore":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in ("YCbCr", "RGB") or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    return height, width


def decode_jpeg(data: bytes, size: tuple[int, int] = (0, 0), reduction: int = 1) -> np.ndarray | None:
    """The pixels of a JPEG, as Pillow has them, too, and a third faster.

    With a ``reduction`` of 2, 4 or 8, (⌈H/reduction⌉, ⌈W/reduction⌉, 3) of an image of ``size``
    (H, W): libjpeg then transforms the lowest frequencies of each block alone.

    None where the least is wrong with it: Pillow decides whether it can be used.
    """
    height, width = (-(-side // reduction) for side in size)
    try:
        return simplejpeg.decode_jpeg(
            data, min_height=height, min_width=width, min_factor=reduction
        )
    except ValueError:
        return None


def _from_array(array: np.ndarray, name: str, pixels: Pixels) -> Image.Image | Bands:
    if array.dtype == np.float32 and array.ndim == 3:
        planes = array.transpose(2, 0, 1)
        return Bands(planes) if pixels.in_chans != 3 else _rgb(planes)
    if array.dtype == np.uint8 and (array.ndim == 2 or array.ndim == 3 and array.shape[2] == 3):
        return convert(Image.fromarray(array), name, pixels)
    return _bands(_planes(array, name, pixels), name, pixels)


def _converted(image: Image.Image, name: str, pixels: Pixels) -> Image.Image | Bands:
    """As :func:`convert`, of an image that may not have been read yet."""
    try:
        return convert(image, name, pixels)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"{name} cannot be read as an image: {_reason(b' ', error)}.") from error


def _read(data: bytes, pixels: Pixels) -> Image.Image | np.ndarray:
    """A picture, or the channels (C, H, W) of a TIFF of which Pillow would leave some out."""
    if tiff.is_tiff(data) and pixels.in_chans not in _MODES:
        return tiff.read(data, pixels.in_chans)
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if tiff.is_tiff(data):
            return tiff.read(data, pixels.in_chans)
        raise
    if image.format == "TIFF" and tiff.leaves_out(image, pixels):
        return tiff.read(data, pixels.in_chans)
    if pixels.value_range and image.format == "PNG" and is_cut_to_8_bits(data):
        raise ValueError(
            "it is a PNG of 16 bits in colours or with alpha, of which Pillow reads only the upper "
            "8, so --value_range cannot be kept to; store it as TIFF or .npy"
        )
    return image


def _read_npy(data: bytes) -> np.ndarray:
    """An array of a ``.npy`` file; memory is taken only for values that are there."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    reads = np.lib.format.read_array_header_1_0 if version == (1, 0) else (
        np.lib.format.read_array_header_2_0  # that of 3.0 has other names of fields only
    )
    shape, _, dtype = reads(file)
    told, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if told > there:
        raise ValueError(f"its header tells of {told:,} bytes of values, and it has {there:,}")
    return np.load(io.BytesIO(data), allow_pickle=False)


def is_cut_to_8_bits(png: bytes) -> bool:
    """Whether Pillow reads only the upper 8 bits of each value: of 16 bits, and more than gray."""
    bits, kind = png[24:26]  # of the header
    return bits == 16 and kind != 0


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # broken pixels are a fault
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001  # notes that cannot be read say nothing
        return image


def convert(image: Image.Image, name: str, pixels: Pixels = RGB) -> Image.Image | Bands:
    """What ``pixels`` asks for of a picture that Pillow opened; errors as those of :func:`decode`."""
    if not all(image.size):
        raise BadImage(f"{name} has no pixels: its size is {image.width} × {image.height}.")
    if pixels.exif == "apply":
        image = _upright(image)
    if image.mode[0] in "IF":  # of more than 8 bits
        return _bands(_values(image)[None], name, pixels)
    mode = _MODES.get(pixels.in_chans)
    if mode is None:
        raise BadImage(
            f"{name} is a picture, {image.mode} of 8 bits, and --in_chans is {pixels.in_chans}; "
            "pictures become 1, 2, 3 or 4 channels."
        )
    try:
        image.load()
        converted = image if image.mode == mode else image.convert(mode)
    except ValueError:  # from some modes, such as LAB, Pillow has no direct way
        converted = image.convert("RGB").convert(mode)
    if pixels.in_chans == 3:
        return converted
    values = np.asarray(converted).reshape(converted.height, converted.width, -1)
    return Bands(pixels.scaled(np.ascontiguousarray(values.transpose(2, 0, 1)), name))


def _values(image: Image.Image) -> np.ndarray:
    """The values (H, W) of a picture of one channel of more than 8 bits, of the type it has."""
    values = np.asarray(image)
    if image.mode != "I":
        return values
    # Pillow holds them in signed 32 bits, whatever they are in the file.
    if image.format == "TIFF":
        return values.astype(tiff.stored_type(image))
    return values.astype(np.uint16) if values.min() >= 0 and values.max() < 1 << 16 else values


def _planes(array: np.ndarray, name: str, pixels: Pixels) -> np.ndarray:
    """An array of a file's as channels (C, H, W)."""
    if array.ndim == 2 and array.size:
        return array[None]
    if array.ndim != 3 or not array.size:
        raise BadImage(
            f"{name} holds an array of shape {array.shape}, which is no image: that is (height, "
            "width), or has the channels as a third axis, first or last."
        )
    ends = array.shape[0], array.shape[2]
    for channels in (pixels.in_chans, 1) if pixels.in_chans == 3 else (pixels.in_chans,):
        if ends == (channels, channels):
            raise BadImage(
                f"{name} holds an array of shape {array.shape}, whose first and last axis could "
                f"both be the {channels} channels; cut or pad the image by a pixel."
            )
        if channels in ends:
            return array if ends[0] == channels else array.transpose(2, 0, 1)
    raise BadImage(
        f"{name} holds an array of shape {array.shape}, and --in_chans {pixels.in_chans} wants its "
        f"first or last axis to be {pixels.in_chans}; --in_chans {_fitting(min(ends))} fits."
    )


def _bands(planes: np.ndarray, name: str, pixels: Pixels) -> Image.Image | Bands:
    """Channels (C, H, W) of any type; a single one becomes three where an RGB image is asked for."""
    channels = len(planes)
    if channels != pixels.in_chans and not (channels == 1 and pixels.in_chans == 3):
        raise BadImage(
            f"{name} has {channels} channel{'s' * (channels > 1)} of {planes.dtype}, and "
            f"--in_chans is {pixels.in_chans}; --in_chans {_fitting(channels)} fits."
        )
    scaled = pixels.scaled(planes, name)
    return Bands(scaled) if pixels.in_chans != 3 else _rgb(scaled)


def _rgb(planes: np.ndarray) -> Image.Image:
    """Three channels in [0, 1], or one for all, (C, H, W), as 8 bits."""
    levels = (planes * 255).round().astype(np.uint8)
    levels = np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(levels))


def _fitting(channels: int) -> str:
    return "1 or 3" if channels == 1 else str(channels)


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        if data[4:12] in _AVIF and ".avif" not in Image.registered_extensions():
            return "it is an AVIF, which this Pillow does not read; a newer one may"
        return "it is in no format that Pillow knows"
    if "imagecodecs" in str(error):
        return f"{error.args[0]}; pip install imagecodecs".replace("<", "").replace(">", "")
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
