"""Every number behind a proposed recipe, in one place, with where it comes from.

What was measured is said to be; the rest is a rule of thumb that fits the published runs at one end
(1.28 million images, 512 a step, 250,000 steps) and small runs on small pictures at the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dino_kit.config.architectures import FREE_VIT
from dino_kit.proposal.survey import Survey


@dataclass(frozen=True)
class Network:
    """A size of network, and what it takes to be worth more than the size below."""

    arch: str
    lr: float  # for a batch of 256, as --lr is
    seen: int  # images, repeated or not, that it should see in a run
    images: int  # different ones that there should be
    sizes: tuple[tuple[str, int], ...] = ()  # of --arch vit
    head: tuple[tuple[str, int], ...] = ()  # where the paper's is out of proportion
    drop_path_rate: float = 0.0

    @property
    def title(self) -> str:
        if not self.sizes:
            return self.arch
        width, depth = (dict(self.sizes)[name] for name in ("embed_dim", "depth"))
        return f"vit of {depth} blocks, {width} wide"


def _sizes(embed_dim: int, depth: int, num_heads: int) -> tuple[tuple[str, int], ...]:
    return (("embed_dim", embed_dim), ("depth", depth), ("num_heads", num_heads))


_SMALL_HEAD = (("head_hidden_dim", 256), ("head_bottleneck_dim", 64))
# Small to large; each costs two to four times the one before. The first is the quickstart's network
# and the second that of the README's curve, on 10,000 images of CIFAR-10; what larger ones should
# see lies between these runs, of 30,000 to 100,000 images, and the 128 million of the paper's
# shortest, and was not measured.
NETWORKS = (
    Network(FREE_VIT, 0.002, 0, 0, _sizes(64, 3, 4), _SMALL_HEAD),
    Network(FREE_VIT, 0.002, 20_000, 0, _sizes(96, 4, 3)),
    Network(FREE_VIT, 0.002, 300_000, 2_000, _sizes(192, 6, 3)),
    Network("vit_tiny", 0.001, 1_000_000, 5_000),
    Network("vit_small", 0.0005, 10_000_000, 20_000, drop_path_rate=0.1),
    Network("vit_base", 0.0005, 100_000_000, 500_000, drop_path_rate=0.1),
)
REDUCED = 2  # so many of the smallest networks are also tried on crops of half the side

# The hours: a share is kept for the start, an evaluation, and a machine that is not always as fast.
RESERVE = 0.1
# The longest published run has 800 epochs; on few images that would be few steps.
MOST_EPOCHS, MOST_STEPS = 800, 50_000

# A batch is the largest that leaves so many steps; the paper's is 512 and leaves 250,000.
BATCHES, SMALL_BATCH = (512, 256, 128), 64
STEPS_FOR_LARGER_BATCH, STEPS_AN_EPOCH = 20_000, 50
# A batch norm in the head speeds the start on few images a step; on fewer still, statistics of so
# few rows say nothing.
BN_BATCH = (16, 128)
# Of the memory that is free; the rest is for what was not counted.
MEMORY_SHARE = {"cuda": 0.9, "mps": 0.6, "cpu": 0.7}

IMAGES_PER_PROTOTYPE = 12  # 4,096 for CIFAR-10, and with the bounds the paper's 65,536 for ImageNet
PROTOTYPES = (1024, 65536)

# The teacher is a mean over about 1 / (1 - momentum) steps.
MOMENTUM_BATCH, MOMENTUM = 512, 0.996  # the paper's
MOMENTUM_RANGE = (0.99, 0.9995)
RUN_PER_MEAN = 15  # how many such means a run should hold

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
# The published long runs of ViT-S and ViT-B end warmer.
LONG_RUN_STEPS, LONG_RUN_TEMP, LONG_RUN_NETWORKS = 100_000, 0.07, ("vit_small", "vit_base")

WARMUP_SHARE = 0.1  # of the run, for the rate and for the temperature: the paper's 10 of 100 epochs
# Below so many epochs one is too coarse a unit for a warm-up.
FEWEST_EPOCHS_TO_WARM = 5

GRAY = 0.95  # share of images without colour from which colour is left alone
LOG_LINES, LOG_EVERY = 100, 10
COPIES, EPOCHS_FOR_COPIES = 5, 20  # checkpoints that are kept for good
SAVE_MINUTES = 15.0


@dataclass(frozen=True)
class CropSizes:
    """Sides in pixels, and shares of a picture's area."""

    patch: int
    globals: int
    locals: int
    number: int  # of local crops
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]

    @property
    def grid(self) -> int:
        """Patches down and across a global crop."""
        return self.globals // self.patch


