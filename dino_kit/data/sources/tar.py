"""Images in tar archives, read in place: all archives together are one tree."""

from __future__ import annotations

import glob
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino_kit.data.sources.archive import Archive
from dino_kit.data.sources.tar_index import Index, open_index
from dino_kit.data.sources.tree import Tree, top_folders
from dino_kit.errors import UserError

SUFFIX = ".tar"
_OPEN = 64  # archives that a process keeps open


class TarSource(Tree):
    """Images in tar archives, which are read by their place in them and never unpacked.

    The names in all archives form one tree; see :mod:`~dino_kit.data.sources.tree`. Where members
    ``KEY.cls`` or ``KEY.json`` stand beside the image ``KEY.jpg``, as in WebDataset's archives, they
    are the labels, and the folders are not: the text of the one; ``cls``, ``label`` or ``class`` in
    the other. Of a name that an archive holds twice the last is meant, as where it is unpacked.

    Args:
        pattern: as for :func:`shards_of`.
        kept: file to keep the index in, where it is long. It is read instead of the archives as long as none of them
            has changed since; a notice names one that has.

    Raises:
        UserError: an archive is missing, damaged or cut off, or there is no image in them.
    """

    def __init__(self, pattern: str, kept: str | Path | None = None):
        self._set(pattern, open_index(pattern, shards_of(pattern), kept))

    def _set(self, pattern: str, index: Index, part: str = "") -> TarSource:
        self.pattern, self.index, self.part = pattern, index, part
        self._begin, self._archives = 0, OrderedDict()
        names: Sequence[str] = index.names
        if part:
            folders, ends = top_folders(names)
            place = folders.index(part)
            self._begin = int(ends[place - 1]) if place else 0
            names = _Below(names, self._begin, int(ends[place]), len(part) + 1)
        super().__init__(os.path.join(pattern, part) if part else pattern, names)
        if index.classes is not None:
            self.classes = index.classes
        return self

    def below(self, part: str) -> TarSource:
        """The images in the folder ``part`` at the top of the tree, which is then theirs."""
        return TarSource.__new__(TarSource)._set(self.pattern, self.index, part)

    def read(self, index: int) -> bytes:
        place = self._begin + index
        offset, size = int(self.index.offset[place]), int(self.index.size[place])
        archive = self._archive(int(self.index.shard[place]))
        data = archive.read(offset, size)
        if len(data) < size:
            raise UserError(
                f"The archive {archive.path} has become shorter since it was indexed: "
                f"{self.key(index)} is cut off."
            )
        return data

    def label(self, index: int) -> int | None:
        if self.index.classes is None:
            return super().label(index)
        label = int(self.index.labels[self._begin + index])
        return None if label < 0 else label

    def name(self, index: int) -> str:
        place = self._begin + index
        return f"{self.index.shards[self.index.shard[place]]}/{self.index.names[place]}"

    def _archive(self, shard: int) -> Archive:
        """An archive, opened the first time that it is read from and now and then again."""
        if shard in self._archives:
            self._archives.move_to_end(shard)
            return self._archives[shard]
        archive = Archive(self.index.shards[shard])
        if (archive.size, archive.changed_at) != self.index.stamps[shard]:
            raise UserError(
                f"The archive {archive.path} has changed since it was indexed; start again."
            )
        self._archives[shard] = archive
        if len(self._archives) > _OPEN:
            self._archives.popitem(last=False)[1].close()
        return archive

    def __getstate__(self) -> dict[str, Any]:
        state = {"pattern": self.pattern, "part": self.part, "shards": self.index.shards}
        # A process on this machine opens the file that this one has open.
        return state | ({"kept": self.index.file} if self.index.file else {"index": self.index})

    def __setstate__(self, state: dict[str, Any]) -> None:
        index = state.get("index") or open_index(state["pattern"], state["shards"], state["kept"])
        self._set(state["pattern"], index, state["part"])


class _Below(Sequence[str]):
    """A range of names, without the folder that all of them begin with."""

    def __init__(self, names: Sequence[str], begin: int, end: int, cut: int):
        self.names, self.begin, self.end, self.cut = names, begin, end, cut

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.names[self.begin + index][self.cut :]


def shards_of(pattern: str) -> list[str]:
    """The archives that ``pattern`` names: a file, a folder of them, a glob, or a range in braces.

    ``train-{000..146}.tar`` is a range and ``{a,b}.tar`` a choice. The order is that of the names.

    Raises:
        UserError: an archive is missing, or there is none.
    """
    found: list[str] = []
    for path in _expanded(pattern):
        if os.path.isdir(path):
            found += [os.path.join(path, name) for name in shards_in(path)]
        elif os.path.exists(path) or not glob.has_magic(path):
            found.append(path)
        else:
            found += sorted(glob.glob(path))
    missing = [path for path in found if not os.path.isfile(path)]
    if missing or not found:
        what = f"{missing[0]} is missing" if missing else "nothing fits it"
        raise UserError(f"{pattern} should name tar archives, and {what}.")
    return found


def shards_in(folder: str) -> list[str]:
    """The names of the archives that lie in ``folder`` itself."""
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    return sorted(name for name in names if name.lower().endswith(SUFFIX))


def _expanded(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None or os.path.exists(pattern):
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    if whole := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = whole.groups()
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    return [path for choice in choices for path in _expanded(f"{head}{choice}{tail}")]
