"""8-bit pixels → what the networks see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """Scale uint8 pixels to [0, 1], subtract each channel's mean and divide by its deviation.

    The operations and their order are those of torchvision's ``ToTensor`` and ``Normalize``, so
    the result is equal bit for bit. Floating-point input counts as prepared and stays as it is.
    """

    def __init__(
        self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(..., C, H, W) uint8 in [0, 255] → the same shape in float32."""
        if pixels.is_floating_point():
            return pixels
        return pixels.float().div_(255.0).sub_(self.mean).div_(self.std)
