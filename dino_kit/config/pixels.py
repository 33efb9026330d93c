"""Settings of what an image becomes before the network sees it; a run's checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dino_kit.config.fields import option
from dino_kit.errors import UserError

IMAGENET, AUTO = "imagenet", "auto"


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Pixels"""

    in_chans: int = option(
        3,
        "Channels that the network takes. 3 is RGB, 1 gray, 2 gray with alpha, 4 RGB with alpha; "
        "files of bands (TIFF, .npy) have to have so many.",
        low=1,
    )
    exif: Literal["ignore", "apply"] = option(
        "ignore", "Whether pictures are turned as their EXIF says; the reference ignores it."
    )
    value_range: tuple[float, float] | None = option(
        None,
        "What black and white are in files of more than 8 bits, such as 0 4095; values beyond are "
        "cut to it.",
        nothing="0 and the type's largest, of floats 0 and 1",
    )
    normalize: Literal["imagenet", "auto"] | tuple[float, ...] | None = option(
        None,
        "Mean and deviation of the channels, of values from 0 to 1: imagenet's; auto measures "
        "them on a sample of the images; or numbers, MEAN STD for all channels, or first each "
        "channel's mean and then each one's deviation.",
        nothing="imagenet of 3 channels, else auto",
    )

    @property
    def is_measured(self) -> bool:
        """Whether mean and deviation are to be measured on the images."""
        return self.normalize == AUTO or (self.normalize is None and self.in_chans != 3)

    def check(self) -> None:
        check_value_range(self.value_range)
        check_normalize(self.normalize, self.in_chans)


def check_value_range(value_range: tuple[float, float] | None) -> None:
    """Raises :class:`UserError` where black is not below white."""
    if value_range is not None and not value_range[0] < value_range[1]:
        raise UserError(
            f"--value_range is {value_range[0]:g} {value_range[1]:g}; it takes two numbers, the "
            "smaller first."
        )


def check_normalize(normalize: str | Sequence[float] | None, in_chans: int) -> None:
    """Raises :class:`UserError` where means and deviations do not fit the channels."""
    if normalize is None or normalize == AUTO:
        return
    if normalize == IMAGENET:
        if in_chans != 3:
            raise UserError(
                f"--normalize imagenet is for 3 channels, and there are {in_chans}; give auto, or "
                "a mean and a deviation."
            )
        return
    if len(normalize) not in (2, 2 * in_chans):
        of = "1 channel" if in_chans == 1 else f"{in_chans} channels"
        more = "" if in_chans == 1 else (
            f", or {2 * in_chans}, each channel's mean and then each one's deviation"
        )
        raise UserError(
            f"--normalize of {of} takes 2 numbers, a mean and a deviation{more}; it got "
            f"{len(normalize)}."
        )
    least = min(normalize[len(normalize) // 2 :])
    if least <= 0:
        raise UserError(f"--normalize has a deviation of {least:g}; deviations are above 0.")
