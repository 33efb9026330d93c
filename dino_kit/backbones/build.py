"""Backbones by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from dino_kit.backbones.vit import VisionTransformer
from dino_kit.config import architectures
from dino_kit.config.fields import nearest
from dino_kit.errors import UserError

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(VisionTransformer, **s) for name, s in architectures.VIT_SIZES.items()},
    architectures.FREE_VIT: VisionTransformer,
}
_FREE_SIZES = ("embed_dim", "depth", "num_heads")


def create_backbone(name: str, **options: Any) -> nn.Module:
    """A backbone with fresh weights, as :class:`~dino_kit.backbones.interface.Backbone` describes.

    ``name`` is ``vit_tiny``, ``vit_small`` (also ``deit_small``), ``vit_base``, ``vit_large``, or
    ``vit``, which needs ``embed_dim``, ``depth`` and ``num_heads``. ``options`` are arguments of
    :class:`~dino_kit.backbones.vit.VisionTransformer`, and go before the sizes of the name.

    Raises:
        UserError: no such name or option, or sizes that are missing or do not fit together.
    """
    architectures.require_buildable(name)
    name = architectures.canonical(name)
    allowed = list(inspect.signature(VisionTransformer).parameters)
    for option in options:
        if option not in allowed:
            hint = nearest(option, allowed)
            raise UserError(f"{name} has no option {option!r}; it has {', '.join(allowed)}{hint}")
    missing = [size for size in _FREE_SIZES if size not in options]
    if name == architectures.FREE_VIT and missing:
        raise UserError(f"The sizes of {name} are given one by one; {', '.join(missing)} missing.")
    return BACKBONES[name](**options)
