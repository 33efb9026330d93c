"""A run, ready to be trained: its folder, its checkpoints, and what is looked at between its epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dino_kit import distributed, files, locks, log, shards
from dino_kit.batch_norm import batch_norms
from dino_kit.config import fields, recipe
from dino_kit.config.train import TrainConfig
from dino_kit.data.bad_images import BadImages
from dino_kit.data.loader import Batch, Loader
from dino_kit.data.sources.source import Source
from dino_kit.errors import RunFailed, is_out_of_memory
from dino_kit.training import checkpoint, engine, memory
from dino_kit.training.interruption import Interruption
from dino_kit.training.learner import Learner, MicroBatch
from dino_kit.training.monitor import Monitor
from dino_kit.training.roll_call import RollCall


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
    failed_saves: int = 0  # in a row
    saved: int = 0  # steps of the newest checkpoint that was written; 0 where there is none

    def train(self) -> None:
        """Take the remaining steps.

        Raises:
            RunFailed: too many of them are not finite, or of the checkpoints cannot be written; or
                another process has died or hangs; or the memory does not suffice.
            UserError: an image cannot be used, or too many of them; or another process is training
                in the folder.
        """
        self.roll_call = RollCall(60.0 * self.config.dist_timeout_minutes)
        folder = Path(self.config.output_dir)
        with self.roll_call.watched(), locks.hold_by_main(folder, "training"):
            if distributed.is_main():
                self._prepare(folder)
            self._train()
            if distributed.is_main() and self.bad_images:
                log.notice(
                    f"{len(self.bad_images):,} of {len(self.source):,} images could not be used; "
                    f"{self.bad_images.path} names them."
                )

    def _prepare(self, folder: Path) -> None:
        files.remove_leftovers(folder)
        if self.replaces:
            checkpoint.remove(folder)
        else:  # of a save that was killed, which would be in the way on a disk that is nearly full
            checkpoint.remove_unused_shards(folder)
        if self.start < self.loader.total_steps:
            files.write_text(folder / "config.yaml", recipe.dump(self.config))

    def _train(self) -> None:
        steps_per_epoch, self.saved = self.loader.steps_per_epoch, self.start
        self.monitor.open()
        self.bad_images.open(anew=self.replaces)
        lacking = ""
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
                    self.roll_call.at,
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
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            lacking = str(error).strip().partition("\n")[0] or "no more can be had"
        finally:
            self.monitor.close()
        if lacking:  # only now: what an exception refers to keeps its memory
            raise RunFailed(self._what_fits(lacking))

    def save(self, done: int) -> bool:
        """Write the checkpoint of ``done`` steps, and its copy for good where one is due.

        Returns whether those that write it could; all processes come to the same.

        Raises:
            RunFailed: it could not be written, and neither could those before, or it is the last.
        """
        refusal = self._write(done)
        if not distributed.total(bool(refusal), self.learner.device):
            self.failed_saves, self.saved = 0, done
            return True
        self.failed_saves += 1
        kept = f"the one of step {self.saved:,} is intact" if self.saved else "there is none so far"
        told = f"The checkpoint of step {done:,} could not be written{refusal}; {kept}."
        last = done == self.loader.total_steps
        if last or self.failed_saves >= self.config.max_failed_saves:
            why = "It was the run's last" if last else f"{self.failed_saves} in a row could not"
            raise RunFailed(
                f"{told} {why}. Make room in {self.config.output_dir}, or make it "
                "writable; the same command then goes on from the newest checkpoint."
            )
        log.notice(f"{told} The run goes on, and it is tried again in a minute.")
        return False

    def _write(self, done: int) -> str:
        """Bring all to the disk that belongs to a checkpoint; returns why it was refused, if so."""
        folder = Path(self.config.output_dir)
        in_parts = self.config.checkpoint_shards and self.learner.is_sharded
        state, monitored = self.learner.state_dict(whole=not in_parts), self.monitor.state_dict()
        try:
            if in_parts:
                state = shards.write(folder, done, state)
            if distributed.is_main():
                self._write_checkpoint(done, state, monitored)
        except OSError as error:
            if distributed.is_main():  # what others wrote for it, on a disk that may be full
                checkpoint.remove_unused_shards(folder)
            return f" ({error.strerror or error})"
        return ""

    def _write_checkpoint(
        self, done: int, state: dict[str, Any], monitored: dict[str, Any]
    ) -> None:
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
        self.monitor.flush()
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
        if not due:
            return
        backbone = self.learner.teacher_backbone()
        if not distributed.is_main() or (probes and probes[-1]["step"] == done):
            return
        with self.monitor.paused():
            result = self.probe(backbone, epoch, probes)
            # Before the line that says that this probe is done: a run that ends between the two
            # probes again.
            if done and checkpoint.is_best([p.get("knn_top1") for p in (*probes, result)]):
                self._keep_as_best(done)
            self.monitor.record_probe(done, result)
        log.say(f"epoch {epoch}: {result['sentence']}")

    def _keep_as_best(self, done: int) -> None:
        if self.saved != done:  # the newest checkpoint is not of the weights that were probed
            log.notice(
                f"{checkpoint.BEST} is not of the best probe, that after step {done:,}, whose "
                "checkpoint could not be written."
            )
            return
        try:
            checkpoint.keep_as_best(self.config.output_dir)
        except OSError as error:
            log.notice(f"{checkpoint.BEST} could not be written ({error.strerror or error}).")

    def _what_fits(self, lacking: str) -> str:
        """What to do where there is too little memory. The networks are of no use afterwards."""
        memory.set_free()
        batches, processes = next(iter(self.loader)), distributed.world_size()
        asked, total = max(len(batch.indices) for batch in batches), self.config.total_batch_size
        told = f"The memory does not suffice for {asked} images at a time ({lacking})"
        if self.learner.go_alone():
            with distributed.apart():
                fit = memory.most_that_fit(
                    lambda images: self._try(batches[0], images, gradients=processes > 1), asked
                )
            fits = f"{fit} fit"
        else:  # to try it takes all processes, of which some go on
            fit, fits = asked // 2, f"{asked // 2} may fit"
        if not fit:
            return (
                f"{told}, nor, as far as it could be tried, for one; a smaller network, smaller or "
                "fewer crops need less."
            )
        if batch_norms(self.learner.student):  # of which no batch is taken in parts
            return (
                f"{told}; {fits}: give --total_batch_size {fit * processes}, which is another run."
            )
        return (
            f"{told}; {fits}: --batch_size_per_gpu {fit} --total_batch_size {total} is the same "
            f"run, its batch taken in parts, and --total_batch_size {fit * processes} one of smaller "
            "batches; "
            "--probe_freq 0 leaves out the probes, if it is they that need so much."
        )

    def _try(self, batch: Batch, images: int, gradients: bool) -> None:
        """Take a step of so many images, beside a second copy of the gradients where there is one."""
        student = self.learner.student
        copies = [torch.empty_like(p) for p in student.parameters() if gradients and p.requires_grad]
        whole = self.prepare(batch)
        groups = [group[:, :images] for group in whole.groups]
        self.learner.step(self.start, [MicroBatch(groups, whole.places[:images])])
        del copies  # not before: where processes join their gradients, each holds them twice

    def describe(
        self,
        batches: Sequence[Batch],
        micro_batches: Sequence[MicroBatch],
        suspect: bool,
        most: int | None,
    ) -> str:
        """The images of a step that went wrong, ``most`` of them by name; all have to call it.

        They are those with a crop that is not finite; where there is none, those of the processes
        whose loss was not, which is what ``suspect`` tells of this one; else those of all, whose
        gradients are averaged.
        """
        indices = torch.cat([batch.indices for batch in batches]).to(self.learner.device)
        broken = [
            torch.stack([~group.isfinite().all(dim=(0, 2, 3, 4)) for group in batch.groups]).any(0)
            for batch in micro_batches
        ]
        evidence = torch.cat(broken).long() * 2 + suspect
        indices, evidence = (distributed.all_gather(own[None]) for own in (indices, evidence))
        guilty = evidence == evidence.max()  # (processes, images)
        where, processes = "", guilty.any(dim=1).nonzero().flatten().tolist()
        if len(processes) < len(guilty):
            where = f"of process {', '.join(map(str, processes))} (of {len(guilty)}) "
        names = [self.source.name(index) for index in indices[guilty].tolist()]
        more = f" and {len(names) - most} more" if most and len(names) > most else ""
        return f"its images {where}are {', '.join(names[:most])}{more}"
