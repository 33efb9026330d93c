"""Datasets of torchvision by their names; nothing is fetched unless it is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino_kit.config.fields import nearest
from dino_kit.data.sources.objects import DatasetSource
from dino_kit.errors import UserError

# Of each dataset, its parts and how its class is asked for them.
_BY_TRAIN = {"train": {"train": True}, "test": {"train": False}}
_BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
_WITH_VAL = {part: {"split": part} for part in ("train", "val", "test")}
_WHOLE: dict[str, dict[str, Any]] = {"": {}}
TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": _BY_TRAIN,
    "CIFAR100": _BY_TRAIN,
    "DTD": _WITH_VAL,
    "EuroSAT": _WHOLE,
    "FGVCAircraft": _WITH_VAL,
    "FashionMNIST": _BY_TRAIN,
    "Flowers102": _WITH_VAL,
    "Food101": _BY_SPLIT,
    "GTSRB": _BY_SPLIT,
    "KMNIST": _BY_TRAIN,
    "MNIST": _BY_TRAIN,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "PCAM": _WITH_VAL,
    "QMNIST": _BY_TRAIN,
    "RenderedSST2": _WITH_VAL,
    "STL10": _BY_SPLIT | {"unlabeled": {"split": "unlabeled"}},
    "SVHN": _BY_SPLIT | {"extra": {"split": "extra"}},
    "StanfordCars": _BY_SPLIT,
    "SUN397": _WHOLE,
    "USPS": _BY_TRAIN,
}


class TorchvisionData:
    """``torchvision:NAME``, or ``torchvision:NAME:FOLDER`` where its files lie elsewhere."""

    half = ""

    def __init__(self, data_path: str, download: bool):
        _, name, folder = (data_path.split(":", 2) + [""])[:3]
        names = {known.lower(): known for known in TORCHVISION}
        if name.lower() not in names:
            raise UserError(
                f"{data_path} names no dataset of torchvision that is read here; they are "
                f"{', '.join(TORCHVISION)}{nearest(name, tuple(TORCHVISION))}."
            )
        self.name, self.download = names[name.lower()], download
        self.folder = folder or _default_folder()
        self.root = f"torchvision:{self.name}"
        self.parts = tuple(part for part in TORCHVISION[self.name] if part)
        # What has no labels, and is there to learn from, comes first.
        self.training = (
            "unlabeled" if "unlabeled" in self.parts else self.parts[0] if self.parts else ""
        )

    def open(self, part: str = "") -> DatasetSource:
        from torchvision import datasets

        options = dict(TORCHVISION[self.name][part])
        if self.download:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        try:
            dataset = getattr(datasets, self.name)(self.folder, download=self.download, **options)
        except Exception as error:  # torchvision raises many kinds where files are missing
            # Its own advice is for its own callers.
            reason = " ".join(str(error).split()).partition(" You can use download")[0].rstrip(".")
            how = "" if self.download else "; --download fetches it"
            raise UserError(
                f"{self.root} cannot be read from {self.folder}: {reason}{how}."
            ) from error
        root = f"{self.root}{f':{part}' if part else ''}"
        return DatasetSource(dataset, root, _known_labels(dataset))


def _known_labels(dataset: Any) -> Sequence[int] | None:
    """The labels of those datasets that show them only beside a decoded image; else None."""
    if hasattr(dataset, "_samples"):
        return [label for _, label in dataset._samples]
    return getattr(dataset, "_labels", None)


def _default_folder() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "dino_kit", "torchvision")
