"""The curves of a run as the page draws them: thinned to what a screen can show, with their meaning.

Legend: K prototypes, B images of a step, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dino_kit.report.paper import width
from dino_kit.report.record import Record, number
from dino_kit.report.results import Result
from dino_kit.report.verdict import ADVICE

# Points of a curve: about one for each pixel of a narrow screen.
POINTS = 320


class Curve(NamedTuple):
    """One line of a figure."""

    key: str  # of a metrics line
    name: str = ""  # in the legend, where a figure has several


class Figure(NamedTuple):
    """One figure of the page, before its numbers."""

    key: str
    title: str
    about: str  # a sentence or two on how to read it
    curves: tuple[Curve, ...]
    unit: str = ""
    scale: str = "linear"  # or "log"
    times: float = 1.0  # what the numbers are multiplied with
    floor: float | None = None  # where the axis begins and ends, where that is not left to the data
    ceiling: float | None = None
    probe: str = ""  # the key of a probe's line that is drawn as points


GROUPS: dict[str, tuple[Figure, ...]] = {
    "Is it learning?": (
        Figure(
            "loss", "Loss",
            "Cross-entropy of the student's answers under the teacher's. At ln K all prototypes "
            "are equally likely. It may rise while the features get better.",
            (Curve("loss"),), "nats",
        ),
        Figure(
            "entropy", "Teacher entropy",
            "How spread out one answer of the teacher is. ln K: over all prototypes alike; 0: on a "
            "single one.",
            (Curve("teacher_entropy"),), "nats", floor=0,
        ),
        Figure(
            "kl", "KL(teacher‖student)",
            "What the student still has to learn: the loss without the teacher's own entropy. 0 "
            "for long means that nothing is left to learn from.",
            (Curve("kl"),), "nats", floor=0,
        ),
        Figure(
            "information", "Information",
            "How much an answer tells about its image. 0: every image gets the same answer.",
            (Curve("teacher_information", "teacher"), Curve("student_information", "student")),
            "nats", floor=0,
        ),
        Figure(
            "prototypes", "Prototypes in use",
            "The effective number over a batch: the exponential of the mean answer's entropy.",
            (Curve("prototypes_used"),), scale="log",
        ),
        Figure(
            "spread", "Spread",
            "Total variance of the teacher's unit embeddings. 0: all images lie on one point.",
            (Curve("spread"),), floor=0, ceiling=1,
        ),
    ),
    "Are the features getting better?": (
        Figure(
            "knn", "k-NN accuracy",
            "Top-1 of labelled images by their nearest neighbours, by the probe during the run, "
            "and by dino-kit knn.",
            (), "%", probe="knn_top1",
        ),
        Figure(
            "rank", "Effective rank",
            "In how many directions the teacher's embeddings extend: of a batch, and as points of "
            "the probe's fixed images.",
            (Curve("effective_rank"),), floor=0, probe="effective_rank",
        ),
        Figure(
            "retrieval", "View retrieval",
            "How often the two global crops of an image find each other among those of the batch; "
            "as points among the probe's fixed images.",
            (Curve("view_retrieval"),), "%", times=100, floor=0, ceiling=100,
            probe="view_retrieval",
        ),
    ),
    "Rates": (
        Figure("lr", "Learning rate", "It rises while it warms up, then falls by a cosine.",
               (Curve("lr"),), floor=0),
        Figure("weight_decay", "Weight decay", "It goes to its end by a cosine.",
               (Curve("weight_decay"),), floor=0),
        Figure("momentum", "Teacher momentum",
               "Share of the teacher that stays in a step; it goes to 1 by a cosine.",
               (Curve("momentum"),)),
        Figure("temperature", "Teacher temperature", "Lower is sharper.",
               (Curve("teacher_temp"),), floor=0),
    ),
    "The machine": (
        Figure("speed", "Images a second", "Of all processes together.",
               (Curve("images_per_second"),), floor=0),
        Figure("wait", "Waiting for data", "Share of the time in which no image was ready.",
               (Curve("data_wait"),), "%", times=100, floor=0, ceiling=100),
        Figure("gradient", "Gradient norm", "Of the student, before clipping.",
               (Curve("grad_norm"),), scale="log"),
        Figure("dropped", "Dropped steps", "Whose loss or gradient was not finite, so far.",
               (Curve("skipped"),), floor=0),
    ),
}  # fmt: skip
# The groups that tell how the run goes; the others are there to look a thing up.
MAIN = tuple(GROUPS)[:2]


def draw(record: Record, results: Sequence[Result]) -> dict[str, Any]:
    """All figures as plain data for the page; see ``page.js`` for what it makes of it.

    Steps are whole numbers, other numbers have five digits, and None is a gap.
    """
    groups = []
    for title, figures in GROUPS.items():
        drawn = [_figure(figure, record, results) for figure in figures]
        missing = [f.title for f, one in zip(figures, drawn, strict=True) if one is None]
        groups.append({"title": title, "figures": [f for f in drawn if f], "missing": missing})
    return {
        "last": max([record.last_step, *(probe["step"] for probe in record.probes)]),
        "each": record.steps_per_epoch,
        "byEpoch": record.by_epoch,
        "warmup": _warmup(record),
        "states": spans(record.steps, record.states),
        "groups": groups,
    }


def thin(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> dict[str, list]:
    """A curve of at most ``points`` points: means of neighbours, with the least and the largest.

    Args:
        steps: ``(n,)``, rising.
        values: ``(n,)``; NaN is a gap.

    Returns:
        ``x``, ``y``, and where something was averaged ``low`` and ``high``, of one length.
    """
    if len(steps) <= points:
        return {"x": steps.tolist(), "y": _rounded(values)}
    parts = np.array_split(np.arange(len(steps)), points)
    known = [values[part][~np.isnan(values[part])] for part in parts]

    def each(reduce: Callable[[np.ndarray], float]) -> list[float | None]:
        return _rounded([reduce(part) if len(part) else math.nan for part in known])

    # A part ends at its last step, so that the curve ends where the run does.
    return {
        "x": [int(steps[part[-1]]) for part in parts],
        "y": each(np.mean),
        "low": each(np.min),
        "high": each(np.max),
    }


def spans(steps: np.ndarray, states: Sequence[str | None]) -> list[tuple[int, int, str]]:
    """For how long a run was in which state: (after this step, up to this one, state).

    Where there are more lines than can be seen, neighbours are taken together, and a fault among
    them is what they show.
    """
    found: list[tuple[int, int, str | None]] = []
    begin = 0
    for part in np.array_split(np.arange(len(steps)), min(len(steps), POINTS) or 1):
        if not len(part):
            continue
        bad = [states[place] for place in part if states[place] in ADVICE]
        state, end = bad[-1] if bad else states[part[-1]], int(steps[part[-1]])
        if found and found[-1][2] == state:
            found[-1] = (found[-1][0], end, state)
        else:
            found.append((begin, end, state))
        begin = end
    return [span for span in found if span[2]]


def _figure(figure: Figure, record: Record, results: Sequence[Result]) -> dict[str, Any] | None:
    curves = []
    for curve in figure.curves:
        values = record.column(curve.key) * figure.times
        if not np.isnan(values).all():
            curves.append({"name": curve.name, **thin(record.steps, values)})
    points = _probed(figure, record)
    if figure.key == "knn":
        points += _measured(record, results)
    if not curves and not points:
        return None
    return {
        "key": figure.key,
        "title": figure.title,
        "about": figure.about + _bounds(figure, record),
        "unit": figure.unit,
        "scale": figure.scale,
        "floor": figure.floor,
        "ceiling": figure.ceiling,
        "curves": curves,
        "points": points,
        "lines": _lines(figure, record, results),
    }


def _probed(figure: Figure, record: Record) -> list[dict[str, Any]]:
    found = [
        (probe["step"], value * figure.times)
        for probe in record.probes
        if figure.probe and not math.isnan(value := number(probe.get(figure.probe)))
    ]
    if not found:
        return []
    steps, values = map(np.array, zip(*found, strict=True))
    return [{"name": "probe", "joined": True, **thin(steps, values)}]


def _measured(record: Record, results: Sequence[Result]) -> list[dict[str, Any]]:
    """What dino-kit knn gave for this run's checkpoints, the data and the k with the most of them."""
    by_kind: dict[tuple[str, str], dict[int, float]] = {}
    for row in results:
        if row.evaluator == "k-NN" and row.metric.startswith("top-1") and row.step is not None:
            by_kind.setdefault((row.setting, row.data), {})[row.step] = row.value
    if not by_kind:
        return []
    # Of k with equally many, 20 is the usual one.
    best = max(by_kind, key=lambda kind: (len(by_kind[kind]), kind[0] == "k 20"))
    if record.by_epoch or max(by_kind[best]) > record.last_step:
        return []  # of another run, or counted in steps where only epochs are known
    steps = np.array(sorted(by_kind[best]))
    values = np.array([by_kind[best][step] for step in steps.tolist()])
    return [{"name": f"dino-kit knn, {best[0]}", "joined": True, **thin(steps, values)}]


