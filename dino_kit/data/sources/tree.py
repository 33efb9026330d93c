"""Images whose names are paths.

Wherever such a tree lies, in a folder or in tar archives: the class of an image is the first folder
in its path, and an image that lies in none takes the classes away. What is hidden, a name that
begins with a dot, is left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from dino_kit.data.sources.names import composed
from dino_kit.data.sources.source import EXTENSIONS
from dino_kit.errors import UserError


class Tree:
    """The names of images, in order, and the classes that they tell.

    A source of images is one of these that also reads them.

    Args:
        root: where the tree lies.
        names: paths below ``root``, parts joined by "/", in the order of a tree.
    """

    def __init__(self, root: str, names: Sequence[str]):
        self.root, self.names = root, names
        self.classes, self._ends = top_folders(names)

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return self.names[index]

    def label(self, index: int) -> int | None:
        if self.classes is None:
            return None
        return int(np.searchsorted(self._ends, index, side="right"))


def top_folders(names: Sequence[str]) -> tuple[list[str] | None, np.ndarray]:
    """The folders at the top of a tree, and where in ``names`` each ends; None if an image is in none.

    Names in one folder stand together, so few of the names need to be looked at.
    """
    classes, ends = [], []
    begin = 0
    while begin < len(names):
        folder, slash, _ = names[begin].partition("/")
        if not slash:
            return None, np.empty(0, np.int64)
        name = composed(folder)
        end = _run_end(names, begin, name)
        classes.append(name)
        ends.append(end)
        begin = end
    return classes, np.array(ends, np.int64)


def _run_end(names: Sequence[str], begin: int, folder: str) -> int:
    """The first place after ``begin`` whose name is not in ``folder``."""
    step = 1
    while begin + step < len(names) and _top(names[begin + step]) == folder:
        step *= 2
    low, high = begin + step // 2, min(begin + step, len(names))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _top(names[middle]) == folder else (low, middle)
    return high


def _top(name: str) -> str | None:
    folder, slash, _ = name.partition("/")
    return composed(folder) if slash else None


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def is_hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def extension(name: str) -> str:
    """What kind of file ``name`` is, for a count of what is no image."""
    return os.path.splitext(name)[1].lower() or "no extension"


def counted(others: Counter[str]) -> str:
    counts = ", ".join(f"{n:,} × {kind}" for kind, n in others.most_common(3))
    return counts + (" …" if len(others) > 3 else "")


def require_images(root: str, images: int, others: Counter[str], what: str = "") -> None:
    """Raises :class:`UserError` where there are none; it says what is there instead."""
    if images:
        return
    raise UserError(
        f"There is no image in {root}: looked {what or 'at every depth'} for "
        f"{', '.join(sorted(EXTENSIONS))} and found "
        f"{f'only {counted(others)}' if others else 'no files at all'}."
    )
