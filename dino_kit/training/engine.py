"""The loop: prepare, step, log, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dino_kit import log
from dino_kit.errors import RunFailed
from dino_kit.training.interruption import Interruption
from dino_kit.training.learner import Learner, MicroBatch
from dino_kit.training.monitor import Monitor

_NAMED = 5  # images that a notice names


@dataclass
class Skipped:
    """Steps that were dropped because something in them was not finite."""

    total: int = 0
    in_a_row: int = 0


def train(
    learner: Learner,
    loader: Iterable[Sequence[Any]],
    prepare: Callable[[Any], MicroBatch],
    monitor: Monitor,
    save: Callable[[int], bool],
    probe: Callable[[int], None],
    at: Callable[[str], None],
    interruption: Interruption,
    *,
    start: int,
    total_steps: int,
    steps_per_epoch: int,
    save_every_steps: int,
    skipped: Skipped,
    max_bad_steps: int,
    stop_on_collapse: bool,
    describe: Callable[[Sequence[Any], Sequence[MicroBatch], bool, int | None], str],
) -> None:
    """Take the steps from ``start`` to ``total_steps``.

    ``loader`` yields a step's micro-batches as the workers made them, ``prepare`` brings one to
    the device, ``save(done)`` writes a checkpoint after ``done`` steps and tells whether it could,
    ``probe(done)`` looks at the networks at the end of an epoch, ``at`` takes the place that the run
    has come to, and ``describe(batches, micro_batches, suspect, most)`` names a step's images,
    ``most`` at most, for the person who has to find out why it was dropped. A signal that
    ``interruption`` puts off is met after its step was saved.

    Raises:
        RunFailed: ``max_bad_steps`` steps in a row were dropped; or the run has collapsed, and
            ``stop_on_collapse`` says that this ends it.
    """
    with log.progress(total_steps, "training", start) as advance:
        at(f"loading the images of step {start}")
        for step, (batches, waited) in enumerate(_with_waiting_time(loader), start):
            at(f"in step {step}")
            observe = monitor.writes_at(step)
            micro_batches = [prepare(batch) for batch in batches]
            outcome = learner.step(step, micro_batches, observe, interruption.request)
            if outcome.committed:
                skipped.in_a_row = 0
            elif not outcome.overflowed:
                skipped.total += 1
                skipped.in_a_row += 1
                named = describe(batches, micro_batches, outcome.suspect, _NAMED)
                log.notice(f"Step {step} was not finite and was dropped; {named}.")
            if skipped.in_a_row >= max_bad_steps:
                named = describe(batches, micro_batches, outcome.suspect, None)
                raise RunFailed(
                    f"{skipped.in_a_row} steps in a row were not finite, so the run stopped; the "
                    "last good checkpoint, if one was written, is kept. In the last of them: "
                    f"{named}."
                )
            monitor.record(
                step,
                outcome.measured,
                outcome.settings,
                waited,
                outcome.observed,
                skipped=skipped.total,
            )
            if stop_on_collapse and monitor.diagnosis.alarm():
                raise RunFailed(
                    f"The run was stopped after step {step + 1} by --stop_on_collapse; the last "
                    f"checkpoint, if one was written, is kept. {monitor.diagnosis.alarm()}"
                )
            advance(1, monitor.summary())
            done = step + 1
            ends_epoch = done % steps_per_epoch == 0
            due = ends_epoch or save_every_steps and done % save_every_steps == 0
            if due or outcome.request:
                at(f"saving after step {step}")
                interruption.saved(save(done))
                interruption.answer(outcome.request)
            if ends_epoch:
                at(f"probing after step {step}")
                probe(done)
            at(f"loading the images of step {done}")


def _with_waiting_time(loader: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each item of ``loader`` with the seconds that it was waited for."""
    items = iter(loader)
    while True:
        began = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        yield item, time.perf_counter() - began
