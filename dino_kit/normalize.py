"""Pixels → what the networks see: each channel's mean and deviation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dino_kit.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def statistics(
    normalize: str | Sequence[float] | None, in_chans: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Each channel's mean and deviation, (C,) and (C,), as a setting of ``--normalize`` says them.

    That is ``"imagenet"``; two numbers for all channels; or C means and then C deviations. None is
    ImageNet's.
    """
    if normalize is None or isinstance(normalize, str):
        return IMAGENET_MEAN, IMAGENET_STD
    numbers = tuple(float(number) for number in normalize)
    half = len(numbers) // 2
    repeats = in_chans // half
    return numbers[:half] * repeats, numbers[half:] * repeats


class Normalize(nn.Module):
    """Scale uint8 pixels to [0, 1], subtract each channel's mean and divide by its deviation.

    The operations and their order are those of torchvision's ``ToTensor`` and ``Normalize``, so
    the result is equal bit for bit. Floating-point pixels are in [0, 1] already.

    Raises:
        UserError: mean and deviation are not known (None).
    """

    def __init__(
        self,
        mean: Sequence[float] | None = IMAGENET_MEAN,
        std: Sequence[float] | None = IMAGENET_STD,
    ):
        super().__init__()
        if mean is None or std is None:
            raise UserError(
                "The checkpoint does not say by which mean and deviation the pixels of its images "
                "were normalised; give --normalize MEAN STD."
            )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(..., C, H, W) uint8 in [0, 255], or floats in [0, 1] → the same shape in float32."""
        if pixels.is_floating_point():
            return pixels.float().sub(self.mean).div_(self.std)
        return pixels.float().div_(255.0).sub_(self.mean).div_(self.std)
