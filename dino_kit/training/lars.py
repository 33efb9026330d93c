"""LARS: SGD with momentum whose step is scaled to each weight matrix's own norm.

Source: You et al. 2017, "Large batch training of convolutional networks", with the scaling and
the weight decay left out for biases and norms, as in Barlow Twins and DINO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dino_kit import sharding


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling.

    For a tensor ``p`` of other than one dimension with gradient ``g``::

        u = g + weight_decay * p
        u = u * eta * |p| / |u|       where both norms are positive
        mu = momentum * mu + u
        p = p - lr * mu

    For one-dimensional tensors ``u = g``. The state's key is ``mu``.
    """

    def __init__(
        self,
        params,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ):
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step on every parameter that has a gradient; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            scaled = [p for p in with_gradient if p.ndim != 1]
            plain = [p for p in with_gradient if p.ndim == 1]
            self._move(scaled, _scaled_updates(scaled, group), group)
            self._move(plain, sharding.parts(p.grad for p in plain), group)
        return loss

    def _move(self, params: Sequence[Tensor], updates: Sequence[Tensor], group: dict) -> None:
        if not params:
            return
        for p in params:
            if "mu" not in self.state[p]:
                self.state[p]["mu"] = torch.zeros_like(p)
        params, momenta = map(sharding.parts, (params, [self.state[p]["mu"] for p in params]))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates)
        torch._foreach_add_(params, momenta, alpha=-group["lr"])


def _scaled_updates(params: Sequence[Tensor], group: dict) -> list[Tensor]:
    if not params:
        return []
    updates = [p.grad for p in params]
    updates = torch._foreach_add(updates, params, alpha=group["weight_decay"])
    weight_norms, update_norms = sharding.norms(params), sharding.norms(updates)
    ratios = group["eta"] * weight_norms / update_norms
    # A tensor that is all zeros has to be able to leave zero.
    ratios = ratios.where((weight_norms > 0) & (update_norms > 0), 1.0)
    updates = sharding.parts(updates)
    torch._foreach_mul_(updates, list(ratios.unbind()))
    return updates
