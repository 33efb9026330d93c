"""Batches of crops: which images a step takes, in what order, made by worker processes.

Everything drawn here is a function of the seed, the epoch and the image, so neither the number of
workers nor that of processes changes a crop, and a loader can begin at any step.

Legend: B images of a micro-batch, C channels, V_g views of one size, S_g their side in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dino_kit.data.crops import View, sample_crop
from dino_kit.data.decode import decode
from dino_kit.data.photograph import for_crops
from dino_kit.data.pixels import RGB, Pixels
from dino_kit.data.sources.source import Source
from dino_kit.data.undisturbed import undisturbed
from dino_kit.errors import BadImage, UserError
from dino_kit.randomness import stream

_TRIES = 100  # images drawn in the place of one that cannot be used, before the run gives up

OnBadImage = Literal["raise", "replace", "leave_out"]
Decode = Callable[[Any, str, Pixels], Any]


class Batch(NamedTuple):
    """A micro-batch, on the host."""

    # (V_g, B, C, S_g, S_g) for each size, the two global crops first: uint8 of RGB images, float32
    # in [0, 1] of others. In memory the channels of a pixel are side by side.
    groups: list[Tensor]
    indices: Tensor  # (B,) int64: images of the source, as they were used
    places: Tensor  # (B,) int64: places in the step's global batch
    bad: tuple[tuple[int, str], ...] = ()  # images that cannot be used, each with the reason


class Pick(NamedTuple):
    """One image to load: what its crops are drawn from, and where it goes."""

    epoch: int
    index: int
    place: int


class Loader:
    """Iterates over optimiser steps, each a list of this process's micro-batches.

    A step's global batch of ``total_batch_size`` images is split evenly over the processes; a
    process's part is cut into as few micro-batches of at most ``batch_size_per_gpu`` as will do,
    whose sizes differ by one at most. Each epoch takes every image at most once; the last short
    batch is dropped, or split as evenly as it can be. Workers go on across epochs, so no step waits
    for them to start again.

    Args:
        source: the images.
        groups: the views of each crop size; the first group holds the two global views.
        pixels: what an image becomes.
        start_step: optimiser steps that were taken before.
        drop_last: whether the last short batch of an epoch is dropped. A process may have no image
            of one that is not: its step then is one micro-batch of none, without groups.
        on_bad_image: what becomes of an image that cannot be used. ``raise`` ends the iteration;
            ``replace`` draws another, from which the crops are made that the bad one would have
            had, as a function of seed, epoch and image; ``leave_out`` makes the batch smaller.
        decode: what reads an image: :func:`~dino_kit.data.decode.decode`, or for the same crops up to
            rounding and several times faster :func:`~dino_kit.data.photograph.open_raster`.

    Raises:
        UserError: the batch cannot be split evenly, or is larger than the source; while iterating,
            an image cannot be used.
    """

    def __init__(
        self,
        source: Source,
        groups: Sequence[Sequence[View]],
        *,
        seed: int,
        epochs: int,
        total_batch_size: int,
        batch_size_per_gpu: int,
        pixels: Pixels = RGB,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        start_step: int = 0,
        drop_last: bool = True,
        on_bad_image: OnBadImage = "raise",
        decode: Decode = decode,
        pin_memory: bool = False,
        multiprocessing_context: str | None = None,
    ):
        if total_batch_size % world_size:
            raise UserError(
                f"A total batch of {total_batch_size} cannot be split evenly over {world_size} "
                "processes; change --total_batch_size."
            )
        if drop_last and len(source) < total_batch_size:
            raise UserError(
                f"There are {len(source)} images, fewer than one batch of {total_batch_size}; "
                f"give --total_batch_size {len(source)} or less."
            )
        whole, rest = divmod(len(source), total_batch_size)
        sizes = [total_batch_size] * whole + ([rest] if rest and not drop_last else [])
        self.steps_per_epoch = len(sizes)
        self.total_steps = epochs * self.steps_per_epoch
        self.total_batch_size = total_batch_size
        self.num_workers, self.start_step = num_workers, start_step
        # All steps of an epoch but its last are alike, so they share one list.
        parts = {size: _parts(size, rank, world_size, batch_size_per_gpu) for size in set(sizes)}
        self._parts = [parts[size] for size in sizes]
        sampler = _MicroBatches(
            len(source), seed, total_batch_size, self._parts, start_step, self.total_steps
        )
        self._batches = DataLoader(
            _Crops(source, groups, seed, pixels, on_bad_image, decode),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=undisturbed,
            pin_memory=pin_memory,
            multiprocessing_context=multiprocessing_context if num_workers else None,
        )

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = iter(self._batches)
        for step in range(self.start_step, self.total_steps):
            parts = self._parts[step % self.steps_per_epoch]
            yield [_readable(next(batches)) for _ in parts]


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order, (length,) int64, in which an epoch goes through the images."""
    return stream("epoch order", seed, epoch).permutation(length)


def usable_cores() -> int:
    """Cores that this process may run on, which a job can make fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """The reference's 10, or the usable cores where they are fewer."""
    return min(10, usable_cores())


