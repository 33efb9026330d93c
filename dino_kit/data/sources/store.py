"""Lists of images that were made once and are kept in a file.

The file is mapped into memory rather than read, so that all processes of a machine share one copy.
It is a line of JSON, and the arrays that the line describes, one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dino_kit import distributed, files

_FORMAT = "dino_kit list of images 1"
_ALIGNED = 64  # bytes
_WORTH_A_FILE = 10_000  # images; fewer are listed in a moment


def is_worth_it(images: int) -> bool:
    """Whether a list of so many is kept: where making it takes time, or others wait for it."""
    return images >= _WORTH_A_FILE or distributed.world_size() > 1


def save(path: str | Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bool:
    """Write plain values and one-dimensional arrays to ``path``; False where nothing can be."""
    described, at = {}, 0
    for name, values in arrays.items():
        described[name] = [values.dtype.str, len(values), at]
        at += -(-values.nbytes // _ALIGNED) * _ALIGNED
    line = json.dumps({"format": _FORMAT, "about": dict(about), "arrays": described, "bytes": at})
    line = line.encode()
    begin = -(-(len(line) + 1) // _ALIGNED) * _ALIGNED
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as file:
            file.write(line.ljust(begin - 1) + b"\n")
            for values in arrays.values():
                file.write(values.tobytes())
                file.write(bytes(-values.nbytes % _ALIGNED))
    except OSError:  # such as a folder that may only be read
        return False
    return True


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What :func:`save` wrote; None where there is no such file, or it is damaged.

    The arrays are read-only and stand in the file.
    """
    try:
        with open(path, "rb") as file:
            line = file.readline()
            content = json.loads(line)
            if content["format"] != _FORMAT:
                return None
            if os.fstat(file.fileno()).st_size != len(line) + content["bytes"]:
                return None
        arrays = {
            name: _mapped(path, dtype, length, len(line) + at)
            for name, (dtype, length, at) in content["arrays"].items()
        }
        return content["about"], arrays
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mapped(path: str | Path, dtype: str, length: int, offset: int) -> np.ndarray:
    if not length:  # nothing cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset, (length,))
