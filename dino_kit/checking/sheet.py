"""A contact sheet: images, and beside each the crops that a run makes of it in its first epoch.

Legend: C channels, S pixels of a crop's side, B images of a batch, V_g views of a size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from PIL import Image
from torch import Tensor

from dino_kit import figures
from dino_kit.data.bands import Bands, picture
from dino_kit.data.crops import View
from dino_kit.data.decode import decode
from dino_kit.data.loader import Batch, Decode, Loader
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.source import Source

_IMAGES, _LOCALS = 8, 4
_SIDE = 192  # pixels of a picture: 96, the usual local crop, twice
_TRIES = 200  # images, where many are broken


def first_batches(
    source: Source,
    groups: Sequence[Sequence[View]],
    pixels: Pixels,
    seed: int,
    decode: Decode = decode,
) -> Iterator[Batch]:
    """The crops of one image after the other, in the order of a run's first epoch.

    Each image's crops are those of the run, whose batches are larger. Images that cannot be read
    are passed over; after so many tries there are no more.
    """
    loader = Loader(
        source, groups, seed=seed, epochs=1, total_batch_size=1, batch_size_per_gpu=1,
        pixels=pixels, on_bad_image="leave_out", decode=decode,
    )  # fmt: skip
    for (batch,) in islice(loader, _TRIES):
        if len(batch.indices):
            yield batch


def contact_sheet(
    source: Source,
    groups: Sequence[Sequence[View]],
    pixels: Pixels,
    seed: int,
    title: str,
) -> Image.Image | None:
    """The first images of a run and their crops, as they go to the network; None if none is readable.

    Args:
        source: what the run reads.
        groups: the views of each crop size, the two global ones first.
        pixels: what an image becomes.
        seed: of the run.
        title: stands above.
    """
    panels: list[tuple[str, str, Image.Image]] = []
    columns = 1
    for row, batch in zip(range(_IMAGES), first_batches(source, groups, pixels, seed), strict=False):
        index = int(batch.indices[0])
        image = decode(source.read(index), source.name(index), pixels)
        size = f"{image.width} × {image.height}"
        name = figures.shortened(source.key(index), _SIDE - figures.width_of(f"  {size}"))
        panels.append((name, size, _framed(picture(image))))
        crops = [
            (f"{kind} {number}" if row == 0 else "", f"{crop.shape[-1]}", _picture(crop))
            for kind, group in zip(("global", "local"), batch.groups, strict=False)
            for number, crop in enumerate(group[:_LOCALS, 0], 1)
        ]
        panels += [(label, size if row == 0 else "", one) for label, size, one in crops]
        columns = 1 + len(crops)
    if not panels:
        return None
    hidden = max(sum(map(len, groups[1:])) - _LOCALS, 0)
    more = f"; {hidden} more local crops of each are not shown" if hidden else ""
    stretched = "" if pixels.in_chans == 3 else " Each picture is stretched by itself."
    subtitle = (
        "Left the image, then what the networks see of it in the first epoch at seed "
        f"{seed}{more}.{stretched}"
    )
    return figures.sheet(title, subtitle, panels, columns)


def _picture(crop: Tensor) -> Image.Image:
    """A crop (C, S, S), uint8 RGB or float bands, as a square to look at."""
    values = crop.numpy()
    if values.dtype.kind == "f":
        return _scaled(Bands(values).picture())
    return _scaled(Image.fromarray(values.transpose(1, 2, 0).copy()))


def _framed(image: Image.Image) -> Image.Image:
    """``image`` on a square of paper."""
    small = _scaled(image)
    square = Image.new("RGB", (_SIDE, _SIDE), "white")
    square.paste(small, ((_SIDE - small.width) // 2, (_SIDE - small.height) // 2))
    return square


def _scaled(image: Image.Image) -> Image.Image:
    """So that the longer side fits; pixels of a small image stay squares."""
    factor = _SIDE / max(image.size)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    how = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    return image.resize(size, how)
