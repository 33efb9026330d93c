"""The features of a source's images, extracted once, for every evaluator.

Images that cannot be used are left out, told, and counted: never replaced.

Legend: n images, m of them that can be used, B batch, C channels, S pixels of a side, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_kit import log
from dino_kit.backbones.frozen import frozen
from dino_kit.data.augment import center_view, eval_sizes
from dino_kit.data.decode import decode
from dino_kit.data.pixels import RGB, Pixels
from dino_kit.data.sources.source import Source
from dino_kit.errors import BadImage, UserError
from dino_kit.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize


class Features(NamedTuple):
    """What :func:`embed` makes of a source, on the CPU."""

    features: Tensor  # (m, D), float32
    kept: Tensor  # (m,), int64, rising: the images that they are of
    left_out: dict[str, str]  # the names of all others, each with the reason


class LabelledFeatures(NamedTuple):
    """Likewise, of a source with labels."""

    features: Tensor  # (m, D), float32
    labels: Tensor  # (m,), int64
    left_out: dict[str, str]


def extract(backbone: nn.Module, source: Source, **how: Any) -> LabelledFeatures:
    """Pooled features and labels of all images; ``how`` is for :func:`embed`.

    Raises:
        UserError: an image has no label, the sentence names it; or none can be used.
    """
    labels = labels_of(source)
    features, kept, left_out = embed(backbone, source, **how)
    require_some(source, len(kept), left_out)
    return LabelledFeatures(features, labels[kept], left_out)


def embed(
    backbone: nn.Module,
    source: Source,
    *,
    image_size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    pixels: Pixels = RGB,
    batch_size: int = 128,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    description: str = "features",
    crop_without_resize: bool = False,
) -> Features:
    """Pooled features of all images that can be used, in the order of the source.

    Images are resized and cut at the centre as after training at ``image_size`` (see
    :func:`~dino_kit.data.augment.eval_sizes`), travel as pixels, and are normalised on the device.
    The backbone runs in eval mode and in its own precision; it stays on ``device``.

    Args:
        backbone: images (B, C, S, S) to (B, D).
        source: images, labelled or not.
        image_size: side in pixels that the backbone was trained at.
        mean, std: of each channel, pixels in [0, 1].
        pixels: what an image becomes.
        batch_size: B.
        num_workers: processes that read and prepare images; 0 for this one.
        device: where the backbone runs.
        description: what the progress line calls it; empty for no line.
        crop_without_resize: the centre, S × S pixels, is cut out of the images as they are.

    Raises:
        UserError: the source cannot be read any more.
    """
    device = torch.device(device)
    backbone, normalize = backbone.to(device), Normalize(mean, std).to(device)
    loader = DataLoader(
        _Views(source, pixels, *eval_sizes(image_size, crop_without_resize)),
        batch_size=batch_size,
        # More processes than batches would start only to stop.
        num_workers=min(num_workers, -(-len(source) // batch_size)),
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
    )
    features = torch.empty(len(source), backbone.embed_dim)
    kept: list[int] = []
    left_out: dict[str, str] = {}
    with frozen(backbone, device), log.progress(len(source), description) as advance:
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            images, indices, bad = batch
            left_out |= bad
            if indices:
                images = normalize(images.to(device, non_blocking=True))  # (B, C, S, S)
                features[len(kept) : len(kept) + len(images)] = backbone(images)
                kept += indices
            advance(len(indices) + len(bad))
    if left_out:
        # A list may name an image twice.
        lost, first = len(source) - len(kept), next(iter(left_out.values()))
        count, verb = f"{lost:,} of {len(source):,}", "is" if lost == 1 else "are"
        log.notice(f"{count} images of {source.root} cannot be used and {verb} left out. {first}")
    return Features(features[: len(kept)], torch.tensor(kept, dtype=torch.int64), left_out)


def require_some(source: Source, used: int, left_out: dict[str, str]) -> None:
    """Raises :class:`UserError` where no image of ``source`` could be used; it says why."""
    if not used:
        # A process that has no part of the images has no reason to give.
        first = next((f" {reason}" for reason in left_out.values()), "")
        raise UserError(f"None of the {len(source):,} images of {source.root} can be used.{first}")


def labels_of(source: Source) -> Tensor:
    """The labels of all images, (n,) int64, -1 of those that cannot be read for one.

    Raises:
        UserError: an image has none.
    """
    labels = torch.empty(len(source), dtype=torch.int64)
    for index in range(len(source)):
        label = source.label(index)
        if label is None and not _is_lost(source, index):
            raise UserError(
                f"{source.name(index)} has no label; an evaluation needs one for every image."
            )
        labels[index] = -1 if label is None else label
    return labels


def _is_lost(source: Source, index: int) -> bool:
    """Whether an image cannot even be had, as then its label may not be either."""
    try:
        source.read(index)
    except BadImage:
        return True
    return False


# Images (B, C, S, S); which they are; and of those left out the names and reasons.
_Batch = tuple[Tensor, list[int], dict[str, str]]


class _Views(Dataset):
    def __init__(self, source: Source, pixels: Pixels, resize: int | None, crop: int):
        self.source, self.pixels, self.resize, self.crop = source, pixels, resize, crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> _Batch | str:
        """A sentence where nothing can be read, as an exception crosses processes as a traceback."""
        shape = (len(indices), self.crop, self.crop, self.pixels.in_chans)
        images, kept = np.empty(shape, self.pixels.dtype), []
        bad: dict[str, str] = {}
        try:
            for index in indices:
                name = self.source.name(index)
                try:
                    image = decode(self.source.read(index), name, self.pixels)
                    images[len(kept)] = center_view(image, self.resize, self.crop, name)
                except BadImage as error:
                    bad[name] = str(error)
                else:
                    kept.append(index)
        except UserError as error:
            return str(error)
        images = torch.from_numpy(images[: len(kept)]).permute(0, 3, 1, 2).contiguous()
        return images, kept, bad


def _as_it_is(batch: _Batch | str) -> _Batch | str:
    return batch
