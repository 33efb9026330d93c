"""A run, ready to be trained: its folder, its checkpoints, and what is looked at between its epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dino_kit import distributed, files, locks, log
from dino_kit.config import fields, recipe
from dino_kit.config.train import TrainConfig
from dino_kit.data.bad_images import BadImages
from dino_kit.data.loader import Batch, Loader
from dino_kit.data.sources.source import Source
from dino_kit.training import checkpoint, engine
from dino_kit.training.interruption import Interruption
from dino_kit.training.learner import Learner, MicroBatch
from dino_kit.training.monitor import Monitor


@dataclass
class Run:
    """Everything that a run consists of, ready to go on from step ``start``."""

    config: TrainConfig  # resolved
    source: Source
    names: str  # the fingerprint of the images' names
    learner: Learner
    loader: Loader
    prepare: Callable[[Any], MicroBatch]
    monitor: Monitor
    probe: Callable[[nn.Module, int, Sequence[Mapping[str, Any]]], dict[str, Any]]
    bad_images: BadImages
    skipped: engine.Skipped
    start: int
    replaces: bool  # an earlier run in the folder makes way

    def train(self) -> None:
        """Take the remaining steps.

        Raises:
            RunFailed: too many of them are not finite.
            UserError: an image cannot be used, or too many of them; or another process is training
                in the folder.
        """
        if not distributed.is_main():
            self._train()
            return
        folder = Path(self.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with locks.hold(folder, "training"):
            files.remove_leftovers(folder)
            if self.replaces:
                checkpoint.remove(folder)
            if self.start < self.loader.total_steps:
                files.write_text(folder / "config.yaml", recipe.dump(self.config))
            self._train()
            if self.bad_images:
                log.notice(
                    f"{len(self.bad_images):,} of {len(self.source):,} images could not be used; "
                    f"{self.bad_images.path} names them."
                )

    def _train(self) -> None:
        steps_per_epoch = self.loader.steps_per_epoch
        self.monitor.open()
        self.bad_images.open(anew=self.replaces)
        try:
            self.look(self.start)
            interruption = Interruption(self.config.save_every_minutes)
            with interruption.put_off():
                engine.train(
                    self.learner,
                    self.bad_images.watch(self.loader),
                    self.prepare,
                    self.monitor,
                    self.save,
                    self.look,
                    interruption,
                    start=self.start,
                    total_steps=self.loader.total_steps,
                    steps_per_epoch=steps_per_epoch,
                    save_every_steps=self.config.save_every_steps,
                    skipped=self.skipped,
                    max_bad_steps=self.config.max_bad_steps,
                    stop_on_collapse=self.config.stop_on_collapse,
                    describe=self.describe,
                )
        finally:
            self.monitor.close()

    def save(self, done: int) -> None:
        """Write the checkpoint of ``done`` steps, and its copy for good where one is due."""
        state, monitored = self.learner.state_dict(), self.monitor.state_dict()
        if not distributed.is_main():
            return
        epoch, rest = divmod(done, self.loader.steps_per_epoch)
        content = {
            **state,
            "epoch": epoch,
            "step": done,
            "config": fields.to_plain(self.config),
            "images": len(self.source),
            "names": self.names,
            "skipped": vars(self.skipped).copy(),
            "monitor": monitored,
        }
        due = rest == 0 and self.config.saveckp_freq and (epoch - 1) % self.config.saveckp_freq == 0
        checkpoint.save(
            self.config.output_dir, content, f"checkpoint{epoch - 1:04}.pth" if due else None
        )

    def look(self, done: int) -> None:
        """Probe the teacher after ``done`` steps, where an epoch ends at which that is due.

        The main process does it while the others wait. The best checkpoint is the one of the best
        probe with labels; without labels nothing says which is best, the loss least of all.
        """
        epoch, rest = divmod(done, self.loader.steps_per_epoch)
        every, last = self.config.probe_freq, self.config.epochs
        due = every and not rest and (epoch % every == 0 or epoch == last)
        probes = self.monitor.probes
        if not due or not distributed.is_main() or (probes and probes[-1]["step"] == done):
            return
        with self.monitor.paused():
            result = self.probe(self.learner.teacher.backbone, epoch, probes)
            self.monitor.record_probe(done, result)
            if done and checkpoint.is_best([probe.get("knn_top1") for probe in probes]):
                checkpoint.keep_as_best(self.config.output_dir)
        log.say(f"epoch {epoch}: {result['sentence']}")

    def describe(self, batches: Sequence[Batch]) -> str:
        """The images of a step on this process, for the person who looks for the fault."""
        names = [self.source.name(int(i)) for batch in batches for i in batch.indices]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return f"its images are {', '.join(names[:5])}{more}"
