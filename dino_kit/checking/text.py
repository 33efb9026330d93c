"""What a check found, told at the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dino_kit import log
from dino_kit.checking.summary import Part, Summary, by_reason

_CLASSES = 20  # rows of the table of classes
_SHOWN = 10  # broken images that are named
_GROUPS, _COPIES = 5, 4  # groups of duplicates that are shown, and images of each
_SIZES, _FREQUENT = 5, 0.01  # sizes that are shown, and the share of images that is worth it
_ODD = {
    "turned": "{} on the side or mirrored by EXIF, which is ignored: --exif apply turns them",
    "animated": "{} with more than one picture inside, of which the first is read",
    "cut": "{} of 16 bits a channel, of which the upper 8 are read; TIFF or .npy keeps them",
    "transparent": "{} with transparency, which is dropped and not blended: what lies beneath shows",
}


def tell(summary: Summary, root: str, crop: int, ignored: Sequence[str]) -> None:
    """Say it: what is there, what is broken, what is double, what is unusual.

    ``root`` is where the images are, ``crop`` the side of a global crop, ``ignored`` are oddities
    that the settings take care of.
    """
    log.say("")
    _tell_parts(summary, root)
    _tell_classes(summary.parts)
    _tell_kinds(summary)
    _tell_broken(summary)
    _tell_duplicates(summary)
    _tell_unusual(summary, crop, ignored)


def _tell_parts(summary: Summary, root: str) -> None:
    rows = []
    for part in summary.parts:
        of = "" if part.checked == part.images else f" of {part.images:,}"
        rows.append(
            (
                part.name or "all",
                f"{part.checked:,}{of}",
                f"{part.checked - part.readable:,}",
                _bytes(part.bytes),
                _size(*part.median) if part.median else "–",
            )
        )
    columns = ["", "looked at", "broken", "bytes", "median size"]
    log.table(f"Images in {root}", columns, rows)


def _tell_classes(parts: Sequence[Part]) -> None:
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.classes or {})
    if not counts:
        log.paragraph("There are no classes, and training needs none.")
        return
    names = list(counts)  # in the order of labels
    title, gap = "Images by class", None
    if len(names) > _CLASSES:
        names = sorted(names, key=lambda name: -counts[name])
        hidden, half = len(names) - _CLASSES, _CLASSES // 2
        names, gap = [*names[:half], *names[-half:]], half
        title = "The largest and the smallest classes"
    several = len(parts) > 1
    rows = [
        (name, *(f"{(part.classes or {}).get(name, 0):,}" for part in parts))
        for name in names
    ]
    if gap:
        rows.insert(gap, (f"… {hidden:,} more", *("" for _ in parts)))
    unlabelled = [part.unlabelled for part in parts]
    if any(unlabelled):
        rows.append(("(none)", *(f"{count:,}" for count in unlabelled)))
    log.table(title, ["class", *(part.name if several else "images" for part in parts)], rows)


def _tell_kinds(summary: Summary) -> None:
    if not any(part.readable for part in summary.parts):
        return
    sizes: Counter[tuple[int, int]] = Counter()
    for part in summary.parts:
        for width, height, count in part.sizes:
            sizes[width, height] += count
    if sum(part.distinct_sizes for part in summary.parts) > len(summary.parts):
        enough = _FREQUENT * sum(part.readable for part in summary.parts)
        most = [(size, count) for size, count in sizes.most_common(_SIZES) if count >= enough]
        if most:
            told = ", ".join(f"{_size(*size)} ({count:,})" for size, count in most)
            log.paragraph(f"Most frequent sizes: {told}.")
        smallest, largest = (
            choose(
                (end for part in summary.parts if (end := getattr(part, which))),
                key=lambda end: end[1] * end[2],
            )
            for choose, which in ((min, "smallest"), (max, "largest"))
        )
        log.say(f"Smallest: {smallest[0]}, {_size(*smallest[1:])}")
        log.say(f"Largest: {largest[0]}, {_size(*largest[1:])}")
    log.paragraph(
        f"Modes: {_counts(summary.total('modes'))}. Formats: {_counts(summary.total('formats'))}."
    )


def _tell_broken(summary: Summary) -> None:
    log.say("")
    if not summary.broken:
        log.say(f"Nothing{_among(summary)} is broken.")
        return
    count = len(summary.broken)
    log.paragraph(f"{_images(count)} {'is' if count == 1 else 'are'} broken:")
    reasons = by_reason(summary.broken)
    named = max(1, _SHOWN // len(reasons))  # of each reason
    for reason, ones in reasons[:_SHOWN]:
        log.say(f"  {len(ones):,} × {reason}")
        for one in ones[:named]:
            log.say(f"      {one.path}")
        if len(ones) > named:
            log.say(f"      … {len(ones) - named:,} more")
    if len(reasons) > _SHOWN:
        log.say(f"  … {len(reasons) - _SHOWN:,} more reasons")
    if count > _SHOWN:
        log.say("  --json lists all.")
    log.paragraph(
        f"That is {_percent(count / summary.checked)} of what was looked at; a run takes other "
        "images in their place, and ends where their share is above its --max_bad_share."
    )


def _tell_duplicates(summary: Summary) -> None:
    double = summary.duplicates
    if not double.groups:
        log.say(f"No image{_among(summary)} is there twice.")
        return
    count = double.superfluous
    log.paragraph(
        f"{_images(count)} {'is a copy' if count == 1 else 'are copies'} of another, byte for byte, "
        f"in {len(double.groups):,} group{'s' * (len(double.groups) > 1)}:"
    )
    _tell_groups(double.groups)
    for groups, told in (
        (double.across_parts, "in two parts of the split: an evaluation would ask for what training saw"),
        (double.across_classes, "in two classes, of which at most one is right"),
    ):
        if groups:
            log.paragraph(f"{len(groups):,} group{'s' * (len(groups) > 1)} {told}:")
            _tell_groups(groups)


def _tell_groups(groups: Sequence[Sequence[str]]) -> None:
    for group in groups[:_GROUPS]:
        more = f" and {len(group) - _COPIES:,} more" if len(group) > _COPIES else ""
        log.say(f"  {' = '.join(group[:_COPIES])}{more}")
    if len(groups) > _GROUPS:
        log.say(f"  … {len(groups) - _GROUPS:,} more; --json lists all.")


def _tell_unusual(summary: Summary, crop: int, ignored: Sequence[str]) -> None:
    small = sum(part.smaller_than_crop for part in summary.parts)
    told = [f"{small:,} smaller than a global crop of {crop} pixels, and enlarged for it"] * (
        small > 0
    )
    for oddity, count in summary.total("oddities").items():
        if count and oddity not in ignored:
            told.append(_ODD[oddity].format(f"{count:,}"))
    if told:
        log.say("Of the images that can be read:")
        for one in told:
            log.paragraph(f"  {one}.")


def _among(summary: Summary) -> str:
    whole = all(part.checked == part.images for part in summary.parts)
    return "" if whole else " among those looked at"


def _counts(counter: Mapping[str, int]) -> str:
    ordered = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} ({count:,})" for name, count in ordered)


def _size(width: int, height: int) -> str:
    return f"{width} × {height}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def _bytes(count: float) -> str:
    unit, *larger = "B", "kB", "MB", "GB", "TB"
    while count >= 1000 and larger:
        count, unit, *larger = count / 1000, *larger
    return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
