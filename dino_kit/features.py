"""The features of a source's images, extracted once, for every evaluator.

Legend: n images, B batch, C channels, S pixels of a side, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from dino_kit.errors import UserError
from dino_kit.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize


def extract(backbone: nn.Module, source: Source, **how: Any) -> tuple[Tensor, Tensor]:
    """Pooled features (n, D), float32, and labels (n,), int64, of all images, on the CPU.

    ``how`` is for :func:`embed`.

    Raises:
        UserError: an image has no label, or cannot be read; the sentence names it.
    """
    labels = labels_of(source)
    return embed(backbone, source, **how), labels


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
) -> Tensor:
    """Pooled features of all images, in the order of the source, on the CPU.

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

    Returns:
        Features (n, D), float32.

    Raises:
        UserError: an image cannot be read, or is smaller than what is cut out of it; the sentence
            names it.
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
    done = 0
    with frozen(backbone, device), log.progress(len(source), description) as advance:
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            images = normalize(batch.to(device, non_blocking=True))  # (B, C, S, S)
            features[done : done + len(images)] = backbone(images)
            done += len(images)
            advance(len(images))
    return features


def labels_of(source: Source) -> Tensor:
    """The labels of all images, (n,) int64; raises :class:`UserError` where one has none."""
    labels = [source.label(index) for index in range(len(source))]
    if None in labels:
        raise UserError(
            f"{source.name(labels.index(None))} has no label; an evaluation needs one for every "
            "image."
        )
    return torch.tensor(labels, dtype=torch.int64)


class _Views(Dataset):
    def __init__(self, source: Source, pixels: Pixels, resize: int | None, crop: int):
        self.source, self.pixels, self.resize, self.crop = source, pixels, resize, crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> Tensor | str:
        """(B, C, S, S); or a sentence, as an exception crosses processes as a traceback."""
        shape = (len(indices), self.crop, self.crop, self.pixels.in_chans)
        batch = np.empty(shape, self.pixels.dtype)
        try:
            for place, index in enumerate(indices):
                data, name = self.source.read(index), self.source.name(index)
                image = decode(data, name, self.pixels)
                batch[place] = center_view(image, self.resize, self.crop, name)
        except UserError as error:
            return str(error)
        return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()


def _as_it_is(batch: Tensor | str) -> Tensor | str:
    return batch
