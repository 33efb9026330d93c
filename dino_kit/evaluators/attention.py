"""Where the attention of the last block, or of another, goes.

Source: Caron et al. 2021, section 4.2.2 and figure 3: the attention of the class token to the
patches, head by head, and the mask of those that hold a share of its mass.

Legend: C channels, H and W pixels, N = h·w patches, P prefix tokens (the class token first),
T = P+N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dino_kit.backbones.frozen import frozen
from dino_kit.backbones.interface import (
    HasClassAttention,
    HasReAttention,
    HasSelfAttention,
    HasTokenMixing,
)
from dino_kit.backbones.maps import has_class_token, no_selfattention, title
from dino_kit.data.augment import center_crop
from dino_kit.data.bands import Bands
from dino_kit.errors import UserError
from dino_kit.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize

# One head's map of so many patches fills 1 GiB in float32, and a dozen such maps are held at once.
_MOST_PATCHES = 1 << 14


def default_size(
    training_size: int, patch_size: int, as_trained: bool = False
) -> tuple[int, int]:
    """Height and width at which to look: 480 after training at 224, as the reference has it.

    At other sizes it is in that proportion, in whole patches; small images, of 64 pixels and
    fewer, are looked at ``as_trained`` on, and so are all by a network that is made for one size
    (:func:`is_made_for_one_size`), or whose crops were not resized.
    """
    if training_size <= 64 or as_trained:
        return training_size, training_size
    side = patch_size * max(1, round(training_size * 480 / 224 / patch_size))
    return side, side


def is_made_for_one_size(backbone: nn.Module) -> bool:
    """Whether other sizes than the training's are a makeshift for it.

    They are where tokens are mixed by a matrix of one grid, and where maps are normalised by
    statistics of one grid's.
    """
    return isinstance(backbone, HasTokenMixing | HasReAttention)


def require_size(image_size: Sequence[int], patch_size: int) -> None:
    """Raises :class:`UserError` where :func:`fit` would refuse every image.

    Where one number is given, a square image has the fewest pixels.
    """
    _require_patches(image_size[0], image_size[-1], image_size, patch_size)


def fit(
    image: Image.Image | Bands,
    image_size: Sequence[int],
    patch_size: int,
    crop_without_resize: bool = False,
) -> Image.Image | Bands:
    """The picture whose patches are looked at: ``image`` resized, then cut to whole patches.

    Args:
        image: a picture of any size.
        image_size: height and width in pixels; one number is the length of the shorter side.
        patch_size: side of a patch in pixels. What is over at the right and below is cut off.
        crop_without_resize: nothing is resized, and so much is cut out of the centre; one number
            is a square.

    Raises:
        UserError: that picture is smaller than a patch, or has too many of them; or the image is
            smaller than what is cut out of it.
    """
    if crop_without_resize:
        require_size(image_size, patch_size)
        rows, columns = (side - side % patch_size for side in (image_size[0], image_size[-1]))
        return center_crop(image, rows, columns, "it")
    width, height = image.size
    if len(image_size) == 2:
        rows, columns = image_size
    elif width <= height:
        rows, columns = int(image_size[0] * height / width), image_size[0]
    else:
        rows, columns = image_size[0], int(image_size[0] * width / height)
    _require_patches(rows, columns, image_size, patch_size)
    resized = image.resize((columns, rows), Image.Resampling.BILINEAR)
    return resized.crop((0, 0, columns - columns % patch_size, rows - rows % patch_size))


def to_tensor(
    image: Image.Image | Bands | np.ndarray,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """``image``, or its pixels (H, W, C), as a backbone sees it, ``(C, H, W)``."""
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return Normalize(mean, std)(pixels)


def require_attention(backbone: nn.Module) -> None:
    """Raises :class:`NoSelfAttention` where ``backbone`` has none between all of its tokens, or no
    class token among them."""
    if not isinstance(backbone, HasSelfAttention) or not has_class_token(backbone):
        raise no_selfattention(backbone)


def attention_rows(backbone: nn.Module, image: Tensor, block: int = -1) -> Tensor:
    """What every token looks at: its attention to each patch in one block, head by head.

    Args:
        backbone: one with ``get_selfattention``; it runs in eval mode and float32.
        image: ``(C, H, W)``, normalised, on the backbone's device; its sides are multiples of the
            patch size.
        block: which block, counted from 0, or from the end as -1.

    Returns:
        ``(heads, T, N)`` float32 on the CPU; the prefix tokens' rows come first. A row sums to at
        most 1: the rest goes to the prefix tokens.

    Raises:
        UserError: no self-attention, or no such block; an image that does not fit the backbone, or
            of so many patches that their maps do not fit into memory.
    """
    attention = _attention(backbone, image, block)
    return attention[:, :, backbone.num_prefix_tokens :].float().cpu()


def attention_maps(backbone: nn.Module, image: Tensor, block: int = -1) -> Tensor:
    """The class token's attention to each patch, ``(heads, h, w)``; else as attention_rows."""
    attention = _attention(backbone, image, block)
    rows = attention[:, 0, backbone.num_prefix_tokens :].float().cpu()
    return rows.unflatten(1, grid_of(backbone, image))


