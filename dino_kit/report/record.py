"""What a run has written down about itself, read for people: tolerant of what is torn or missing.

A fault of a file is a sentence in :attr:`Record.faults`, and the rest is read nevertheless.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dino_kit.config import recipe
from dino_kit.config.fields import create
from dino_kit.config.train import TrainConfig
from dino_kit.errors import UserError

CONFIG, METRICS, EPOCHS, PROBE, NEWEST = (
    "config.yaml", "metrics.jsonl", "log.txt", "probe.jsonl", "checkpoint.pth",
)  # fmt: skip
# The reference's keys of a line for an epoch, by the keys of a line for some steps.
_OF_AN_EPOCH = {
    "loss": "train_loss",
    "grad_norm": "train_grad_norm",
    "lr": "train_lr",
    "weight_decay": "train_wd",
}


@dataclass(frozen=True)
class Record:
    """A run as its files tell it."""

    folder: Path
    config: TrainConfig | None  # None where there is no recipe that can be read
    lines: list[dict[str, Any]]  # of metrics.jsonl, ``step`` rising
    probes: list[dict[str, Any]]  # of probe.jsonl, ``step`` rising
    # Whether a line is a whole epoch, its ``step`` the number of epochs: there was only log.txt.
    by_epoch: bool
    faults: list[str]

    @cached_property
    def steps(self) -> np.ndarray:
        """Steps taken when a line was written, ``(lines,)`` int64."""
        return np.array([line["step"] for line in self.lines], dtype=np.int64)

    @property
    def last_step(self) -> int:
        """0 where no line was written."""
        return int(self.steps[-1]) if self.lines else 0

    def column(self, name: str) -> np.ndarray:
        """A measure of every line, ``(lines,)`` float64, NaN where a line lacks it."""
        if name not in self._columns:
            values = [number(line.get(name)) for line in self.lines]
            self._columns[name] = np.array(values, dtype=np.float64)
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {}

    @property
    def states(self) -> list[str | None]:
        """The name of the run's state in every line."""
        found = (line.get("state") for line in self.lines)
        return [state if isinstance(state, str) else None for state in found]

    @cached_property
    def steps_per_epoch(self) -> int | None:
        """None where the lines leave it open, as within the first epoch."""
        if self.by_epoch:
            return 1
        # A line's epoch is (step - 1) // steps_per_epoch: each bounds it from both sides.
        low, high = 1, None
        for line in self.lines:
            before, epoch = line["step"] - 1, line.get("epoch")
            if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
                continue
            low = max(low, before // (epoch + 1) + 1)
            if epoch:
                high = before // epoch if high is None else min(high, before // epoch)
        if high is not None and low == high:
            return low
        for probe in self.probes:  # taken between two epochs
            epoch = probe.get("epoch")
            if isinstance(epoch, int) and epoch > 0 and probe["step"] % epoch == 0:
                return probe["step"] // epoch
        if self.config and self.last_step and self.last_step % self.config.epochs == 0:
            whole = self.last_step // self.config.epochs
            if low <= whole and (high is None or whole <= high):
                return whole
        # Of several that fit, any is within a line's steps of the truth.
        return high if high is not None and low <= high else None

    @property
    def total_steps(self) -> int | None:
        if self.config is None or self.steps_per_epoch is None:
            return None
        return self.config.epochs * self.steps_per_epoch

    @property
    def finished(self) -> bool:
        total = self.total_steps
        # The total may be off by a few steps where the lines leave the length of an epoch open.
        return bool(total and self.last_step and self.last_step >= total * (1 - 1e-3))

    def seconds(self) -> float | None:
        """How long the logged steps took, of all the processes that the run was split over."""
        speed, total = self.column("images_per_second"), self.total_batch
        if total is None or not np.any(speed > 0):
            return None
        taken = np.diff(self.steps, prepend=0) * total
        return float(np.sum(taken[speed > 0] / speed[speed > 0]))

    def waited(self) -> float | None:
        """The share of that time that went into waiting for data."""
        speed, share = self.column("images_per_second"), self.column("data_wait")
        known = (speed > 0) & np.isfinite(share)
        if not known.any():
            return None
        taken = np.diff(self.steps, prepend=0)[known] / speed[known]
        return float(np.sum(taken * share[known]) / np.sum(taken))

    @property
    def total_batch(self) -> int | None:
        return self.config and (self.config.total_batch_size or self.config.batch_size_per_gpu)


def read(folder: str | Path) -> Record:
    """What the files in a run's ``folder`` hold.

    Raises:
        UserError: it is no folder, or no run's.
    """
    folder = Path(folder)
    _require_run(folder)
    faults: list[str] = []
    config = _config(folder, faults)
    lines = _rising(_json_lines(folder / METRICS, faults))
    by_epoch = False
    if not lines and (folder / EPOCHS).is_file():
        lines = _epochs(_json_lines(folder / EPOCHS, faults))
        by_epoch = bool(lines)
        if by_epoch:
            faults.append(
                f"There are no steps in {METRICS}, so the curves come from {EPOCHS}, a point for "
                "an epoch."
            )
    probes = _rising(_json_lines(folder / PROBE, faults))
    return Record(folder, config, lines, probes, by_epoch, faults)


def number(value: Any) -> float:
    """``value`` as a float where it is a finite number, else NaN."""
    if type(value) is float:  # nearly always; a long run has millions
        return value if math.isfinite(value) else math.nan
    if isinstance(value, bool) or not isinstance(value, int):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _require_run(folder: Path) -> None:
    if folder.is_file():
        raise UserError(
            f"{folder} is a file; give the folder of a run, such as {folder.absolute().parent}."
        )
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give the --output_dir of dino-kit train.")
    wanted = (CONFIG, METRICS, EPOCHS)
    if not any((folder / name).is_file() for name in wanted):
        entries = sorted(entry.name for entry in folder.iterdir())
        more = f" and {len(entries) - 4} more" if len(entries) > 5 else ""
        holds = ", ".join(entries[:4] if more else entries) + more if entries else "nothing"
        raise UserError(
            f"{folder} is no run's folder: it has neither {', '.join(wanted[:-1])} nor "
            f"{wanted[-1]}, and holds {holds}. Give the --output_dir of dino-kit train."
        )


def _config(folder: Path, faults: list[str]) -> TrainConfig | None:
    path = folder / CONFIG
    if not path.is_file():
        faults.append(f"There is no {CONFIG}, so the recipe is not known.")
        return None
    try:
        return create(TrainConfig, recipe.read(TrainConfig, str(path)), missing_ok=True)
    except UserError as error:
        faults.append(f"The recipe cannot be read. {error}")
        return None


def _json_lines(path: Path, faults: list[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that is still being written is passed over."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", "replace")
    torn = not text.endswith("\n")
    rows = text.split("\n")
    found, damaged = [], []
    for place, row in enumerate(rows):
        if not row.strip():
            continue
        try:
            value = json.loads(row)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif not (torn and place == len(rows) - 1):
            damaged.append(place + 1)
    _tell(path.name, damaged, faults)
    return found


def _tell(name: str, damaged: list[int], faults: list[str]) -> None:
    if not damaged:
        return
    if len(damaged) == 1:
        faults.append(f"Line {damaged[0]} of {name} is damaged and was passed over.")
        return
    shown = ", ".join(map(str, damaged[:3])) + (" …" if len(damaged) > 3 else "")
    faults.append(f"{len(damaged):,} lines of {name} are damaged and were passed over: {shown}.")


def _rising(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By step; of two lines for one step the later, and none whose step is no whole number."""
    by_step = {
        line["step"]: line
        for line in lines
        if type(line.get("step")) is int and 0 <= line["step"] < 1 << 53
    }
    return [by_step[step] for step in sorted(by_step)]


def _epochs(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return _rising(
        {"step": epoch + 1, "epoch": epoch}
        | {name: line[theirs] for name, theirs in _OF_AN_EPOCH.items() if theirs in line}
        for line in lines
        if type(epoch := line.get("epoch")) is int
    )
