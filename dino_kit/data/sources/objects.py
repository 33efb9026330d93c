"""A Python object as a source: any map-style dataset of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from dino_kit.data.sources.names import composed
from dino_kit.errors import BadImage, UserError

_IMAGES, _LABELS = ("image", "img", "pixels"), ("label", "labels", "target", "class")


class DatasetSource:
    """The images of ``dataset``, an object with ``len(dataset)`` and ``dataset[i]``.

    An item is an image; or a pair of it and its label, a whole number; or a dictionary with
    ``image`` and ``label``. An image is one of PIL's, an array (H, W) or (H, W, C), a tensor
    (C, H, W), or the bytes of a file. Labels are taken from ``dataset.targets`` or
    ``dataset.labels`` where it has them, else from the items, and their names from
    ``dataset.classes``; an item that cannot be read has none then. Where workers are spawned
    rather than forked the object is pickled.

    Args:
        dataset: the object, without augmentation of its own.
        root: what to call it in messages.
        labels: whole numbers, where they are known beside the items.
    """

    def __init__(
        self, dataset: Any, root: str | None = None, labels: Sequence[int] | None = None
    ):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise UserError(
                f"A {type(dataset).__name__} is no dataset: it needs a length, and items by number."
            )
        self.dataset, self.root = dataset, root or type(dataset).__name__
        self._given = labels
        if not len(dataset):
            raise UserError(f"{self.root} holds no image.")

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> bytes | np.ndarray | Image.Image:
        image, _ = self._item(index)
        if hasattr(image, "detach"):  # a tensor of PyTorch
            image = image.detach().cpu().numpy()
            image = image.transpose(1, 2, 0) if image.ndim == 3 else image
        if isinstance(image, np.ndarray):
            # As float32 it would count as prepared, and its values would not be looked at.
            return image.astype(np.float64) if image.dtype == np.float32 else image
        if isinstance(image, (bytes, Image.Image)):
            return image
        raise BadImage(
            f"{self.name(index)} is a {type(image).__name__}, and should be an image of PIL's, an "
            "array, a tensor or a file's bytes."
        )

    def label(self, index: int) -> int | None:
        label = self._labels[index]
        return None if label < 0 else int(label)

    def key(self, index: int) -> str:
        return str(index)

    def name(self, index: int) -> str:
        return f"{self.root}[{index}]"

    @cached_property
    def classes(self) -> list[str] | None:
        names = getattr(self.dataset, "classes", None)
        highest = int(self._labels.max())
        if highest < 0:
            return None
        if names is not None and len(names) > highest:
            return [composed(str(name)) for name in names]
        return [str(number) for number in range(highest + 1)]

    @cached_property
    def _labels(self) -> np.ndarray:
        """(n,) int64, -1 for none."""
        known = (getattr(self.dataset, name, None) for name in ("targets", "labels"))
        for values in (self._given, *known):
            if values is not None and len(values) == len(self):
                return np.array([_number(value) for value in values], np.int64)
        labels, labelled = np.full(len(self), -1), False
        for index in range(len(self)):
            try:
                label = self._item(index)[1]
            except BadImage:
                continue
            if label is None and not labelled:
                break  # where the first has none, none has
            labels[index], labelled = _number(label), True
        return labels

    def _item(self, index: int) -> tuple[Any, Any]:
        try:
            item = self.dataset[index]
        except Exception as error:  # it is the user's own code that reads here
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadImage(f"{self.name(index)} cannot be read: {reason}.") from error
        if isinstance(item, dict):
            return _first(item, _IMAGES), _first(item, _LABELS)
        if isinstance(item, Sequence) and not isinstance(item, (bytes, str)):
            return item[0], item[1] if len(item) > 1 else None
        return item, None


def _first(item: dict, names: Sequence[str]) -> Any:
    return next((item[name] for name in names if name in item), None)


def _number(label: Any) -> int:
    try:
        return -1 if label is None else int(label)
    except (TypeError, ValueError):
        raise UserError(f"A label is {label!r}, and should be a whole number.") from None
