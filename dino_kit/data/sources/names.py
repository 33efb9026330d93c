"""Very many names in little memory, and the order in which a tree of them is read."""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Callable, Iterable, Sequence

import numpy as np

# What is no Unicode in a file's name stands in it as surrogates.
_TEXT = ("utf-8", "surrogatepass")


class Names(Sequence[str]):
    """Names as one array of text and one of where each ends: 8 bytes a name beside its own.

    Args:
        text: (bytes,) uint8, the names one after the other.
        ends: (n,) int64, where each ends in ``text``.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        text, ends = bytearray(), array("q")
        for name in names:
            text += name.encode(*_TEXT)
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        begin = self.ends[index - 1] if index else 0
        return self.text[begin : self.ends[index]].tobytes().decode(*_TEXT)


def composed(name: str) -> str:
    """``name`` with composed accents: some file systems hand out decomposed ones."""
    return unicodedata.normalize("NFC", name)


def siblings(name: str) -> tuple[str, str]:
    """The order of names in one folder, the same whichever way accents are stored."""
    return composed(name), name


def order(names: Sequence[str]) -> np.ndarray | None:
    """How to put paths, parts joined by "/", into the order of a tree: (n,); None if they are.

    That is folder by folder, in each by :func:`siblings`; equal paths keep the order they have.
    """
    key = _key(names)
    keys = [key(name) for name in names]
    if all(keys[i] <= keys[i + 1] for i in range(len(keys) - 1)):
        return None
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def _key(names: Sequence[str]) -> Callable[[str], bytes]:
    # Bytes in UTF-8 are in the order of their characters, and none comes before the zero.
    if all(unicodedata.is_normalized("NFC", name) for name in names):
        return lambda name: name.encode(*_TEXT).replace(b"/", b"\0")
    return lambda name: "\0".join(part for one in name.split("/") for part in siblings(one)).encode(
        *_TEXT
    )
