"""Which of labelled images are held out: by a hash of their names, so that new images move no old one."""

from __future__ import annotations

import hashlib

from dino_kit.data.sources.names import composed
from dino_kit.data.sources.source import Source


def held_out_of(source: Source, wanted_share: float, purpose: str = "") -> list[int]:
    """About a share of the images, rising.

    A class of two or more images has at least one on each side; a single one is not held out.

    Args:
        wanted_share: between 0 and 1.
        purpose: another hash for each, as what is left by one share of a hash has no small ones.
    """
    by_class: dict[int | None, list[tuple[float, int]]] = {}
    for index in range(len(source)):
        share = _hash_share(purpose + source.key(index))
        by_class.setdefault(source.label(index), []).append((share, index))
    chosen: list[int] = []
    for members in by_class.values():
        members.sort()
        wanted = sum(share < wanted_share for share, _ in members)
        count = min(max(wanted, 1), len(members) - 1)
        chosen += [index for _, index in members[:count]]
    return sorted(chosen)


def _hash_share(key: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    # What is no Unicode in a file name stands in it as surrogates.
    name = composed(key).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64
