"""Settings of a pretraining run: the flags of ``dino-kit train``, and the keys of a recipe.

Names, meanings and defaults are those of the reference's ``main_dino.py`` wherever it has the flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_kit.config import architectures
from dino_kit.config.backbone import Backbone
from dino_kit.config.crops import Crops
from dino_kit.config.fields import REQUIRED, Checked, option
from dino_kit.config.pixels import Pixels
from dino_kit.errors import UserError

# Flags by which the same thing can be said: on a command line, one of them also takes the place of
# the other in a recipe.
SAME_THING = {"use_fp16": "precision", "precision": "use_fp16"}
# What may change when a run goes on; a different value of anything else is another run.
RESUMABLE = frozenset(
    {
        "augment",  # as auto it goes with the device
        "batch_size_per_gpu",  # the total batch is compared instead
        "checkpoint_activations",
        "checkpoint_shards",
        "compile",
        "data_path",
        "device",
        "dist_timeout_minutes",
        "download",
        "fsdp",
        "log_every_steps",
        "max_bad_share",
        "max_bad_steps",
        "max_failed_saves",
        "num_workers",
        "on_bad_image",
        "output_dir",
        "probe_data",
        "probe_freq",
        "resume",
        "save_every_minutes",
        "save_every_steps",
        "saveckp_freq",
        "stop_on_collapse",
    }
)


def check_device(name: str) -> str:
    """``name``; raises :class:`UserError` for what cannot be the name of a device."""
    kind, colon, index = name.partition(":")
    if not (kind in ("auto", "cpu", "mps") and not colon) and not (
        kind == "cuda" and (not colon or index.isdecimal() and len(index) <= 3)
    ):
        raise UserError(f"--device is {name!r}; it takes auto, cpu, cuda, cuda:N or mps.")
    return name


@dataclass(frozen=True, kw_only=True)
class Head:
    """Projection head"""

    out_dim: int = option(
        65536, "Number of prototypes. Large values suit large data.", low=2
    )
    norm_last_layer: bool = option(
        True,
        "Keep the prototypes' norms at 1, which steadies the training; without it small models "
        "get better. The published ViT-S runs use false, ViT-B true.",
    )
    use_bn_in_head: bool = option(False, "Batch normalisation in the head.")
    head_nlayers: int = option(3, "Linear layers of the head's MLP.", low=1)
    head_hidden_dim: int = option(2048, "Width of the MLP's hidden layers.", low=1)
    head_bottleneck_dim: int = option(256, "Width of the space of the prototypes.", low=1)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Objective and teacher"""

    centering: Literal["center", "sinkhorn"] = option(
        "center",
        "What keeps the teacher from collapsing: a moving centre, as in DINO, or Sinkhorn-Knopp, "
        "as in SwAV and DINOv2.",
    )
    center_momentum: float = option(0.9, "Momentum of the centre.", low=0, below=1)
    student_temp: float = option(0.1, "Temperature of the student's softmax.", above=0)
    warmup_teacher_temp: float = option(
        0.04, "Teacher temperature at the start. Lower it if the loss does not fall.", above=0
    )
    teacher_temp: float = option(
        0.04, "Teacher temperature after its warm-up. Above 0.07 is mostly unstable.", above=0
    )
    warmup_teacher_temp_epochs: int = option(
        0, "Epochs over which the teacher temperature grows linearly.", low=0
    )
    momentum_teacher: float = option(
        0.996,
        "Momentum of the teacher's moving average at the start; it grows to 1 by a cosine. Small "
        "batches need a higher one, such as 0.9995 for 256 images.",
        low=0,
        high=1,
    )


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Optimisation"""

    epochs: int = option(100, "Epochs of training.", low=1)
    batch_size_per_gpu: int = option(
        64, "Images per process and step, or the most at a time where a total is given.", low=1
    )
    total_batch_size: int | None = option(
        None,
        "Images per step over all processes; where they do not fit at once they are accumulated.",
        low=1,
        nothing="batch_size_per_gpu times processes",
    )
    optimizer: Literal["adamw", "sgd", "lars"] = option(
        "adamw", "Optimiser: adamw for transformers, sgd or lars for convolutional networks."
    )
    lr: float = option(
        0.0005, "Highest learning rate, for a batch of 256; scaled linearly with the batch.", low=0
    )
    warmup_epochs: int = option(
        10, "Epochs over which the learning rate grows linearly.", low=0
    )
    min_lr: float = option(1e-6, "Learning rate at the end of the cosine.", low=0)
    weight_decay: float = option(0.04, "Weight decay at the start.", low=0)
    weight_decay_end: float = option(0.4, "Weight decay at the end of the cosine.", low=0)
    clip_grad: float = option(
        3.0, "Largest norm of each parameter tensor's gradient; 0 for none.", low=0
    )
    freeze_last_layer: int = option(
        1, "Epochs during which the prototypes stay. Raise it if the loss does not fall.", low=0
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "Number format; auto is fp32 on a CPU, and bf16 (else fp16) on a GPU."
    )
    use_fp16: bool | None = option(
        None, "The older flag: true is --precision fp16, false is --precision fp32."
    )
    checkpoint_activations: bool = option(
        False,
        "Compute each block of the backbone a second time in the backward pass in place of keeping "
        "what it computed: less memory, and more time.",
    )
    fsdp: bool = option(
        False,
        "Over several processes, keep only a share of the weights, gradients and moments on each, "
        "for backbones that do not fit on one GPU; checkpoints stay as they are.",
    )
    checkpoint_shards: bool = option(
        False,
        "With --fsdp, let each process write its own share of a checkpoint to the folder shards, "
        "beside checkpoint.pth, for where the main process's memory cannot hold it all.",
    )
    compile: bool = option(
        False,
        "Compile attention and MLP of the backbone's blocks by torch.compile, which takes a minute "
        "or more at the start and Triton. Meant for a GPU: on a CPU it compiles the MLP alone, by a "
        "C++ compiler, and gains nothing.",
    )
    max_bad_steps: int = option(
        20, "Stop after so many steps in a row whose loss or gradient is not finite.", low=1
    )
    stop_on_collapse: bool = option(
        False, "Stop when the run has collapsed, with status 1; else it is told and goes on."
    )

    @property
    def asked_precision(self) -> str:
        """``precision``, by whichever of the two flags it was given."""
        return {None: self.precision, True: "fp16", False: "fp32"}[self.use_fp16]

    def check(self) -> None:
        if self.precision not in ("auto", self.asked_precision):
            raise UserError(
                f"--use_fp16 {str(self.use_fp16).lower()} contradicts --precision "
                f"{self.precision}; give one."
            )
        if self.fsdp and self.compile:
            raise UserError("--fsdp true and --compile true do not go together; give one.")
        if self.checkpoint_shards and not self.fsdp:
            raise UserError("--checkpoint_shards true is of use with --fsdp true only; give both.")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data"""

    data_path: str = option(
        REQUIRED,
        "Folder of images, at any depth, labelled or not; tar archives: a file, a folder of them, a "
        "pattern such as x-{000..146}.tar; a .txt or .csv that lists images; torchvision:NAME, "
        "hf:NAME; or digits, for those of scikit-learn.",
    )
    download: bool = option(
        False, "Fetch a dataset that is known by name and is not here yet.", switch=True
    )
    num_workers: int | None = option(
        None, "Processes that load data; 0 loads in the run's own.", low=0,
        nothing="usable cores, 10 at most",
    )
    on_bad_image: Literal["skip", "raise"] = option(
        "skip",
        "An image that cannot be read: skip takes another in its place and names it in "
        "bad_images.txt; raise ends the run.",
    )
    max_bad_share: float = option(
        0.01, "Share of such images, of those looked at, beyond which the run ends.", low=0, high=1
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run"""

    output_dir: str = option(
        REQUIRED, "The run's folder. The same command on it goes on where the run stopped."
    )
    seed: int = option(0, "Seed of everything random.", low=0, high=2**32 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.", then=check_device)
    dist_timeout_minutes: float = option(
        30.0,
        "Of several processes, how long they wait for one another before the run ends; longer than "
        "a probe, or making a list of the images, takes one of them.",
        above=0, high=10_000,
    )
    saveckp_freq: int = option(
        20, "Keep a checkpoint for good every so many epochs; 0 for none.", low=0
    )
    save_every_steps: int = option(
        0, "Write checkpoint.pth every so many steps too, not only after each epoch.", low=0
    )
    save_every_minutes: float = option(
        0.0, "Write it every so many minutes too, so that no more than that is lost.", low=0
    )
    max_failed_saves: int = option(
        10,
        "Stop after so many checkpoints in a row that could not be written, as on a full disk; they "
        "are tried again every minute.",
        low=1,
    )
    log_every_steps: int = option(10, "Steps between two lines of metrics.jsonl.", low=1)
    probe_freq: int = option(
        10,
        "Look at the teacher every so many epochs, before the first and after the last: how its "
        "embeddings spread, and a sheet of eight images in looks/; 0 for never.",
        low=0,
    )
    probe_data: str | None = option(
        None,
        "Labelled images, as for dino-kit knn, on which the teacher is measured then; training "
        "does not see them. The best one stays as checkpoint_best.pth.",
        nothing="",
    )
    resume: Literal["auto", "never"] = option(
        "auto", "auto goes on with the run in --output_dir; never begins again in its place."
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Run, Data, Pixels, Crops, Optimisation, Objective, Head, Backbone, Checked):
    def check(self) -> None:
        patch = self.known_patch_size
        if patch is None:
            return  # the model is asked when it is there
        takes = architectures.family_of(self.arch).takes_patch_size
        flag = "--patch_size" if takes else f"the patches of {self.arch},"
        sizes = [("global_crops_size", self.global_crops_size)]
        if self.local_crops_number:
            sizes.append(("local_crops_size", self.local_crops_size))
        for name, size in sizes:
            rest = size % patch
            if rest:
                below, above = size - rest, size - rest + patch
                near = f"{below} and {above}" if below else f"{above}"
                raise UserError(
                    f"--{name} {size} is not a multiple of {flag} {patch}; the nearest "
                    f"{'are' if below else 'is'} {near}."
                )
