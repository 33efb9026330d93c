"""What evaluators have to show of a run's newest checkpoint, as the page takes it."""

from __future__ import annotations

from typing import NamedTuple


class Map(NamedTuple):
    """One map of an image: what one head looks at, or the mean."""

    label: str
    source: str  # a data: address


class Seen(NamedTuple):
    """An image, and what the network looks at in it."""

    name: str
    picture: str  # a data: address
    overlay: str  # likewise: the mean of the maps on the image
    maps: list[Map]


class Tile(NamedTuple):
    """An image among others."""

    name: str
    source: str  # a data: address
    label: str  # its class; empty where it has none
    similarity: float | None  # to the query, -1 to 1; None for the query itself


class Neighbours(NamedTuple):
    query: Tile
    found: list[Tile]  # the nearest first


class Looks(NamedTuple):
    """Each part may be empty; its note then says why, and else what it shows."""

    checkpoint: str  # which network was looked at; empty where there is none
    seen: list[Seen]
    seen_note: str
    neighbours: list[Neighbours]
    neighbours_note: str
