"""``torchvision:NAME``: torchvision's classifiers of images, without what classifies.

Of a convolutional network and of a Swin the pooled feature is the mean of its last map. Of a ViT it
is the class token, whose positions are interpolated for images of other sizes.

Legend: B batch, C channels, H and W pixels, N = h·w patches, T = 1+N with the class token, D width,
A heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import regnet

from dino_kit.backbones.frozen import in_eval_mode
from dino_kit.backbones.interface import Features
from dino_kit.backbones.layers import block_index, patch_grid
from dino_kit.backbones.libraries import sizes
from dino_kit.backbones.libraries.wrapped import (
    LibraryBackbone,
    outputs_of,
    require_depth,
    resized_positions,
    see_channels,
)
from dino_kit.config.fields import nearest
from dino_kit.errors import UserError

# What gives the last map, by the networks' own names of it.
_STAGES = (
    "features", "layer4", "trunk_output", "conv5", "Mixed_7c", "inception5b", "layers", "blocks",
)  # fmt: skip
_AFTER_THE_MAP = ("avgpool", "flatten", "classifier", "fc", "head")


def build(
    name: str,
    image_size: int | None = None,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> LibraryBackbone:
    """The model that torchvision calls ``name``, with ``options`` of torchvision's.

    Raises:
        UserError: there is no such model or option, or it takes no images of ``image_size``.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(
            f"torchvision has no classifier {name!r} here; it has {len(known)}, among them resnet50 "
            f"and swin_t{nearest(name, known)}"
        )
    title = f"torchvision:{name}"
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True, **options}
    sized = partial(_sized, name, title, in_chans, drop_path_rate, options)
    return sizes.built(sized, title, image_size)


