"""What a run writes down about itself: ``metrics.jsonl``, ``log.txt``, ``probe.jsonl`` and
``tensorboard/``.

Measured values stay on the device, summed, until a step is logged; only then are they fetched.
The sums are part of a checkpoint, so a resumed run writes the lines of an uninterrupted one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dino_kit import distributed, files, log
from dino_kit.journal import Journal
from dino_kit.training.diagnosis import COLLAPSED, Diagnosis

METRICS, EPOCHS, PROBES = "metrics.jsonl", "log.txt", "probe.jsonl"
TENSORBOARD = "tensorboard"
_HELD_BACK = 0.2  # share of a window's time spent waiting for data that is worth a sentence


class Monitor:
    """Collects what a step measured, and writes a line every ``log_every_steps`` steps.

    Nothing is touched before :meth:`open`.

    Args:
        folder: the run's folder.
        images_per_step: images that all processes together take in a step.
        diagnosis: names the run's state, line by line.
        start: steps taken before this process began; files are cut back to it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        steps_per_epoch: int,
        total_steps: int,
        images_per_step: int,
        log_every_steps: int,
        diagnosis: Diagnosis,
        start: int = 0,
    ):
        self.folder = Path(folder)
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.images_per_step = images_per_step
        self.log_every_steps, self.start = log_every_steps, start
        self.diagnosis = diagnosis
        self._window, self._epoch = _Sums(), _Sums()
        self._began = time.perf_counter()
        self._waited = 0.0
        self._timed_steps = 0
        self._journals = {name: Journal(self.folder / name) for name in (METRICS, EPOCHS, PROBES)}
        self._writer = None
        self._first_window, self._told_of_waiting = True, False
        self.last_line: dict[str, Any] = {}
        self.probes: list[dict[str, Any]] = []  # results, first to last; on the main process

    def open(self) -> None:
        """Cut the files back to the step that the run goes on from, and begin to measure time."""
        if distributed.is_main():
            self._open()
        self._began = time.perf_counter()

    def record(
        self,
        step: int,
        measured: dict[str, torch.Tensor],
        settings: dict[str, float],
        waited: float,
        observed: Mapping[str, torch.Tensor] = MappingProxyType({}),
        **counts: int,
    ) -> None:
        """Take what step ``step`` (0-based) measured, the settings it ran with, and its wait.

        ``measured`` holds scalars on the device, ``observed`` those of a step that writes a line,
        of all processes; both are empty for a step that was dropped. ``waited`` is in seconds.
        """
        done = step + 1
        self._window.add(measured, settings)
        self._epoch.add(measured, settings)
        self._timed_steps += 1
        self._waited += waited
        if self.writes_at(step):
            self._write_line(step, settings, observed, counts)
        if done % self.steps_per_epoch == 0:
            self._write_epoch(step)

    def record_probe(self, done: int, result: dict[str, Any]) -> None:
        """Take what a probe after ``done`` steps found; on the main process."""
        self.probes.append({"step": done, **result})
        self._append(PROBES, self.probes[-1])
        self._write_scalars("probe", result, done)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, time does not count as the run's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began

    def writes_at(self, step: int) -> bool:
        """Whether a line is written after step ``step`` (0-based)."""
        return (step + 1) % self.log_every_steps == 0 or step + 1 == self.total_steps

    def summary(self) -> str:
        """The newest logged line in a few words, for a progress bar."""
        if "loss" not in self.last_line:
            return ""
        line = self.last_line
        speed = f"{line['images_per_second']:.1f} img/s"
        return f"{line['state']}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  {speed}"

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, of all processes; every process has to call it."""
        return {
            "window": self._window.state_dict(),
            "epoch": self._epoch.state_dict(),
            "diagnosis": self.diagnosis.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._window.load_state_dict(state["window"], device)
        self._epoch.load_state_dict(state["epoch"], device)
        if "diagnosis" in state:  # a run that was begun before there was one has to be watched anew
            self.diagnosis.load_state_dict(state["diagnosis"])

    def flush(self) -> None:
        """Bring all lines to the disk, before a checkpoint after which none would be written again.

        Raises:
            OSError: the folder cannot be written to, or is full.
        """
        for journal in self._journals.values():
            journal.flush()

    def close(self) -> None:
        with self._tensorboard() as writer:
            writer.close()

    def _open(self) -> None:
        files.cut_lines(self.folder / METRICS, lambda line: line["step"] <= self.start)
        epochs_done = self.start // self.steps_per_epoch
        files.cut_lines(self.folder / EPOCHS, lambda line: line["epoch"] < epochs_done)
        self.probes = files.cut_lines(
            self.folder / PROBES, lambda line: line["step"] <= self.start
        )
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=self.start + 1)

    def _write_line(
        self,
        step: int,
        settings: dict[str, float],
        observed: Mapping[str, torch.Tensor],
        counts: dict[str, int],
    ) -> None:
        means = self._window.means()
        health = {name: float(value) for name, value in observed.items()}
        seconds = max(time.perf_counter() - self._began, 1e-9)
        share = self._waited / seconds
        self.last_line = {
            "step": step + 1,
            "epoch": step // self.steps_per_epoch,
            **means,
            **health,
            "state": self._diagnose(step + 1, health),
            **settings,
            **counts,
            "images_per_second": self._timed_steps * self.images_per_step / seconds,
            "data_wait": share,
        }
        self._say_if_held_back(share)
        self._window = _Sums()
        self._began, self._waited, self._timed_steps = time.perf_counter(), 0.0, 0
        if distributed.is_main():
            self._append(METRICS, self.last_line)
            self._write_scalars("train", self.last_line, step + 1)

    def _write_epoch(self, step: int) -> None:
        means, settings = self._epoch.means(), self._epoch.mean_settings()
        self._epoch = _Sums()
        if distributed.is_main():
            line = {f"train_{name}": value for name, value in means.items()}
            line |= {"train_lr": settings["lr"], "train_wd": settings["weight_decay"]}
            self._append(EPOCHS, line | {"epoch": step // self.steps_per_epoch})
            with self._tensorboard() as writer:
                writer.flush()

    def _write_scalars(self, group: str, line: dict[str, Any], done: int) -> None:
        with self._tensorboard() as writer:
            for name, value in line.items():
                if not isinstance(value, str) and name != "step":
                    writer.add_scalar(f"{group}/{name}", value, done)

    @contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        """The writer; one that a full disk has broken does nothing any more."""
        try:
            yield self._writer or _NoCurves()
        except OSError as error:
            # What its thread could not write is lost to it, and it raises at each call from then on.
            self._writer = None
            log.notice(
                f"{self.folder / TENSORBOARD} could not be written to ({error.strerror}) and gets "
                f"no more of this process; {METRICS} has the same figures."
            )

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self._journals[name].append(json.dumps(line))

    def _diagnose(self, done: int, health: dict[str, float]) -> str:
        before, state = self.diagnosis.state, self.diagnosis.update(done, health)
        if state != before and state in COLLAPSED:
            log.notice(f"Step {done}: {self.diagnosis.alarm()}")
        elif state != before and before in COLLAPSED:
            log.notice(f"Step {done}: the {before} is over, and the run learns.")
        return state

    def _say_if_held_back(self, share: float) -> None:
        # The first window holds the workers' start and says nothing of the run.
        first, self._first_window = self._first_window, False
        if share > _HELD_BACK and not first and not self._told_of_waiting:
            self._told_of_waiting = True
            log.notice(
                f"The run is held back by its data: {share:.0%} of the time goes into waiting for "
                "crops; more --num_workers, or fewer or smaller crops, would help."
            )


class _Sums:
    """What some steps measured and the settings they ran with, summed."""

    def __init__(self):
        self._measured: dict[str, torch.Tensor] = {}  # scalars on the device
        self._settings: dict[str, float] = {}
        self._measured_steps = self._steps = 0

    def add(self, measured: dict[str, torch.Tensor], settings: dict[str, float]) -> None:
        for name, value in measured.items():
            value = value.detach()
            known = name in self._measured
            self._measured[name] = self._measured[name] + value if known else value.clone()
        for name, number in settings.items():
            self._settings[name] = self._settings.get(name, 0.0) + number
        self._measured_steps += bool(measured)
        self._steps += 1

    def means(self) -> dict[str, float]:
        """Over the steps that were measured, and all processes; empty where none was."""
        return {name: total / self._measured_steps for name, total in self._fetched().items()}

    def mean_settings(self) -> dict[str, float]:
        return {name: total / self._steps for name, total in self._settings.items()}

    def _fetched(self) -> dict[str, float]:
        """The measured sums on the host, their means over the processes."""
        if not self._measured:
            return {}
        sums = distributed.all_reduce_mean(self._stacked())
        return dict(zip(self._measured, sums.tolist(), strict=True))

    def _stacked(self) -> torch.Tensor:
        return torch.stack(list(self._measured.values())).float()

    def _of_each_process(self) -> dict[str, list[float]]:
        """The measured sums on the host: a mean of them would go on with another rounding."""
        if not self._measured:
            return {}
        sums = distributed.all_gather(self._stacked()[:, None], dim=1)  # (measures, processes)
        return dict(zip(self._measured, sums.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "measured": self._of_each_process(),
            "settings": dict(self._settings),
            "measured_steps": self._measured_steps,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        measured = state["measured"].items()
        self._measured = {name: torch.tensor(_own(sums), device=device) for name, sums in measured}
        self._settings = dict(state["settings"])
        self._measured_steps, self._steps = state["measured_steps"], state["steps"]


def _own(sums: float | list[float]) -> float:
    """This process's sum; the mean where there were other processes, or an older checkpoint's."""
    if isinstance(sums, list):
        same = len(sums) == distributed.world_size()
        return sums[distributed.rank()] if same else sum(sums) / len(sums)
    return sums


class _NoCurves:
    """In the place of TensorBoard's writer where there is none."""

    def add_scalar(self, name: str, value: float, done: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...
