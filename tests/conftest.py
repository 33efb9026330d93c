"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

# The tests' tensors are small: threads would spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from dino_kit import log

GOLDEN = Path(os.environ.get("DINO_KIT_GOLDEN") or Path(__file__).parent / "golden")


class Golden:
    """Numbers that the reference computed, read by file name without the suffix."""

    def path(self, name: str) -> Path:
        return GOLDEN / name

    def __call__(self, name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    def names(self, prefix: str) -> list[str]:
        return sorted(path.stem for path in GOLDEN.glob(f"{prefix}*.npz"))


@pytest.fixture(autouse=True)
def fresh_notices(monkeypatch):
    """A notice is given once in a process, and a process runs many tests."""
    monkeypatch.setattr(log, "_noticed", set())


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()
