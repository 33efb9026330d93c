"""Settings of the backbone: its architecture by name, and what a name leaves open."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dino_kit.config import arch_options, architectures, fields
from dino_kit.config.fields import option
from dino_kit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Backbone"""

    arch: str = option(
        "vit_small",
        f"Name of the architecture: {', '.join(architectures.BUILDABLE)}, of which those without a size "
        "in their names need the sizes given below; or a model of a library as timm:NAME, "
        "torchvision:NAME, hf:FOLDER (a configuration of transformers) or "
        "python:PACKAGE.MODULE:CALLABLE. The reference's names are understood, too: deit_small is "
        "vit_small, and resnet50 is torchvision:resnet50.",
        then=architectures.canonical,
    )
    arch_options: tuple[str, ...] | None = option(
        None,
        "Arguments of the architecture that have no flag: words KEY=VALUE, values as in YAML, such as "
        "num_register_tokens=4 of a ViT, or depths=[1,2,21,1] and heads=[2,4,8,16] of cswin. Of a "
        "library's model they go to the library, of python: to the callable but for two: without=PART "
        "takes a part out, as a classifier, and tokens=PART names the part that gives out the tokens.",
        then=arch_options.check,
    )
    patch_size: int = option(
        16,
        "Side of a patch in pixels, of an architecture that leaves it open. Smaller ones give better "
        "features and cost more.",
        low=1,
    )
    embed_dim: int | None = option(
        None, "Width of --arch vit, resmlp, deepvit or t2t_vit, or of the first stage of cswin.",
        low=1, nothing="by --arch",
    )
    depth: int | None = option(
        None, "Number of blocks of --arch vit, resmlp, deepvit or t2t_vit.", low=1,
        nothing="by --arch",
    )
    num_heads: int | None = option(
        None, "Attention heads of --arch vit, deepvit or t2t_vit.", low=1, nothing="by --arch"
    )
    mlp_ratio: float | None = option(
        None, "Width of the MLP over that of --arch vit, resmlp, deepvit, t2t_vit or cswin.", above=0,
        high=100, nothing="4; 3 of a DeepViT or T2T-ViT",
    )
    reattention_blocks: int | None = option(
        None, "Blocks of --arch deepvit, the last ones, that have Re-Attention.", low=1,
        nothing="all",
    )
    mlp_grid: Literal["mix", "resize"] | None = option(
        None,
        "How a ResMLP, made for the grid of patches of the global crops, sees local crops: mix "
        "carries its mixing of patches over to their grid, resize enlarges them to the global "
        "size, which costs more.",
        nothing=architectures.MLP_GRID,
    )
    drop_path_rate: float = option(
        0.1,
        "Stochastic depth of the student: rate of the last block of a ViT, of each block of a "
        "ResMLP.",
        low=0, below=1,
    )

    @property
    def known_patch_size(self) -> int | None:
        """Side of a patch; None where it is a library's model's, which is not there yet."""
        family = architectures.family_of(self.arch)
        return self.patch_size if family.takes_patch_size else family.patch_size

    def check(self) -> None:
        family = architectures.family_of(self.arch)
        if not family.takes_patch_size and self.patch_size != Backbone.patch_size:
            raise UserError(
                f"--arch {self.arch} has patches of its own, so --patch_size cannot be given; leave "
                "it out."
            )
        options = arch_options.pairs(self.arch_options)
        sizes = (*family.needed, *family.optional)
        every = ("embed_dim", "depth", "num_heads", "mlp_ratio", "reattention_blocks", "mlp_grid")
        given = [name for name in every if getattr(self, name) is not None]
        useless = [f"--{name}" for name in given if name not in (*sizes, *family.settings)]
        if useless:
            raise UserError(
                f"--arch {self.arch} has no use for {' and '.join(useless)}; leave "
                f"{'it' if len(useless) == 1 else 'them'} out."
            )
        if family.is_built_here:
            self._check_options(options)
        else:
            arch_options.require_fresh(self.arch, options)
        if family is architectures.DEEPVIT and self.patch_size % 2:
            raise UserError(
                f"--patch_size {self.patch_size} is odd; {family.title}, whose patch embedding "
                "begins with every second pixel, takes an even one."
            )
        if self.arch == family.free:
            self._check_free_sizes(family)
        elif any(name in sizes for name in given):
            flags = ", ".join(f"--{name}" for name in given if name in sizes)
            raise UserError(
                f"--arch {self.arch} has sizes of its own, so {flags} cannot be given; use --arch "
                f"{family.free} to choose them."
            )

    def _check_options(self, options: Iterable[str]) -> None:
        said = [key for key in options if key in fields.names(Backbone)]
        if said:
            raise UserError(
                f"--arch_options has {', '.join(said)}, which a flag of that name says; give that."
            )

    def _check_free_sizes(self, family: architectures.Family) -> None:
        absent = [f"--{name}" for name in family.needed if getattr(self, name) is None]
        if absent:
            raise UserError(f"--arch {self.arch} needs its sizes: {', '.join(absent)} missing.")
        if self.num_heads is not None and self.embed_dim % self.num_heads:
            raise UserError(
                f"--embed_dim {self.embed_dim} is not a multiple of --num_heads {self.num_heads}."
            )
        if self.mlp_ratio is not None and int(self.embed_dim * self.mlp_ratio) < 1:
            raise UserError(
                f"--mlp_ratio {self.mlp_ratio} of --embed_dim {self.embed_dim} leaves the MLP no "
                "width."
            )
        if self.reattention_blocks is not None and self.reattention_blocks > self.depth:
            raise UserError(
                f"--reattention_blocks {self.reattention_blocks} is more than --depth {self.depth}; "
                "it is at most that."
            )
