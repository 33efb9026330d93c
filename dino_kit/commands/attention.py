"""``dino-kit attention``: what each head of a checkpoint looks at, as pictures or a page.

Or what comes of the attention of all blocks together. Of a network that has no attention, its
Re-Attention or token mixing, and how like the whole its patches are.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from dino_kit import distributed, evaluation, files, log
from dino_kit.backbones.layers import block_index
from dino_kit.backbones.maps import KINDS, available, lacking, title
from dino_kit.config.evaluate import AttentionConfig
from dino_kit.data.decode import decode
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.names import composed
from dino_kit.data.sources.opening import LISTS, open_pictures
from dino_kit.data.sources.single import OneImage
from dino_kit.data.sources.source import Source
from dino_kit.errors import BadImage, UserError
from dino_kit.evaluators import patches
from dino_kit.evaluators.attention import default_size, is_made_for_one_size
from dino_kit.evaluators.gallery import Page, Picture, show
from dino_kit.weights import Loaded

_PAGE, _RECORD = "attention.html", "attention.json"


def run(config: AttentionConfig) -> None:
    """Write pictures and numbers of each image's attention, and with ``--html`` a page of all.

    Raises:
        UserError: checkpoint, images and flags do not fit, and nothing is written then; or an
            image's maps do not fit into memory.
    """
    if not distributed.is_main():
        return
    files.require_folder("output_dir", config.output_dir)
    device = distributed.choose_device(config.device)
    loaded = evaluation.load_checkpoint(config)
    target = evaluation.place(config.output_dir, loaded, "attention")
    images = open_pictures(config.image_path, target.parent / LISTS, config.download)
    target = _target(config, target, images)
    backbone, transform = loaded.backbone.to(device), loaded.transform
    kinds = _kinds(config, backbone)
    as_trained = transform.crop_without_resize or is_made_for_one_size(backbone)
    image_size = config.image_size or default_size(
        transform.image_size, backbone.patch_size, as_trained
    )
    page = Page(target / _PAGE, len(images), _origin(loaded, config)) if config.html else None
    block = None
    if kinds == ("attention",):
        block = block_index(-1 if config.block is None else config.block, backbone.depth)
    sheets: list[Path] = []
    on_page = 0
    with log.progress(len(images), kinds[0] if len(kinds) == 1 else "maps") as advance:

        def done(sheet: Path) -> None:
            sheets.append(sheet)
            advance(1)

        def leave_out(error: UserError) -> None:
            if len(images) == 1:
                raise error
            log.notice(f"{error} It is left out.")
            advance(1)

        pictures = _pictures(images, target, transform.pixels, leave_out)
        options = {
            "image_size": image_size,
            "crop_without_resize": transform.crop_without_resize,
            "mean": transform.mean,
            "std": transform.std,
            "advance": done,
            "refuse": lambda picture, error: leave_out(UserError(f"{picture.title}: {error}")),
        }
        if kinds == ("attention",):
            on_page = show(
                backbone, pictures, block=block, threshold=config.threshold, page=page, **options
            )
        else:
            patches.show(backbone, pictures, kinds, **options)
    if not sheets:
        raise UserError(f"None of the {len(images):,} images can be shown.")
    record = {
        "images": [sheet.parent.relative_to(target).as_posix() for sheet in sheets],
        "maps": list(kinds),
        "block": block,
        "image_size": list(image_size),
        "interpolation": None if transform.crop_without_resize else "bilinear",
        **{name: value for name, value in transform.plain().items() if name != "image_size"},
        "threshold": config.threshold,
        "device": str(device),
        **evaluation.origin(loaded),
        **evaluation.repetition("attention", config),
    }
    files.write_json(target / _RECORD, record)
    if len(sheets) == 1:
        log.say(f"written to {sheets[0].parent}; look first at {sheets[0].name}")
    else:
        log.say(f"written to {target}, a folder for each of {len(sheets):,} images")
    if config.html:
        some = f" (it has the first {on_page:,} images)" if on_page < len(sheets) else ""
        log.say(f"open in a browser: {target / _PAGE}{some}")


def _kinds(config: AttentionConfig, backbone: nn.Module) -> tuple[str, ...]:
    """The kinds of maps to show: the one asked for; else attention, or all that there are."""
    there = available(backbone)
    if not there:
        raise UserError(f"{title(backbone)} gives no patches, so there are no maps of them to show.")
    kinds = (config.maps,) if config.maps else ("attention",) if "attention" in there else there
    name, lacks = title(backbone), "attention" not in there
    takes = " or ".join(filter(None, (", ".join(there[:-1]), there[-1])))
    for kind in kinds:
        if kind not in there:
            raise UserError(
                f"{name} has no {lacking(backbone, kind)}, so --maps {kind} has nothing to show; it "
                f"takes {takes} here."
            )
    for flag in ("html", "threshold", "block"):
        given = getattr(config, flag)
        if "attention" not in kinds and given is not None and given is not False:
            missing = f"{name} has no {lacking(backbone, 'attention')}"
            why = missing if lacks else f"--maps is {config.maps}"
            raise UserError(f"--{flag} is for attention maps, and {why}; leave it out.")
    if lacks and not config.maps:
        instead = " and ".join(KINDS[kind].shows for kind in kinds)
        log.notice(
            f"{name} has no {lacking(backbone, 'attention')}, so there are no attention maps; shown "
            f"instead: {instead}."
        )
    return kinds


def folders(source: Source) -> list[str]:
    """The name of the folder for the pictures of each image: a path below where everything goes.

    It is the image's key without the ending, where no other image claims that; else the key; of
    images that a list names twice the later ones are numbered. What would lead out of the folder is
    left out, and a key that is a number has the source's name before it.
    """
    paths = [_path(source.key(index), source.root) for index in range(len(source))]
    stems = [os.path.splitext(path)[0] for path in paths]
    claims = Counter(map(_alike, (*stems, *paths)))
    names: dict[str, str] = {}
    for stem, path in zip(stems, paths, strict=True):
        wanted = name = stem if claims[_alike(stem)] == 1 else path
        number = 1
        while _alike(name) in names:
            number += 1
            name = f"{wanted}_{number}"
        names[_alike(name)] = name
    return list(names.values())


def _path(key: str, root: str) -> str:
    """An image's key as a path that stays below any folder, of names that the platform allows."""
    if key.isdecimal():
        key = f"{re.sub(r'[^0-9A-Za-z]+', '_', root).strip('_')}_{key}"
    if os.name == "nt":
        key = re.sub(r'[<>:"|?*]', "_", key.replace("\\", "/"))
    return "/".join(part for part in key.split("/") if part not in ("", ".", "..")) or "image"


