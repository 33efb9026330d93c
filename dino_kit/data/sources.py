"""Where images come from: how many there are, the bytes or pixels of one, its label and its name.

A source lists, and reads on request; it decodes nothing. ``_OPENERS`` is the table of kinds that
``--data_path`` can name.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from dino_kit import log
from dino_kit.errors import UserError
from dino_kit.randomness import stream

EXTENSIONS = frozenset(  # those that torchvision lists, and three more
    (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
     ".avif", ".gif", ".npy")
)
DIGITS, DIGITS_MOVED = "digits", "digits:moved"
_TRAIN, _QUERIES = "train", ("val", "test")


class Source(Protocol):
    """A list of images. Sources are sent to worker processes, so they can be pickled."""

    classes: list[str] | None  # names of the labels, in order; None where there are no labels

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded image, or its pixels (H, W, 3) uint8."""

    def label(self, index: int) -> int | None:
        """A place in ``classes``, or None."""

    def name(self, index: int) -> str:
        """What to call the image in a message."""


class FolderSource:
    """Images at any depth below ``root``; the class is the first folder below it.

    Where an image lies in ``root`` itself there are no classes. The order does not depend on the
    file system: it is that of the paths, part by part. Names that differ only in how accents are
    stored are the same class. Hidden files and folders are left out.

    Raises:
        UserError: there is no such folder, or no image in it.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        if not os.path.isdir(self.root):
            kind = "a file" if os.path.exists(self.root) else "nothing"
            raise UserError(f"{self.root} should be a folder of images, and there is {kind}.")
        others: Counter[str] = Counter()
        self.paths = sorted(_list_images(self.root, others), key=_order)
        if not self.paths:
            raise UserError(
                f"There is no image in {self.root}: looked at every depth for "
                f"{', '.join(sorted(EXTENSIONS))} and found "
                f"{f'only {_count(others)}' if others else 'no files at all'}."
            )
        if others:
            log.notice(f"{self.root} holds files of other kinds too, left out: {_count(others)}.")
        flat = any("/" not in path for path in self.paths)
        self.classes = None if flat else sorted({_class(path) for path in self.paths})

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))

    def label(self, index: int) -> int | None:
        return None if self.classes is None else self._places[_class(self.paths[index])]

    def name(self, index: int) -> str:
        return os.path.join(self.root, *self.paths[index].split("/"))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.classes)}


class DigitsSource:
    """Handwritten digits of scikit-learn, 8 × 8 pixels.

    80 % of each class are to train, the rest to test; the split is drawn once and for all, class
    by class. With ``moved`` a digit is seen through a window of 6 × 6 pixels at a place of its own,
    also drawn once: in pictures of one size it is moved by up to a sixth of the side, and 4/3 as
    large.
    """

    def __init__(self, split: str, moved: bool = False):
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        chosen = []
        for digit in range(10):
            of_class = np.flatnonzero(labels == digit)
            order = stream("digits split", digit).permutation(of_class)
            cut = round(0.8 * len(order))
            chosen.append(order[:cut] if split == _TRAIN else order[cut:])
        self._rows = np.sort(np.concatenate(chosen))
        self._labels = labels[self._rows]
        ink = (pixels[self._rows].reshape(-1, 8, 8, 1) * (255 / 16)).round()  # 0 paper … 255 ink
        self._images = [image for image in ink.astype(np.uint8).repeat(3, axis=3)]
        if moved:
            pairs = zip(self._images, self._rows, strict=True)
            self._images = [_through_a_window(image, row) for image, row in pairs]
        self.classes = [str(digit) for digit in range(10)]
        self._kind = DIGITS_MOVED if moved else DIGITS

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> np.ndarray:
        return self._images[index]

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self._kind}[{self._rows[index]}]"


class Subset:
    """Some images of another source, in the order of ``indices``."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices, self.classes = source, list(indices), source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(self.indices[index])

    def label(self, index: int) -> int | None:
        return self.source.label(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])


