"""Archives for tests, written by the standard library."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path


def write_tar(
    path: Path, members: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT, mode: str = "w"
) -> Path:
    """An archive of files by their names, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # a fraction: pax writes more headers
            archive.addfile(info, io.BytesIO(content))
    return path
