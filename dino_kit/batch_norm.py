"""Batch norms of a network: which there are, passes that leave their statistics as they are, and
statistics of all processes.

PyTorch's ``SyncBatchNorm`` computes on GPUs only; where it can, it is used.

Legend: B rows of this process, n rows of all, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dino_kit import distributed
from dino_kit.errors import UserError

_ANY = nn.modules.batchnorm._BatchNorm


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """Every batch norm of ``network``, those synchronised over processes among them."""
    return [module for module in network.modules() if isinstance(module, _ANY)]


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


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` with each batch norm in it over all processes; names and values stay.

    Raises:
        UserError: one of them cannot be, here.
    """
    if device.type == "cuda":
        if any("Act" in type(norm).__name__ for norm in batch_norms(network)):
            # timm's, which an activation is part of, and which PyTorch would leave out.
            from timm.layers import convert_sync_batchnorm

            return convert_sync_batchnorm(network)
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, module in network.named_children():
        if isinstance(module, nn.BatchNorm1d):
            setattr(network, name, SharedBatchNorm.like(module))
        elif isinstance(module, _ANY):
            # Of a backbone's, whose stochastic depth gives each process other numbers of rows.
            raise UserError(
                "The batch norms of this --arch cannot be synchronised over several processes on "
                "CPUs; use one process, GPUs, or another --arch."
            )
        else:
            synchronised(module, device)
    return network


class SharedBatchNorm(nn.BatchNorm1d):
    """``(B, D)`` to the same; every process holds as many rows as the others."""

    @classmethod
    def like(cls, other: nn.BatchNorm1d) -> SharedBatchNorm:
        """With the tensors of ``other``."""
        new = cls(other.num_features, other.eps, other.momentum)
        new.load_state_dict(other.state_dict(), assign=True)
        return new.train(other.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rows = x.float()  # under autocast x is half precision, too coarse for sums
        n = len(rows) * distributed.world_size()
        # Not from the sum of squares, which cancels where the mean is large.
        mean = _Sum.apply(rows.sum(dim=0)) / n  # (D,)
        centred = rows - mean
        variance = _Sum.apply(centred.square().sum(dim=0)) / n  # (D,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (n / max(n - 1, 1)), self.momentum)
        return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes, in the gradient too: each process's loss sees all rows."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        return distributed.all_reduce_sum(own)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return distributed.all_reduce_sum(gradient)
