"""How fast a training step is, in how much memory, where its time goes, and its share of the peak.

Legend: B images of a micro-batch, V_g views of one size, C channels, S_g side in pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from dino_kit.bench.machine import Peak, matmul_rate
from dino_kit.errors import RunFailed
from dino_kit.proposal.speed import wait

PHASES = ("teacher", "student", "loss", "backward", "clipping", "optimizer", "average")
_FIRST = 2  # steps that warm up, where they are short: allocations, the optimiser's moments
_DROPPED = 20  # steps that may overflow before the scale of fp16 suits


@dataclass(frozen=True)
class StepCost:
    """One step of so many images."""

    images: int
    seconds: float
    phases: dict[str, float]  # seconds, which add up to ``seconds``
    peak_bytes: int | None  # from before the networks were built
    flops: int  # floating-point operations, of both networks, there and back
    matmul_rate: float  # such operations a second of one large matrix product in this precision

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds

    @property
    def utilisation(self) -> float:
        """The step's operations a second, as a share of the matrix product's."""
        return self.flops / self.seconds / self.matmul_rate


def measure_step(
    build: Callable[[], Any],
    batches: Callable[[], Sequence[Any]],
    device: torch.device,
    precision: str,
    seconds: float,
) -> StepCost:
    """Time steps of what ``build`` makes on what ``batches`` makes, its micro-batches.

    The fastest of the steps that ``seconds`` hold counts, one at least, because what else the machine does only
    ever adds to one.

    Raises:
        RunFailed: the steps are not finite.
    """
    peak = Peak(device)
    learner, made = build(), batches()
    images = sum(len(batch.places) for batch in made)
    done, began = 0, time.perf_counter()
    while done < 1 or (done < _FIRST and time.perf_counter() - began < seconds):
        _committed(learner, done, made)
        done += 1
    taken: list[dict[str, float]] = []
    with _clock(learner) as lap:
        while sum(sum(phases.values()) for phases in taken) < seconds:
            taken.append(lap(lambda: _committed(learner, done + len(taken), made)))
    most = peak.bytes()
    fastest = min(taken, key=lambda phases: sum(phases.values()))
    return StepCost(
        images, sum(fastest.values()), fastest, most, _flops(learner, made),
        matmul_rate(device, precision),
    )  # fmt: skip


def _committed(learner: Any, step: int, batches: Sequence[Any]) -> None:
    for _ in range(_DROPPED):
        outcome = learner.step(step, batches)
        if outcome.committed:
            return
        if not outcome.overflowed:
            break
    raise RunFailed("A step on random crops was not finite; another --precision may be.")


@contextmanager
def _clock(learner: Any) -> Iterator[Callable[[Callable[[], Any]], dict[str, float]]]:
    """Yields a function that takes a step and returns the seconds of its phases.

    Hooks tell when a phase ends: it is whatever happened since the one before. Targets belong to
    the loss, the check for finite numbers to clipping, and the centre to the average.
    """
    marks: list[tuple[str, Any]] = []
    device = learner.device

    def mark(phase: str) -> None:
        marks.append((phase, _now(device)))

    def before_student(*_: Any) -> None:
        mark("loss")

    def after_student(_: nn.Module, __: Any, logits: Any) -> None:
        mark("student")
        if isinstance(logits, Tensor) and logits.requires_grad:
            logits.register_hook(lambda gradient: mark("loss"))

    parameters = [p for p in learner.student.parameters() if p.requires_grad]
    hooks = [
        learner.teacher.head.register_forward_hook(lambda *_: mark("teacher")),
        learner.student.register_forward_pre_hook(before_student),
        learner.student.register_forward_hook(after_student),
        *(p.register_post_accumulate_grad_hook(lambda _: mark("backward")) for p in parameters),
        learner.optimizer.register_step_pre_hook(lambda *_: mark("clipping")),
        learner.optimizer.register_step_post_hook(lambda *_: mark("optimizer")),
    ]

    def lap(step: Callable[[], Any]) -> dict[str, float]:
        marks.clear()
        wait(device)
        mark("")
        step()
        mark("average")
        wait(device)
        phases = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in pairwise(marks):
            phases[phase] += _between(before, after)
        return phases

    try:
        yield lap
    finally:
        for hook in hooks:
            hook.remove()


def _now(device: torch.device) -> Any:
    """A moment: on a GPU of what it computes, without waiting for it."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    wait(device)
    return time.perf_counter()


def _between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000


def _flops(learner: Any, batches: Sequence[Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        _committed(learner, 0, batches)
    return counter.get_total_flops()


def _formulas() -> dict[Any, Callable[..., int]]:
    """Of what PyTorch's counter does not know: oneDNN's linear layers, and CPUs' fused attention."""

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def attention_back(g: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(g, q, k, v)

    def linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    fused = "_scaled_dot_product_flash_attention_for_cpu"
    formulas = [
        (torch.ops.aten, fused, attention),
        (torch.ops.aten, f"{fused}_backward", attention_back),
        (torch.ops.mkldnn, "_linear_pointwise", linear),
    ]
    return {
        getattr(library, name): formula
        for library, name, formula in formulas
        if hasattr(library, name)
    }
