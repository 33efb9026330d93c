"""The attention of many images, written as pictures and numbers, and as one page to explore."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from dino_kit import attention_page, figures, files
from dino_kit.backbones.layers import block_index
from dino_kit.data import bands
from dino_kit.data.augment import center_crop
from dino_kit.data.bands import Bands
from dino_kit.errors import UserError
from dino_kit.evaluators import attention
from dino_kit.normalize import IMAGENET_MEAN, IMAGENET_STD

# Colours to choose from on the page, matplotlib's names; the first is that of the pictures.
_COLOURS = (figures.COLOURS, "viridis", "gray")


class Picture(NamedTuple):
    """An image to look at."""

    title: str
    folder: Path  # where its files go
    image: Image.Image | Bands  # RGB or what else the network takes, of any size


def stop(picture: Picture, error: UserError) -> None:
    raise error


def fitted(
    pictures: Iterable[Picture],
    backbone: nn.Module,
    image_size: Sequence[int],
    crop_without_resize: bool,
    refuse: Callable[[Picture, UserError], object],
) -> Iterator[tuple[Picture, Image.Image | Bands]]:
    """Each picture with its image as it is looked at; arguments as those of :func:`show`.

    Raises:
        UserError: no image of that size has a patch or as few patches as can be shown.
    """
    attention.require_size(image_size, backbone.patch_size)
    for picture in pictures:
        try:
            image = attention.fit(
                picture.image, image_size, backbone.patch_size, crop_without_resize
            )
        except UserError as error:
            refuse(picture, error)
            continue
        yield picture, image


class Page(NamedTuple):
    """A page to write."""

    path: Path
    images: int  # how many it is meant to show; where they do not fit, the first of them
    origin: str  # a sentence that says which network the maps are of


def show(
    backbone: nn.Module,
    pictures: Iterable[Picture],
    *,
    image_size: Sequence[int],
    block: int = -1,
    crop_without_resize: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    threshold: float | None = None,
    page: Page | None = None,
    facts: Mapping[str, object] | None = None,
    advance: Callable[[Path], object] = lambda sheet: None,
    refuse: Callable[[Picture, UserError], object] = stop,
) -> int:
    """Write for each picture what :func:`~dino_kit.figures.save_attention` lists, and the page.

    Args:
        backbone: has self-attention; runs in eval mode and float32, where it is.
        pictures: taken one after the other, so they may be made as they are needed.
        image_size: height and width to which images are resized; one number is the shorter side.
        block: the block whose attention is shown, counted from 0, or from the end as -1.
        crop_without_resize: nothing is resized; so much is cut out of the centre of the images.
        mean, std: of each channel, pixels in [0, 1].
        threshold: the share of the attention that masks keep; None for no masks.
        page: the page to write; None for none.
        facts: plain values to store beside the maps of every picture.
        advance: called with the sheet of each picture when its files are written.
        refuse: called with a picture that has too many patches at that size, and a sentence that
            says so; where it returns, the picture is left out.

    Returns:
        How many images the page shows; where it would show none, it is not written.

    Raises:
        UserError: the backbone has no self-attention or no such block, or takes no images of that
            size; an image's maps do not fit into memory.
    """
    attention.require_attention(backbone)
    block = block_index(block, backbone.depth)
    last = backbone.depth - 1
    named = "" if block == last else f"block {block} of 0 to {last}"
    device = next(backbone.parameters()).device

    def see(image: Image.Image | Bands) -> Tensor:
        return attention.to_tensor(image, mean, std).to(device)  # (C, H, W)

    exhibits: list[attention_page.Exhibit] = []
    for picture, image in fitted(pictures, backbone, image_size, crop_without_resize, refuse):
        maps = attention.attention_maps(backbone, see(image), block)  # (heads, h, w)
        sight = bands.picture(image)
        written = figures.save_attention(
            picture.folder,
            sight,
            maps.numpy(),
            title=picture.title,
            block=named,
            masks=None if threshold is None else _masks(maps, threshold).numpy(),
            keep=threshold,
            facts=facts,
        )
        advance(written[0])
        if page is None:
            continue
        most, room = attention_page.patches_for(page.images, len(maps))
        if len(exhibits) < room:
            grid = attention.smaller_grid(maps.shape[1:], most)
            height, width = (n * backbone.patch_size for n in grid)
            if crop_without_resize:
                small = center_crop(image, height, width)
                sight = bands.picture(small)
            else:
                small = image.resize((width, height))
            rows = attention.attention_rows(backbone, see(small), block)  # (heads, T, N)
            note = _note(grid, maps.shape[1:])
            exhibits.append(attention_page.exhibit(picture.title, sight, rows.numpy(), grid, note))
    if exhibits:
        colours = {name: figures.colour_table(name) for name in _COLOURS}
        text = attention_page.page(
            "Attention", page.origin, exhibits, colours, threshold, named or "the last block"
        )
        files.write_text(page.path, text)
    return len(exhibits)


def _masks(maps: Tensor, threshold: float) -> Tensor:
    """Maps (heads, h, w) to the masks of each head and of their mean, (heads + 1, h, w)."""
    rows = torch.cat((maps, maps.mean(dim=0, keepdim=True))).flatten(1)
    return attention.threshold_mask(rows, threshold).unflatten(1, maps.shape[1:])


def _note(grid: tuple[int, int], whole: tuple[int, int]) -> str:
    if tuple(grid) == tuple(whole):
        return ""
    return (
        f"So that the page stays small, this image was looked at in {grid[0]} × {grid[1]} patches, "
        f"not in the {whole[0]} × {whole[1]} of its pictures."
    )
