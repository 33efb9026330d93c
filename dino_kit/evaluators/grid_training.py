"""A linear layer on features that are extracted once, its learning rate chosen among several.

The rate is chosen on a part of the training images that is held out by a hash of their names, never
on the images that are classified in the end; the layer that is kept is then trained at that rate on
all training images. An interruption leaves nothing: what takes long is to extract the features.

Legend: n images, m of them that can be used, E width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_kit import distributed, files, locks, log
from dino_kit.data.sources.holding_out import held_out_of
from dino_kit.data.sources.source import Source
from dino_kit.errors import RunFailed, UserError
from dino_kit.evaluators import classifier, linear
from dino_kit.evaluators.identity import Identity
from dino_kit.evaluators.linear import LinearFeatures, LinearHead
from dino_kit.evaluators.rate_grid import RateGrid
from dino_kit.evaluators.shares import joined_features
from dino_kit.features import labels_of
from dino_kit.weights import EvalTransform, Loaded

HELD_OUT_SHARE = 0.1
_NEEDED = ("epoch", "state_dict", "results", "rates")  # beside what tells trainings apart
_ROWS = 4096  # checked at once
_OF_THE_MEMORY = 0.5  # of what is free on a GPU, that features may take


class Images(NamedTuple):
    """Features of the images of a set that can be used."""

    features: Tensor  # (m, E), float32
    labels: Tensor  # (m,), int64
    places: Tensor  # (m,), int64, rising: which of the set's they are


@dataclass(kw_only=True)
class GridTraining:
    """A linear layer, its learning rate to be chosen.

    Args:
        loaded, flags, features, transform, train, val, epochs, total_batch_size: as of
            :class:`~dino_kit.evaluators.head_training.HeadTraining`.
        lrs: learning rates for a batch of 256; they are scaled to ``total_batch_size``.
        batch_size_per_gpu: images that a process takes at a time to make their features.
        seed: of the images' order and the first weights.
        path: the layer's file.
        resume: whether what ``path`` holds of this training stands; else it makes way.

    Raises:
        UserError: ``path`` is of another training.
    """

    loaded: Loaded
    flags: dict[str, Any]
    features: LinearFeatures
    transform: EvalTransform
    train: Source
    val: Source
    epochs: int
    lrs: Sequence[float]
    total_batch_size: int
    batch_size_per_gpu: int
    seed: int
    num_workers: int
    device: torch.device
    path: Path
    resume: bool = True
    finished: bool = field(default=False, init=False)  # before
    # Of the layer that is kept: its lr, epochs done, top1 and top5 (percent) and loss on the images
    # to classify, and how many images there were for what.
    result: dict[str, Any] = field(default_factory=dict, init=False)
    # Of each rate, rising: lr, diverged, and by "held_out" and "test" the top1 and loss of its layer,
    # which learnt from the images that are not held out; None where it diverged.
    rates: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.lrs = sorted(set(self.lrs))
        names = ("epochs", "lrs", "total_batch_size", "seed")
        self.identity = Identity(
            self.loaded, self.flags, self.features, self.transform, self.train, self.val,
            {"held_out_share": HELD_OUT_SHARE} | {name: getattr(self, name) for name in names},
        )  # fmt: skip
        saved = self.identity.saved(self.path, _NEEDED) if self.resume else None
        if saved:
            self.finished, self.result, self.rates = True, saved["results"]["fast"], saved["rates"]

    @property
    def chosen(self) -> dict[str, Any]:
        """The entry of ``rates`` whose rate was chosen."""
        return next(entry for entry in self.rates if entry["lr"] == self.result["lr"])

    @property
    def best_on_test(self) -> dict[str, Any]:
        """The entry that classifies best the images which the choice must not see."""
        there = [entry for entry in self.rates if not entry["diverged"]]
        return max(there, key=lambda entry: entry["test"]["top1"])

    def fit(self) -> None:
        """Extract, choose, train, write; every process has to call it, and the main one trains.

        Raises:
            RunFailed: all rates diverged.
            UserError: images or features cannot be used, none can be held out, or another process is
                training in ``path``.
        """
        if self.finished:
            return
        folder, name = self.path.parent, self.path.name
        with locks.hold_by_main(folder, f"training {name}", f".{name}.lock"):
            if distributed.is_main():
                files.remove_leftovers(folder)
            train = self._images(self.train, "training")
            val = self._images(self.val, "validation")
            if not distributed.is_main():
                return
            # Not before, as the other processes wait to be met at the second set.
            for images, role in ((train, "training"), (val, "validation")):
                _require_finite(images.features, role)
            if not self.resume:
                self.path.unlink(missing_ok=True)
            self._write(self._choose_and_train(train, val))

    def _images(self, source: Source, role: str) -> Images:
        labels = labels_of(source)
        features, places, _ = joined_features(
            self.features,
            source,
            self.transform,
            batch_size=self.batch_size_per_gpu,
            num_workers=self.num_workers,
            device=self.device,
            description=f"features ({role})",
        )
        where = _roomy(features, self.device)
        return Images(features.to(where), labels[places].to(where), places)

    def _choose_and_train(self, train: Images, val: Images) -> LinearHead:
        everything, test = torch.arange(len(train.labels)), torch.arange(len(val.labels))
        is_held = torch.zeros(len(self.train), dtype=torch.bool)
        is_held[held_out_of(self.train, HELD_OUT_SHARE, "held out")] = True
        is_held = is_held[train.places]
        held, rest = everything[is_held], everything[~is_held]
        if not len(held) or not len(rest):
            raise UserError(
                f"Of {self.train.root} no class has two images that can be used, one to learn from "
                "and one to choose the learning rate by; leave --fast out and give one --lr."
            )
        grid = self._fitted(self.lrs, train, rest, f"training at {len(self.lrs)} rates")
        self._compare(grid, (train, held), (val, test))
        there = [entry for entry in self.rates if not entry["diverged"]]
        if not there:
            raise RunFailed(
                f"The training diverged at every learning rate from {self.lrs[0]:g} to "
                f"{self.lrs[-1]:g}; give lower ones by --lrs."
            )
        # Of rates that classify alike the one whose loss is the lowest.
        found = [(entry["held_out"]["top1"], -entry["held_out"]["loss"]) for entry in there]
        lr = there[found.index(max(found))]["lr"]
        grid = self._fitted([lr], train, everything, f"training at the rate {lr:g}")
        (found,) = grid.classify(val.features, val.labels, _on(val, test))
        if not grid.are_finite()[0] or not found.loss < float("inf"):
            raise RunFailed(
                f"At the learning rate {lr:g}, the best on the images held out, the training on all "
                "images diverged; give lower ones by --lrs."
            )
        counts = torch.bincount(val.labels.cpu(), minlength=len(self.train.classes))
        largest = int(torch.bincount(train.labels.cpu()).argmax())
        self.result = {
            "lr": lr, "epochs": self.epochs, **found._asdict(),
            "largest_class_percent": 100.0 * int(counts[largest]) / len(test),
            "images": len(test), "train_images": len(everything), "held_out_images": len(held),
        }  # fmt: skip
        return grid.head(0)

    def _fitted(self, lrs: Sequence[float], train: Images, rows: Tensor, what: str) -> RateGrid:
        """Layers that learnt from ``rows`` of the training images, one at each rate."""
        scale = self.total_batch_size / linear.REFERENCE_BATCH
        head = LinearHead(self.features.embed_dim, len(self.train.classes), self.seed)
        grid = RateGrid(head, [lr * scale for lr in lrs], self.device)
        steps = self.epochs * -(-len(rows) // self.total_batch_size)
        with log.progress(steps, what) as advance:
            grid.fit(
                train.features,
                train.labels,
                _on(train, rows),
                epochs=self.epochs,
                batch_size=self.total_batch_size,
                seed=self.seed,
                advance=advance,
            )
        return grid

    def _compare(self, grid: RateGrid, *sets: tuple[Images, Tensor]) -> None:
        """What each rate came to on the images held out and on those to classify."""
        found = [grid.classify(x.features, x.labels, _on(x, rows)) for x, rows in sets]
        self.rates = []
        for lr, finite, *both in zip(self.lrs, grid.are_finite(), *found, strict=True):
            diverged = not finite or not all(each.loss < float("inf") for each in both)
            told = [None if diverged else {"top1": x.top1, "loss": x.loss} for x in both]
            self.rates.append(
                {"lr": lr, "diverged": diverged, "held_out": told[0], "test": told[1]}
            )

    def _write(self, head: LinearHead) -> None:
        content = {
            "epoch": self.epochs,
            "state_dict": classifier.wrapped(head.state_dict()),
            "best_acc": self.result["top1"],
            "results": {"fast": self.result},
            "rates": self.rates,
            **self.identity.plain(),
        }
        files.write_weights(self.path, content)


def _on(images: Images, rows: Tensor) -> Tensor:
    return rows.to(images.labels.device)


def _require_finite(features: Tensor, role: str) -> None:
    for rows in features.split(_ROWS):
        if not bool(rows.isfinite().all()):
            raise UserError(
                f"The {role} images have features that are not finite; the checkpoint's weights are "
                "likely broken."
            )


def _roomy(features: Tensor, device: torch.device) -> torch.device:
    """Where features are kept: on the device, unless they would fill a GPU's memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if features.numel() * features.element_size() > _OF_THE_MEMORY * free:
            return torch.device("cpu")
    return device
