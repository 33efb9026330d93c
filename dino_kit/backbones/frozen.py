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
    plain = torch.autocast(device.type, enabled=False)
    with in_eval_mode(backbone), torch.inference_mode(), plain:
        yield


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Within: eval mode; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
