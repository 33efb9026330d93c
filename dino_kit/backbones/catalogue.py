"""Which backbones there are by name, how large each is, and which maps it has."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from dino_kit.backbones import maps
from dino_kit.backbones.build import create_backbone
from dino_kit.config import architectures
from dino_kit.errors import UserError


class Entry(NamedTuple):
    """A backbone with its first weights, for images of three channels."""

    name: str
    stands_for: str | None = None  # the name that this one is another name of
    parameters: int | None = None
    patch_size: int | None = None  # pixels of the side that a patch, or a place of the last map, has
    width: int | None = None
    maps: tuple[str, ...] = ()  # kinds, see :mod:`~dino_kit.backbones.maps`
    fault: str | None = None  # why it cannot be built, and nothing is known of it


def own_names() -> list[str]:
    """Names with sizes of their own that are built here."""
    return [name for family in architectures.FAMILIES for name in family.sizes]


def library_names(library: str) -> list[str]:
    """All names of ``timm`` or ``torchvision``, each as ``--arch`` has it."""
    if library == "timm":
        import timm

        known = timm.list_models()
    else:
        from torchvision import models

        known = models.list_models(module=models)
    return [f"{library}:{name}" for name in known]


def matching(pattern: str) -> list[str]:
    """Names that fit a shell's pattern: those of here, the reference's, then the libraries'.

    A name that is none is the only one that fits itself: ``hf:FOLDER`` has no list.
    """
    if not set("*?[") & set(pattern):
        return [pattern]
    before = pattern.partition(":")[0] if ":" in pattern else None
    known = [*own_names(), *architectures.ALIASES]
    for library in ("torchvision", "timm"):
        # A library is asked only where the pattern can mean it.
        if before is None and pattern[0] in "*?[" or before and fnmatchcase(library, before):
            known += library_names(library)
    return [name for name in known if fnmatchcase(name, pattern)]


def describe(name: str) -> Entry:
    """Build the backbone of that name, where it can be without memory for its weights, and look.

    Raises:
        UserError: there is no such name, or it cannot be built.
    """
    meant = architectures.canonical(name)
    backbone = _build(meant)
    return Entry(
        name,
        meant if meant != name else None,
        sum(p.numel() for p in backbone.parameters()),
        backbone.patch_size,
        backbone.embed_dim,
        maps.available(backbone),
    )


def described(names: list[str]) -> Iterator[Entry]:
    """The same of several; one that cannot be built has a fault."""
    for name in names:
        try:
            yield describe(name)
        except UserError as error:
            yield Entry(name, fault=str(error))


def _build(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return create_backbone(name)
    except (RuntimeError, NotImplementedError, UserError):  # not every model can be looked at so
        return create_backbone(name)
