"""Which images there are in tar archives, and where: found once, by the headers alone."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino_kit import log
from dino_kit.data.sources import store
from dino_kit.data.sources.archive import Archive, Member
from dino_kit.data.sources.names import Names, composed, order
from dino_kit.data.sources.source import classes_of
from dino_kit.data.sources.tree import counted, extension, is_hidden, is_image, require_images

_LABELS = (".cls", ".json")
_LABEL_KEYS = ("cls", "label", "class")  # of a .json; the first that is there
_LONGEST_LABEL = 1 << 16  # bytes of a .cls or .json


@dataclass(frozen=True)
class Index:
    """The images of some archives, in the order of the tree; n of them in s archives."""

    shards: list[str]  # paths of the archives
    stamps: list[tuple[int, int]]  # of each its size in bytes, and the time of its last change
    names: Names  # (n,) the members'
    shard: np.ndarray  # (n,) int32, a place in ``shards``
    offset: np.ndarray  # (n,) int64, where the image begins, in bytes
    size: np.ndarray  # (n,) int64, bytes
    labels: np.ndarray  # (n,) int32, -1 for none; empty where no member is a label
    classes: list[str] | None  # of these labels
    file: str | None = None  # where all of this is kept


def open_index(root: str, shards: list[str], kept: str | Path | None) -> Index:
    """The index of ``shards``: the one kept in the file ``kept``, as long as it holds.

    Raises:
        UserError: an archive is missing, damaged or cut off, or there is no image in them.
    """
    before = _load(kept, shards) if kept else None
    if before is not None:
        changed = _changed(before, shards)
        if not changed:
            return before
        log.notice(f"{root} was indexed before, and since then {changed}: it is indexed again.")
    index = _build(root, shards)
    if kept is None or not store.is_worth_it(len(index.names)):
        return index
    return _keep(index, kept) or index


def _build(root: str, shards: list[str]) -> Index:
    found = _Found()
    stamps = []
    with log.progress(len(shards), f"indexing {root}") as advance:
        for number, path in enumerate(shards):
            archive = Archive(path)
            stamps.append((archive.size, archive.changed_at))
            found.add(number, archive)
            archive.close()
            advance(text=f"{len(found.offset):,} images")
    require_images(root, len(found.offset), found.others)
    if found.others:
        log.notice(f"{root} holds files of other kinds too, left out: {counted(found.others)}.")
    return found.index(shards, stamps)


class _Found:
    """Collects the images of one archive after the other, in the order in which they lie there."""

    def __init__(self) -> None:
        self.text, self.ends = bytearray(), array("q")
        self.shard, self.offset, self.size = array("i"), array("q"), array("q")
        self.label, self.texts = array("i"), {}
        self.others: Counter[str] = Counter()

    def add(self, number: int, archive: Archive) -> None:
        links: list[Member] = []
        key, begin, label = "", 0, -1
        for member in archive.members():
            if member.kind == "folder" or is_hidden(member.name):
                continue
            if (own := _key(member.name)) != key:
                key, begin, label = own, len(self.offset), -1
            if member.kind == "link" and is_image(member.name):
                links.append(member)
            elif member.kind == "file" and is_image(member.name):
                self._add(member.name, number, member.offset, member.size, label)
            elif (
                member.kind == "file"
                and member.name.endswith(_LABELS)
                and (text := _label(archive, member)) is not None
            ):
                label = self.texts.setdefault(text, len(self.texts))
                for place in range(begin, len(self.label)):
                    self.label[place] = label
            elif not (member.kind == "file" and member.name.endswith(_LABELS)):
                self.others[extension(member.name)] += 1
        if links:
            self._add_links(number, links, archive)

    def _add(self, name: str, shard: int, offset: int, size: int, label: int) -> None:
        self.text += name.encode("utf-8", "surrogatepass")
        self.ends.append(len(self.text))
        self.shard.append(shard)
        self.offset.append(offset)
        self.size.append(size)
        self.label.append(label)

    def _add_links(self, number: int, links: Sequence[Member], archive: Archive) -> None:
        """Second names of images: they have the bytes of the member that they lead to."""
        places = {m.name: (m.offset, m.size) for m in archive.members() if m.kind == "file"}
        for link in links:
            if link.target in places:
                self._add(link.name, number, *places[link.target], -1)
            else:
                self.others["link that leads nowhere"] += 1

    def index(self, shards: list[str], stamps: list[tuple[int, int]]) -> Index:
        names = Names(np.frombuffer(self.text, np.uint8), np.frombuffer(self.ends, np.int64))
        shard = np.frombuffer(self.shard, np.int32)
        rows = order(names)
        rows = np.arange(len(names)) if rows is None else rows
        rows = rows[_is_last(names, shard, rows)]
        classes, labels = None, np.empty(0, np.int32)
        if self.texts:
            classes = classes_of(set(self.texts))
            places = np.array([classes.index(text) for text in self.texts] + [-1], np.int32)
            labels = places[np.frombuffer(self.label, np.int32)[rows]]
        return Index(
            shards,
            stamps,
            Names.of(names[row] for row in rows),
            shard[rows],
            np.frombuffer(self.offset, np.int64)[rows],
            np.frombuffer(self.size, np.int64)[rows],
            labels,
            classes,
        )


def _is_last(names: Names, shard: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of members of one name in one archive the last one, as where the archive is unpacked: (n,)."""
    keep = np.ones(len(rows), bool)
    for place in np.flatnonzero(shard[rows[:-1]] == shard[rows[1:]]):
        keep[place] = names[rows[place]] != names[rows[place + 1]]
    return keep


def _key(name: str) -> str:
    """What the members of one sample of WebDataset's have in common."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _label(archive: Archive, member: Member) -> str | None:
    """The label that a member holds; None where it holds none."""
    if member.size > _LONGEST_LABEL:
        return None
    text = archive.read(member.offset, member.size).decode("utf-8", "replace").strip()
    if member.name.endswith(".cls"):
        return composed(text) or None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    value = next((content[key] for key in _LABEL_KEYS if key in content), None)
    return composed(str(value)) or None if isinstance(value, (int, str)) else None


def _changed(index: Index, shards: list[str]) -> str:
    """What is no longer as it was indexed, in words; empty if all is."""
    for path, stamp in zip(shards, index.stamps, strict=True):
        stat = os.stat(path)
        if (stat.st_size, stat.st_mtime_ns) != stamp:
            return f"{path} has changed"
    return ""


def _keep(index: Index, path: str | Path) -> Index | None:
    """``index`` as it stands in the file ``path`` from now on; None where nothing can be written."""
    about = {
        "shards": [os.path.basename(shard) for shard in index.shards],
        "stamps": index.stamps,
        "classes": index.classes,
    }
    arrays = {
        "text": index.names.text,
        "ends": index.names.ends,
        "shard": index.shard,
        "offset": index.offset,
        "size": index.size,
        "labels": index.labels,
    }
    return _load(path, index.shards) if store.save(path, about, arrays) else None


def _load(path: str | Path, shards: list[str]) -> Index | None:
    """The index that is kept in ``path``, if it is one of archives called as ``shards`` are."""
    found = store.load(path)
    if found is None:
        return None
    about, arrays = found
    if about["shards"] != [os.path.basename(shard) for shard in shards]:
        return None
    names = Names(arrays.pop("text"), arrays.pop("ends"))
    stamps = [tuple(stamp) for stamp in about["stamps"]]
    return Index(shards, stamps, names, **arrays, classes=about["classes"], file=str(path))
