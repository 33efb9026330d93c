"""Attention of given queries, keys and values, with no map kept between the passes.

Legend: B batch, h heads, d their width, Q queries, T tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST_MAP = 1 << 20  # numbers of one head's map, beyond which PyTorch's kernel is the faster one
_AT_ONCE = 1 << 21  # numbers of the maps that are held at a time: 4 MB
_ROWS_AT_ONCE = 1 << 19  # the same where the maps themselves are what is wanted: 2 MB


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q kᵀ / √d) v``: q (B, h, Q, d), k and v (B, h, T, d) to ``(B, h, Q, d)``.

    PyTorch's fused kernel, but for bfloat16 on a CPU, where it is several times slower than
    products of batches of matrices; those are taken of a few images at a time.
    """
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    # The loop over images is not for a compiler.
    if slow and not torch.compiler.is_compiling() and q.shape[2] * k.shape[2] <= _LARGEST_MAP:
        return _InProducts.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attention_maps(q: Tensor, k: Tensor) -> Tensor:
    """``softmax(q kᵀ / √d)``: q (B, h, Q, d) and k (B, h, T, d) to ``(B, h, Q, T)``.

    Where no gradient is asked for, some rows at a time, so that little more than the maps themselves
    is in memory.
    """
    scale = q.shape[-1] ** -0.5
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return (q @ k.mT * scale).softmax(dim=-1)
    maps = q.new_empty(*q.shape[:3], k.shape[2])
    rows = max(1, _ROWS_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    for own, part in zip(maps.split(rows, dim=2), q.split(rows, dim=2), strict=True):
        own.copy_((part @ k.mT).mul_(scale).softmax(dim=-1))
    return maps


class _InProducts(torch.autograd.Function):
    """Maps of a few images at a time, computed again in the backward pass."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        # Laid out so that joining the heads is a view.
        result = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        for own, qs, ks, vs in _images(result, q, k, v):
            own.copy_(_maps(qs, ks) @ vs)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        results = tuple(map(torch.empty_like, (q, k, v)))
        for dq, dk, dv, do, qs, ks, vs in _images(*results, gradient, q, k, v):
            maps = _maps(qs, ks)  # (b, h, Q, T)
            dv.copy_(maps.mT @ do)
            ds = torch.ops.aten._softmax_backward_data(do @ vs.mT, maps, -1, maps.dtype)
            ds.mul_(q.shape[-1] ** -0.5)
            dq.copy_(ds @ ks)
            dk.copy_(ds.mT @ qs)
        return results


def _maps(q: Tensor, k: Tensor) -> Tensor:
    scores = (q @ k.mT).mul_(q.shape[-1] ** -0.5)
    # Not by Tensor.softmax, which autocast would compute in float32.
    return torch.ops.aten._softmax(scores, -1, False)


def _images(*tensors: Tensor):
    """A few images of each tensor at a time; the last are queries, keys and values."""
    q, k = tensors[-3:-1]
    size = max(1, _AT_ONCE // (q.shape[1] * q.shape[2] * k.shape[2]))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
