"""Batch norm whose statistics are those of all processes, on every device.

PyTorch's ``SyncBatchNorm`` computes on GPUs only; where it can, it is used.

Legend: B rows of this process, n rows of all, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_kit import distributed


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` with each batch norm in it over all processes; names and values stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, module in network.named_children():
        if isinstance(module, nn.BatchNorm1d):
            setattr(network, name, SharedBatchNorm.like(module))
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
