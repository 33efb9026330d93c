"""What the numbers of a run come to, in a few sentences for a person.

The loss is explained, never praised: the lowest loss is not the best network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dino_kit import log
from dino_kit.data import bad_images
from dino_kit.report.record import Record, number
from dino_kit.report.results import UNTRAINED, Result, newest
from dino_kit.training.diagnosis import (
    DEAD,
    FAULTS,
    LEARNING,
    ONE_POINT,
    UNIFORM,
    UNSTEADY,
    WARMING_UP,
)  # fmt: skip

# What each state is, as a sentence; and for a fault what it means and the knobs to turn.
MEANING = {
    WARMING_UP: "The run is warming up",
    LEARNING: "The run is learning",
    UNIFORM: "The run has collapsed to the uniform answer",
    ONE_POINT: "The run has collapsed to one point",
    DEAD: "The student is dead",
    UNSTEADY: "The teacher is unsteady",
}
ADVICE = {
    state: f"{what[0].upper()}{what[1:]}. {knobs}" for state, (what, knobs) in FAULTS.items()
}
_NEAR_EVEN = 0.98  # of ln K: from here a loss says that nothing is told apart
_HELD_BACK = 0.2  # share of the time spent waiting for data that is worth a hint
Tone = Literal["good", "bad", "open"]


class Verdict(NamedTuple):
    state: str  # as in the metrics; empty where it was not measured
    tone: Tone
    headline: str
    sentences: list[str]
    advice: str  # empty where there is nothing to mend


def judge(record: Record, results: Sequence[Result]) -> Verdict:
    """Say what became of a run, from its lines, its probes and the evaluators' results."""
    if not record.lines:
        return Verdict(
            "", "open", "The run has not logged a step yet.",
            ["This page shows what is there; make it again when the run has come further."], "",
        )  # fmt: skip
    state = record.states[-1] or ""
    even = _even(record)
    at_even = not state and even is not None and _last(record, "loss") > _NEAR_EVEN * even
    stays = at_even and _warmed_up(record)
    sentences = [
        _progress(record),
        _episodes(record, state),
        _loss(record, state, even),
        _worth(record, results, state),
        _conduct(record),
        _unusable(record),
    ]
    advice = ADVICE.get(state, ADVICE[UNIFORM] if stays else "")
    in_vain = record.finished and state == LEARNING and _no_better(record, results)
    tone: Tone = "bad" if advice else "good" if state == LEARNING and not in_vain else "open"
    headline = _headline(record, state, at_even, stays)
    if in_vain:
        headline = "The run is finished, but its features are no better than before training."
    return Verdict(state, tone, headline, [one for one in sentences if one], advice)


def position(record: Record, step: int) -> str:
    """Where ``step`` is, in epochs too where their length is known."""
    if record.by_epoch:
        return f"epoch {step:,}"
    each = record.steps_per_epoch
    return f"step {step:,}" + (f" (epoch {step / each:.1f})" if each else "")


def _headline(record: Record, state: str, at_even: bool, stays: bool) -> str:
    end = record.finished
    if state in ADVICE:
        return f"{MEANING[state]}."
    if stays:
        return "The loss stands at ln K: nothing is told apart yet, or no longer."
    if at_even:
        return "The loss is at ln K, as it is at the start of every run."
    if state == LEARNING:
        return "The run is finished, and it learnt." if end else f"{MEANING[state]}."
    if state == WARMING_UP:
        return "The run is finished and never left its warm-up." if end else f"{MEANING[state]}."
    if state:
        return f"The run is in the state “{state}”."
    return f"The run {'is finished' if end else 'is under way'}; its health was not measured."


