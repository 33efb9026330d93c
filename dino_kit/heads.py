"""The projection head between a backbone and its prototypes.

Legend: B rows (an image's view each), D width of the backbone, K prototypes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kit.errors import UserError


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

    def weight(self) -> Tensor:
        """The normed rows ``(out_features, in_features)``, in the parameters' own precision."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())