def _lines(
    figure: Figure, record: Record, results: Sequence[Result]
) -> list[dict[str, float | str | bool]]:
    """Values with a meaning of their own; the axis is made to hold those that are ``wanted``."""
    config, found = record.config, []

    def line(value: float, label: str, wanted: bool = True) -> None:
        found.append({"value": float(f"{value:.5g}"), "label": label, "wanted": wanted})

    if config and figure.key in ("loss", "entropy"):
        line(math.log(config.out_dim), f"ln {config.out_dim}")
    if config and figure.key == "information":
        line(math.log(config.out_dim), f"ln {config.out_dim}", False)
    if config and figure.key == "prototypes":
        line(config.out_dim, f"all {config.out_dim:,}")
    if config and figure.key == "retrieval":
        line(100 / record.total_batch, "chance, in a batch")
    if figure.key == "knn":
        floors = {row.floor for row in results if row.floor is not None and row.step is not None}
        if len(floors) == 1:
            line(floors.pop(), "largest class")
    return found


def _bounds(figure: Figure, record: Record) -> str:
    own = record.config and width(record.config)
    if figure.key != "rank" or not own:
        return ""
    return f" At most {min(own, 2 * record.total_batch):,} in a batch."


def _warmup(record: Record) -> int | None:
    """The step at which the learning rate has warmed up, where there is a warm-up."""
    each, config = record.steps_per_epoch, record.config
    return each * config.warmup_epochs or None if each and config else None


def _rounded(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values]
