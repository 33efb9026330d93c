"""How fast images become batches of crops: stage by stage in this process, and by workers.

Legend: V_g views of one size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dino_kit.bench.machine import Peak
from dino_kit.data.crops import View, sample_crop
from dino_kit.data.decode import decode
from dino_kit.data.loader import Batch, Loader
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.source import Source
from dino_kit.randomness import stream

_MANY_EPOCHS = 1 << 20
_ALONE = {"jitter": (), "gray": False, "blur_radius": None, "solarize_threshold": None}
_GROUPS = ("global", "local")


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
    *,
    seed: int,
    batch_size: int,
    seconds: float,
) -> InProcess:
    """The loader in this process, for so many ``seconds`` at least, and where they went.

    After each batch its images are taken once more, stage by stage, so that stages and whole are
    timed in turn. Resizing is a crop without changes of colour, blur and solarisation; these are
    what the crop takes beyond; the rest, drawing parameters and copying crops into the batch, is
    what the whole takes beyond the stages.

    Raises:
        UserError: no image can be read.
    """
    peak = Peak()
    timed = _ReadTimed(source)
    loader = _loader(timed, groups, pixels, seed, batch_size, 0)
    stages: dict[str, float] = {}
    whole = core = 0.0
    images = 0
    steps = iter(loader)
    (first,) = next(iter(_loader(source, groups, pixels, seed, 1, 0)))
    _stages_of(source, groups, pixels, seed, first)  # loads what is loaded once
    while whole < seconds:
        before, worked, began = timed.seconds, time.process_time(), time.perf_counter()
        (batch,) = next(steps)
        taken = time.perf_counter() - began
        core += time.process_time() - worked
        whole += taken
        images += len(batch.indices)
        _add(stages, {"read": timed.seconds - before})
        most = peak.bytes()
        _add(stages, _stages_of(source, groups, pixels, seed, batch))
    return InProcess(
        whole / images, core / images, _within(stages, whole, images), images, most
    )  # fmt: skip


def by_workers(
    source: Source,
    groups: Sequence[Sequence[View]],
    pixels: Pixels,
    *,
    seed: int,
    batch_size: int,
    num_workers: int,
    seconds: float,
) -> float:
    """Images a second of ``num_workers`` processes that go on without waiting for anyone.

    They send their batches in rounds, one of each worker. The first round, in which they start, is
    not counted.
    """
    batches = _endless(_loader(source, groups, pixels, seed, batch_size, num_workers))
    for _ in range(num_workers):
        next(batches)
    began, images = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds or not images:
        images += sum(len(next(batches).indices) for _ in range(num_workers))
    return images / max(time.perf_counter() - began, passed)


def _loader(
    source: Any,
    groups: Sequence[Sequence[View]],
    pixels: Pixels,
    seed: int,
    batch_size: int,
    num_workers: int,
) -> Loader:
    batch_size = min(batch_size, len(source))
    return Loader(
        source, groups, seed=seed, epochs=_MANY_EPOCHS, total_batch_size=batch_size,
        batch_size_per_gpu=batch_size, pixels=pixels, num_workers=num_workers,
        on_bad_image="replace",
    )  # fmt: skip


def _endless(loader: Loader) -> Iterator[Batch]:
    for (batch,) in loader:
        yield batch


def _stages_of(
    source: Source,
    groups: Sequence[Sequence[View]],
    pixels: Pixels,
    seed: int,
    batch: Batch,
) -> dict[str, float]:
    """Seconds of each stage for all images of ``batch``."""
    taken: dict[str, float] = {}
    for index in batch.indices.tolist():
        name, data = source.name(index), source.read(index)
        began = time.perf_counter()
        image = decode(data, name, pixels)
        _add(taken, {"decode": time.perf_counter() - began})
        view_number = 0
        for group, views in zip(_GROUPS, groups, strict=False):
            for view in views:
                rng = stream("crop", seed, 0, index, view_number)
                drawn = sample_crop(view, image.height, image.width, rng, name)
                both = [("alone", replace(drawn, **_ALONE)), ("full", drawn)]
                times = {}
                # In turn, since the first to touch a part of the image waits for its memory.
                for kind, parameters in both[:: 1 if view_number % 2 else -1]:
                    began = time.perf_counter()
                    view.render(image, parameters)
                    times[kind] = time.perf_counter() - began
                _add(taken, {
                    f"{group}_resize": times["alone"],
                    f"{group}_photometric": times["full"] - times["alone"],
                })  # fmt: skip
                view_number += 1
    return taken


def _within(stages: dict[str, float], whole: float, images: int) -> dict[str, float]:
    """Seconds an image by stage, and of the rest; together the whole's.

    Where the machine was slower while stages were timed, they would be more than the whole.
    """
    stages = {name: max(seconds, 0.0) for name, seconds in stages.items()}
    factor = min(whole / max(sum(stages.values()), 1e-9), 1.0)
    parts = {name: seconds * factor / images for name, seconds in stages.items()}
    return {**parts, "rest": max(whole / images - sum(parts.values()), 0.0)}


def _add(sums: dict[str, float], more: dict[str, float]) -> None:
    for name, seconds in more.items():
        sums[name] = sums.get(name, 0.0) + seconds
