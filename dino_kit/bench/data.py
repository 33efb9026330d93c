"""How fast images become batches of crops: stage by stage in this process, and by workers.

Legend: V_g views of one size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from dino_kit.bench.machine import Peak
from dino_kit.data import augment
from dino_kit.data.crops import View, sample_crop
from dino_kit.data.loader import Batch, Decode, Loader
from dino_kit.data.photograph import for_crops
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.source import Source
from dino_kit.randomness import stream

_ALONE = {"jitter": (), "gray": False, "blur_radius": None, "solarize_threshold": None}
_GROUPS = ("global", "local")

# (source, images of a batch, workers): a loader that does not end.
Load = Callable[[Any, int, int], Loader]


@dataclass(frozen=True)
class InProcess:
    """What one process does with an image, on average."""

    seconds: float  # by the clock
    core_seconds: float  # of all threads of the process
    phases: dict[str, float]  # seconds by the clock, which add up to ``seconds``
    images: int  # that were measured
    peak_bytes: int | None  # above what was taken before


class _ReadTimed:
    """A source that also says how long its images took to be read."""

    def __init__(self, source: Source):
        self._source, self.seconds = source, 0.0

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, index: int) -> Any:
        began = time.perf_counter()
        try:
            return self._source.read(index)
        finally:
            self.seconds += time.perf_counter() - began


def in_process(
    source: Source,
    groups: Sequence[Sequence[View]],
    pixels: Pixels,
    load: Load,
    *,
    seed: int,
    batch_size: int,
    seconds: float,
    decode: Decode,
) -> InProcess:
    """The loader in this process, for so many ``seconds`` at least, and where they went.

    After each batch its images are taken once more, stage by stage, so that stages and whole are
    timed in turn. Resizing is a crop without changes of colour, blur and solarisation; these are
    what the crop takes beyond. Copying crops into the batch is what the whole takes beyond all
    other stages.

    Raises:
        UserError: no image can be read.
    """

    def stages_of(batch: Batch) -> dict[str, float]:
        return _stages_of(source, groups, pixels, decode, seed, batch)

    peak, timed = Peak(), _ReadTimed(source)
    (first,) = next(iter(load(timed, 1, 0)))
    stages_of(first)  # loads what is loaded once
    batches = _endless(load(timed, min(batch_size, len(source)), 0))
    timed.seconds = whole = core = 0.0
    stages: dict[str, float] = {}
    images = 0
    while whole < seconds:
        worked, began = time.process_time(), time.perf_counter()
        batch = next(batches)
        whole += time.perf_counter() - began
        core += time.process_time() - worked
        images += len(batch.indices)
        most = peak.bytes()
        _add(stages, stages_of(batch))
    phases = _within({"read": timed.seconds, **stages}, whole, images)
    return InProcess(whole / images, core / images, phases, images, most)


def by_workers(
    source: Source, load: Load, *, batch_size: int, num_workers: int, seconds: float
) -> float:
    """Images a second of ``num_workers`` processes that go on without waiting for anyone.

    They send their batches in rounds, one of each worker. The first round, in which they start, is
    not counted.
    """
    batches = _endless(load(source, min(batch_size, len(source)), num_workers))
    for _ in range(num_workers):
        next(batches)
    began, images, passed = time.perf_counter(), 0, 0.0
    while passed < seconds:
        images += sum(len(next(batches).indices) for _ in range(num_workers))
        passed = time.perf_counter() - began
    return images / passed


def _endless(loader: Loader) -> Iterator[Batch]:
    for (batch,) in loader:
        yield batch


def _stages_of(
    source: Source,
    groups: Sequence[Sequence[View]],
    pixels: Pixels,
    decode: Decode,
    seed: int,
    batch: Batch,
) -> dict[str, float]:
    """Seconds of each stage for all images of ``batch``."""
    taken: dict[str, float] = {}
    for index in batch.indices.tolist():
        name, data = source.name(index), source.read(index)
        began = time.perf_counter()
        image = decode(data, name, pixels)
        opened = time.perf_counter()
        rng = stream("crop", seed, 0, index)
        crops = [
            [sample_crop(view, image.height, image.width, rng, name) for view in views]
            for views in groups
        ]
        known = time.perf_counter()
        image = for_crops(image, chain.from_iterable(crops))
        decoded = time.perf_counter()
        _add(taken, {"decode": opened - began + decoded - known, "parameters": known - opened})
        turn = 0
        for group, views, parameters_of in zip(_GROUPS, groups, crops, strict=False):
            for view, drawn in zip(views, parameters_of, strict=True):
                both = [("alone", replace(drawn, **_ALONE)), ("full", drawn)]
                if view.render is augment.geometry:  # which leaves out the rest by itself
                    both = both[1:]
                times = {}
                # In turn, since the first to touch a part of the image waits for its memory.
                for kind, parameters in both[:: 1 if turn % 2 else -1]:
                    began = time.perf_counter()
                    view.render(image, parameters)
                    times[kind] = time.perf_counter() - began
                alone = times.get("alone", times["full"])
                _add(taken, {
                    f"{group}_resize": alone,
                    f"{group}_photometric": times["full"] - alone,
                })  # fmt: skip
                turn += 1
    return taken


def _within(stages: dict[str, float], whole: float, images: int) -> dict[str, float]:
    """Seconds an image by stage, and of the batch; together the whole's.

    Where the machine was slower while stages were timed, they would be more than the whole.
    """
    stages = {name: max(seconds, 0.0) for name, seconds in stages.items()}
    factor = min(whole / max(sum(stages.values()), 1e-9), 1.0)
    parts = {name: seconds * factor / images for name, seconds in stages.items()}
    return {**parts, "batch": max(whole / images - sum(parts.values()), 0.0)}


def _add(sums: dict[str, float], more: dict[str, float]) -> None:
    for name, seconds in more.items():
        sums[name] = sums.get(name, 0.0) + seconds
