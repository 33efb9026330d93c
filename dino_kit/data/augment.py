"""A crop as pixels: Pillow does what the parameters say, as torchvision's Pillow path does it.

First its geometry, then its colours; the latter may be left to a device, where
:mod:`~dino_kit.data.photometric` changes those of a whole batch.

:class:`~dino_kit.data.raster.Raster` does the same several times faster and equal up to rounding,
:class:`~dino_kit.data.raster.Reduced` of a large photograph decoded at a smaller scale, and of an
image that is no RGB image :class:`~dino_kit.data.bands.Bands`.

Legend: S pixels of a side, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dino_kit.data.bands import Bands
from dino_kit.data.raster import Raster, Reduced
from dino_kit.errors import BadImage


@dataclass(frozen=True)
class CropParameters:
    """What to do with an image: its geometry first, then the rest, each in the order of the fields."""

    size: int  # S
    box: tuple[int, int, int, int]  # top, left, height, width, in pixels of the image
    flip: bool = False
    # From here to solarisation not geometry.
    jitter: tuple[tuple[str, float], ...] = ()  # (operation, factor), in the order of application
    gray: bool = False
    blur_radius: float | None = None  # deviation of the Gaussian, in pixels
    solarize_threshold: float | None = None
    vflip: bool = False
    quarter_turns: int = 0  # counter-clockwise


def render(
    image: Image.Image | Raster | Reduced | Bands,
    parameters: CropParameters,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """The crop of an RGB ``image`` as (S, S, 3) uint8; of bands as (S, S, C) float32 in [0, 1].

    Saturation, hue and gray are RGB images' only.
    """
    return np.asarray(_recoloured(_placed(image, parameters, resample), parameters))


def geometry(
    image: Image.Image | Raster | Bands,
    parameters: CropParameters,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """The crop as :func:`render` makes it, before its colours are changed, blurred or inverted."""
    return np.asarray(_placed(image, parameters, resample))


def _placed(
    image: Image.Image | Raster | Bands, p: CropParameters, resample: Image.Resampling
) -> Image.Image | Raster | Bands:
    crop = resized_crop(image, p.box, p.size, resample)
    if p.flip:
        crop = flip(crop)
    if p.vflip:
        crop = vertical_flip(crop)
    if p.quarter_turns:
        crop = turn(crop, p.quarter_turns)
    return crop


def _recoloured(
    crop: Image.Image | Raster | Bands, p: CropParameters
) -> Image.Image | Raster | Bands:
    for operation, factor in p.jitter:
        crop = JITTER[operation](crop, factor)
    if p.gray:
        crop = grayscale(crop)
    if p.blur_radius is not None:
        crop = blur(crop, p.blur_radius)
    if p.solarize_threshold is not None:
        crop = solarize(crop, p.solarize_threshold)
    return crop


def resized_crop(
    image: Image.Image | Raster | Reduced | Bands,
    box: tuple[int, int, int, int],
    size: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image | Raster | Bands:
    """Cut out ``box`` (top, left, height, width), then resize it to S × S.

    Resizing with ``box`` in one go would let pixels outside of it bleed in at the borders.
    """
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size, size), resample)


@singledispatch
def flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@singledispatch
def vertical_flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


@singledispatch
def turn(image: Image.Image, quarter_turns: int) -> Image.Image:
    """Turned by so many times 90 degrees, counter-clockwise."""
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(turns[quarter_turns - 1])


@singledispatch
def brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


@singledispatch
def contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


@singledispatch
def saturation(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


@singledispatch
def hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by ``shift`` of a turn, in 8-bit HSV: by ``int(255 * shift)`` of 256 steps."""
    hues, saturations, values = image.convert("HSV").split()
    turned = np.asarray(hues) + np.int32(shift * 255).astype(np.uint8)
    hsv = (Image.fromarray(turned), saturations, values)
    return Image.merge("HSV", hsv).convert("RGB")


JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}


