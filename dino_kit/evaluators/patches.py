"""What there is to see of an image's patches besides what each head attends to.

Rollout, which is of all blocks together; what a class token looks at where it alone attends; the
patches' similarity to the whole, which every network has; rows of a token mixing; and what a class
token takes from patches by Re-Attention, which has a sign as mixing has.

Legend: C channels, H and W pixels, N = h·w patches, R rows of the mixing that are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dino_kit import patch_figures
from dino_kit.backbones.interface import (
    Features,
    HasTokenMixing,
)
from dino_kit.backbones.maps import title
from dino_kit.data import bands
from dino_kit.errors import UserError
from dino_kit.evaluators import attention
from dino_kit.evaluators.gallery import Picture, fitted, stop
from dino_kit.evaluators.rollout import rollout_map
from dino_kit.normalize import IMAGENET_MEAN, IMAGENET_STD

_ALONG_A_SIDE = 3  # rows of the mixing are shown for so many patches down and across


def look(backbone: nn.Module, image: Tensor) -> Features:
    """A backbone's features of one image.

    Args:
        backbone: any; it runs in eval mode and float32.
        image: ``(C, H, W)``, normalised, on the backbone's device.

    Raises:
        UserError: an image that does not fit the backbone, or of too many patches.
    """
    with attention.looking(backbone, image):
        return backbone.forward_features(image[None])


def similarity_map(features: Features) -> Tensor:
    """How like the pooled feature of an image each of its patches is: their cosine, from -1 to 1.

    Both are normalised as the backbone gives them out. Returns ``(h, w)`` float32, on the CPU.
    """
    patches, pooled = features.patches[0].float(), features.pooled.float()  # (N, D), (1, D)
    return F.cosine_similarity(patches, pooled, dim=1).cpu().unflatten(0, features.grid)


class Mixing(NamedTuple):
    """Rows of the last block's token mixing."""

    places: list[tuple[int, int]]  # R patches, down and across from 0
    rows: Tensor  # (R, h, w), float32, signed, on the CPU: what each patch adds to that one


@torch.no_grad()
def mixing_rows(backbone: nn.Module, grid: tuple[int, int]) -> Mixing:
    """Rows of the token mixing for patches spread over a ``grid`` of :class:`Features`.

    Raises:
        UserError: the backbone has no token mixing.
    """
    if not isinstance(backbone, HasTokenMixing):
        raise UserError(
            f"{title(backbone)} mixes its tokens by no matrix of weights, so it has no "
            "rows of one to show; a ResMLP has them."
        )
    matrix = backbone.get_last_mixing(grid).float().cpu()  # (N, N)
    places = spread(grid)
    chosen = [row * grid[1] + column for row, column in places]
    return Mixing(places, matrix[chosen].unflatten(1, grid))


def spread(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """A few patches spread evenly over a grid, row by row; all of a small one."""
    rows, columns = (
        sorted({(2 * part + 1) * side // (2 * _ALONG_A_SIDE) for part in range(_ALONG_A_SIDE)})
        for side in grid
    )
    return [(row, column) for row in rows for column in columns]


def show(
    backbone: nn.Module,
    pictures: Iterable[Picture],
    kinds: Sequence[str],
    *,
    image_size: Sequence[int],
    crop_without_resize: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    facts: Mapping[str, object] | None = None,
    advance: Callable[[Path], object] = lambda sheet: None,
    refuse: Callable[[Picture, UserError], object] = stop,
) -> None:
    """Write for each picture what :func:`~dino_kit.patch_figures.save_patches` lists.

    Args:
        kinds: those to show; of those of :data:`~dino_kit.backbones.maps.KINDS` all but attention.
        backbone, pictures, image_size, crop_without_resize, mean, std, facts, advance, refuse: as
            those of :func:`~dino_kit.evaluators.gallery.show`.

    Raises:
        UserError: the backbone lacks what is to be shown, or takes no images of that size.
    """
    device = next(backbone.parameters()).device
    for picture, image in fitted(pictures, backbone, image_size, crop_without_resize, refuse):
        seen = attention.to_tensor(image, mean, std).to(device)  # (C, H, W)
        sight = bands.picture(image)
        parts = [draw(backbone, seen, sight) for kind, draw in _PARTS.items() if kind in kinds]
        written = patch_figures.save_patches(
            picture.folder, sight, parts, title=picture.title, facts=facts
        )
        advance(written[0])


def _rollout(backbone: nn.Module, seen: Tensor, sight: Image.Image) -> patch_figures.Part:
    return patch_figures.rollout(sight, rollout_map(backbone, seen).numpy())


def _similarity(backbone: nn.Module, seen: Tensor, sight: Image.Image) -> patch_figures.Part:
    return patch_figures.similarity(sight, similarity_map(look(backbone, seen)).numpy())


def _mixing(backbone: nn.Module, seen: Tensor, sight: Image.Image) -> patch_figures.Part:
    places, rows = mixing_rows(backbone, look(backbone, seen).grid)
    return patch_figures.mixing(sight, places, rows.numpy())


def _classattention(backbone: nn.Module, seen: Tensor, sight: Image.Image) -> patch_figures.Part:
    maps = attention.classattention_maps(backbone, seen)
    return patch_figures.classattention(sight, maps.numpy())


def _reattention(backbone: nn.Module, seen: Tensor, sight: Image.Image) -> patch_figures.Part:
    return patch_figures.reattention(sight, attention.reattention_maps(backbone, seen).numpy())


# In their order on a sheet.
_PARTS = {
    "rollout": _rollout,
    "classattention": _classattention,
    "similarity": _similarity,
    "mixing": _mixing,
    "reattention": _reattention,
}