def _sized(
    name: str,
    title: str,
    in_chans: int,
    drop_path_rate: float,
    options: dict[str, Any],
    image_size: int | None,
) -> LibraryBackbone:
    from torchvision import models

    is_vit = name.startswith("vit_")
    if is_vit and image_size:
        options = {**options, "image_size": image_size}
    try:
        model = models.get_model(name, weights=None, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{title} cannot be built so: {error}.") from error
    _set_stochastic_depth(model, drop_path_rate)
    see_channels(model, in_chans)
    return (_ViT if is_vit else _Map)(model, title, image_size or 224, in_chans)


def _set_stochastic_depth(model: nn.Module, last: float) -> None:
    """Rates from 0 linearly to ``last``, as torchvision sets them; nothing where it has none."""
    from torchvision.ops import StochasticDepth

    found = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    for index, module in enumerate(found):
        module.p = last * index / max(1, len(found) - 1)


class _Map(LibraryBackbone):
    """A network that ends in a map, ``(B, D, h, w)``, or of a Swin ``(B, h, w, D)``."""

    exempt = ("relative_position_bias_table",)

    def __init__(self, model: nn.Module, name: str, image_size: int, in_chans: int):
        head = getattr(model, "classifier", None)
        for part in _AFTER_THE_MAP:
            if hasattr(model, part):
                setattr(model, part, nn.Identity())
        if isinstance(head, nn.Sequential) and isinstance(head[0], nn.LayerNorm):
            model.classifier = nn.Sequential(head[0])  # a ConvNeXt's norm, which is of the mean
        self._is_swin = hasattr(model, "permute")
        self._is_densenet = type(model).__name__ == "DenseNet"
        stage = next(getattr(model, part) for part in _STAGES if hasattr(model, part))
        self._last = tuple(_last_blocks(stage))  # in a tuple they are no second part of this module
        super().__init__(model, name, image_size, in_chans)
        self._last = self._last[-self._count_equal() :]
        self.depth = len(self._last)

    def read(self, images: Tensor) -> Features:
        (x,) = self._maps(images, 1)
        patches, grid = self._normed(x).flatten(2).mT, tuple(x.shape[2:])
        if self._is_swin:
            return Features(patches.mean(dim=1), patches, grid)
        return Features(self._normed(x.mean((2, 3), keepdim=True)).flatten(1), patches, grid)

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Of the last ``n`` of ``depth`` blocks, all of the last map's size, ``(B, N, D)``."""
        require_depth(self, n)
        self.keep_all()
        return [self._normed(x).flatten(2).mT for x in self._maps(images, n)]

    def _maps(self, images: Tensor, n: int) -> list[Tensor]:
        """Outputs (B, D, h, w) of the last ``n`` blocks, as they are before a norm."""
        outputs = outputs_of(self._last[-n:], self.model, images)
        if self._is_swin:
            return [x.permute(0, 3, 1, 2) for x in outputs]
        return [F.relu(x) for x in outputs] if self._is_densenet else outputs

    def _normed(self, x: Tensor) -> Tensor:
        """``(B, D, h, w)`` to the same."""
        if self._is_swin:
            return self.model.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        classifier = getattr(self.model, "classifier", None)
        return x if classifier is None else classifier(x)

    def _count_equal(self) -> int:
        """How many of the last blocks give maps of one size."""
        if self._is_densenet:
            return 1  # its blocks end in a norm of their own
        with in_eval_mode(self), torch.no_grad():
            maps = self._maps(self.blank(self.image_size), len(self._last))
        same = [x.shape == maps[-1].shape for x in maps]
        return len(same) if all(same) else same[::-1].index(False)


def _last_blocks(stage: nn.Module) -> list[nn.Module]:
    """The parts of a stage, or of the last stage in it, in order."""
    parts = [stage]
    # By the very type: what derives from Sequential is a layer with its norm.
    while type(parts[-1]) in (nn.Sequential, nn.ModuleList, regnet.AnyStage):
        parts = list(parts[-1].children())
    return parts


class _ViT(LibraryBackbone):
    """torchvision's vision transformer, at any size in whole patches."""

    num_prefix_tokens = 1
    exempt = ("class_token", "pos_embedding")

    def __init__(self, model: nn.Module, name: str, image_size: int, in_chans: int):
        model.heads = nn.Identity()
        self.depth = len(model.encoder.layers)
        super().__init__(model, name, image_size, in_chans)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.encoder.layers)

    def read(self, images: Tensor) -> Features:
        (x,) = self._layers(images, 1)
        return Features(x[:, 0], x[:, 1:], self._grid(images))

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last ``n`` blocks, first to last, normalised, each ``(B, T, D)``."""
        require_depth(self, n)
        self.keep_all()
        return self._layers(images, n)

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """The last block's attention after the softmax, ``(B, A, T, T)``; the class token first."""
        return self.get_selfattention(images, -1)

    def get_selfattention(self, images: Tensor, block: int) -> Tensor:
        """The same of any block, counted from 0, or from the end as -1, -2, …"""
        index = block_index(block, self.depth)
        self.keep_all()
        x = self._tokens(images)
        for layer in self.model.encoder.layers[:index]:
            x = layer(x)
        layer = self.model.encoder.layers[index]
        x = layer.ln_1(x)
        return layer.self_attention(x, x, x, need_weights=True, average_attn_weights=False)[1]

    def _layers(self, images: Tensor, n: int) -> list[Tensor]:
        x, outputs = self._tokens(images), []
        for index, layer in enumerate(self.model.encoder.layers):
            x = layer(x)
            if index >= self.depth - n:
                outputs.append(self.model.encoder.ln(x))
        return outputs

    def _tokens(self, images: Tensor) -> Tensor:
        patches = self.model.conv_proj(images).flatten(2).mT  # (B, N, D)
        cls = self.model.class_token.expand(len(images), -1, -1)
        positions = self.model.encoder.pos_embedding  # (1, T, D) of the native grid
        side = self.model.image_size // self.model.patch_size
        x = torch.cat((cls, patches), dim=1)
        return x + resized_positions(positions, (side, side), self._grid(images), prefix=1)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return patch_grid(images, self.in_chans, self.model.patch_size)
