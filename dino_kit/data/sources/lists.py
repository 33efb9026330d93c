"""Images whose paths stand in a text or CSV file, with or without labels."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dino_kit.data.sources.names import Names, composed
from dino_kit.data.sources.source import classes_of, read_file
from dino_kit.errors import UserError

SUFFIXES = (".txt", ".csv", ".tsv")
_PATHS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "image_id")
_LABELS = ("label", "class", "target", "category", "class_name", "label_id", "y")


class ListSource:
    """The images that a file lists, in its order; paths count from the file's own folder.

    A ``.csv`` has commas between its columns and a ``.tsv`` tabs; the columns are told by a heading
    such as ``path,label``, or are the first and, if there is one, the second. A ``.txt`` has a path
    in each line, and behind it, after a tab, the label; or, if it is so in every line, after a blank
    the label's number. An empty label is none.

    Raises:
        UserError: the file cannot be read so, or lists nothing.
    """

    def __init__(self, path: str | Path):
        self.root = str(path)
        rows = _rows(self.root)
        if not rows:
            raise UserError(f"{self.root} lists no image.")
        self.paths = Names.of(path for path, _ in rows)
        labels = [composed(label) for _, label in rows]
        named = set(labels) - {""}
        self.classes = classes_of(named) if named else None
        places = {label: place for place, label in enumerate(self.classes or ())}
        self._labels = np.array([places.get(label, -1) for label in labels], np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))

    def label(self, index: int) -> int | None:
        label = int(self._labels[index])
        return None if label < 0 else label

    def key(self, index: int) -> str:
        return self.paths[index]

    def name(self, index: int) -> str:
        return os.path.join(os.path.dirname(self.root), self.paths[index])


def _rows(path: str) -> list[tuple[str, str]]:
    """The path and the label of each image; the label is empty where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8, so it cannot be a list of images.") from error
    if "\0" in text:
        raise UserError(f"{path} holds characters of no text, so it cannot be a list of images.")
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".txt":
        return _lines(path, text.split("\n"))
    return _table(path, text, "\t" if suffix == ".tsv" else ",")


def _lines(file: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    written = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    numbered = [re.fullmatch(r"(.*\S) +(\d+)", line.rstrip()) for _, line in written]
    if written and all(numbered):
        return [(match[1].strip(), match[2]) for match in numbered]
    rows = []
    for number, line in written:
        path, _, label = line.partition("\t")
        if not path.strip():
            raise UserError(f"{file} names no image in its line {number}.")
        rows.append((path.strip(), label.strip()))
    return rows


def _table(path: str, text: str, delimiter: str) -> list[tuple[str, str]]:
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as a table: {error}.") from error
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        return []
    heading = [cell.strip().lower() for cell in rows[0]]
    of_path = next((name for name in _PATHS if name in heading), None)
    if of_path is None:
        return list(_cells(path, rows, 0, 1, first=1))
    of_label = next((name for name in _LABELS if name in heading), None)
    label = len(heading) if of_label is None else heading.index(of_label)
    return list(_cells(path, rows[1:], heading.index(of_path), label, first=2))


def _cells(
    file: str, rows: Sequence[Sequence[str]], path: int, label: int, first: int
) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(rows, first):
        if len(row) <= path or not row[path].strip():
            raise UserError(f"{file} names no image in its row {number}.")
        yield row[path].strip(), row[label].strip() if len(row) > label else ""
