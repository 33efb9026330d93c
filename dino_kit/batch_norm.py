"""Batch norms of a network: which there are, passes that leave their statistics as they are, and
statistics of all processes.

PyTorch's ``SyncBatchNorm`` computes on GPUs only; where it can, it is used.

Legend: B samples of this process, C channels, n values of a channel on all processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dino_kit import distributed
from dino_kit.errors import UserError

_ANY = nn.modules.batchnorm._BatchNorm
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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
    """``network`` with each batch norm in it over all processes; names and tensors stay.

    Raises:
        UserError: one of them does more than to normalise, and what that is would be lost.
    """
    gpu = device.type == "cuda"
    for name, module in network.named_children():
        if type(module) in _PLAIN:
            shared = nn.SyncBatchNorm.convert_sync_batchnorm if gpu else SharedBatchNorm.like
            setattr(network, name, shared(module))
        elif type(module).__name__ == "BatchNormAct2d":  # timm's, which an activation is a part of
            from timm.layers import convert_sync_batchnorm

            shared = convert_sync_batchnorm if gpu else SharedBatchNormAct.like
            setattr(network, name, shared(module))
        elif isinstance(module, _ANY):
            raise UserError(
                f"A {type(module).__name__}, as this --arch has it, cannot be synchronised over "
                "several processes; use one process or another --arch."
            )
        else:
            synchronised(module, device)
    return network


class SharedBatchNorm(_ANY):
    """``(B, C)`` or ``(B, C, …)`` to the same, normalised over everything but the channels.

    The processes may hold different numbers of samples, as stochastic depth leaves them; one may
    hold none. It takes part in the sums all the same, so that the others do not wait for it.
    """

    @classmethod
    def like(cls, other: nn.Module) -> SharedBatchNorm:
        """With the tensors of ``other``, a batch norm."""
        new = cls(
            other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats
        )
        for name, tensor in (*other.named_parameters(), *other.named_buffers()):
            setattr(new, name, tensor)
        return new.train(other.training)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {x.ndim}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.track_running_stats:
            return super().forward(x)
        self._check_input_dim(x)
        # Under autocast x is half precision, too coarse for sums.
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [dim for dim in range(x.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        own = values.new_full((1,), x.numel() // x.shape[1], dtype=torch.float64)
        # In double precision, as PyTorch's: a channel of little variance shows the mean's rounding.
        total = _Sum.apply(torch.cat((values.sum(dims, dtype=torch.float64), own)))  # (C + 1,)
        n = total[-1].detach().clamp(min=1)
        # Not from the sum of squares, which cancels where the mean is large.
        mean = total[:-1] / n  # (C,)
        centred = values - mean.to(values.dtype).view(shape)
        squares = centred.square().sum(dims, dtype=torch.float64)
        variance = _Sum.apply(squares) / n  # (C,)
        if self.training and self.track_running_stats and total[-1]:
            self._follow(mean, variance * (n / (n - 1).clamp(min=1)))
        scale = (variance + self.eps).rsqrt() * (self.weight if self.affine else 1.0)  # (C,)
        normalised = centred * scale.to(values.dtype).view(shape)
        if self.affine:
            normalised = normalised + self.bias.view(shape)
        return normalised.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards these (C,)."""
        self.num_batches_tracked += 1
        # Without a momentum they are the mean over all batches.
        step = 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(variance.to(self.running_var.dtype), step)


class SharedBatchNormAct(SharedBatchNorm):
    """The same, and then what timm's ``BatchNormAct2d`` does besides."""

    @classmethod
    def like(cls, other: nn.Module) -> SharedBatchNormAct:
        new = super().like(other)
        new.drop, new.act = other.drop, other.act
        return new

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class _Sum(torch.autograd.Function):
    """The sum over the processes, in the gradient too: each process's loss sees all values."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        return distributed.all_reduce_sum(own)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return distributed.all_reduce_sum(gradient)
