"""Linear layers by the faster of PyTorch's two libraries of matrix products for CPUs.

In float32 PyTorch takes MKL, whose kernels are made for Intel's processors. oneDNN, which comes with
PyTorch too, multiplies by weights about a tenth faster on AMD's.

Legend: I numbers in, O numbers out.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW = 1 << 20  # multiplications, below which a call costs more than it saves


class Linear(nn.Linear):
    """As ``nn.Linear``, its products by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weightᵀ + bias``: x (..., I), weight (O, I), bias (O,) to ``(..., O)``."""
    if not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    wanted = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            linear(gradient, weight.mT) if of_x else None,
            # Here, where rows are what is summed over, MKL is as fast.
            rows.mT @ x.flatten(0, -2) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.ndim > 1
        and x.numel() * len(weight) >= _FEW
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _prefers_onednn()
    )


@cache
def _prefers_onednn() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and "AuthenticAMD" in _processor()


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    return table.read_text(encoding="utf-8") if table.exists() else platform.processor()