@singledispatch
def grayscale(image: Image.Image) -> Image.Image:
    """Luma in all three channels."""
    return Image.merge("RGB", (image.convert("L"),) * 3)


@singledispatch
def blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


@singledispatch
def solarize(image: Image.Image, threshold: float) -> Image.Image:
    return ImageOps.solarize(image, threshold)


for operation, of_bands in {
    flip: Bands.flipped,
    vertical_flip: Bands.flipped_vertically,
    turn: Bands.turned,
    brightness: Bands.brightened,
    contrast: Bands.contrasted,
    blur: Bands.blurred,
    solarize: Bands.solarized,
}.items():
    operation.register(Bands, of_bands)
for operation, of_raster in {
    flip: Raster.flipped,
    vertical_flip: Raster.flipped_vertically,
    turn: Raster.turned,
    brightness: Raster.brightened,
    contrast: Raster.contrasted,
    saturation: Raster.saturated,
    hue: Raster.hue_shifted,
    grayscale: Raster.gray,
    blur: Raster.blurred,
    solarize: Raster.solarized,
}.items():
    operation.register(Raster, of_raster)


def eval_sizes(
    training_size: int, crop_without_resize: bool = False
) -> tuple[int | None, int]:
    """To what the shorter side is resized, and the side of the centre crop, to evaluate.

    256 and 224 after training at 224, as the reference has it, and in that proportion at other
    sizes; small images, of 64 pixels and fewer, are not cut. After training on crops that are not
    resized nothing is resized here either: None.
    """
    if crop_without_resize:
        return None, training_size
    if training_size <= 64:
        return training_size, training_size
    return round(training_size * 256 / 224), training_size


def center_view(
    image: Image.Image | Raster | Bands, resize: int | None, crop: int, name: str = "An image"
) -> np.ndarray:
    """The centre (crop, crop, C) of ``image``, its shorter side resized to ``resize``.

    uint8 of an RGB image, of bands float32.

    Equal to torchvision's ``Resize(resize, BICUBIC)`` and ``CenterCrop(crop)``, the padding of
    images that are smaller than the crop included. Where ``resize`` is None, the centre of the
    image as it is.

    Raises:
        BadImage: nothing is to be resized, and the image, ``name``, is smaller than the crop; or it
            is so long and narrow that it would be too large, once resized.
    """
    if resize is None:
        return np.asarray(center_crop(image, crop, crop, name))
    width, height = image.size
    if width <= height:
        size = (resize, int(resize * height / width))
    else:
        size = (int(resize * width / height), resize)
    if size != image.size:
        if math.prod(size) > max(2 * (Image.MAX_IMAGE_PIXELS or math.inf), width * height):
            raise BadImage(
                f"{name} is of {width} × {height} pixels, so long and narrow that it would be of "
                f"{size[0]:,} × {size[1]:,} once its shorter side is {resize}."
            )
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (_margin(side, crop) for side in size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def center_crop(
    image: Image.Image | Raster | Bands, height: int, width: int, name: str = "An image"
) -> Image.Image | Raster | Bands:
    """The centre of ``image`` as it is; raises :class:`BadImage` where ``name`` is smaller."""
    require_room(image.height, image.width, height, width, name)
    left, top = _margin(image.width, width), _margin(image.height, height)
    return image.crop((left, top, left + width, top + height))


def require_room(height: int, width: int, crop_height: int, crop_width: int, name: str) -> None:
    """Raises :class:`BadImage` where a crop that is not resized does not fit into an image."""
    if height < crop_height or width < crop_width:
        raise BadImage(
            f"{name} is of {width} × {height} pixels, too few for a crop of {crop_width} × "
            f"{crop_height} that is not resized; leave the image out, ask for smaller crops, or "
            "train without --crop_without_resize."
        )


def _margin(side: int, crop: int) -> int:
    """What is cut off before a centre crop; negative: what is padded, the smaller half."""
    return round((side - crop) / 2.0) if side >= crop else -((crop - side) // 2)
