"""What a check found, as plain data: numbers of each part of a split, what is broken, what is double.

Legend: n images that were looked at, of all parts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dino_kit.data.inspection import ODDITIES, Findings

_SIZES = 20  # sizes that are told, the most frequent first
_NO_CLASS = ""


@dataclass(frozen=True)
class Part:
    """The images of one part of a split, or all of them; sizes and so on are of readable ones."""

    name: str  # train, val …; empty where there are no parts
    images: int
    checked: int
    readable: int
    bytes: int
    classes: dict[str, int] | None  # of the checked images, in the order of labels
    unlabelled: int
    distinct_sizes: int
    sizes: list[tuple[int, int, int]]  # width, height, how many: the most frequent first
    median: tuple[int, int] | None  # of widths, of heights
    smallest: tuple[str, int, int] | None  # by the number of pixels
    largest: tuple[str, int, int] | None
    modes: dict[str, int]
    formats: dict[str, int]
    smaller_than_crop: int
    oddities: dict[str, int]  # see ODDITIES


@dataclass(frozen=True)
class Broken:
    """An image that cannot be used."""

    image: str
    path: str
    reason: str  # follows the path


@dataclass(frozen=True)
class Duplicates:
    """Images of equal content, in groups of their names."""

    superfluous: int  # images whose content an earlier one has
    groups: list[list[str]]
    across_parts: list[list[str]]  # groups with images in two parts of a split
    across_classes: list[list[str]]  # with images in two classes


@dataclass(frozen=True)
class Summary:
    parts: list[Part]
    broken: list[Broken]
    duplicates: Duplicates

    @property
    def checked(self) -> int:
        return sum(part.checked for part in self.parts)

    def total(self, name: str) -> Counter[str]:
        """A part's counter (modes, formats, oddities), summed over the parts."""
        return sum((Counter(getattr(part, name)) for part in self.parts), Counter())


def summarize(found: Mapping[str, Findings], crop: int) -> Summary:
    """What ``found`` holds, by the name of the part; ``crop`` is the side of a global crop."""
    return Summary(
        [_part(name, findings, crop) for name, findings in found.items()],
        [
            Broken(
                _name(part, findings, row), path := findings.source.name(int(findings.indices[row])),
                sentence.removeprefix(path).strip(" ,:"),
            )
            for part, findings in found.items()
            for row, sentence in findings.faults.items()
        ],
        _duplicates(found),
    )  # fmt: skip


def by_reason(broken: Sequence[Broken]) -> list[tuple[str, list[Broken]]]:
    """Broken images by their reasons, the most frequent first; numbers make no other reason."""
    groups: dict[str, list[Broken]] = {}
    for one in broken:
        groups.setdefault(re.sub(r"\d+", "0", one.reason), []).append(one)
    return sorted(((ones[0].reason, ones) for ones in groups.values()), key=lambda g: -len(g[1]))


def _part(name: str, found: Findings, crop: int) -> Part:
    good = found.readable
    rows, sizes = np.flatnonzero(good), found.sizes[good]
    classes, unlabelled = _classes(found)
    kinds = Counter(found.kinds[good].tolist())
    modes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    for place, count in kinds.items():
        mode, kind = found.modes_and_formats[place]
        modes[mode] += count
        formats[kind or "pixels"] += count
    pixels = sizes.astype(np.int64).prod(axis=1)
    ends: list[Any] = [None, None]
    if len(rows):
        ends = [
            (_name(name, found, int(rows[at])), *sizes[at].tolist())
            for at in (pixels.argmin(), pixels.argmax())
        ]
    counted, counts = np.unique(sizes, axis=0, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")[:_SIZES]
    return Part(
        name=name,
        images=len(found.source),
        checked=len(found),
        readable=len(rows),
        bytes=int(found.bytes.sum()),
        classes=classes,
        unlabelled=unlabelled,
        distinct_sizes=len(counted),
        sizes=[(*counted[at].tolist(), int(counts[at])) for at in frequent],
        median=_median(sizes) if len(rows) else None,
        smallest=ends[0],
        largest=ends[1],
        modes=_ordered(modes),
        formats=_ordered(formats),
        smaller_than_crop=int((sizes.min(axis=1) < crop).sum()) if len(rows) else 0,
        oddities={
            oddity: int((found.oddities[good] >> bit & 1).sum())
            for bit, oddity in enumerate(ODDITIES)
        },
    )


def _median(sizes: np.ndarray) -> tuple[int, int]:
    middle = np.sort(sizes, axis=0)[(len(sizes) - 1) // 2]
    return int(middle[0]), int(middle[1])


def _ordered(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _classes(found: Findings) -> tuple[dict[str, int] | None, int]:
    """Images by class, and how many have none."""
    counts = Counter(_class(found, row) for row in range(len(found)))
    unlabelled = counts.pop(_NO_CLASS, 0)
    if not counts and found.source.classes is None:
        return None, unlabelled
    order = [name for name in found.source.classes or () if name in counts]
    order += sorted(set(counts) - set(order))
    return {name: counts[name] for name in order}, unlabelled


def _class(found: Findings, row: int) -> str:
    label, names = found.source.label(int(found.indices[row])), found.source.classes
    if label is None:
        return _NO_CLASS
    return names[label] if names and label < len(names) else str(label)


def _name(part: str, found: Findings, row: int) -> str:
    """What an image is called within the whole."""
    key = found.source.key(int(found.indices[row]))
    return f"{part}/{key}" if part else key


def _duplicates(found: Mapping[str, Findings]) -> Duplicates:
    """Of readable images; groups, and images in a group, are in the order of the images."""
    owners, rows, digests = [], [], []
    for place, findings in enumerate(found.values()):
        good = np.flatnonzero(findings.readable)
        owners.append(np.full(len(good), place))
        rows.append(good)
        digests.append(findings.digests[good])
    owner, row = np.concatenate(owners), np.concatenate(rows)
    digest = np.concatenate(digests)  # (n, 2)
    order = np.lexsort((digest[:, 1], digest[:, 0]))  # stable: equal ones stay in their order
    equal = (digest[order][1:] == digest[order][:-1]).all(axis=1)
    begins = np.flatnonzero(np.append(True, ~equal)) if len(order) else np.empty(0, np.int64)
    sizes = np.diff(np.append(begins, len(order)))
    groups = [
        order[begin : begin + size]
        for begin, size in zip(begins[sizes > 1], sizes[sizes > 1], strict=True)
    ]
    groups.sort(key=lambda group: group[0])
    parts = list(found.items())
    named, across_parts, across_classes = [], [], []
    for group in groups:
        members = [(*parts[owner[at]], int(row[at])) for at in group]
        names = [_name(*member) for member in members]
        named.append(names)
        if len({part for part, _, _ in members}) > 1:
            across_parts.append(names)
        if len({_class(findings, at) for _, findings, at in members} - {_NO_CLASS}) > 1:
            across_classes.append(names)
    superfluous = sum(len(group) - 1 for group in groups)
    return Duplicates(superfluous, named, across_parts, across_classes)
