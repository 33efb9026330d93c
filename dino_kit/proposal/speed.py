"""How fast, and in how much memory: a few real steps on real crops, timed.

Legend: B images of a step.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dino_kit import files
from dino_kit.proposal.fit import Speed

_FIRST, _MOST = 4, 64  # images of the smaller and of the larger step that are timed
_SECONDS = 1.5  # what the larger step may take
_REPEATS = 2
# Of what is kept for the backward pass: gradients and the workspace of the largest layer come on
# top of it.
_ON_TOP = 1.3

Load = Callable[[int], Sequence[Any]]  # B images: a step's batches, as a loader yields them


def measure(
    learner: Any,
    load: Load,
    prepare: Callable[[Any], Any],
    images: int,
    first: int = _FIRST,
) -> Speed:
    """The costs of ``learner``'s steps on this machine; it is of no use afterwards.

    A step of few images and one of more are timed; what they differ by is the images' own cost.
    Where few, ``first``, take long already, they alone are. ``images`` is how many there are.

    Raises:
        UserError: an image cannot be read.
        RuntimeError, MemoryError: not even the smaller step fits into memory.
    """
    if learner.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(learner.device)
    small = most = min(first, images)
    batches, crop = _loaded(load, small)
    # The first step also warms up: allocations, the optimiser's moments.
    first, kept = _seconds(learner, prepare, batches), _kept_bytes(learner, prepare, batches)
    of_small = first if first > _SECONDS else _seconds(learner, prepare, batches, _REPEATS)
    step, image = 0.0, of_small / small
    fixed, image_bytes = _bytes_of(learner), kept / small
    larger = min(images, _MOST, 2 ** int(math.log2(max(_SECONDS / image, 1))))
    if larger >= 2 * small:
        most = larger
        batches, crop = _loaded(load, most)
        image_bytes = max(_kept_bytes(learner, prepare, batches) - kept, 0) / (most - small)
        fixed += max(kept - math.ceil(small * image_bytes), 0)  # such as weights in half precision
        of_most = _seconds(learner, prepare, batches, _REPEATS)
        # Timing is noisy: more images never cost less, and no step costs less than nothing.
        image = min(max(of_most - of_small, 0.0) / (most - small), of_most / most)
        step = of_most - most * image
    image_bytes *= _ON_TOP
    if learner.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(learner.device)
        image_bytes = max(image_bytes, (peak - fixed) / most)
    return Speed(step, image, crop, _saving(learner), fixed, math.ceil(image_bytes))


def _loaded(load: Load, images: int) -> tuple[Sequence[Any], float]:
    """A step's batches, and the seconds that an image's crops took."""
    began = time.perf_counter()
    batches = load(images)
    return batches, (time.perf_counter() - began) / images


def _seconds(
    learner: Any, prepare: Callable[[Any], Any], batches: Sequence[Any], repeats: int = 1
) -> float:
    """Of a step with all that the device does for it, the least of ``repeats``.

    What else the machine does only ever adds to it.
    """
    least = math.inf
    for step in range(repeats):
        wait(learner.device)
        began = time.perf_counter()
        learner.step(step, [prepare(batch) for batch in batches])
        wait(learner.device)
        least = min(least, time.perf_counter() - began)
    return least


def _saving(learner: Any) -> float:
    """Of a checkpoint: four tensors for each of the teacher's, which alone is written here."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files.write_weights(Path(folder) / "teacher.pth", learner.teacher.state_dict())
    return 4 * (time.perf_counter() - began)


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _bytes_of(learner: Any) -> int:
    """Weights of both networks; of the student also gradients and the optimiser's two moments."""
    student = sum(p.numel() * p.element_size() for p in learner.student.parameters())
    teacher = sum(p.numel() * p.element_size() for p in learner.teacher.parameters())
    return 4 * student + teacher


def _kept_bytes(learner: Any, prepare: Callable[[Any], Any], batches: Sequence[Any]) -> int:
    """What a step keeps for its backward pass, each piece of memory once; takes the step."""
    known = {p.untyped_storage().data_ptr() for p in learner.student.parameters()}
    sizes: list[int] = []
    prepared = [prepare(batch) for batch in batches]

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        learner.step(0, prepared)
    return sum(sizes)
