"""The commands: what each is called, what it takes, and where it lives."""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields

from dino_kit.config.backbones import BackbonesConfig
from dino_kit.config.bench import (
    BenchDataConfig,
    BenchFitConfig,
    BenchKnnConfig,
    BenchStepConfig,
)
from dino_kit.config.check import CheckConfig
from dino_kit.config.evaluate import AttentionConfig, KnnConfig, LinearConfig, QuickstartConfig
from dino_kit.config.fields import option
from dino_kit.config.launch import LocalConfig, SlurmConfig, StatusConfig
from dino_kit.config.propose import RecipeConfig
from dino_kit.config.report import ReportConfig
from dino_kit.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Printing"""

    diff: str | None = option(None, "Show only what differs from this recipe: a name or a file.")
    explain: bool = option(
        False,
        "Show besides, as comments, how the student's parameters begin and which of them decay.",
        switch=True,
    )


@dataclass(frozen=True, kw_only=True)
class ConfigConfig(TrainConfig, Shown):
    pass


@dataclass(frozen=True)
class Command:
    """One row of the table."""

    schema: type
    # "module:function", imported when the command is called; it returns the exit status, or None.
    function: str
    summary: str
    examples: tuple[str, ...]
    takes_recipe: bool = False
    takes_command: bool = False  # another command's line follows its own flags
    missing_ok: bool = False  # required fields may be left out
    # Flags of the reference that have no meaning here, each with the reason.
    without_effect: dict[str, str] = field(default_factory=dict)


_LAUNCHER = "torchrun's environment says which process this is"
_TORCHRUN = {"dist_url": _LAUNCHER, "local_rank": _LAUNCHER}
_EVALUATION = {**_TORCHRUN, "use_cuda": "--device says where to compute"}

# Of two words where one command has several parts.
COMMANDS = {
    "quickstart": Command(
        QuickstartConfig,
        "dino_kit.commands.quickstart:run",
        "pretrain, evaluate and show attention on handwritten digits, offline",
        ("dino-kit quickstart",),
    ),
    "train": Command(
        TrainConfig,
        "dino_kit.commands.train:run",
        "pretrain a backbone on a folder of images",
        (
            "dino-kit train --arch vit_small --patch_size 16 --data_path FOLDER --output_dir OUT",
            "dino-kit train vits16_100ep --data_path imagenet --output_dir OUT",
        ),
        takes_recipe=True,
        without_effect=_TORCHRUN,
    ),
    "check-data": Command(
        CheckConfig,
        "dino_kit.commands.check_data:run",
        "what would be read, what is broken, what the network will see",
        ("dino-kit check-data FOLDER", "dino-kit check-data vits16_100ep FOLDER --json"),
        takes_recipe=True,
    ),
    "recipe": Command(
        RecipeConfig,
        "dino_kit.commands.recipe:run",
        "propose a recipe for these images and this machine, with its reasons",
        (
            "dino-kit recipe FOLDER --hours 4 > mine.yaml",
            "dino-kit recipe FOLDER --hours 4 --arch vit_small --output mine.yaml",
        ),
    ),
    "knn": Command(
        KnnConfig,
        "dino_kit.commands.knn:run",
        "k-nearest-neighbour accuracy of a checkpoint on labelled images",
        ("dino-kit knn OUT --data_path FOLDER_WITH_LABELS",),
        without_effect=_EVALUATION,
    ),
    "linear": Command(
        LinearConfig,
        "dino_kit.commands.linear:run",
        "accuracy of a linear layer trained with labels on a checkpoint's features",
        (
            "dino-kit linear OUT --data_path FOLDER_WITH_LABELS",
            "dino-kit linear OUT --data_path FOLDER_WITH_LABELS --fast",
            "dino-kit linear OUT --evaluate --val_data FOLDER_WITH_LABELS",
        ),
        without_effect=_TORCHRUN,
    ),
    "attention": Command(
        AttentionConfig,
        "dino_kit.commands.attention:run",
        "what each attention head of a checkpoint looks at, as pictures or a page",
        ("dino-kit attention OUT --image_path PICTURE --html",),
        without_effect=_EVALUATION,
    ),
    "report": Command(
        ReportConfig,
        "dino_kit.commands.report:run",
        "a run as one page: what became of it, curves, attention, neighbours, recipe, results",
        ("dino-kit report OUT",),
    ),
    "launch slurm": Command(
        SlurmConfig,
        "dino_kit.commands.launch:slurm",
        "run a command as a job of a Slurm cluster, on several nodes, through every requeue",
        (
            "dino-kit launch slurm --profile mine.yaml -- train --data_path FOLDER --output_dir OUT",
            "dino-kit launch slurm --array -- knn OUT/checkpoint*.pth --data_path FOLDER",
        ),
        takes_command=True,
    ),
    "launch local": Command(
        LocalConfig,
        "dino_kit.commands.launch:local",
        "run a command as the same kind of job on this machine, in several processes",
        ("dino-kit launch local --gpus_per_node 2 -- train --data_path FOLDER --output_dir OUT",),
        takes_command=True,
    ),
    "launch status": Command(
        StatusConfig,
        "dino_kit.commands.launch:status",
        "what became of the last job of a folder: its state, log and newest metrics",
        ("dino-kit launch status OUT",),
    ),
    "config": Command(
        ConfigConfig,
        "dino_kit.commands.config:run",
        "print a recipe with every value, or how it differs from another",
        (
            "dino-kit config vits16_100ep --epochs 50 > mine.yaml",
            "dino-kit config mine.yaml --diff vits16_300ep",
            "dino-kit config --arch vit_tiny --explain",
        ),
        takes_recipe=True,
        missing_ok=True,
    ),
    "backbones": Command(
        BackbonesConfig,
        "dino_kit.commands.backbones:run",
        "names of backbones, how large each is, and which maps it has",
        ("dino-kit backbones", "dino-kit backbones 'timm:*swin*'"),
    ),
    "bench data": Command(
        BenchDataConfig,
        "dino_kit.commands.bench:data",
        "images a second that this machine reads, decodes and crops, by stage",
        (
            "dino-kit bench data FOLDER",
            "dino-kit bench data vits16_100ep FOLDER --num_workers 4 --json data.json",
        ),
        takes_recipe=True,
    ),
    "bench step": Command(
        BenchStepConfig,
        "dino_kit.commands.bench:step",
        "images a second of a training step on random crops, its memory and phases",
        (
            "dino-kit bench step --arch vit_small --batch_size_per_gpu 8",
            "dino-kit bench step vits16_100ep --precision bf16 --json step.json",
        ),
        takes_recipe=True,
        missing_ok=True,
        without_effect=_TORCHRUN,
    ),
    "bench knn": Command(
        BenchKnnConfig,
        "dino_kit.commands.bench:knn",
        "seconds of exact k-NN on random features, against the reference's way",
        ("dino-kit bench knn", "dino-kit bench knn --num_train 1281167 --num_queries 50000"),
    ),
    "bench fit": Command(
        BenchFitConfig,
        "dino_kit.commands.bench:fit",
        "whether a run fits into memory, how long it takes, and what limits it",
        (
            "dino-kit bench fit vits16_100ep --data_path FOLDER",
            "dino-kit bench fit --arch vit_small --epochs 300 --data_path FOLDER --json fit.json",
        ),
        takes_recipe=True,
        missing_ok=True,
        without_effect=_TORCHRUN,
    ),
}


def train_part(config: ConfigConfig) -> TrainConfig:
    """The settings of a run that ``dino-kit config`` was given, without its own."""
    return TrainConfig(**{f.name: getattr(config, f.name) for f in dataclass_fields(TrainConfig)})
