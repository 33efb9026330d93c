"""Settings of the command that looks at images before a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_kit.config.backbone import Backbone
from dino_kit.config.crops import Crops
from dino_kit.config.fields import REQUIRED, Checked, option
from dino_kit.config.pixels import Pixels
from dino_kit.config.train import Head, check_device


@dataclass(frozen=True, kw_only=True)
class Checking:
    """Check"""

    data_path: str = option(
        REQUIRED, "What the run is to read, as for dino-kit train.", positional=True
    )
    output_dir: str = option(
        "check_data", "Folder for contact_sheet.png, and for lists of many images in lists/."
    )
    max_images: int | None = option(
        None, "Look at so many images of each part of a split, evenly spread over it.", low=1,
        nothing="all",
    )
    json: bool = option(
        False, "Print the numbers as JSON, and all else on standard error.", switch=True
    )
    download: bool = option(
        False, "Fetch a dataset that is known by name and is not here yet.", switch=True
    )
    num_workers: int | None = option(
        None, "Processes that read the images here; 0 reads them in this one.", low=0,
        nothing="usable cores, 10 at most",
    )
    seed: int = option(0, "Seed of the run whose crops are shown.", low=0, high=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Step, which is timed to tell how many images a second have to be prepared"""

    batch_size_per_gpu: int = option(64, "Images per process and step.", low=1)
    total_batch_size: int | None = option(
        None, "Images per step.", low=1, nothing="batch_size_per_gpu"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "Number format; auto is fp32 on a CPU, and bf16 (else fp16) on a GPU."
    )
    use_fp16: bool | None = option(
        None, "The older flag: true is --precision fp16, false is --precision fp32."
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.", then=check_device)


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Step, Head, Backbone, Crops, Pixels, Checking, Checked):
    pass
