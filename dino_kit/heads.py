"""The projection head between a backbone and its prototypes.

Legend: B rows (an image's view each), D width of the backbone, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_kit.errors import UserError

_IN_CACHE = 1 << 18  # weights that a core's cache holds several times: 1 MB


class DINOHead(nn.Module):
    """MLP, L2 normalisation, weight-normed linear layer: ``(B, D)`` features to ``(B, K)`` logits.

    With frozen norms a logit is the cosine of the angle between the bottleneck and a prototype.
    Source: Caron et al. 2021, section 3.1 "Network architecture" and appendix C.

    Args:
        in_dim: D, the width of the features.
        out_dim: K, the number of prototypes.
        use_bn: a batch norm after every hidden linear layer.
        norm_last_layer: keep the prototypes' norms fixed, which steadies the training.
        nlayers: linear layers of the MLP; with one there is no hidden layer.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width of the space in which prototypes live.

    Raises:
        UserError: ``nlayers`` is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        if nlayers < 1:
            raise UserError(f"A head of {nlayers} layers cannot be built; nlayers is 1 or more.")
        layers: list[nn.Module] = []
        width = in_dim
        for _ in range(nlayers - 1):
            layers.append(nn.Linear(width, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
            width = hidden_dim
        layers.append(nn.Linear(width, bottleneck_dim))
        # Published heads of one layer name it "mlp", not "mlp.0".
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, K)``."""
        x = self.mlp(x)  # (B, bottleneck)
        # Under autocast x is half precision here, too coarse for a norm; the weights are not.
        x = F.normalize(x.to(self.last_layer.weight_v.dtype), dim=-1)
        return self.last_layer(x)  # (B, K)


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are ``weight_g`` times the directions of ``weight_v``.

    Rows start as those of ``nn.Linear``, rescaled to norm 1. Source: Salimans and Kingma 2016,
    equation 2.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_features)`` to ``(B, out_features)``."""
        kind = x.device.type
        lowered = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if lowered else x.dtype
        return _WeightNormProduct.apply(x, self.weight_v, self.weight_g, dtype)


class _WeightNormProduct(torch.autograd.Function):
    """``x wᵀ`` in ``dtype``, w = g v / ‖v‖ row by row in the parameters' own precision.

    A few prototypes at a time, so that their normed rows, and the gradient by them, which are as
    large as the weights, are made and used in the cache and never stored. With u = v / ‖v‖ the
    gradient G by w becomes u·G by g, and (G - u (u·G)) g / ‖v‖ by v (Salimans and Kingma 2016,
    equation 3). There is no gradient of the gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, v, g)
        ctx.dtype = dtype
        x = x.to(dtype)
        logits = x.new_empty(len(x), len(v))
        for own, rows, scale in _prototypes(logits, v, g):
            weight = rows * (scale / rows.norm(dim=1, keepdim=True))
            torch.mm(x, weight.to(dtype).mT, out=own)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, v, g = ctx.saved_tensors
        of_x, of_v, of_g, _ = ctx.needs_input_grad
        low = x.to(ctx.dtype)
        by_x = torch.zeros_like(x) if of_x else None
        by_v = torch.empty_like(v) if of_v else None
        by_g = torch.empty_like(g) if of_g else None
        for number, (own, rows, scale) in enumerate(_prototypes(gradient, v, g)):
            norms = rows.norm(dim=1, keepdim=True)
            units = rows / norms
            if of_x:
                by_x += own @ (units * scale).to(ctx.dtype)
            if not (of_v or of_g):
                continue
            by_w = (own.mT @ low).to(v.dtype)
            along = torch.linalg.vecdot(by_w, units).unsqueeze(1)
            first = number * _at_once(v)
            part = slice(first, first + len(rows))
            if of_v:
                torch.mul(by_w.addcmul_(units, along, value=-1), scale / norms, out=by_v[part])
            if of_g:
                by_g[part] = along
        return by_x, by_v, by_g, None


def _prototypes(logits: Tensor, v: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A few prototypes at a time: their columns of ``logits``, their rows of ``v`` and of ``g``."""
    size = _at_once(v)
    return zip(logits.split(size, dim=1), v.split(size), g.split(size), strict=True)


def _at_once(v: Tensor) -> int:
    return max(1, _IN_CACHE // v.shape[1]) if v.device.type == "cpu" else len(v)