def _progress(record: Record) -> str:
    seconds = record.seconds()
    took = "" if seconds is None else f" in {log.duration(seconds)}"
    total, last = record.total_steps, record.last_step
    if record.by_epoch:
        of = f" of {record.config.epochs:,}" if record.config else ""
        return f"Done so far: {last:,}{of} epochs."
    if record.finished:
        return f"All {record.config.epochs:,} epochs are done: {last:,} steps{took}."
    if total is None:
        return f"So far {last:,} steps are done{took}."
    epochs = last / record.steps_per_epoch
    return (
        f"It has come to step {last:,} of {total:,}, epoch {epochs:.1f} of "
        f"{record.config.epochs:,}{took}; the same dino-kit train command goes on from its last "
        "checkpoint."
    )


def _episodes(record: Record, state: str) -> str:
    """Since when it has collapsed; or that it had, and came out of it."""
    states = record.states
    if state in ADVICE:
        begin = len(states)
        while begin and states[begin - 1] == state:
            begin -= 1
        since = position(record, int(record.steps[begin]))
        return f"It has been so since {since}." if begin else "It has been so from the beginning."
    bad = [place for place, one in enumerate(states) if one in ADVICE]
    if not bad:
        return ""
    first, last = (position(record, int(record.steps[place])) for place in (bad[0], bad[-1]))
    when = f"at {first}" if first == last else f"between {first} and {last}"
    return f"There were signs of {states[bad[-1]]} {when}; it came out of that."


def _loss(record: Record, state: str, even: float | None) -> str:
    loss = _last(record, "loss")
    if math.isnan(loss):
        return ""
    if even is None:
        return f"The loss is {loss:.2f}, which says nothing of quality by itself."
    size = f"ln {record.config.out_dim} = {even:.2f}"
    if state in (ONE_POINT, DEAD):
        return (
            f"A loss of {loss:.2f} is no success here: what counts is that answers differ from "
            "image to image, and they do not."
        )
    if loss > _NEAR_EVEN * even:
        end = {
            UNIFORM: "after the warm-up that is not normal",
            WARMING_UP: "at the start that is normal",
        }.get(state, "at the start that is normal, later it is a collapse")
        about = "" if f"{loss:.2f}" == f"{even:.2f}" else "about "
        return f"The loss of {loss:.2f} is {about}{size}: every prototype is equally likely; {end}."
    return (
        f"The loss of {loss:.2f} is {100 * loss / even:.0f} % of {size}, where every prototype is equally "
        "likely; how good the features are it cannot tell."
    )


def _worth(record: Record, results: Sequence[Result], state: str) -> str:
    """What the features are worth, and whether that still rose, by the best witness there is."""
    if accuracy := _accuracies(record):
        return _accuracy(accuracy, state)
    told = [
        _capital(probe["sentence"])
        for probe in record.probes
        if isinstance(probe.get("sentence"), str)
    ]
    measured = _measured(results)
    words = f"{measured} {told[-1]}" if measured and told else measured or (told[-1] if told else "")
    return words or (
        "What the features are worth nothing here has measured; dino-kit knn does, with labelled "
        "images."
    )


def _accuracies(record: Record) -> list[tuple[dict[str, Any], float]]:
    """The probes with labels, and their k-NN top-1 in percent."""
    found = [(probe, number(probe.get("knn_top1"))) for probe in record.probes]
    return [(probe, value) for probe, value in found if not math.isnan(value)]


def _no_better(record: Record, results: Sequence[Result]) -> bool:
    """Whether k-NN was measured before training too, and has not risen by more than chance."""
    accuracy = _accuracies(record)
    if accuracy:
        (first, start), (last, end) = accuracy[0], accuracy[-1]
        return len(accuracy) > 1 and first.get("epoch") == 0 and end - start <= _noise(last, end)
    one = newest(results)
    untrained = _untrained(results, one)
    return one is not None and bool(untrained) and one.value <= untrained[0].value


def _noise(probe: dict[str, Any], percent: float) -> float:
    """One deviation of a share of so many answers: a smaller change may be chance."""
    queries = number(probe.get("knn_queries"))
    share = min(max(percent / 100, 0.01), 0.99)
    return 100 * math.sqrt(share * (1 - share) / queries) if queries > 0 else 0.5


