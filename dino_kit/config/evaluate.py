"""Settings of the commands that look at a checkpoint, and of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_kit.config import arch_options, architectures
from dino_kit.config.fields import REQUIRED, Checked, option
from dino_kit.config.train import check_device
from dino_kit.errors import UserError

# Four decades in steps of 1, 2, 5, as DINOv2's thirteen are, but a decade higher: the fewer steps an
# epoch has, the higher the best rate. A thousand digits have theirs at 0.2, and the usual one for
# ImageNet is 0.001; neither is at an edge.
LEARNING_RATES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoint"""

    checkpoint: str | None = option(
        None, "A checkpoint, or the folder of a run.", positional=True, nothing=""
    )
    pretrained_weights: str | None = option(None, "CHECKPOINT by its older name.", nothing="")
    checkpoint_key: str = option(
        "teacher", "Which network of the checkpoint, teacher or student, where it holds both."
    )
    arch: str | None = option(
        None, "Architecture, where the checkpoint does not say.", nothing="the checkpoint's",
        then=architectures.canonical,
    )
    patch_size: int | None = option(
        None, "Side of a patch in pixels, likewise.", low=1, nothing="the checkpoint's"
    )
    embed_dim: int | None = option(None, "Width, likewise.", low=1, nothing="the checkpoint's")
    depth: int | None = option(
        None, "Number of blocks, likewise.", low=1, nothing="the checkpoint's"
    )
    num_heads: int | None = option(
        None, "Attention heads, likewise.", low=1, nothing="the checkpoint's"
    )
    mlp_ratio: float | None = option(
        None, "Width of the MLP over that of the tokens, likewise.", above=0,
        nothing="the checkpoint's",
    )
    mlp_grid: Literal["mix", "resize"] | None = option(
        None, "How a ResMLP sees images of another size than it was trained at, likewise.",
        nothing="the checkpoint's",
    )
    arch_options: tuple[str, ...] | None = option(
        None, "What a library's model, or a CSWin Transformer, was built with, KEY=VALUE, likewise.",
        nothing="the checkpoint's", then=arch_options.check,
    )
    in_chans: int | None = option(
        None, "Channels of the images, likewise.", low=1, nothing="the checkpoint's"
    )
    exif: Literal["ignore", "apply"] | None = option(
        None, "Whether pictures are turned as their EXIF says, likewise.",
        nothing="the checkpoint's, else ignore",
    )
    value_range: tuple[float, float] | None = option(
        None, "What black and white are in files of more than 8 bits, likewise.",
        nothing="the checkpoint's, else by the type of the numbers",
    )
    normalize: Literal["imagenet"] | tuple[float, ...] | None = option(
        None, "Mean and deviation of the channels, likewise.",
        nothing="the checkpoint's, else imagenet of 3 channels",
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.", then=check_device)
    output_dir: str | None = option(
        None, "Folder to write to.", nothing="beside the checkpoint"
    )

    @property
    def weights(self) -> str | None:
        """The file or folder, by whichever name it was given."""
        return self.checkpoint or self.pretrained_weights

    def check(self) -> None:
        if self.checkpoint and self.pretrained_weights not in (None, self.checkpoint):
            raise UserError(
                f"Two checkpoints are given, {self.checkpoint} and --pretrained_weights "
                f"{self.pretrained_weights}; give one."
            )

    def require_checkpoint(self) -> None:
        """Raises :class:`UserError` where no checkpoint was given by either name."""
        if not self.weights:
            raise UserError("A checkpoint is missing: give a file, or the folder of a run.")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Data"""

    data_path: str | None = option(
        None,
        "Folder with train/ and val/ (or test/) inside, or one with a folder for each class; "
        "likewise tar archives, a list of images in a file, torchvision:NAME or hf:NAME; or digits, "
        "or digits:moved, whose test images are moved and larger.",
        nothing="",
    )
    train_data: str | None = option(
        None, "Labelled images to learn from, instead of --data_path.", nothing=""
    )
    val_data: str | None = option(None, "Labelled images to classify, likewise.", nothing="")
    val_share: float = option(
        0.2, "Share of a folder without a split that is held out, by a hash of the names.",
        above=0, below=1,
    )
    download: bool = option(
        False, "Fetch a dataset that is known by name and is not here yet.", switch=True
    )
    image_size: int | None = option(
        None,
        "Side of the images that the network sees: of the centre of resized images, or, for one "
        "trained by --crop_without_resize, of images as they are.",
        low=1,
        nothing="what it was trained on",
    )
    batch_size_per_gpu: int = option(128, "Images at a time.", low=1)
    num_workers: int | None = option(
        None, "Processes that load data.", low=0, nothing="usable cores, 10 at most"
    )

    def require_labelled(self) -> None:
        """Raises :class:`UserError` where the flags do not name two sets of labelled images."""
        pair = (self.train_data, self.val_data)
        if bool(self.data_path) == any(pair) or any(pair) != all(pair):
            raise UserError(
                "Labelled images are needed: give either --data_path, or both --train_data and "
                "--val_data."
            )


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Neighbours"""

    nb_knn: tuple[int, ...] = option(
        (10, 20, 100, 200), "Numbers of neighbours; 20 is mostly the best.", low=1
    )
    temperature: float = option(0.07, "A neighbour's vote is exp(similarity / this).", above=0)
    dump_features: str | None = option(None, "Folder to write the features to.")
    load_features: str | None = option(
        None, "Folder to read features from, instead of a checkpoint and images."
    )


@dataclass(frozen=True, kw_only=True)
class KnnConfig(Neighbours, Labelled, Checkpoint, Checked):
    def check(self) -> None:
        if self.load_features:
            return
        self.require_checkpoint()
        self.require_labelled()


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear layer"""

    n_last_blocks: int | None = option(
        None,
        "Join the class tokens of so many last blocks. The published ViT-S have 4, ViT-B 1.",
        low=1, nothing="4, or all blocks where there are fewer",
    )
    avgpool_patchtokens: bool | None = option(
        None,
        "Also join the last block's average patch. The published ViT-S have false, ViT-B true.",
        nothing="false",
    )
    epochs: int = option(100, "Epochs of training.", low=1)
    lr: float = option(
        0.001,
        "First learning rate for a batch of 256, scaled in proportion to the batch; then half a "
        "cosine, epoch by epoch, towards 0. The best one depends on the checkpoint.",
        above=0,
    )
    fast: bool = option(
        False,
        "Extract the features once, of the centres of the images, and train at all of --lrs side by "
        "side; the rate is chosen on a tenth of the training images. A layer of its own is kept.",
        switch=True,
    )
    lrs: tuple[float, ...] = option(
        LEARNING_RATES, "The learning rates of --fast, each as --lr.", above=0
    )
    total_batch_size: int | None = option(
        None,
        "Images of a step over all processes, so that the result does not depend on how many there "
        "are; --batch_size_per_gpu is then the most that one takes at a time.",
        low=1, nothing="--batch_size_per_gpu of each process",
    )
    val_freq: int = option(1, "Epochs from one validation to the next.", low=1)
    num_labels: int | None = option(
        None, "Number of classes, to be held against the data's.", low=1, nothing="the data's"
    )
    seed: int = option(
        0, "Seed of the crops, their order and the first weights.", low=0, high=2**32 - 1
    )
    resume: Literal["auto", "never"] = option(
        "auto", "auto goes on where this command stopped; never begins again in its place."
    )
    evaluate: bool = option(
        False, "Train nothing: classify the validation images by a head trained before.",
        switch=True,
    )
    linear_weights: str | None = option(
        None, "That head: a file of this command's, or a published one of the reference's.",
        nothing="the one that this command wrote",
    )


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Linear, Labelled, Checkpoint, Checked):
    def check(self) -> None:
        self.require_checkpoint()
        if self.linear_weights and not self.evaluate:
            raise UserError("--linear_weights names a head to evaluate; give --evaluate with it.")
        if self.fast and self.lr != LinearConfig.lr:
            raise UserError(
                f"--lr {self.lr:g} is the rate of a training without --fast; with it give --lrs, of "
                "which it takes the best."
            )
        if self.fast and self.val_freq != LinearConfig.val_freq:
            raise UserError(
                f"--val_freq {self.val_freq} is of a training without --fast, which validates only "
                "at its end; leave one of them out."
            )
        if self.lrs != LinearConfig.lrs and not self.fast:
            raise UserError("--lrs are the learning rates of --fast; give it too, or one --lr.")
        # To classify images takes none to learn from.
        if not (self.evaluate and self.val_data and not (self.data_path or self.train_data)):
            self.require_labelled()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Picture"""

    image_path: str = option(
        REQUIRED,
        "An image; or images as --data_path of dino-kit train names them: a folder, tar archives, a "
        "list in a file, torchvision:NAME, hf:NAME or digits. All of them, but of a dataset by name "
        "those that are held out.",
    )
    download: bool = option(
        False, "Fetch a dataset that is known by name and is not here yet.", switch=True
    )
    maps: (
        Literal["attention", "rollout", "reattention", "classattention", "mixing", "similarity"] | None
    ) = option(
        None,
        "What to show: attention of the class token in one block; rollout, its attention followed "
        "through all blocks; reattention, that of a DeepViT, mixed and normalised; classattention, "
        "that of the class token where it alone attends, as in an XCiT or a CaiT; mixing, rows of the "
        "matrix by which a ResMLP mixes its patches; or similarity of each patch to the pooled "
        "feature.",
        nothing="attention; of a network that has none, all that it has",
    )
    block: int | None = option(
        None, "The block whose attention is shown, counted from 0, or from the end as -1.",
        nothing="the last",
    )
    image_size: tuple[int, ...] | None = option(
        None,
        "Height and width to resize to; one number is the length of the shorter side. For a "
        "network trained by --crop_without_resize nothing is resized: it is what is cut out of the "
        "centre, one number a square.",
        low=1,
        nothing="480 480 for a network trained at 224 pixels, and in proportion for others; the "
        "size it was trained at, where that is 64 pixels or fewer, for a ResMLP or a DeepViT, and "
        "where nothing is resized",
    )
    threshold: float | None = option(
        None, "Also draw masks of the patches that hold this share of the attention, such as 0.6.",
        above=0, high=1,
    )
    html: bool = option(
        False, "Also write a page for a browser, on which to explore every patch's attention.",
        switch=True,
    )

    def check(self) -> None:
        if self.image_size is not None and len(self.image_size) > 2:
            raise UserError(
                f"--image_size takes one or two numbers and got {len(self.image_size)}."
            )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Picture, Checkpoint, Checked):
    def check(self) -> None:
        self.require_checkpoint()


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Checked):
    """Quickstart"""

    output_dir: str = option("dino_kit_quickstart", "Folder to write to.")
    seed: int = option(0, "Seed of everything random; the same seed gives the same numbers.",
                       low=0, high=2**32 - 1)
    resume: Literal["auto", "never"] = option(
        "auto", "auto goes on with the run in --output_dir; never begins again in its place."
    )
