"""An encoded file, or an array, → an RGB image."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from dino_kit.errors import UserError


def decode(data: bytes | np.ndarray, name: str) -> Image.Image:
    """Decode ``data``, a file's bytes or an (H, W, 3) uint8 array, to an RGB image.

    Every mode of 8 bits becomes RGB by Pillow's ``convert``; an EXIF rotation is not applied. Both
    are the reference's ways.

    Raises:
        UserError: ``name`` cannot be read as an image; the sentence says why.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    try:
        with warnings.catch_warnings():
            # A large photograph, a transparent palette or odd EXIF is no fault, and a warning
            # names no file; what could exhaust the memory is an error below.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.mode[0] not in "IF":
                return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large to be read as an image: {error}") from error
    except Exception as error:  # broken data makes Pillow's readers raise almost anything
        reason = "the file is empty" if not data else _reason(error)
        raise UserError(f"{name} cannot be read as an image: {reason}.") from error
    # Pillow would cut such values off at 255 without a word.
    raise UserError(
        f"{name} has more than 8 bits a channel (its mode is {image.mode}); convert it to 8 bits."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is in no format that Pillow knows"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