def _alike(name: str) -> str:
    """What file systems that tell neither a from A nor one form of an accent from another see."""
    return composed(name).casefold()


def _target(config: AttentionConfig, target: Path, images: Source) -> Path:
    """The folder given; else ``target`` beside the checkpoint, where a single image has its own."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    return target / Path(config.image_path).stem if isinstance(images, OneImage) else target


def _pictures(
    images: Source,
    target: Path,
    pixels: Pixels,
    leave_out: Callable[[UserError], object],
) -> Iterator[Picture]:
    """Each image as it is needed, without those that cannot be read."""
    # The pictures of a single image go where everything goes.
    names = [""] if isinstance(images, OneImage) else folders(images)
    for index, name in enumerate(names):
        try:
            image = decode(images.read(index), images.name(index), pixels)
        except BadImage as error:
            leave_out(error)
            continue
        yield Picture(name or images.key(index), target / name, image)


def _origin(loaded: Loaded, config: AttentionConfig) -> str:
    """Which network the maps are of, and what made the page, for its reader."""
    of = f"the {loaded.which} of {loaded.path}" if loaded.which else loaded.path
    age = "" if loaded.epoch is None else f" after epoch {loaded.epoch}"
    return (
        f"The network is {of}{age}, of the architecture {loaded.architecture['name']}. This page "
        f"was made by: {evaluation.repetition('attention', config)['command']}"
    )
