"""Settings of the command that proposes a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from dino_kit.config import architectures
from dino_kit.config.fields import REQUIRED, Checked, option
from dino_kit.config.pixels import Pixels
from dino_kit.config.train import check_device
from dino_kit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Proposed:
    """Recipe"""

    data_path: str = option(
        REQUIRED, "What the run is to read, as for dino-kit train.",
        positional=True,
    )
    hours: float = option(
        8.0, "Hours that the run may take on this machine, such as 0.5; the default is a night.",
        above=0,
    )
    total_batch_size: int | None = option(
        None, "Images per step.", low=1, nothing="by the number of images and of steps"
    )
    arch: str | None = option(
        None, "Architecture; vit is one of the sizes below vit_tiny.",
        nothing="the largest that the hours suffice for", then=architectures.canonical,
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.", then=check_device)
    output: str | None = option(
        None, "File to write, which must not exist.", nothing="standard output"
    )

    def check(self) -> None:
        if self.arch is not None and not architectures.family_of(self.arch).is_built_here:
            raise UserError(
                f"--arch {self.arch} is a library's, whose recipes nobody here knows; leave it out, "
                f"or give {', '.join(architectures.BUILDABLE)}."
            )


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(Pixels, Proposed, Checked):
    pass
