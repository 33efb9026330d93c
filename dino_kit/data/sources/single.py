"""One image in a file."""

from __future__ import annotations

import os

from dino_kit.data.sources.source import read_file


class OneImage:
    """The file ``path``, whatever it is called, as a source of a single image."""

    classes = None

    def __init__(self, path: str):
        self.path = self.root = path

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> bytes:
        return read_file(self.path)

    def label(self, index: int) -> None:
        return None

    def key(self, index: int) -> str:
        return os.path.basename(self.path)

    def name(self, index: int) -> str:
        return self.path
