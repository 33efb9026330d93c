"""The settings that each step runs with: epochs are turned into steps here, once.

A run has one clock, the batches taken. Everything that changes over a run is a pure function of
it, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dino_kit import log, schedules


@dataclass(frozen=True)
class Plan:
    """Functions of the step, the number of batches taken before it."""

    lr: Callable[[int], float]
    weight_decay: Callable[[int], float]
    momentum: Callable[[int], float]
    teacher_temp: Callable[[int], float]
    last_layer_frozen: Callable[[int], bool]
    warmup_steps: int  # until the learning rate has peaked and the prototypes move

    def at(self, step: int) -> dict[str, float]:
        """The numbers of ``step``, by name."""
        return {
            "lr": self.lr(step),
            "weight_decay": self.weight_decay(step),
            "momentum": self.momentum(step),
            "teacher_temp": self.teacher_temp(step),
        }


def plan_epochs(
    *,
    epochs: int,
    steps_per_epoch: int,
    lr: float,
    min_lr: float,
    warmup_epochs: int,
    weight_decay: float,
    weight_decay_end: float,
    momentum: float,
    warmup_teacher_temp: float,
    teacher_temp: float,
    warmup_teacher_temp_epochs: int,
    freeze_last_layer: int,
) -> Plan:
    """The reference's schedules over ``epochs``; ``lr`` is the peak rate for the run's batch.

    A warm-up longer than the run is cut to the run's length, with a notice.
    """
    total_steps = epochs * steps_per_epoch
    warmup_epochs = _at_most(epochs, warmup_epochs, "--warmup_epochs")
    temp_epochs = _at_most(epochs, warmup_teacher_temp_epochs, "--warmup_teacher_temp_epochs")
    cosine = partial(schedules.cosine, total_steps=total_steps)

    def temperature(step: int) -> float:
        return schedules.linear_warmup(
            step // steps_per_epoch,
            start=warmup_teacher_temp,
            end=teacher_temp,
            warmup_epochs=temp_epochs,
        )

    return Plan(
        lr=partial(cosine, base=lr, final=min_lr, warmup_steps=warmup_epochs * steps_per_epoch),
        weight_decay=partial(cosine, base=weight_decay, final=weight_decay_end),
        momentum=partial(cosine, base=momentum, final=1.0),
        teacher_temp=temperature,
        last_layer_frozen=lambda step: step // steps_per_epoch < freeze_last_layer,
        warmup_steps=max(warmup_epochs, freeze_last_layer) * steps_per_epoch,
    )


def _at_most(epochs: int, asked: int, flag: str) -> int:
    if asked > epochs:
        log.notice(f"{flag} {asked} is longer than the run and was cut to its {epochs} epochs.")
    return min(asked, epochs)
