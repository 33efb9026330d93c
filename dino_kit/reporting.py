"""From a run's folder to its page: what the evaluators show of the newest checkpoint, handed over.

Looking is bounded in images and in time, so that a page is made in a minute or two on any machine;
where something cannot be looked at, a sentence takes its place.
"""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dino_kit import distributed, figures, files, log, search, weights
from dino_kit.backbones.interface import HasReAttention, HasSelfAttention
from dino_kit.data.augment import center_crop
from dino_kit.data.bands import Bands, picture
from dino_kit.data.decode import decode
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.opening import LISTS, open_pictures, open_training_source
from dino_kit.data.sources.source import Source, Subset
from dino_kit.errors import UserError
from dino_kit.evaluators import attention, patches
from dino_kit.features import embed
from dino_kit.report import record as records
from dino_kit.report.look import Looks, Map, Neighbours, Seen, Tile
from dino_kit.report.page import page
from dino_kit.report.pictures import evenly, plain, small
from dino_kit.report.record import Record
from dino_kit.weights import Loaded

NAME = "report.html"
_IMAGES = 8  # shown with attention, and with neighbours
_FOUND = 5  # neighbours of each
_BANK = 2000  # images among which they are looked for, at most
_AT_A_TIME = 64
_SECONDS = 60.0  # for each of the two; what is done by then is shown
_MOST_SIDE = 32  # patches of a side of the images with attention, at most
_SIGHT, _TILE = 224, 112  # pixels of a side on the page
_TINY = 64  # pixels: up to here an image is enlarged in squares


def write(
    folder: str,
    output: str | None = None,
    image_path: str | None = None,
    device: str = "auto",
    download: bool = False,
) -> Path:
    """Write the page of the run in ``folder`` and say where it is; returns its path.

    Args:
        output: the file; by default ``report.html`` in the folder.
        image_path: what to show attention on, instead of the run's own images; see
            :func:`~dino_kit.data.sources.opening.open_pictures`.
        device: where the network runs.
        download: whether a dataset that ``image_path`` names may be fetched.

    Raises:
        UserError: that is no run's folder, or the page or the images cannot be where they are said
            to be.
    """
    record = records.read(folder)
    target = Path(output or Path(folder) / NAME)
    if target.is_dir():
        raise UserError(f"--output {target} is a folder; give the name of a file in it.")
    files.require_folder("output", str(target.parent))
    chosen = None
    if image_path is not None:
        chosen = open_pictures(image_path, record.folder / LISTS, download)
    words = ["dino-kit", "report", str(folder)]
    words += ["--image_path", image_path] if image_path else []
    origin = f"Made by {shlex.join(words)} (dino_kit {version('dino_kit')}) from what the folder held at"
    looks = _look(record, chosen, distributed.choose_device(device))
    if chosen and looks.checkpoint and not looks.seen:
        raise UserError(f"--image_path {image_path} has nothing that can be shown. {looks.seen_note}")
    text = page(record, looks, origin)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, text)
    for fault in record.faults:
        log.notice(fault)
    log.say(f"written to {target} ({target.stat().st_size / 1e6:.1f} MB); open it in a browser")
    return target


class _Data(NamedTuple):
    """The images to look at, or why there are none."""

    source: Source | None
    reason: str = ""


def _look(record: Record, chosen: Source | None, device: torch.device) -> Looks:
    try:
        loaded = weights.load(record.folder)
    except UserError as error:
        there = (record.folder / records.NEWEST).is_file()
        reason = str(error) if there else (
            f"There is no {records.NEWEST} yet, so there is no network to look at; a run writes it "
            "after each epoch."
        )
        return Looks("", [], reason, [], reason)
    loaded.backbone.to(device)
    own = _training_data(record)
    seen, seen_note = _attention(loaded, _Data(chosen) if chosen else own, device)
    found, found_note = _neighbours(loaded, own, device)
    return Looks(_age(loaded), seen, seen_note, found, found_note)


