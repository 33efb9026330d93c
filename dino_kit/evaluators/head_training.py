"""A linear layer's training on a checkpoint's features: crops, steps, and the files it leaves.

It goes on where an earlier one stopped, from the layer's file, which appears whole after each epoch;
whatever is drawn is a function of seed, epoch and image, so neither an interruption nor the number
of processes changes what is learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dino_kit import distributed, files, locks, log
from dino_kit.backbones.frozen import frozen
from dino_kit.data.loader import Loader
from dino_kit.data.sources.source import Source
from dino_kit.evaluators import classifier, linear
from dino_kit.evaluators.identity import Identity
from dino_kit.evaluators.linear import LinearFeatures, LinearHead, Step
from dino_kit.evaluators.shares import shared_features
from dino_kit.features import labels_of
from dino_kit.normalize import Normalize
from dino_kit.weights import EvalTransform, Loaded

# What a file needs, beside what tells trainings apart, to go on from it.
_NEEDED = ("epoch", "state_dict", "optimizer", "results")


@dataclass(kw_only=True)
class HeadTraining:
    """A linear layer in training, ready to go on from epoch ``start``.

    Args:
        loaded: the checkpoint, whose backbone ``features`` has.
        flags: what had to be said of its architecture, as :func:`dino_kit.weights.load` takes it.
        train, val: labelled sources of the same classes.
        lr: for a batch of 256; it is scaled to ``total_batch_size``.
        batch_size_per_gpu: images that a process takes at a time, at most.
        path: the layer's file.
        log: the file of a line for each epoch.
        resume: whether to go on from ``path``, if it is there; else it makes way.

    Raises:
        UserError: the batch cannot be split evenly, or ``path`` is of another training.
    """

    loaded: Loaded
    flags: dict[str, Any]
    features: LinearFeatures
    transform: EvalTransform
    train: Source
    val: Source
    epochs: int
    lr: float
    total_batch_size: int
    batch_size_per_gpu: int
    seed: int
    val_freq: int
    num_workers: int
    device: torch.device
    path: Path
    log: Path
    resume: bool = True
    start: int = field(default=0, init=False)  # epochs done before
    # Epochs done, top1, top5 (percent), loss, and the images of each kind that could be used, by
    # "last" and "best".
    results: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    told: bool = field(default=False, init=False)  # that images are left out
    chance: float = field(default=0.0, init=False)  # percent of the commonest class learnt from

    def __post_init__(self) -> None:
        protocol = ("epochs", "lr", "total_batch_size", "seed")
        self.identity = Identity(
            self.loaded, self.flags, self.features, self.transform, self.train, self.val,
            {name: getattr(self, name) for name in protocol},
        )  # fmt: skip
        saved = self.identity.saved(self.path, _NEEDED) if self.resume else None
        if saved:
            self.start, self.results = saved["epoch"], saved["results"]
        self.loader = Loader(
            self.train,
            [[linear.training_view(self.transform.image_size, self.transform.crop_without_resize)]],
            seed=self.seed,
            epochs=self.epochs,
            total_batch_size=self.total_batch_size,
            batch_size_per_gpu=self.batch_size_per_gpu,
            pixels=self.transform.pixels,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=self.num_workers,
            start_step=self.start * -(-len(self.train) // self.total_batch_size),
            drop_last=False,
            on_bad_image="leave_out",
            pin_memory=self.device.type == "cuda",
        )
        self.head = LinearHead(self.features.embed_dim, len(self.train.classes), self.seed)
        self.head.to(self.device)
        self.optimizer = linear.build_optimizer(self.head)
        if saved:
            self.head.load_state_dict(classifier.unwrapped(saved["state_dict"]))
            self.optimizer.load_state_dict(saved["optimizer"])

    @property
    def scaled_lr(self) -> float:
        """The first epoch's rate, for the batch as it is."""
        return self.lr * self.total_batch_size / linear.REFERENCE_BATCH

    def left_out(self) -> dict[str, int]:
        """How many images could not be used when the layer was last validated."""
        last, train, val = self.results["last"], len(self.train), len(self.val)
        # Files of earlier versions do not say; there was none then.
        return {
            "train": train - last.get("train_images", train),
            "validation": val - last.get("images", val),
        }

    def fit(self) -> None:
        """Train the remaining epochs; every process has to call it.

        Raises:
            RunFailed: the loss is not finite.
            UserError: an image cannot be read, or another process is training in ``path``.
        """
        folder, name = self.path.parent, self.path.name
        with locks.hold_by_main(folder, f"training {name}", f".{name}.lock"):
            if distributed.is_main():
                files.remove_leftovers(folder)
                if not self.resume:
                    self.path.unlink(missing_ok=True)
                files.cut_lines(self.log, lambda line: line["epoch"] < self.start)
            self._fit()

    def _fit(self) -> None:
        if self.start == self.epochs:
            return
        # An image to validate on looks the same each time, so its features are made once.
        features, labels, _ = shared_features(
            self.features,
            self.val,
            self.transform,
            batch_size=self.batch_size_per_gpu,
            num_workers=self.num_workers,
            device=self.device,
            description="features (validation)",
        )
        counts = linear.class_counts(labels, len(self.train.classes), self.device)
        learnt = labels_of(self.train)
        largest = int(torch.bincount(learnt[learnt >= 0]).argmax())
        self.chance = 100.0 * int(counts[largest]) / int(counts.sum())
        total, done = self.loader.total_steps, self.loader.start_step
        with log.progress(total, "training", done) as advance:
            linear.fit(
                self.head,
                self.optimizer,
                self._steps(),
                steps_per_epoch=self.loader.steps_per_epoch,
                epochs=self.epochs,
                lr=self.scaled_lr,
                start=self.start,
                val_freq=self.val_freq,
                validate=lambda: linear.accuracy(self.head, features, labels),
                finished=self._finished,
                advance=advance,
            )

    def _steps(self) -> Iterator[Step]:
        labels = labels_of(self.train)
        features = self.features.to(self.device)
        normalize = Normalize(self.transform.mean, self.transform.std).to(self.device)
        for batches in self.loader:
            self._tell([sentence for batch in batches for _, sentence in batch.bad])
            with frozen(features, self.device):
                parts = [
                    features(normalize(batch.groups[0][0].to(self.device, non_blocking=True)))
                    for batch in batches
                    if len(batch.indices)
                ]
            # What was made in inference mode cannot be learnt from; what is joined here can.
            none = torch.empty(0, features.embed_dim, device=self.device)
            indices = torch.cat([batch.indices for batch in batches])
            yield Step(
                torch.cat([none, *parts]),
                labels[indices].to(self.device),
                distributed.total(len(indices), self.device),
            )

    def _tell(self, bad: Sequence[str]) -> None:
        if bad and not self.told:
            log.notice(f"{bad[0]} It is left out, as is every image that cannot be used.")
            self.told = True

    def _finished(self, done: int, line: dict[str, float | None]) -> None:
        """Write down an epoch: its line, then the layer."""
        if "test_acc1" in line:
            last = {
                "epochs": done,
                "top1": line["test_acc1"],
                "top5": line["test_acc5"],
                "loss": line["test_loss"],
                "largest_class_percent": self.chance,
                "images": line["test_images"],
                "train_images": line["train_images"],
            }
            best = self.results.get("best", last)
            self.results = {"last": last, "best": last if last["top1"] > best["top1"] else best}
        if not distributed.is_main():
            return
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        content = {
            "epoch": done,
            "state_dict": classifier.wrapped(self.head.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "best_acc": self.results["best"]["top1"],
            "results": self.results,
            **self.identity.plain(),
        }
        files.write_weights(self.path, content)
