"""Optimisers, and what happens to gradients before they see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dino_kit import sharding
from dino_kit.errors import UserError
from dino_kit.training.lars import LARS


def is_regularized(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to all but biases and one-dimensional (norms') weights.

    So class token, position embedding and the prototypes' free norms decay.
    """
    return not name.endswith(".bias") and parameter.ndim != 1


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, decayed ones first; the second never decays.

    The second has, besides, what a ``network.backbone`` exempts by its ``no_weight_decay()``.
    """
    decayed, others = split_by_decay(network)
    return [
        {"params": list(decayed.values())},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]


def split_by_decay(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trainable parameters that weight decay applies to, and the others, by their names."""
    exempt = getattr(getattr(network, "backbone", None), "no_weight_decay", set)()
    exempt = {f"backbone.{name}" for name in exempt}
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    decayed = {
        name: p for name, p in trainable.items() if is_regularized(name, p) and name not in exempt
    }
    return decayed, {name: p for name, p in trainable.items() if name not in decayed}


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    devices = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(groups, fused=devices <= {"cpu", "cuda", "mps"})


def _sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    # Not fused: that kernel needs all momentum buffers to exist or none, and those of a last layer
    # that was frozen at first come later.
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, foreach=True)


OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd, "lars": LARS}


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """``adamw``, ``sgd`` or ``lars`` over :func:`parameter_groups`.

    Rate and decay are set before every step by :func:`set_hyperparameters`.

    Raises:
        UserError: there is no such optimiser.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"There is no optimizer '{name}'; there are {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name](groups)


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """The rate for all parameters, the decay for the first group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def clip_per_tensor_(gradients: Sequence[Tensor], norms: Tensor, max_norm: float) -> None:
    """Scale each gradient whose norm exceeds ``max_norm`` down to it, by itself, in place.

    ``norms`` (n,) are those of the whole gradients; the host does not wait for them.
    """
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(sharding.parts(gradients), list(factors.unbind()))


def cancel_last_layer_gradients(network: nn.Module) -> None:
    """Remove the prototypes' gradients, so that a step neither moves nor decays them.

    Nor does it touch their moments: a gradient of zero would.
    """
    for name, parameter in network.named_parameters():
        if "last_layer" in name:
            parameter.grad = None
