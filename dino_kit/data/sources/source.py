"""What a source of images is, and what can be made of one whatever it reads from.

A source lists, and reads on request; it decodes nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dino_kit.data.sources.names import composed
from dino_kit.errors import BadImage, UserError

EXTENSIONS = frozenset(  # those that torchvision lists, and three more
    (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
     ".avif", ".gif", ".npy")
)  # fmt: skip


class Source(Protocol):
    """A list of images. Sources are sent to worker processes, so they can be pickled."""

    root: str  # where the images come from, for a message or a record
    classes: list[str] | None  # names of the labels, in order; None where there are no labels

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded image, or its pixels (H, W, 3) uint8.

        Raises:
            BadImage: this image cannot be had; a run may go on without it.
            UserError: more than this one image cannot be had.
        """

    def label(self, index: int) -> int | None:
        """A place in ``classes``, or None."""

    def key(self, index: int) -> str:
        """The image's name within the source, the same wherever the source lies."""

    def name(self, index: int) -> str:
        """What to call the image in a message: where it is found."""


class Subset:
    """Some images of another source, in the order of ``indices``."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, list(indices)
        self.root = source.root

    @property
    def classes(self) -> list[str] | None:
        # Asked for when they are needed: of some datasets every item has to be read for them.
        return self.source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(self.indices[index])

    def label(self, index: int) -> int | None:
        return self.source.label(self.indices[index])

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])


class Relabelled(Subset):
    """A source whose labels count in the classes of another, ``classes``, which has all of its."""

    def __init__(self, source: Source, classes: list[str]):
        super().__init__(source, range(len(source)))
        self._places = [classes.index(name) for name in source.classes]
        self._classes = classes

    @property
    def classes(self) -> list[str]:
        return self._classes

    def label(self, index: int) -> int | None:
        label = self.source.label(index)
        return None if label is None else self._places[label]


def read_file(path: str | Path) -> bytes:
    """A file's bytes; raises :class:`BadImage` where they cannot be had."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            return file.read() or b""
    except OSError as error:
        raise BadImage(f"{path} cannot be opened: {error.strerror}.") from error


def _without_waiting(path: str, flags: int) -> int:
    # A named pipe among the files would be waited for; so it is an empty file.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def fingerprint(source: Source) -> str:
    """A digest of the images' names in their order, wherever and in whichever form they lie."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(composed(source.key(index)).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def require_labels(source: Source) -> None:
    """Raises :class:`UserError` where the images have no classes."""
    if source.classes is None:
        raise UserError(f"{source.root} has no labels, which an evaluation needs{_why(source)}.")


def _why(source: Source) -> str:
    if not hasattr(source, "names"):  # only in a tree do folders tell the class
        return ""
    loose = next((key for key in map(source.key, range(len(source))) if "/" not in key), None)
    if loose is None:
        return ""
    return f": some images lie in no folder named for their class, {loose} among them"


def classes_of(labels: set[str]) -> list[str]:
    """The order of classes that are known by their names alone: numbers by value, else by text."""
    return sorted(labels, key=int) if all(map(str.isdecimal, labels)) else sorted(labels)
