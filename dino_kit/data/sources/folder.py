"""Images in a folder, at any depth."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino_kit import log
from dino_kit.data.sources import store
from dino_kit.data.sources.names import Names, siblings
from dino_kit.data.sources.source import read_file
from dino_kit.data.sources.tree import Tree, counted, extension, is_image, require_images
from dino_kit.errors import UserError

# A folder that changed so shortly before it was listed may change again without its time telling.
_TOO_FRESH = 2_000_000_000  # nanoseconds
_NAMED = 3  # files that a sentence about changes names


class FolderSource(Tree):
    """Images at any depth below ``root``; see :mod:`~dino_kit.data.sources.tree` for the classes.

    The order does not depend on the file system: it is that of the paths, part by part. Names that
    differ only in how accents are stored are the same class. Links are followed.

    Args:
        root: the folder.
        kept: file to keep the list in, where it is long. It is read instead of the folders as long as none of them
            has changed since; of one that has, a notice tells what is new and what is gone.

    Raises:
        UserError: there is no such folder, or no image in it.
    """

    def __init__(self, root: str | Path, kept: str | Path | None = None):
        root = str(root)
        if not os.path.isdir(root):
            kind = "a file" if os.path.exists(root) else "nothing"
            raise UserError(f"{root} should be a folder of images, and there is {kind}.")
        before = _Listing.load(kept) if kept else None
        if before is None or before.changed(root):
            listing = _Listing.of(root)
            if before is not None and (difference := changes(before.names, listing.names)):
                log.notice(f"{root} has changed since it was listed: {difference}.")
            worth_it = kept and store.is_worth_it(len(listing.names))
            before = listing.keep(kept) if worth_it else listing
        self._file = before.file
        super().__init__(root, before.names)

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))

    def name(self, index: int) -> str:
        return os.path.join(self.root, *self.names[index].split("/"))

    def __getstate__(self) -> dict[str, Any]:
        # A process on this machine opens the file that this one has open.
        return {**vars(self), "names": None} if self._file else vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.names is None:
            self.names = _Listing.load(self._file).names


class _Listing(NamedTuple):
    """What was found below a folder, and when."""

    names: Names
    folders: Names
    changed_at: np.ndarray  # (folders,) int64, nanoseconds
    listed_at: int
    file: str | None = None  # where the arrays stand

    @classmethod
    def of(cls, root: str) -> _Listing:
        others: Counter[str] = Counter()
        folders: dict[str, int] = {}
        listed_at = time.time_ns()
        with log.progress(None, f"listing {root}") as advance:
            names = Names.of(_walk(root, others, folders, advance))
        require_images(root, len(names), others)
        if others:
            log.notice(f"{root} holds files of other kinds too, left out: {counted(others)}.")
        stamps = np.fromiter(folders.values(), np.int64, len(folders))
        return cls(names, Names.of(folders), stamps, listed_at)

    @classmethod
    def load(cls, path: str | Path) -> _Listing | None:
        found = store.load(path)
        if found is None:
            return None
        about, arrays = found
        names = Names(arrays["text"], arrays["ends"])
        folders = Names(arrays["folder_text"], arrays["folder_ends"])
        return cls(names, folders, arrays["changed_at"], about["listed_at"], str(path))

    def keep(self, path: str | Path) -> _Listing:
        """This list as it stands in ``path`` from now on; where nothing can be written, itself."""
        if not store.save(
            path,
            {"listed_at": self.listed_at},
            {
                "text": self.names.text,
                "ends": self.names.ends,
                "folder_text": self.folders.text,
                "folder_ends": self.folders.ends,
                "changed_at": self.changed_at,
            },
        ):
            return self
        return self.load(path) or self

    def changed(self, root: str) -> bool:
        """Whether there may be other files below ``root`` by now."""
        for folder, changed_at in zip(self.folders, self.changed_at, strict=True):
            try:
                now = os.stat(os.path.join(root, *folder.split("/"))).st_mtime_ns
            except OSError:
                return True
            if now != changed_at or now > self.listed_at - _TOO_FRESH:
                return True
        return False


def changes(before: Names, now: Names) -> str:
    """What is new in ``now`` and what is gone, in words; empty where nothing is."""
    old, new = set(before), set(now)
    parts = []
    for word, names in (("new", sorted(new - old)), ("gone", sorted(old - new))):
        if names:
            more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            verb = "is" if len(names) == 1 else "are"
            parts.append(f"{', '.join(names[:_NAMED])}{more} {verb} {word}")
    return "; ".join(parts)


def _walk(
    root: str, others: Counter[str], folders: dict[str, int], advance: Callable[..., None]
) -> Iterator[str]:
    """Paths of images relative to ``root``, parts joined by "/", in the order of a tree.

    ``others`` counts what is no image; ``folders`` gets the time of each folder's last change.
    """
    waiting = [_entries(root, "", (os.path.realpath(root),), others, folders)]
    while waiting:
        for path, ancestors in waiting[-1]:
            if ancestors is not None:
                waiting.append(_entries(root, path, ancestors, others, folders))
                break
            advance()
            yield path
        else:
            waiting.pop()


def _entries(
    root: str,
    prefix: str,
    ancestors: tuple[str, ...],
    others: Counter[str],
    folders: dict[str, int],
) -> Iterator[tuple[str, tuple[str, ...] | None]]:
    """Of one folder the images, and the folders with all that are above what they hold, in order."""
    place = os.path.join(root, *prefix.split("/"))
    images: list[str] = []
    below: dict[str, tuple[str, ...]] = {}
    try:
        folders[prefix] = os.stat(place).st_mtime_ns
        for entry in os.scandir(place):
            name = entry.name
            if name.startswith("."):
                continue
            if _is_folder(entry):
                real = (
                    os.path.realpath(entry.path)
                    if entry.is_symlink()
                    else os.path.join(ancestors[-1], name)
                )
                if real not in ancestors:  # a link to a folder above would never end
                    below[name] = (*ancestors, real)
            elif is_image(name):
                images.append(name)
            else:
                others[extension(name)] += 1
    except OSError as error:
        raise UserError(f"The folder {error.filename} cannot be read: {error.strerror}.") from error
    plain = all(map(str.isascii, images)) and all(map(str.isascii, below))
    for name in sorted([*images, *below], key=None if plain else siblings):
        yield f"{prefix}/{name}" if prefix else name, below.get(name)


def _is_folder(entry: os.DirEntry) -> bool:
    # A link to itself is an error to DirEntry.is_dir.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
