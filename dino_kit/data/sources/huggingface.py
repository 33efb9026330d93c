"""Datasets that Hugging Face ``datasets`` reads; nothing is fetched unless it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dino_kit.data.sources.names import composed
from dino_kit.data.sources.source import classes_of, read_file
from dino_kit.errors import BadImage, UserError

_PARTS = {"validation": "val", "valid": "val", "dev": "val"}  # by the names used elsewhere


class HuggingFaceData:
    """``hf:FOLDER`` or ``hf:NAME``; the optional package ``datasets`` reads them."""

    half = ""

    def __init__(self, data_path: str, download: bool):
        self.root, name = data_path, data_path.partition(":")[2]
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{data_path} needs the package datasets: pip install 'dino_kit[hf]'."
            ) from error
        with _online(datasets, download):
            try:
                found = datasets.load_dataset(name)
            except Exception as error:  # of many kinds, by what the files are
                reason = " ".join(str(error).split()).rstrip(".")
                how = "" if download or os.path.exists(name) else "; --download fetches it"
                raise UserError(f"{data_path} cannot be read: {reason}{how}.") from error
        self._tables = {_PARTS.get(part, part): found[part] for part in found}
        known = tuple(part for part in ("train", "val", "test") if part in self._tables)
        # One part alone is the whole, whatever it is called.
        self.parts = known if len(self._tables) > 1 else ()
        self.training = "train" if "train" in self.parts else ""

    def open(self, part: str = "") -> HuggingFaceSource:
        part = part or next(iter(self._tables))
        return HuggingFaceSource(self._tables[part], f"{self.root}:{part}")


class HuggingFaceSource:
    """A table of ``datasets`` with a column of images, whose bytes are read as they are stored.

    Raises:
        UserError: it has no column of images, or no row.
    """

    def __init__(self, table: Any, root: str):
        import datasets

        self.root, features = root, table.features
        columns = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        if not columns or not len(table):
            what = f"no column of images among {', '.join(features)}" if len(table) else "no row"
            raise UserError(f"{root} has {what}.")
        self.column = columns[0]
        # Of a row all columns would be read, and other images among them decoded.
        alone = table.select_columns([self.column])
        self.table = alone.cast_column(self.column, datasets.Image(decode=False))
        named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        named += [name for name in ("label", "labels") if name in features]
        self.classes, self._labels = _labels(table, named[0]) if named else (None, None)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> bytes:
        image = self.table[index][self.column]
        if image is None:
            raise BadImage(f"{self.name(index)} holds no image.")
        return image["bytes"] if image["bytes"] is not None else read_file(image["path"])

    def label(self, index: int) -> int | None:
        if self._labels is None or self._labels[index] < 0:
            return None
        return int(self._labels[index])

    def key(self, index: int) -> str:
        return str(index)

    def name(self, index: int) -> str:
        return f"{self.root}[{index}]"


def _labels(table: Any, column: str) -> tuple[list[str] | None, np.ndarray | None]:
    """The classes, and the label of each row: (n,) int32, -1 for none."""
    values = list(table[column])
    names = getattr(table.features[column], "names", None)
    if names is not None:
        names = [composed(name) for name in names]
        return names, np.array([-1 if v is None else v for v in values], np.int32)
    texts = [None if value is None else composed(str(value)) for value in values]
    classes = classes_of({text for text in texts if text is not None})
    if not classes:
        return None, None
    places = {text: place for place, text in enumerate(classes)}
    return classes, np.array([places.get(text, -1) for text in texts], np.int32)


@contextmanager
def _online(datasets: Any, allowed: bool) -> Iterator[None]:
    """Within, ``datasets`` reaches the network only where that is allowed."""
    import huggingface_hub

    config, hub = datasets.config, huggingface_hub.constants
    before = config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    if not allowed:
        config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before
