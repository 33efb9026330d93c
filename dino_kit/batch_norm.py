"""Batch norms of a network: which there are, and passes that leave their statistics as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """Every batch norm of ``network``, those synchronised over processes among them."""
    kind = nn.modules.batchnorm._BatchNorm
    return [module for module in network.modules() if isinstance(module, kind)]


@contextmanager
def statistics_unchanged(network: nn.Module) -> Iterator[None]:
    """Within: batch norms normalise as ever; afterwards their running statistics are as before.

    For a pass that repeats one which has moved them already.
    """
    buffers = [buffer for norm in batch_norms(network) for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