def _accuracy(accuracy: list[tuple[dict[str, Any], float]], state: str) -> str:
    values = [value for _, value in accuracy]
    start, end = accuracy[0], accuracy[-1]
    if len(accuracy) == 1:
        return f"By the probe, k-NN is {end[1]:.1f} % {_when(end[0])}."
    text = f"By the probe, k-NN went from {start[1]:.1f} % {_when(start[0])} to {end[1]:.1f} %"
    best = int(np.argmax(values))
    noise = _noise(*end)
    if values[best] > end[1] + noise:
        text += f"; it was highest, {values[best]:.1f} %, {_when(accuracy[best][0])}"
    if len(values) < 4 or state in ADVICE:
        return f"{text}."
    before = values[-1 - max(1, len(values) // 4)]
    if end[1] - before > noise:
        return f"{text}, and still rose at the end: a longer run may give more."
    if before - end[1] > noise:
        return f"{text}, and it fell at the end."
    return f"{text}, and no longer rose at the end."


def _when(probe: dict[str, Any]) -> str:
    epoch = probe.get("epoch")
    if epoch == 0:
        return "before training"
    return f"after epoch {epoch}" if type(epoch) is int else f"after step {probe['step']:,}"


def _measured(results: Sequence[Result]) -> str:
    """The newest top-1 of the teacher, beside the untrained network's where that was measured."""
    one = newest(results)
    if one is None:
        return ""
    untrained = _untrained(results, one)
    of = f" of {one.data}" if one.data else ""
    how = ", ".join(filter(None, (one.evaluator, one.setting)))
    text = f"By {how}, the teacher's features classify {one.value:.1f} %{of} rightly"
    if untrained:
        text += f", and before training it was {untrained[0].value:.1f} %"
    return f"{text} ({one.file})."


def _untrained(results: Sequence[Result], one: Result | None) -> list[Result]:
    """The same number as ``one``, of the untrained network."""
    rivals = [r for r in results if one and (r.file, r.data) == (one.file, one.data)]
    return [row for row in rivals if UNTRAINED in row.setting]


def _conduct(record: Record) -> str:
    """How much time was lost, and how many steps."""
    waited, dropped = record.waited(), number(record.lines[-1].get("skipped"))
    parts = []
    if waited is not None:
        parts.append(f"{100 * waited:.0f} % of the time went into waiting for data")
        if waited > _HELD_BACK:
            parts[0] += " (more --num_workers, or fewer or smaller crops, would help)"
    if not math.isnan(dropped):
        share = f" ({100 * dropped / record.last_step:.2g} %)" if dropped else ""
        count = f"{dropped:,.0f} steps{share} were" if dropped else "no step was"
        if dropped == 1:
            count = f"one step{share} was"
        parts.append(f"{count} dropped as not finite")
    text = ", and ".join(parts)
    return f"{_capital(text)}." if text else ""


def _unusable(record: Record) -> str:
    count = len(bad_images.written(record.folder))
    if not count:
        return ""
    what = "One image could" if count == 1 else f"{count:,} images could"
    return f"{what} not be used, and others took their place ({bad_images.NAME} names them)."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _warmed_up(record: Record) -> bool:
    """Whether the learning rate's warm-up is over; true where that cannot be told."""
    epoch = record.lines[-1].get("epoch")  # 0-based
    return not record.config or type(epoch) is not int or epoch >= record.config.warmup_epochs


def _even(record: Record) -> float | None:
    """ln K in nats."""
    return math.log(record.config.out_dim) if record.config else None


def _last(record: Record, name: str) -> float:
    """The newest value that was logged, NaN where there is none."""
    values = record.column(name)
    known = values[~np.isnan(values)]
    return float(known[-1]) if len(known) else math.nan