def read_file(path: str | Path) -> bytes:
    """A file's bytes; raises :class:`UserError` where they cannot be had."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}.") from error


def open_training_source(data_path: str) -> Source:
    """What ``--data_path`` means to a run that pretrains: all images, or those of ``train/``.

    Raises:
        UserError: nothing there can be read as images; the sentence says what was found.
    """
    if (digits := _open_digits(data_path, _TRAIN)) is not None:
        return digits
    root = Path(data_path)
    if (root / _TRAIN).is_dir() and any((root / name).is_dir() for name in _QUERIES):
        log.say(f"{root} is split: training reads {root / _TRAIN}")
        root = root / _TRAIN
    _refuse_unknown_kind(data_path)
    return FolderSource(root)


def open_labelled_sources(
    data_path: str | None = None,
    train_data: str | None = None,
    val_data: str | None = None,
    val_share: float = 0.2,
) -> tuple[Source, Source]:
    """The two labelled sets of an evaluation: the bank that is searched, and the queries.

    Either ``data_path``, a root with ``train/`` and ``val/`` (or ``test/``), one labelled folder,
    of which the share ``val_share`` is held out by a hash of the names, or ``digits``; or both
    ``train_data`` and ``val_data``.

    Raises:
        UserError: the flags do not fit together, an image has no label, or a query has a class
            that the bank lacks.
    """
    if train_data or val_data:
        if data_path or not (train_data and val_data):
            raise UserError("Give either --data_path, or both --train_data and --val_data.")
        bank, queries = _open_one(train_data, _TRAIN), _open_one(val_data, "val")
    elif not data_path:
        raise UserError(
            "There is no labelled data to evaluate on: give --data_path, or --train_data and "
            "--val_data."
        )
    elif (digits := _open_digits(data_path, _TRAIN)) is not None:
        bank, queries = digits, _open_digits(data_path, "test")
    else:
        bank, queries = _open_root(data_path, val_share)
    return _with_same_classes(bank, queries)


def _open_digits(data_path: str, split: str) -> DigitsSource | None:
    """The digits, if they are meant; ``digits:moved`` moves those to test, and no others."""
    if data_path in (DIGITS, DIGITS_MOVED) and not os.path.exists(data_path):
        return DigitsSource(split, moved=data_path == DIGITS_MOVED and split != _TRAIN)
    return None


def _open_one(path: str, split: str) -> Source:
    digits = _open_digits(path, split)
    if digits is not None:
        return digits
    _refuse_unknown_kind(path)
    return FolderSource(path)


def _open_root(data_path: str, val_share: float) -> tuple[Source, Source]:
    _refuse_unknown_kind(data_path)
    root = Path(data_path)
    query_folders = [root / name for name in _QUERIES if (root / name).is_dir()]
    if (root / _TRAIN).is_dir() and query_folders:
        return FolderSource(root / _TRAIN), FolderSource(query_folders[0])
    halves = [half for half in (root / _TRAIN, *query_folders) if _has_folders(half)]
    if halves:
        raise UserError(
            f"{root} has a folder {halves[0].name}/ but not the other half of a split (train/ and "
            "val/ or test/); name both folders by --train_data and --val_data."
        )
    whole = FolderSource(root)
    _require_labels(whole)
    queries = _held_out(whole, val_share)
    if not queries:
        raise UserError(
            f"No class in {root} has two images, one to search and one to classify; name folders "
            "for both by --train_data and --val_data."
        )
    bank = sorted(set(range(len(whole))) - set(queries))
    return Subset(whole, bank), Subset(whole, queries)


def _has_folders(path: Path) -> bool:
    # A folder without any is no half of a labelled split: "train" is also a word for a vehicle.
    return path.is_dir() and any(entry.is_dir() for entry in path.iterdir())


def _held_out(source: FolderSource, val_share: float) -> list[int]:
    """The images to classify: by a hash of their names, so that new images move no old one.

    A class of two or more images has at least one on each side; that of a single one is searched.
    """
    by_class: dict[int, list[tuple[float, int]]] = {}
    for index, path in enumerate(source.paths):
        by_class.setdefault(source.label(index), []).append((_hash_share(path), index))
    chosen: list[int] = []
    for members in by_class.values():
        members.sort()
        wanted = sum(share < val_share for share, _ in members)
        count = min(max(wanted, 1), len(members) - 1)
        chosen += [index for _, index in members[:count]]
    return sorted(chosen)


def place(source: Source) -> str:
    """Where the images of ``source`` come from, for a message or a record."""
    if isinstance(source, Subset):
        return place(source.source)
    return getattr(source, "root", None) or source.name(0).partition("[")[0]


def _with_same_classes(bank: Source, queries: Source) -> tuple[Source, Source]:
    for source in (bank, queries):
        _require_labels(source)
    if bank.classes == queries.classes:
        return bank, queries
    unknown = sorted(set(queries.classes) - set(bank.classes))
    if unknown:
        raise UserError(
            f"The images to classify have classes that the training images lack: "
            f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}."
        )
    return bank, _Relabelled(queries, bank.classes)


class _Relabelled(Subset):
    """A source whose labels count in the classes of another."""

    def __init__(self, source: Source, classes: list[str]):
        super().__init__(source, range(len(source)))
        self._places = [classes.index(name) for name in source.classes]
        self.classes = classes

    def label(self, index: int) -> int:
        return self._places[self.source.label(index)]


def _require_labels(source: Source) -> None:
    if source.classes is None:
        loose = next(path for path in source.paths if "/" not in path)
        raise UserError(
            f"{place(source)} has no labels, which an evaluation needs: some images lie in no "
            f"folder named for their class, {loose} among them."
        )


def _refuse_unknown_kind(data_path: str) -> None:
    kind, colon, _ = data_path.partition(":")
    # A single letter before the colon is a drive.
    if colon and len(kind) > 1 and not os.path.exists(data_path):
        raise UserError(
            f"{data_path} is neither a folder nor a known kind of data; give a folder of images, "
            f"{DIGITS} or {DIGITS_MOVED}."
        )


def _list_images(root: str, others: Counter[str]) -> list[str]:
    """Paths of images relative to ``root``, parts joined by "/"; ``others`` counts what is not."""
    found: list[str] = []
    folders = [("", (os.path.realpath(root),))]
    while folders:
        prefix, ancestors = folders.pop()
        try:
            entries = list(os.scandir(os.path.join(root, *prefix.split("/"))))
        except OSError as error:
            raise UserError(
                f"The folder {error.filename} cannot be read: {error.strerror}."
            ) from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{prefix}/{entry.name}" if prefix else entry.name
            extension = os.path.splitext(entry.name)[1].lower()
            if _is_folder(entry):
                real = os.path.realpath(entry.path) if entry.is_symlink() else (
                    os.path.join(ancestors[-1], entry.name))
                if real not in ancestors:  # a link to a folder above would never end
                    folders.append((path, (*ancestors, real)))
            elif extension in EXTENSIONS:
                found.append(path)
            else:
                others[extension or "no extension"] += 1
    return found


def _is_folder(entry: os.DirEntry) -> bool:
    # A link to itself is an error to DirEntry.is_dir.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _composed(name: str) -> str:
    """``name`` with composed accents: some file systems hand out decomposed ones."""
    return unicodedata.normalize("NFC", name)


def _order(path: str) -> tuple:
    return tuple(_composed(path).split("/")), path


def _class(path: str) -> str:
    return _composed(path.partition("/")[0])


def _count(others: Counter[str]) -> str:
    counts = ", ".join(f"{n} × {extension}" for extension, n in others.most_common(3))
    return counts + (" …" if len(others) > 3 else "")


def _hash_share(path: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    # What is no Unicode in a file name stands in it as surrogates.
    name = _composed(path).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64


def _through_a_window(image: np.ndarray, row: int) -> np.ndarray:
    top, left = stream("moved digit", int(row)).integers(0, 3, size=2)
    return image[top : top + 6, left : left + 6]