def _training_data(record: Record) -> _Data:
    if record.config is None or not record.config.data_path:
        return _Data(None, "Where the run's images are is not known; --image_path names some.")
    try:
        return _Data(open_training_source(record.config.data_path, record.folder / LISTS))
    except UserError as error:
        return _Data(None, f"The run's images cannot be read here any more. {error}")


def _age(loaded: Loaded) -> str:
    age = "" if loaded.epoch is None else f" after {loaded.epoch:,} epochs"
    return f"the {loaded.which or 'network'}{age}"


def _attention(
    loaded: Loaded, data: _Data, device: torch.device
) -> tuple[list[Seen], str]:
    """What each head of the last block looks at, and a sentence on what that is."""
    if data.source is None:
        return [], data.reason
    side, patch = _looked_at(loaded), loaded.backbone.patch_size
    has_attention = isinstance(loaded.backbone, HasSelfAttention)
    colours = figures.colour_table()
    seen: list[Seen] = []
    lost: list[str] = []
    places = _various(data.source, range(len(data.source)))
    deadline = time.monotonic() + _SECONDS
    with log.progress(len(places), "attention") as advance:
        for place in places:
            if seen and time.monotonic() > deadline:
                break
            name = data.source.name(place)
            try:
                whole = decode(data.source.read(place), name, loaded.transform.pixels)
                if loaded.transform.crop_without_resize:
                    whole = center_crop(whole, side, side, name)
                image = ImageOps.fit(whole, (side, side), Image.Resampling.BICUBIC)
                maps = _maps(loaded, image, has_attention, device)  # (heads, h, w)
            except UserError as error:
                lost.append(str(error))
                continue
            shown = {"similarity": maps[0]}
            if has_attention:
                shown = {"mean": maps.mean(axis=0)}
                shown |= {f"head {head}": one for head, one in enumerate(maps)}
            sight = _sight(whole)
            over = figures.overlay(sight, next(iter(shown.values())), colours)
            heats = {label: figures.heat(one, one.shape, colours) for label, one in shown.items()}
            seen.append(
                Seen(
                    _short(data.source, place),
                    small(sight, _SIGHT),
                    small(over, _SIGHT),
                    [Map(label, plain(heat)) for label, heat in heats.items()],
                )
            )
            advance()
    if not seen:
        return [], " ".join(dict.fromkeys(lost))
    grid = f"{side // patch} × {side // patch} patches"
    if has_attention:
        note = (
            f"Where the class token of {_age(loaded)} looks in the last block, in {grid}: the mean "
            "of the heads on the image, then each head. Brighter is more; every map is scaled by "
            "itself. dino-kit attention --html makes a page on which every patch can be asked."
        )
    else:
        note = (
            f"{loaded.architecture['name']} has no self-attention, so this is what every network "
            f"has, of {_age(loaded)}: the similarity of each of {grid} to the pooled feature. "
            "Brighter is more alike; every map is scaled by itself."
        )
    return seen, " ".join((note, *dict.fromkeys(lost)))


