"""Settings of the commands that measure a machine: on data, on a step, on k-NN, on a whole run."""

from __future__ import annotations

from dataclasses import dataclass

from dino_kit.config.crops import Crops
from dino_kit.config.fields import REQUIRED, Checked, option
from dino_kit.config.pixels import Pixels
from dino_kit.config.train import TrainConfig
from dino_kit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Numbers"""

    json: str | None = option(None, "File to write the numbers to, as JSON.")


@dataclass(frozen=True, kw_only=True)
class Timed(Numbers):
    """Timing"""

    seconds: float = option(
        5.0, "How long to measure each thing, at least; longer is surer.", above=0
    )


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """Data"""

    data_path: str = option(
        REQUIRED, "What the run is to read, as for dino-kit train.", positional=True
    )
    num_workers: int | None = option(
        None, "Processes that load data; 0 loads in this one.", low=0,
        nothing="usable cores, 10 at most",
    )
    batch_size_per_gpu: int = option(64, "Images that a worker prepares at a time.", low=1)
    download: bool = option(
        False, "Fetch a dataset that is known by name and is not here yet.", switch=True
    )
    seed: int = option(0, "Seed of the crops and of the images' order.", low=0, high=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class BenchDataConfig(Crops, Pixels, Feeding, Timed, Checked):
    pass


@dataclass(frozen=True, kw_only=True)
class BenchStepConfig(TrainConfig, Timed):
    pass


@dataclass(frozen=True, kw_only=True)
class BenchFitConfig(TrainConfig, Numbers):
    def check(self) -> None:
        if not self.data_path:
            raise UserError("--data_path is missing: which images is the run to read?")


@dataclass(frozen=True, kw_only=True)
class BenchKnnConfig(Numbers, Checked):
    """Random features"""

    num_train: int = option(100_000, "Images of the bank.", low=1)
    num_queries: int = option(5_000, "Images to classify.", low=1)
    embed_dim: int = option(384, "Width of a feature.", low=1)
    num_classes: int = option(1_000, "Classes of the images.", low=1)
    nb_knn: tuple[int, ...] = option(
        (10, 20, 100, 200), "Numbers of neighbours, all measured.", low=1
    )
    temperature: float = option(0.07, "Temperature of the vote.", above=0)
    seed: int = option(0, "Seed of the features.", low=0, high=2**32 - 1)

    def check(self) -> None:
        if max(self.nb_knn) > self.num_train:
            raise UserError(
                f"--nb_knn {max(self.nb_knn)} is more than the {self.num_train} images of the bank; "
                "give fewer neighbours or a larger --num_train."
            )
