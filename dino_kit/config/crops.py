"""Settings of the crops of a pretraining run: what is cut out of an image, and what is done to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_kit.config.fields import option
from dino_kit.errors import UserError

RATIO = (3 / 4, 4 / 3)  # torchvision's


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Crops (one number for every view, or three: first global, second global, local)"""

    global_crops_size: int = option(224, "Side of the two global crops in pixels.", low=1)
    global_crops_scale: tuple[float, float] = option(
        (0.4, 1.0), "Share of the image's area in a global crop; try 0.14 1 without local crops."
    )
    global_crops_ratio: tuple[float, float] = option(
        RATIO, "Width / height of the box of a global crop."
    )
    local_crops_number: int = option(8, "Number of small local crops; 0 for none.", low=0)
    local_crops_size: int = option(96, "Side of the local crops in pixels.", low=1)
    local_crops_scale: tuple[float, float] = option(
        (0.05, 0.4), "Share of the image's area in a local crop."
    )
    local_crops_ratio: tuple[float, float] = option(
        RATIO, "Width / height of the box of a local crop."
    )
    crop_ratio: tuple[float, float] | None = option(
        None, "Width / height of the box of every crop, in place of the two flags above.",
        nothing="what they say",
    )
    crop_without_resize: bool = option(
        False,
        "Cut crops out as they are, as many pixels of the image as of the crop, so that a pixel "
        "stays as large as it was, as on a microscope's scale; share and shape of the box then "
        "have no meaning. No image may be smaller than a crop. Evaluators then cut the centre out "
        "likewise.",
    )
    pixels: Literal["fast", "exact"] = option(
        "fast",
        "How crops of RGB images are made: exact is Pillow, as in the reference; fast is equal to it "
        "up to rounding, and decodes large photographs at a smaller scale where all crops of one "
        "shrink at least twofold after that.",
    )
    augment: Literal["auto", "cpu", "device"] = option(
        "auto",
        "Where colours, blur and solarisation of RGB images are changed: by the workers on the CPU, "
        "or for a whole batch on the device, equal up to rounding; auto is device on a CUDA GPU.",
    )
    flip_prob: tuple[float, float, float] = option(
        (0.5,) * 3, "Probability of a horizontal flip.", low=0, high=1
    )
    vflip: tuple[float, float, float] = option(
        (0.0,) * 3, "Probability of a vertical flip, for images without an above and below.",
        low=0, high=1,
    )
    rotate90: tuple[float, float, float] = option(
        (0.0,) * 3,
        "Probability of a turn by 90, 180 or 270 degrees, one as likely as the other; 0.75 leaves "
        "no direction apart.",
        low=0, high=1,
    )
    jitter_prob: tuple[float, float, float] = option(
        (0.8,) * 3, "Probability of changed colours.", low=0, high=1
    )
    brightness: tuple[float, float, float] = option(
        (0.4,) * 3, "Strength of brightness changes.", low=0
    )
    contrast: tuple[float, float, float] = option(
        (0.4,) * 3, "Strength of contrast changes.", low=0
    )
    saturation: tuple[float, float, float] = option(
        (0.2,) * 3, "Strength of saturation changes.", low=0
    )
    hue: tuple[float, float, float] = option(
        (0.1,) * 3, "Largest change of hue, in turns.", low=0, high=0.5
    )
    gray_prob: tuple[float, float, float] = option(
        (0.2,) * 3, "Probability of gray.", low=0, high=1
    )
    blur_prob: tuple[float, float, float] = option(
        (1.0, 0.1, 0.5), "Probability of a Gaussian blur.", low=0, high=1
    )
    blur_radius_min: tuple[float, float, float] = option(
        (0.1,) * 3, "Smallest deviation of the blur, in pixels of the crop.", low=0
    )
    blur_radius_max: tuple[float, float, float] = option(
        (2.0,) * 3, "Largest deviation of the blur, in pixels of the crop.", low=0
    )
    solarize_prob: tuple[float, float, float] = option(
        (0.0, 0.2, 0.0), "Probability of solarisation.", low=0, high=1
    )
    solarize_threshold: tuple[float, float, float] = option(
        (128.0,) * 3, "8-bit value from which solarisation inverts.", low=0, high=256
    )

    def check(self) -> None:
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise UserError(
                    f"--{name} is {low:g} {high:g}; it takes two shares of the image, the smaller "
                    "first, above 0 and at most 1."
                )
        for name in ("global_crops_ratio", "local_crops_ratio", "crop_ratio"):
            low, high = getattr(self, name) or (1.0, 1.0)
            if not 0 < low <= high:
                raise UserError(
                    f"--{name} is {low:g} {high:g}; it takes two numbers above 0, the smaller "
                    "first."
                )
            if self.crop_ratio is not None and (low, high) not in (RATIO, self.crop_ratio):
                raise UserError(
                    f"--{name} {low:g} {high:g} contradicts --crop_ratio {self.crop_ratio[0]:g} "
                    f"{self.crop_ratio[1]:g}; give one."
                )
        if self.crop_ratio is not None and self.crop_without_resize:
            raise UserError(
                "--crop_ratio has no meaning with --crop_without_resize, whose boxes are as large "
                "as the crops; give one."
            )
        if self.augment == "device" and self.pixels == "exact":
            raise UserError(
                "--pixels exact is Pillow's result, made on the CPU, and --augment device makes crops "
                "elsewhere; give --augment cpu or --pixels fast."
            )
        pairs = zip(self.blur_radius_min, self.blur_radius_max, strict=True)
        for smallest, largest in pairs:
            if smallest > largest:
                raise UserError(
                    f"--blur_radius_min {smallest:g} is above --blur_radius_max {largest:g}."
                )
