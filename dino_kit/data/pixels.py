"""What an image becomes: how many channels, which way up, and which numbers are black and white."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dino_kit.errors import BadImage


@dataclass(frozen=True)
class Pixels:
    """A rule by which every image becomes the same kind of thing.

    Args:
        in_chans: channels. 3 are an RGB image of 8 bits, as in the reference; of any other number
            :class:`~dino_kit.data.bands.Bands` of float32.
        exif: ``"apply"`` turns a picture as its EXIF says; ``"ignore"`` does not.
        value_range: the numbers that become 0 and 1 in files of more than 8 bits; None for those
            of the type: 0 and the largest of an unsigned one, 0 and 1 of floats.
    """

    in_chans: int = 3
    exif: str = "ignore"
    value_range: tuple[float, float] | None = None

    def plain(self) -> dict[str, Any]:
        """As plain data; :meth:`from_plain` reads it."""
        values = asdict(self)
        return values | {"value_range": self.value_range and list(self.value_range)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Pixels:
        """The rule that is said among ``plain`` settings, RGB's where they do not say."""
        known = {name: plain[name] for name in asdict(RGB) if plain.get(name) is not None}
        if "value_range" in known:
            known["value_range"] = tuple(known["value_range"])
        return cls(**known)

    @property
    def dtype(self) -> type:
        """Of a rendered crop."""
        return np.uint8 if self.in_chans == 3 else np.float32

    def scaled(self, values: np.ndarray, name: str) -> np.ndarray:
        """``values``, as a file holds them, as float32 in [0, 1].

        Raises:
            BadImage: what 0 and 1 are is not known, or a value is none or lies outside of them;
                the sentence names ``name``.
        """
        kind, ends = values.dtype.kind, self.value_range
        if kind == "b":
            return values.astype(np.float32)
        if values.dtype == np.uint8:
            return values.astype(np.float32) / np.float32(255)
        if kind not in "uif":
            raise BadImage(f"{name} holds no numbers of pixels, but values of {values.dtype}.")
        if kind == "f" and not np.isfinite(values).all():
            raise BadImage(
                f"{name} holds values that are no finite numbers (NaN or infinity); replace them "
                "by numbers before training."
            )
        if ends is None and kind == "u":
            ends = (0, np.iinfo(values.dtype).max)
        if ends is None and kind == "i":
            raise BadImage(
                f"{name} holds signed numbers ({values.dtype}, from {values.min()} to "
                f"{values.max()}), of which it is not known what is black and what white; say it "
                "by --value_range, such as 0 10000."
            )
        if ends is None:
            low, high = values.min(), values.max()
            if low < 0 or high > 1:
                raise BadImage(
                    f"{name} holds floats from {low:g} to {high:g}, and without --value_range they "
                    "go from 0 to 1; say by it what is black and what white."
                )
            ends = (0, 1)
        low, high = ends
        # In float64, in which every number of up to 32 bits is exact.
        return ((values.astype(np.float64) - low) / (high - low)).clip(0, 1).astype(np.float32)


RGB = Pixels()
