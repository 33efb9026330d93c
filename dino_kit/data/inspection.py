"""Every image of a source, read and decoded once by worker processes: what it is, or what is wrong.

What is found is kept as columns, about 60 bytes an image, so that a million of them are no burden.

Legend: n images that were looked at.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dino_kit import log
from dino_kit.data.crops import View, require_crops
from dino_kit.data.decode import decode
from dino_kit.data.header import header
from dino_kit.data.pixels import RGB, Pixels
from dino_kit.data.sources.source import Source
from dino_kit.errors import BadImage, UserError

_AT_ONCE = 16  # images that a worker sends together
# In the order of the bits of ``Findings.oddities``: of a header, what is not read as one may think.
ODDITIES = ("turned", "animated", "cut", "transparent")


class Look(NamedTuple):
    """One image; of one that is bad only what could be had."""

    fault: str = ""  # a sentence
    width: int = 0
    height: int = 0
    mode: str = ""
    format: str = ""
    oddities: int = 0  # bits, see ODDITIES
    size: int = 0  # bytes: of the file, or of the pixels where there is none
    digest: bytes = bytes(16)  # of these bytes
    read: float = 0.0  # seconds by the clock
    decode: float = 0.0  # seconds of a core


@dataclass
class Findings:
    """What a source's images are; rows are in the order of ``indices``."""

    source: Source
    indices: np.ndarray  # (n,) int64, of the source
    sizes: np.ndarray  # (n, 2) int32: width, height
    kinds: np.ndarray  # (n,) int16: places in ``modes_and_formats``
    modes_and_formats: list[tuple[str, str]]
    oddities: np.ndarray  # (n,) uint8
    bytes: np.ndarray  # (n,) int64
    digests: np.ndarray  # (n, 2) uint64
    seconds: np.ndarray  # (n, 2) float32: to read, to decode
    faults: dict[int, str]  # by row

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def readable(self) -> np.ndarray:
        """(n,) bool."""
        good = np.ones(len(self), bool)
        good[list(self.faults)] = False
        return good


def inspect(
    source: Source,
    pixels: Pixels = RGB,
    views: Sequence[View] = (),
    *,
    most: int | None = None,
    num_workers: int = 0,
    description: str = "reading",
) -> Findings:
    """Read and decode images of ``source``; the number of workers changes nothing but the times.

    Args:
        source: the images.
        pixels: what an image becomes.
        views: crops that have to be possible of each image.
        most: how many to look at, evenly spread over the source; None for all.
        num_workers: processes that do it; 0 for this one.
        description: what the progress line calls it; empty for no line.

    Raises:
        UserError: more than single images cannot be read.
    """
    indices = spread(len(source), most)
    n = len(indices)
    found = Findings(
        source, indices, np.zeros((n, 2), np.int32), np.zeros(n, np.int16), [],
        np.zeros(n, np.uint8), np.zeros(n, np.int64), np.zeros((n, 2), np.uint64),
        np.zeros((n, 2), np.float32), {},
    )  # fmt: skip
    places: dict[tuple[str, str], int] = {}
    loader = DataLoader(
        _Looks(source, indices, pixels, views),
        batch_size=_AT_ONCE,
        num_workers=min(num_workers, -(-n // _AT_ONCE)),
        collate_fn=_as_it_is,
    )
    row = 0
    with log.progress(n, description) as advance:
        for looks in loader:
            if isinstance(looks, str):
                raise UserError(looks)
            for look in looks:
                kind = places.setdefault((look.mode, look.format), len(places))
                found.sizes[row] = look.width, look.height
                found.kinds[row], found.oddities[row] = kind, look.oddities
                found.bytes[row] = look.size
                found.digests[row] = np.frombuffer(look.digest, np.uint64)
                found.seconds[row] = look.read, look.decode
                if look.fault:
                    found.faults[row] = look.fault
                row += 1
            faults = len(found.faults)
            advance(len(looks), f"{faults:,} broken" if faults else "")
    found.modes_and_formats = list(places)
    return found


def spread(length: int, most: int | None) -> np.ndarray:
    """At most ``most`` of ``length`` indices, at equal distances, the first and last among them."""
    if most is None or most >= length:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, most).round().astype(np.int64))


class _Looks(Dataset):
    def __init__(
        self, source: Source, indices: np.ndarray, pixels: Pixels, views: Sequence[View]
    ):
        self.source, self.indices, self.pixels, self.views = source, indices, pixels, views

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, rows: Sequence[int]) -> list[Look] | str:
        """A sentence where more than one image is lost, as an exception crosses as a traceback."""
        try:
            return [self._look(int(self.indices[row])) for row in rows]
        except UserError as error:
            return str(error)

    def _look(self, index: int) -> Look:
        name = self.source.name(index)
        began = time.perf_counter()
        try:
            data = self.source.read(index)
        except BadImage as error:
            return Look(str(error))
        read = time.perf_counter() - began
        size, digest = _content(data)
        known = Look(size=size, digest=digest, read=read)
        began = time.thread_time()
        try:
            image = decode(data, name, self.pixels)
        except BadImage as error:
            return known._replace(fault=str(error))
        known = known._replace(decode=time.thread_time() - began)
        seen = header(data, name, self.pixels, image)
        fault = ""
        try:
            require_crops(self.views, image.height, image.width, name)
        except UserError as error:
            fault = str(error)
        odd = (seen.turned, seen.frames > 1, seen.cut, seen.transparent)
        return known._replace(
            fault=fault,
            width=image.width,
            height=image.height,
            mode=seen.mode,
            format=seen.format,
            oddities=sum(1 << bit for bit, holds in enumerate(odd) if holds),
        )


def _content(data: bytes | np.ndarray | Image.Image) -> tuple[int, bytes]:
    """How many bytes, and their digest; of pixels, their shape and kind count too."""
    about = b""
    if isinstance(data, np.ndarray):
        about, data = f"{data.dtype} {data.shape}".encode(), data.tobytes()
    elif isinstance(data, Image.Image):
        about, data = f"{data.mode} {data.size}".encode(), _pixels(data)
    digest = hashlib.blake2b(about, digest_size=16)
    digest.update(data)
    return len(data), digest.digest()


def _pixels(image: Image.Image) -> bytes:
    try:
        return bytes(image.getpalette() or ()) + image.tobytes()
    except Exception:  # noqa: BLE001  # it is broken, as decoding will tell
        return b""


def _as_it_is(looks: Any) -> Any:
    return looks
