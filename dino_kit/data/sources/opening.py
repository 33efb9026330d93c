"""What ``--data_path`` and its like can name, and which of its images a command reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dino_kit import distributed, log
from dino_kit.data.sources.digits import DIGITS, DIGITS_MOVED, DigitsSource
from dino_kit.data.sources.folder import FolderSource
from dino_kit.data.sources.holding_out import held_out_of
from dino_kit.data.sources.huggingface import HuggingFaceData
from dino_kit.data.sources.lists import SUFFIXES, ListSource
from dino_kit.data.sources.objects import DatasetSource
from dino_kit.data.sources.single import OneImage
from dino_kit.data.sources.source import Relabelled, Source, Subset, require_labels
from dino_kit.data.sources.tar import SUFFIX, TarSource, shards_in
from dino_kit.data.sources.torchvision_data import TorchvisionData
from dino_kit.data.sources.tree import is_image, top_folders
from dino_kit.errors import UserError

TRAIN, QUERIES = "train", ("val", "test")
LISTS = "lists"  # the folder, beside a run, of the lists of images that were made once
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


class Data(Protocol):
    """Images that lie together, and the parts in which they come."""

    root: str  # where they lie
    parts: tuple[str, ...]  # the halves of a split that are there, of train, val and test
    half: str  # a half whose other half is missing; "" for none
    training: str  # the part to pretrain on; "" for all images

    def open(self, part: str = "") -> Source:
        """The images of a part; of all of them where none is named."""


def open_data(path: Any, lists: str | Path | None = None, download: bool = False) -> Data:
    """What ``path`` names: a path, a dataset by name, or a Python object.

    Args:
        path: a folder of images or of tar archives; an archive, a glob or range of them; a file
            that lists images; ``digits``; ``torchvision:NAME``; ``hf:NAME``; a dataset.
        lists: folder to keep lists of images in, so that they are made once.
        download: whether a dataset by name may be fetched.

    Raises:
        UserError: it names nothing that can be read.
    """
    if not isinstance(path, (str, os.PathLike)):
        return _Single(path if hasattr(path, "read") else DatasetSource(path))
    path = os.fspath(path)
    kind = path.partition(":")[0]
    if not os.path.exists(path):
        if path in (DIGITS, DIGITS_MOVED):
            return _Digits(moved=path == DIGITS_MOVED)
        if kind == "torchvision":
            return TorchvisionData(path, download)
        if kind == "hf":
            return HuggingFaceData(path, download)
    if os.path.isdir(path):
        return _Shards(path, lists) if _is_of_shards(path) else _Folder(path, lists)
    lower = path.lower()
    if lower.endswith(SUFFIX):
        return _Shards(path, lists)
    if os.path.isfile(path) and lower.endswith(SUFFIXES):
        return _Single(ListSource(path))
    if lower.endswith(_COMPRESSED):
        raise UserError(
            f"{path} is compressed, so its images cannot be read in place; make it a plain .tar, or "
            "a folder."
        )
    # A single letter before the colon is a drive.
    if len(kind) > 1 and ":" in path and not os.path.exists(path):
        raise UserError(
            f"{path} is neither a path nor a known kind of data; give a folder of images, tar "
            f"archives, a list of images in a file, {DIGITS}, torchvision:NAME or hf:NAME."
        )
    return _Folder(path, lists)


def open_training_source(
    data_path: Any, lists: str | Path | None = None, download: bool = False
) -> Source:
    """What ``--data_path`` means to a run that pretrains: all images, or those to train on.

    Raises:
        UserError: nothing there can be read as images; the sentence says what was found.
    """
    data = open_data(data_path, lists, download)
    source = data.open(data.training)
    if data.training and len(data.parts) > 1 and not isinstance(data, _Digits):
        log.say(f"{data.root} is split: training reads {source.root}")
    return source


def open_pictures(
    image_path: str, lists: str | Path | None = None, download: bool = False
) -> Source:
    """What ``--image_path`` means: an image, or all images of what :func:`open_data` takes.

    Of halves that lie apart, as those of a dataset by name do, it is the one that is held out.

    Raises:
        UserError: there is no image in it, or nothing of that name.
    """
    known = (SUFFIX, *SUFFIXES, *_COMPRESSED)
    if os.path.isfile(image_path) and not image_path.lower().endswith(known):
        return OneImage(image_path)
    data = open_data(image_path, lists, download)
    if isinstance(data, _Folder) and not os.path.isdir(image_path):
        raise UserError(
            f"{image_path} is neither an image nor a folder of images, nor other data of which "
            "--data_path could take them."
        )
    if isinstance(data, _Tree) and not data.is_apart:
        return data.open()
    return data.open(next((part for part in (*QUERIES, TRAIN) if part in data.parts), ""))


def open_labelled_sources(
    data_path: Any = None,
    train_data: Any = None,
    val_data: Any = None,
    val_share: float = 0.2,
    lists: str | Path | None = None,
    download: bool = False,
) -> tuple[Source, Source]:
    """The two labelled sets of an evaluation: the bank that is searched, and the queries.

    Either ``data_path``, whose split is taken, or of which, where it has none, the share
    ``val_share`` is held out by a hash of the names; or both ``train_data`` and ``val_data``.

    Raises:
        UserError: the arguments do not fit together, an image has no label, or a query has a class
            that the bank lacks.
    """
    if train_data or val_data:
        if data_path or not (train_data and val_data):
            raise UserError("Give either --data_path, or both --train_data and --val_data.")
        bank = _of_role(open_data(train_data, lists, download), (TRAIN,))
        queries = _of_role(open_data(val_data, lists, download), QUERIES)
    elif not data_path:
        raise UserError(
            "There is no labelled data to evaluate on: give --data_path, or --train_data and "
            "--val_data."
        )
    else:
        bank, queries = _both(open_data(data_path, lists, download), val_share)
    return _with_same_classes(bank, queries)


def _of_role(data: Data, role: tuple[str, ...]) -> Source:
    """The images of the first part of ``role`` that there is, else all."""
    return data.open(next((part for part in (*role, *data.parts) if part in data.parts), ""))


def _both(data: Data, val_share: float) -> tuple[Source, Source]:
    queries = [part for part in QUERIES if part in data.parts]
    if TRAIN in data.parts and queries:
        return data.open(TRAIN), data.open(queries[0])
    if data.half:
        raise UserError(
            f"{data.root} has a folder {data.half}/ but not the other half of a split (train/ and "
            "val/ or test/); name both halves by --train_data and --val_data."
        )
    whole = data.open()
    require_labels(whole)
    held_out = held_out_of(whole, val_share)
    if not held_out:
        raise UserError(
            f"No class in {whole.root} has two images, one to search and one to classify; name "
            "images for both by --train_data and --val_data."
        )
    bank = sorted(set(range(len(whole))) - set(held_out))
    return Subset(whole, bank), Subset(whole, held_out)


def _with_same_classes(bank: Source, queries: Source) -> tuple[Source, Source]:
    for source in (bank, queries):
        require_labels(source)
    if bank.classes == queries.classes:
        return bank, queries
    unknown = sorted(set(queries.classes) - set(bank.classes))
    if unknown:
        raise UserError(
            f"The images to classify have classes that the training images lack: "
            f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}."
        )
    return bank, Relabelled(queries, bank.classes)


class _Undivided:
    parts: tuple[str, ...] = ()
    half = training = ""


class _Single(_Undivided):
    """A source that is all there is."""

    def __init__(self, source: Source):
        self.source, self.root = source, source.root

    def open(self, part: str = "") -> Source:
        return self.source


class _Digits:
    parts, half, training = (TRAIN, "test"), "", TRAIN

    def __init__(self, moved: bool):
        self.moved, self.root = moved, DIGITS_MOVED if moved else DIGITS

    def open(self, part: str = "") -> Source:
        # Those to train on are never moved.
        return DigitsSource(part, moved=self.moved and part != TRAIN)


class _Tree:
    """A folder, or tar archives: the folders at the top may be a split."""

    is_apart = False  # whether the halves can only be opened one by one

    def __init__(self, root: str, tops: Mapping[str, bool]):
        self.root = root
        words = [name for name in (TRAIN, *QUERIES) if name in tops]
        # A folder without any is no half of a labelled split: "train" is a word for a vehicle, too.
        holding = [name for name in words if tops[name]]
        if TRAIN in words and len(words) > 1:
            self.parts, self.half = tuple(words), ""
        else:
            alone = len(tops) == 1 and bool(holding)
            self.parts = tuple(holding) if alone else ()
            self.half = holding[0] if holding else ""
        self.training = next(iter(self.parts), "")


class _Folder(_Tree):
    def __init__(self, root: str, lists: str | Path | None):
        self.lists = lists
        super().__init__(root, _tops_of_folder(root))

    @property
    def is_apart(self) -> bool:
        return any(_is_of_shards(os.path.join(self.root, part)) for part in self.parts)

    def open(self, part: str = "") -> Source:
        path = str(Path(self.root, part))
        kind = TarSource if part and _is_of_shards(path) else FolderSource
        return _once(lambda: kind(path, _kept(self.lists, path)))


class _Shards(_Tree):
    def __init__(self, pattern: str, lists: str | Path | None):
        self._whole = _once(lambda: TarSource(pattern, kept=_kept(lists, pattern)))
        names, tops = self._whole.names, {}
        folders, ends = top_folders(names)
        for folder, end in zip(folders or (), ends, strict=True):
            tops[folder] = names[int(end) - 1].count("/") > 1
        super().__init__(pattern, tops)

    def open(self, part: str = "") -> Source:
        return self._whole.below(part) if part else self._whole


def _tops_of_folder(root: str) -> dict[str, bool]:
    """The folders at the top, and of those called like halves whether they hold folders or archives.

    An image beside them counts as one more.
    """
    tops = {}
    for entry in os.scandir(root) if os.path.isdir(root) else ():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            tops[entry.name] = entry.name in (TRAIN, *QUERIES) and (
                any(inner.is_dir() for inner in os.scandir(entry.path)) or _is_of_shards(entry.path)
            )
        elif is_image(entry.name):
            tops["."] = False
    return tops


def _is_of_shards(folder: str) -> bool:
    """Whether tar archives lie in ``folder``, and neither images nor folders."""
    if not os.path.isdir(folder) or not shards_in(folder):
        return False
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return not any(is_image(entry.name) or entry.is_dir() for entry in entries)


def _kept(lists: str | Path | None, path: str) -> Path | None:
    if lists is None:
        return None
    digest = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogatepass")).hexdigest()
    return Path(lists) / f"{digest[:16]}.list"


def _once(build: Callable[[], Any]) -> Any:
    """What ``build`` makes; of several processes one makes it, and the others read what it kept."""
    with distributed.main_first():
        return build()
