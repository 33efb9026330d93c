"""A backbone at work without learning, as every evaluator runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(backbone: nn.Module, device: torch.device) -> Iterator[None]:
    """Within: eval mode, no gradients, and on ``device`` no autocast of a caller's.

    Afterwards each module is in the mode that it was in.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
