"""Backbones by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from dino_kit.backbones.cswin import CSWin
from dino_kit.backbones.deepvit import DeepViT
from dino_kit.backbones.resmlp import ResMLP
from dino_kit.backbones.t2t import T2TViT
from dino_kit.backbones.vit import VisionTransformer
from dino_kit.config import arch_options, architectures
from dino_kit.config.fields import nearest
from dino_kit.errors import UserError

# What a name stands for: a class, and arguments of it.
BACKBONES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    **{name: (VisionTransformer, sizes) for name, sizes in architectures.VIT_SIZES.items()},
    architectures.FREE_VIT: (VisionTransformer, {}),
    **{name: (ResMLP, dict(sizes)) for name, sizes in architectures.RESMLP_SIZES.items()},
    architectures.FREE_RESMLP: (ResMLP, {}),
    **{
        name: (DeepViT, {**sizes, "scale_reattention": name in architectures.SCALED_REATTENTION})
        for name, sizes in architectures.DEEPVIT_SIZES.items()
    },
    architectures.FREE_DEEPVIT: (DeepViT, {}),
    **{name: (T2TViT, sizes) for name, sizes in architectures.T2T_SIZES.items()},
    architectures.FREE_T2T: (T2TViT, {}),
    **{name: (CSWin, sizes) for name, sizes in architectures.CSWIN_SIZES.items()},
    architectures.FREE_CSWIN: (CSWin, {}),
}
# By its depth it would be 1e-5; the published code begins wider networks lower.
BACKBONES["resmlp_b24"][1]["init_scale"] = 1e-6


def create_backbone(name: str, **options: Any) -> nn.Module:
    """A backbone with fresh weights, as :class:`~dino_kit.backbones.interface.Backbone` describes.

    ``name`` is one of :data:`BACKBONES`, or stands for one, as ``deit_small`` does for ``vit_small``;
    or a model of a library as ``timm:NAME``, ``torchvision:NAME``, ``hf:FOLDER`` or
    ``python:PACKAGE.MODULE:CALLABLE``. ``options`` are arguments of the class that it names there,
    and go before the sizes of the name; a name without sizes needs them. Of a library's model they
    are ``image_size``, ``in_chans``, ``drop_path_rate`` and what the library takes.

    Raises:
        UserError: no such name or option, or sizes that are missing or do not fit together.
    """
    name = architectures.canonical(name)
    family = architectures.family_of(name)
    if not family.is_built_here:
        arch_options.require_fresh(name, options)
        library, _, name = name.partition(":")
        return _library(library).build(name, **options)
    kind, sizes = BACKBONES[name]
    allowed = list(inspect.signature(kind).parameters)
    for option in options:
        if option not in allowed:
            hint = nearest(option, allowed)
            raise UserError(f"{name} has no option {option!r}; it has {', '.join(allowed)}{hint}")
    missing = [size for size in family.needed if size not in options]
    if name == family.free and missing:
        raise UserError(f"The sizes of {name} are given one by one; {', '.join(missing)} missing.")
    return kind(**{**sizes, **options})


def require_sizes(backbone: nn.Module, sizes: Sequence[int], way_out: str = "") -> None:
    """Raises :class:`UserError` where images of one of these sides, in pixels, do not pass.

    Which sides do can be known of a library's model by trying only. ``way_out`` ends the sentence.
    """
    if hasattr(backbone, "require_sizes"):
        backbone.require_sizes(sizes, way_out)


def _library(name: str) -> ModuleType:
    """What builds a library's models; imported when it is asked for."""
    if name == "timm":
        from dino_kit.backbones.libraries import timm_models as library
    elif name == "torchvision":
        from dino_kit.backbones.libraries import torchvision_models as library
    elif name == "hf":
        from dino_kit.backbones.libraries import transformers_models as library
    else:
        from dino_kit.backbones.libraries import own_callable as library
    return library
