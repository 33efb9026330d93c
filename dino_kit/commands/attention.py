"""``dino-kit attention``: what each head of a checkpoint looks at, as pictures or a page.

Of a network that has no attention, its token mixing and how like the whole its patches are.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from dino_kit import distributed, evaluation, files, log
from dino_kit.config.evaluate import AttentionConfig
from dino_kit.data.decode import decode
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.folder import FolderSource
from dino_kit.data.sources.source import read_file
from dino_kit.errors import UserError
from dino_kit.evaluators import patches
from dino_kit.evaluators.attention import default_size
from dino_kit.evaluators.gallery import Page, Picture, show
from dino_kit.weights import Loaded

_PAGE, _RECORD = "attention.html", "attention.json"
# Kinds of maps, by what a network without them lacks, and what they are.
_KINDS = {
    "attention": ("self-attention", "attention maps"),
    "mixing": ("token mixing by a matrix", "rows of its last token mixing"),
    "similarity": ("", "the similarity of each patch to the pooled feature"),
}


def run(config: AttentionConfig) -> None:
    """Write pictures and numbers of each image's attention, and with ``--html`` a page of all.

    Raises:
        UserError: checkpoint, images and flags do not fit, and nothing is written then; or an
            image's maps do not fit into memory.
    """
    if not distributed.is_main():
        return
    files.require_folder("output_dir", config.output_dir)
    images = _find(config.image_path)
    device = distributed.choose_device(config.device)
    loaded = evaluation.load_checkpoint(config)
    backbone, transform = loaded.backbone.to(device), loaded.transform
    kinds = _kinds(config, backbone)
    as_trained = transform.crop_without_resize or "mixing" in patches.available(backbone)
    image_size = config.image_size or default_size(
        transform.image_size, backbone.patch_size, as_trained
    )
    target = _target(config, loaded)
    page = Page(target / _PAGE, len(images), _origin(loaded, config)) if config.html else None
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
            on_page = show(backbone, pictures, threshold=config.threshold, page=page, **options)
        else:
            patches.show(backbone, pictures, kinds, **options)
    if not sheets:
        raise UserError(f"None of the {len(images):,} images can be shown.")
    record = {
        "images": [sheet.parent.relative_to(target).as_posix() for sheet in sheets],
        "maps": list(kinds),
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
    there = patches.available(backbone)
    kinds = (config.maps,) if config.maps else ("attention",) if "attention" in there else there
    name, lacks = type(backbone).__name__, "attention" not in there
    for kind in kinds:
        if kind not in there:
            raise UserError(
                f"{name} has no {_KINDS[kind][0]}, so --maps {kind} has nothing to show; it takes "
                f"{' or '.join(there)} here."
            )
    for flag in ("html", "threshold"):
        if "attention" not in kinds and getattr(config, flag):
            why = f"{name} has no self-attention" if lacks else f"--maps is {config.maps}"
            raise UserError(f"--{flag} is for attention maps, and {why}; leave it out.")
    if lacks and not config.maps:
        instead = " and ".join(_KINDS[kind][1] for kind in kinds)
        log.notice(
            f"{name} has no self-attention, so there are no attention maps; shown instead: "
            f"{instead}."
        )
    return kinds


def _find(image_path: str) -> dict[str, str]:
    """The images to look at: each one's path, by the name of the folder for its pictures.

    That is its path without the ending, where no other image claims it. A single image has the name
    ``""``: its pictures go where everything goes.
    """
    if os.path.isfile(image_path):
        return {"": image_path}
    if not os.path.isdir(image_path):
        raise UserError(f"--image_path {image_path} is neither an image nor a folder of images.")
    source = FolderSource(image_path)
    stems = [os.path.splitext(path)[0] for path in source.names]
    # Some file systems do not tell a from A.
    claims = Counter(name.casefold() for name in (*stems, *source.names))
    return {
        stem if claims[stem.casefold()] == 1 else path: source.name(index)
        for index, (stem, path) in enumerate(zip(stems, source.names, strict=True))
    }


def _target(config: AttentionConfig, loaded: Loaded) -> Path:
    """The folder given; else one beside the checkpoint, where a single image has its own."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    target = evaluation.place(None, loaded, "attention")
    return target / Path(config.image_path).stem if os.path.isfile(config.image_path) else target


def _pictures(
    images: dict[str, str],
    target: Path,
    pixels: Pixels,
    leave_out: Callable[[UserError], object],
) -> Iterator[Picture]:
    """Each image as it is needed, without those that cannot be read."""
    for name, path in images.items():
        try:
            image = decode(read_file(path), path, pixels)
        except UserError as error:
            leave_out(error)
            continue
        yield Picture(name or Path(path).name, target / name, image)


def _origin(loaded: Loaded, config: AttentionConfig) -> str:
    """Which network the maps are of, and what made the page, for its reader."""
    of = f"the {loaded.which} of {loaded.path}" if loaded.which else loaded.path
    age = "" if loaded.epoch is None else f" after epoch {loaded.epoch}"
    return (
        f"The network is {of}{age}, of the architecture {loaded.architecture['name']}. This page "
        f"was made by: {evaluation.repetition('attention', config)['command']}"
    )