PATCHES, FEWEST_ACROSS, FEWEST_TINY = (16, 8), 8, 3  # a patch leaves 8 × 8, or 3 × 3 of the least
LARGEST_CROP = 224
# Of the pictures' side, as the paper's 224 is of photographs of 300 to 500. Measured on 5,000 images
# of CIFAR-10 with the second network, ten minutes on one core: k-NN 31.1, 31.6 % (seeds 0, 1) with
# crops of 24 pixels, 30.4, 29.8 % with crops of 32.
CROP_SHARE = 3 / 4
FEWEST_TO_REDUCE = 12  # patches across, of which half are left
LOCAL_SIDE = (96, 224)  # the paper's, of a global crop's; rounded up to whole patches
LOCAL_CROPS, LOCAL_CROPS_SMALL = 8, 4  # for crops of the paper's grid, and below it
TINY_SIDE = 16  # pictures below this hold a stroke or two


def crop_sizes(survey: Survey, reduced: bool = False) -> CropSizes:
    """Crops of three quarters of the pictures' side, at most 224; ``reduced`` ones of half that."""
    side = survey.shorter[1]
    patch = next((p for p in PATCHES if side >= FEWEST_ACROSS * p), 4)
    crop = min(int(CROP_SHARE * side), LARGEST_CROP)
    across = max(crop // patch // (2 if reduced else 1), FEWEST_TINY)
    inner = -(-across * LOCAL_SIDE[0] // LOCAL_SIDE[1])
    tiny = side < TINY_SIDE
    # A box of fewer than 8 × 8 pixels of the picture holds next to nothing.
    smallest = min(max(0.05, math.ceil(100 * (8 / (survey.shorter[1] or 1)) ** 2) / 100), 0.25)
    return CropSizes(
        patch,
        across * patch,
        inner * patch,
        LOCAL_CROPS if across >= 14 else LOCAL_CROPS_SMALL,
        (0.5, 1.0) if tiny else (0.4, 1.0),
        (smallest, 0.5 if tiny else 0.4),
    )


def can_reduce(survey: Survey) -> bool:
    return crop_sizes(survey).grid >= FEWEST_TO_REDUCE


def out_dim(images: int) -> int:
    nearest = 2 ** round(math.log2(max(images / IMAGES_PER_PROTOTYPE, 1)))
    return min(max(nearest, PROTOTYPES[0]), PROTOTYPES[1])


def small_batch(images: int) -> int:
    """The batch of a run that is short of steps: 64, or what leaves two steps an epoch."""
    return min(SMALL_BATCH, 2 ** int(math.log2(max(images // 2, 1))))


def momentum(steps: int, batch: int) -> float:
    """The paper's, stretched to ``batch``; at least so fast that a run holds several means."""
    stretched = MOMENTUM ** (batch / MOMENTUM_BATCH)
    low, high = MOMENTUM_RANGE
    wanted = min(stretched, 1 - RUN_PER_MEAN / max(steps, 1), high)
    return round(max(wanted, low), 4)


def blur_radius(crop: int) -> tuple[float, float]:
    """The paper's 0.1 to 2 pixels of 224, at the same share of ``crop``."""
    return tuple(float(f"{radius * crop / 224:.2g}") for radius in (0.1, 2.0))


def is_gray(survey: Survey) -> bool:
    return survey.gray >= GRAY


def crop_settings(survey: Survey, crops: CropSizes) -> dict[str, Any]:
    """All that a crop is drawn from, by the names of settings."""
    settings: dict[str, Any] = {
        "global_crops_size": crops.globals,
        "local_crops_size": crops.locals,
        "local_crops_number": crops.number,
        "global_crops_scale": crops.global_scale,
        "local_crops_scale": crops.local_scale,
    }
    if survey.digits:
        settings["flip_prob"] = (0.0,) * 3
    if is_gray(survey) or survey.channels != 3:
        settings |= dict.fromkeys(("saturation", "hue", "gray_prob"), (0.0,) * 3)
    if survey.shorter[1] < TINY_SIDE:
        settings |= dict.fromkeys(("blur_prob", "solarize_prob"), (0.0,) * 3)
    elif crops.globals < LARGEST_CROP:
        smallest, largest = blur_radius(crops.globals)
        settings["blur_radius_min"] = (smallest,) * 3
        settings["blur_radius_max"] = (largest,) * 3
    return settings
