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
        None,
        "Images to show attention on: one, or a folder, tar archives or other data, as of dino-kit "
        "attention; of many, some.",
        nothing="some of the images that the run was trained on",
    )
    download: bool = option(
        False, "Fetch a dataset that is known by name and is not here yet.", switch=True
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.", then=check_device)

    def check(self) -> None:
        if not self.out:
            raise UserError("A run's folder is missing: give the --output_dir of dino-kit train.")
