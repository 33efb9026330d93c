"""Settings of ``dino-kit report``."""

from __future__ import annotations

from dataclasses import dataclass

from dino_kit.config.fields import Checked, option
from dino_kit.config.train import check_device
from dino_kit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Checked):
    """Report"""

    out: str | None = option(
        None, "A run's folder: the --output_dir of dino-kit train.", positional=True, nothing=""
    )
    output: str | None = option(None, "The page to write.", nothing="report.html in that folder")
    image_path: str | None = option(
        None, "An image, or a folder of images, to show attention on.",
        nothing="some of the images that the run was trained on",
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.", then=check_device)

    def check(self) -> None:
        if not self.out:
            raise UserError("A run's folder is missing: give the --output_dir of dino-kit train.")