def _looked_at(loaded: Loaded) -> int:
    """Pixels of a side of the square of an image that is looked at."""
    transform, patch = loaded.transform, loaded.backbone.patch_size
    size = transform.image_size
    # The norms of a Re-Attention know maps of that size.
    if transform.crop_without_resize or isinstance(loaded.backbone, HasReAttention):
        side = size
    elif size <= 64:  # which at their own size have so few patches that there is little to look at
        side = 2 * size
    else:
        side = attention.default_size(size, patch)[0]
    return patch * min(max(1, side // patch), _MOST_SIDE)


def _sight(whole: Image.Image | Bands) -> Image.Image:
    """The square that the network sees of an image, as large as the page shows it."""
    whole = picture(whole)
    tiny = min(whole.size) <= _TINY
    way = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    return ImageOps.fit(whole, (_SIGHT, _SIGHT), way)


def _various(source: Source, places: Sequence[int]) -> list[int]:
    """A few of ``places``, evenly spaced; where there are labels, of as many classes as can be."""
    if not source.classes:
        return [places[place] for place in evenly(len(places), _IMAGES)]
    most = -(-_IMAGES // len(source.classes))
    seen: Counter[int | None] = Counter()
    chosen: list[int] = []
    for place in np.random.default_rng(0).permutation(len(places)).tolist():
        label = source.label(places[place])
        if seen[label] < most:
            seen[label] += 1
            chosen.append(places[place])
        if len(chosen) == _IMAGES:
            break
    return sorted(chosen)


def _maps(
    loaded: Loaded, image: Image.Image | Bands, has_attention: bool, device: torch.device
) -> np.ndarray:
    """Maps ``(heads, h, w)``; a single one where there is no attention."""
    t = loaded.transform
    pixels = attention.to_tensor(image, t.mean, t.std).to(device)  # (C, H, W)
    if has_attention:
        return attention.attention_maps(loaded.backbone, pixels).numpy()
    return patches.similarity_map(patches.look(loaded.backbone, pixels))[None].numpy()


def _neighbours(
    loaded: Loaded, data: _Data, device: torch.device
) -> tuple[list[Neighbours], str]:
    """Some images with those nearest to them, and a sentence on what was searched."""
    if data.source is None:
        return [], data.reason
    source = data.source
    bank = evenly(len(source), _BANK)
    if len(bank) <= _FOUND:
        return [], f"The run has only {len(bank)} images, too few to have neighbours."
    queries = _various(source, bank)
    # Shuffled, so that what there is time for is a fair part of all.
    rest = np.random.default_rng(0).permutation(sorted(set(bank) - set(queries)))
    bank = [*queries, *rest.tolist()]
    try:
        features, bank = _features(loaded, source, bank, device)  # (n, D)
    except UserError as error:
        return [], str(error)
    if not bank:
        return [], "None of the images that were tried can be used."
    features = F.normalize(features, dim=1)
    queries = [place for place in bank[: len(queries)] if place in queries]
    k = min(_FOUND + 1, len(features))
    similarity, index = search.nearest(features, features[: len(queries)], k)  # (queries, k)
    pixels = loaded.transform.pixels
    rows = [
        Neighbours(
            _tile(source, bank[row], None, pixels),
            [
                _tile(source, bank[place], value, pixels)
                for value, place in zip(similarity[row].tolist(), index[row].tolist(), strict=True)
                if place != row
            ][:_FOUND],
        )
        for row in range(len(queries))
    ]
    searched = f"{len(features):,}" + (f" of {len(source):,}" if len(features) < len(source) else "")
    note = (
        f"The nearest of {searched} training images by the features of {_age(loaded)}: first an "
        "image, then its neighbours with their cosine similarity."
    )
    if source.classes:
        note += " No label was shown to the network; what is of the image's own class is in bold."
    return rows, note


def _features(
    loaded: Loaded, source: Source, bank: Sequence[int], device: torch.device
) -> tuple[Tensor, list[int]]:
    """Features (n, D), and which images they are of: as far as the time suffices."""
    deadline = time.monotonic() + _SECONDS
    parts: list[Tensor] = []
    found: list[int] = []
    with log.progress(len(bank), "neighbours") as advance:
        for start in range(0, len(bank), _AT_A_TIME):
            part = bank[start : start + _AT_A_TIME]
            features, kept, _ = embed(
                loaded.backbone, Subset(source, part), **loaded.transform._asdict(),
                batch_size=_AT_A_TIME, device=device, description="",
            )  # fmt: skip
            parts.append(features)
            found += [part[place] for place in kept.tolist()]
            advance(len(part))
            if time.monotonic() > deadline:
                break
    return torch.cat(parts), found


def _tile(source: Source, place: int, similarity: float | None, pixels: Pixels) -> Tile:
    image = picture(decode(source.read(place), source.name(place), pixels))
    side = min(_TILE, *image.size)
    square = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    label = source.label(place) if source.classes else None
    name = "" if label is None else source.classes[label]
    return Tile(_short(source, place), small(square, _TILE), name, similarity)


def _short(source: Source, place: int) -> str:
    """An image's name without where all images lie; a number alone would say too little."""
    key = source.key(place)
    return source.name(place) if key.isdecimal() else key
