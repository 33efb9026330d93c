"""``timm:NAME``: timm's models of images, without what classifies."""

from __future__ import annotations

import re
from typing import Any

import timm
from torch import nn

from dino_kit.backbones.libraries import sizes
from dino_kit.backbones.libraries.timm_backbone import TimmBackbone
from dino_kit.backbones.libraries.timm_kinds import kind_of
from dino_kit.config.fields import nearest
from dino_kit.errors import UserError

# How timm's models are asked to take images of other sizes than that which they are made for; most
# know one of these, or none.
_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}
_OF_OTHER_USES = {"num_classes", "features_only", "feature_cfg", "out_indices"}


def build(
    name: str,
    image_size: int | None = None,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> TimmBackbone:
    """The model that timm calls ``name``, with ``options`` of timm's and fresh weights.

    Raises:
        UserError: there is no such model or option, or it takes no images of ``image_size``.
    """
    known = timm.list_models()
    if name not in known:
        raise UserError(
            f"timm has no model {name!r} here; it has {len(known)}, among them "
            f"vit_small_patch16_224 and convnext_tiny{nearest(name, known)}"
        )
    title = f"timm:{name}"
    useless = _OF_OTHER_USES.intersection(options)
    if useless:
        raise UserError(
            f"{title} takes no option {min(useless)} here: a backbone has no classifier and gives out "
            "its last tokens or map; leave it out."
        )
    if not 0.0 <= drop_path_rate < 1.0:
        raise UserError(
            f"drop_path_rate is {drop_path_rate}; a rate of stochastic depth is at least 0 and below 1."
        )

    def sized(side: int | None) -> TimmBackbone:
        wishes = {"img_size": side, "drop_path_rate": drop_path_rate, **_ANY_SIZE}
        model = _create(name, title, options, wishes, in_chans=in_chans)
        return kind_of(model)(model, title, side or _native_size(model), in_chans)

    return sizes.built(sized, title, image_size)


def _create(
    name: str, title: str, options: dict[str, Any], wishes: dict[str, Any], **needed: Any
) -> nn.Module:
    """The model with ``options`` and ``needed``, and with those ``wishes`` that it knows."""
    wishes = {key: value for key, value in wishes.items() if value is not None}
    while True:
        try:
            return timm.create_model(
                name, pretrained=False, num_classes=0, **{**needed, **wishes, **options}
            )
        except TypeError as error:
            _, _, unknown = str(error).partition("unexpected keyword argument")
            unknown = [key for key in re.findall(r"'(\w+)'", unknown) if key in wishes]
            if not unknown or any(key in options for key in unknown):
                raise _refused(title, error) from error
            for key in unknown:
                del wishes[key]
        except Exception as error:  # each model has its own
            raise _refused(title, error) from error


def _refused(title: str, error: Exception) -> UserError:
    twice = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
    if twice:
        return UserError(
            f"{title} cannot be built so: {twice[1]} is a part of what its name stands for; leave it out."
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{title} cannot be built so: {reason.rstrip('.')}.")


def _native_size(model: nn.Module) -> int:
    """The side of the images that a model is made for where nothing else is asked."""
    embed = getattr(model, "patch_embed", None) or getattr(model, "stem", None)
    made_for = getattr(embed, "img_size", None)
    return made_for[0] if made_for else model.default_cfg["input_size"][-1]
