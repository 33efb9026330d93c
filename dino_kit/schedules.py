"""Values that change over a run, as pure functions of the step or the epoch.

A run keeps no schedule as state: the value at a step is computed from the step alone, so a resumed
run continues on the same curve.
"""

from __future__ import annotations

import math


def cosine(
    step: int,
    *,
    base: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
) -> float:
    """A linear warm-up from ``warmup_start`` to ``base``, then half a cosine towards ``final``.

    The warm-up takes ``warmup_steps`` steps and reaches ``base`` on its last one, so the first
    step of the cosine is at ``base`` again; ``final`` itself would be the value one step after the
    last. A warm-up of a single step is its start. Learning rate, weight decay and teacher momentum
    follow this curve (Caron et al. 2021, section 3.2, "Implementation details").

    Raises:
        ValueError: ``step`` lies outside the run, or the warm-up is longer than the run.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside a schedule of {total_steps} steps")
    if warmup_steps > total_steps:
        raise ValueError(f"a warm-up of {warmup_steps} steps exceeds a run of {total_steps}")
    if step < warmup_steps:
        return _ramp(step, warmup_start, base, warmup_steps)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * progress))


def linear_warmup(epoch: int, *, start: float, end: float, warmup_epochs: int) -> float:
    """``start`` to ``end`` over the first ``warmup_epochs`` epochs, the last at ``end``; then ``end``.

    The teacher temperature follows it: constant within an epoch (Caron et al. 2021, appendix D).
    """
    return _ramp(epoch, start, end, warmup_epochs) if epoch < warmup_epochs else end


def _ramp(position: int, start: float, end: float, length: int) -> float:
    """Point ``position`` of ``length`` evenly spaced ones, both ends included."""
    return start if length == 1 else start + (end - start) * position / (length - 1)