def reattention_maps(backbone: nn.Module, image: Tensor) -> Tensor:
    """What the class token takes from each patch by Re-Attention, ``(heads, h, w)``, signed.

    Of the last block, float32, on the CPU; arguments and errors as of attention_rows.
    """
    if not isinstance(backbone, HasReAttention):
        raise UserError(
            f"{title(backbone)} has no Re-Attention, so there are no maps of it to show; a "
            "DeepViT has them."
        )
    with looking(backbone, image):
        maps = backbone.get_last_reattention(image[None])[0]
    rows = maps[:, 0, backbone.num_prefix_tokens :].float().cpu()
    return rows.unflatten(1, grid_of(backbone, image))


def classattention_maps(backbone: nn.Module, image: Tensor) -> Tensor:
    """The class token's attention to each patch where it alone attends, ``(heads, h, w)``.

    Of the last block, float32, on the CPU; arguments and errors as of attention_rows.
    """
    if not isinstance(backbone, HasClassAttention):
        raise UserError(
            f"{title(backbone)} has no blocks in which the class token alone attends, so there are no "
            "maps of them to show; an XCiT and a CaiT have them."
        )
    with looking(backbone, image):
        maps = backbone.get_last_classattention(image[None])[0]
    rows = maps[:, backbone.num_prefix_tokens :].float().cpu()
    return rows.unflatten(1, grid_of(backbone, image))


def threshold_mask(attention: Tensor, keep: float) -> Tensor:
    """The fewest patches that together hold ``keep`` of the attention's mass or more.

    Patches are left out from the weakest on while what is left out is at most ``1 - keep`` of the
    sum; among equal ones the earlier goes first.

    Args:
        attention: ``(heads, N)``, from 0; each row is taken by itself.
        keep: the share of the mass, above 0 and at most 1.

    Returns:
        ``(heads, N)`` bool, on the CPU.

    Raises:
        UserError: ``keep`` is no such share.
    """
    if not 0.0 < keep <= 1.0:
        raise UserError(f"The share of attention to keep is {keep}; it is above 0 and at most 1.")
    # On the CPU, as a device's cumulative sum may round in another order each time.
    values, order = attention.float().cpu().sort(dim=1, stable=True)
    kept = (values / values.sum(dim=1, keepdim=True)).cumsum(dim=1) > 1 - keep
    return torch.zeros_like(kept).scatter(1, order, kept)


def smaller_grid(grid: tuple[int, int], most: int) -> tuple[int, int]:
    """Patches down and across, in the proportion of ``grid``, at most ``most`` in all."""
    rows, columns = grid
    if rows * columns <= most:
        return grid
    scale = math.sqrt(most / (rows * columns))
    rows = min(max(1, int(rows * scale)), most)
    return rows, min(max(1, int(columns * scale)), most // rows)


def grid_of(backbone: nn.Module, image: Tensor) -> tuple[int, int]:
    """Patches down and across of an image ``(C, H, W)``."""
    return image.shape[1] // backbone.patch_size, image.shape[2] // backbone.patch_size


def _attention(backbone: nn.Module, image: Tensor, block: int) -> Tensor:
    require_attention(backbone)
    with looking(backbone, image):
        return backbone.get_selfattention(image[None], block)[0]


@contextmanager
def looking(backbone: nn.Module, image: Tensor) -> Iterator[None]:
    """Within: the backbone at work without learning on an image ``(C, H, W)``.

    Raises:
        UserError: the image has too many patches to show, or they do not fit into memory.
    """
    rows, columns = image.shape[1:]
    _require_few(rows, columns, backbone.patch_size)
    try:
        with frozen(backbone, image.device):
            yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "memory" in str(error):
            raise UserError(
                f"{_count(rows, columns, backbone.patch_size)}, whose maps do not fit into memory; "
                "give a smaller --image_size."
            ) from error
        raise


def _require_patches(rows: int, columns: int, image_size: Sequence[int], patch_size: int) -> None:
    """For an image that ``image_size`` makes ``rows`` × ``columns`` pixels."""
    if min(rows, columns) < patch_size:
        raise UserError(
            f"--image_size {' '.join(map(str, image_size))} makes the image {rows} × {columns} "
            f"pixels, smaller than a patch of {patch_size} × {patch_size}; give {patch_size} or "
            "more."
        )
    _require_few(rows, columns, patch_size)


def _require_few(rows: int, columns: int, patch_size: int) -> None:
    if (rows // patch_size) * (columns // patch_size) > _MOST_PATCHES:
        raise UserError(
            f"{_count(rows, columns, patch_size)}, and maps are shown of {_MOST_PATCHES:,} at "
            "most; give a smaller --image_size."
        )


def _count(rows: int, columns: int, patch_size: int) -> str:
    patches = (rows // patch_size) * (columns // patch_size)
    return f"{rows} × {columns} pixels are {patches:,} patches of {patch_size} × {patch_size}"