def _parts(size: int, rank: int, world_size: int, most: int) -> list[np.ndarray]:
    """The places of a process in a global batch of ``size``, in micro-batches of ``most``."""
    share = np.array_split(np.arange(size), world_size)[rank]
    return np.array_split(share, max(1, -(-len(share) // most)))


class _MicroBatches(Sampler):
    """The picks of each micro-batch; ``parts`` are the places of each step of an epoch."""

    def __init__(
        self,
        length: int,
        seed: int,
        total_batch_size: int,
        parts: Sequence[Sequence[np.ndarray]],
        start_step: int,
        total_steps: int,
    ):
        self.length, self.seed, self.total_batch_size = length, seed, total_batch_size
        self.parts, self.start_step, self.total_steps = parts, start_step, total_steps

    def __len__(self) -> int:
        steps = range(self.start_step, self.total_steps)
        return sum(len(self.parts[step % len(self.parts)]) for step in steps)

    def __iter__(self) -> Iterator[list[Pick]]:
        order, order_of = np.empty(0), -1
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, len(self.parts))
            if epoch != order_of:
                order, order_of = epoch_order(self.seed, epoch, self.length), epoch
            begin = position * self.total_batch_size
            for part in self.parts[position]:
                yield [Pick(epoch, int(order[begin + place]), int(place)) for place in part]


class _Crops(Dataset):
    """Makes a whole micro-batch at once, so that each crop is written straight to its place."""

    def __init__(
        self,
        source: Source,
        groups: Sequence[Sequence[View]],
        seed: int,
        pixels: Pixels,
        on_bad_image: OnBadImage,
        decode: Decode,
    ):
        self.source, self.groups = source, [list(group) for group in groups]
        self.seed, self.pixels, self.on_bad_image = seed, pixels, on_bad_image
        self.decode = decode

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, picks: Sequence[Pick]) -> Batch | str:
        """A batch; or a sentence, because an exception would cross processes as a traceback."""
        try:
            return self._batch(picks)
        except UserError as error:
            return str(error)

    def _batch(self, picks: Sequence[Pick]) -> Batch:
        groups: list[np.ndarray] = []  # (V_g, B, S_g, S_g, C)
        indices: list[int] = []
        places: list[int] = []
        bad: list[tuple[int, str]] = []
        for pick in picks:
            for index in self._candidates(pick):
                try:
                    self._write(groups, len(indices), len(picks), pick, index)
                except BadImage as error:
                    if self.on_bad_image == "raise":
                        raise UserError(
                            f"{error} A run that is to go on needs as many images as before: "
                            "replace the file, rather than remove it."
                        ) from error
                    bad.append((index, str(error)))
                else:
                    indices.append(index)
                    places.append(pick.place)
                    break
            else:
                if self.on_bad_image == "replace":
                    raise UserError(
                        f"{bad[-1][1]} Nor can what else was drawn, {_TRIES} times, in the place of "
                        f"{self.source.name(pick.index)}."
                    )
        return Batch(
            [torch.from_numpy(group[:, : len(indices)]).permute(0, 1, 4, 2, 3) for group in groups]
            if indices
            else [],
            torch.tensor(indices, dtype=torch.int64),
            torch.tensor(places, dtype=torch.int64),
            tuple(bad),
        )

    def _candidates(self, pick: Pick) -> Iterator[int]:
        """The image to load, and those that may take its place, in turn."""
        yield pick.index
        if self.on_bad_image == "replace":
            rng = stream("replacement", self.seed, pick.epoch, pick.index)
            for _ in range(_TRIES):
                yield int(rng.integers(len(self.source)))

    def _write(
        self, groups: list[np.ndarray], column: int, columns: int, pick: Pick, index: int
    ) -> None:
        """Put the crops of ``pick`` in their ``column``, made of the image ``index``."""
        name = self.source.name(index)
        image = self.decode(self.source.read(index), name, self.pixels)
        rng = stream("crop", self.seed, pick.epoch, pick.index)
        # All of them before the first is made: they say how far the image has to be decoded.
        drawn = [
            [sample_crop(view, image.height, image.width, rng, name) for view in views]
            for views in self.groups
        ]
        image = for_crops(image, chain.from_iterable(drawn))
        for number, views in enumerate(self.groups):
            for row, view in enumerate(views):
                pixels = _channels_last(view.render(image, drawn[number][row]))  # (S, S, C)
                if number == len(groups):
                    groups.append(np.empty((len(views), columns, *pixels.shape), pixels.dtype))
                groups[number][row, column] = pixels


def _channels_last(pixels: np.ndarray | Tensor) -> np.ndarray:
    """(S, S, C) of what a view's ``render`` gave."""
    return pixels.permute(1, 2, 0).numpy() if isinstance(pixels, Tensor) else pixels


def _readable(batch: Batch | str) -> Batch:
    if isinstance(batch, str):
        raise UserError(batch)
    return batch


def _as_it_is(batch: Batch | str) -> Batch | str:
    return batch
