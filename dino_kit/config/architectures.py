"""Names of architectures: the sizes of those that are built here, and whose the others are."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from dino_kit.config.fields import nearest
from dino_kit.errors import UserError

# Width, blocks, heads; the MLP is four times as wide where nothing else is said (Dosovitskiy et al.,
# Touvron et al. 2021; the giant, ViT-G, is that of Zhai et al. 2022, "Scaling vision transformers").
VIT_SIZES: dict[str, dict[str, int | float]] = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "vit_giant": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 8192 / 1664},
}
FREE_VIT = "vit"  # sizes are given one by one
# Width and blocks (Touvron et al. 2021, "ResMLP").
RESMLP_SIZES = {
    "resmlp_s12": {"embed_dim": 384, "depth": 12},
    "resmlp_s24": {"embed_dim": 384, "depth": 24},
    "resmlp_s36": {"embed_dim": 384, "depth": 36},
    "resmlp_b24": {"embed_dim": 768, "depth": 24},
}
FREE_RESMLP = "resmlp"
# Width, blocks, heads and, of the blocks, the last so many with Re-Attention (Zhou et al. 2021,
# published code); the MLP is three times as wide.
DEEPVIT_SIZES = {
    "deepvit_s": {"embed_dim": 396, "depth": 16, "num_heads": 12, "reattention_blocks": 5},
    "deepvit_l": {"embed_dim": 420, "depth": 32, "num_heads": 12, "reattention_blocks": 12},
}
FREE_DEEPVIT = "deepvit"
# Width of the first stage; blocks, heads and width of stripes of each of four stages, for images of
# 224 pixels (Dong et al. 2021, published code); the MLP is four times as wide.
CSWIN_SIZES = {
    "cswin_tiny": {
        "embed_dim": 64, "depths": [1, 2, 21, 1], "heads": [2, 4, 8, 16],
        "split_sizes": [1, 2, 7, 7],
    },
    "cswin_small": {
        "embed_dim": 64, "depths": [2, 4, 32, 2], "heads": [2, 4, 8, 16],
        "split_sizes": [1, 2, 7, 7],
    },
    "cswin_base": {
        "embed_dim": 96, "depths": [2, 4, 32, 2], "heads": [4, 8, 16, 32],
        "split_sizes": [1, 2, 7, 7],
    },
    "cswin_large": {
        "embed_dim": 144, "depths": [2, 4, 32, 2], "heads": [6, 12, 24, 24],
        "split_sizes": [1, 2, 7, 7],
    },
}  # fmt: skip
FREE_CSWIN = "cswin"
# Whose Re-Attention's maps are multiplied by 1/√(width of a head): no tensor shows it.
SCALED_REATTENTION = ("deepvit_s",)
# Width, blocks, heads and the MLP's width over the tokens' (Yuan et al. 2021, published code).
T2T_SIZES = {
    "t2t_vit_7": {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0},
    "t2t_vit_10": {"embed_dim": 256, "depth": 10, "num_heads": 4, "mlp_ratio": 2.0},
    "t2t_vit_12": {"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0},
    "t2t_vit_14": {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0},
    "t2t_vit_19": {"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0},
    "t2t_vit_24": {"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0},
}
FREE_T2T = "t2t_vit"
# How a ResMLP, whose token mixing is made for one grid of patches, meets another: it carries the
# mixing over, or resizes the image. The first is what it does where nothing else is said: in equal
# time its features were the better ones (README, "Without attention").
MLP_GRIDS = ("mix", "resize")
MLP_GRID = MLP_GRIDS[0]

# fmt: off
_TORCHVISION = [
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny",
    "densenet121", "densenet161", "densenet169", "densenet201", "efficientnet_b0",
    "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4",
    "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l",
    "efficientnet_v2_m", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mobilenet_v2",
    "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_16gf", "regnet_x_1_6gf",
    "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf", "regnet_x_8gf",
    "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf",
    "regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf", "resnet101", "resnet152", "resnet18",
    "resnet34", "resnet50", "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
    "squeezenet1_0", "squeezenet1_1", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s",
    "swin_v2_t", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19",
    "vgg19_bn", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2",
    "wide_resnet50_2",
]
# fmt: on
_XCIT = [
    f"xcit_{size}_p{patch}"
    for size in ("nano_12", "tiny_12", "small_12", "tiny_24", "small_24", "medium_24", "large_24")
    for patch in (16, 8)
]
# What the reference calls them, and where they are.
ALIASES = {
    "deit_tiny": "vit_tiny",
    "deit_small": "vit_small",
    **{name: f"torchvision:{name}" for name in _TORCHVISION},
    **{name: f"timm:{name}_224" for name in _XCIT},
}


class Family(NamedTuple):
    """Architectures of one kind."""

    title: str  # what a sentence calls one of them
    free: str  # the name whose sizes are given one by one; of a library how its names are written
    sizes: dict[str, dict[str, Any]]  # of the other names
    needed: tuple[str, ...]  # the sizes that the free name must be given
    optional: tuple[str, ...] = ("mlp_ratio",)  # the sizes that it may be given besides
    settings: tuple[str, ...] = ()  # what every name may be given, and not every family
    unseen: tuple[str, ...] = ()  # the sizes without a flag that show in no tensor
    is_built_here: bool = True  # or by a library
    takes_patch_size: bool = True
    patch_size: int | None = None  # where it is the family's own, and not each model's


VIT = Family("a vision transformer", FREE_VIT, VIT_SIZES, ("embed_dim", "depth", "num_heads"))
RESMLP = Family(
    "a ResMLP", FREE_RESMLP, RESMLP_SIZES, ("embed_dim", "depth"), settings=("mlp_grid",)
)
DEEPVIT = Family(
    "a DeepViT",
    FREE_DEEPVIT,
    DEEPVIT_SIZES,
    ("embed_dim", "depth", "num_heads"),
    ("mlp_ratio", "reattention_blocks"),
)
T2T = Family(
    "a T2T-ViT",
    FREE_T2T,
    T2T_SIZES,
    ("embed_dim", "depth", "num_heads"),
    takes_patch_size=False,
    patch_size=16,
)
CSWIN = Family(
    "a CSWin Transformer",
    FREE_CSWIN,
    CSWIN_SIZES,
    ("embed_dim",),
    # The authors' models for 384 pixels have the tensors of those for 224, and other stripes.
    unseen=("heads", "split_sizes"),
    takes_patch_size=False,
    patch_size=32,
)
FAMILIES = (VIT, RESMLP, DEEPVIT, T2T, CSWIN)
BUILDABLE = tuple(name for family in FAMILIES for name in (*family.sizes, family.free))


def _library(title: str, form: str) -> Family:
    return Family(title, form, {}, (), optional=(), is_built_here=False, takes_patch_size=False)


# By what stands before the colon of their models' names.
LIBRARIES = {
    "timm": _library("a model of timm", "timm:NAME"),
    "torchvision": _library("a model of torchvision", "torchvision:NAME"),
    "hf": _library("a model of Hugging Face transformers", "hf:FOLDER"),
    "python": _library("a model of the user's own", "python:PACKAGE.MODULE:CALLABLE"),
}


def family_of(name: str) -> Family:
    """The family of an architecture.

    Raises:
        UserError: as :func:`canonical`.
    """
    name = canonical(name)
    library, colon, _ = name.partition(":")
    if colon:
        return LIBRARIES[library]
    return next(family for family in FAMILIES if name in (*family.sizes, family.free))


def canonical(name: str) -> str:
    """The one name of an architecture that has two; a library's own names are not looked up.

    Raises:
        UserError: there is no such architecture; the sentence names the nearest.
    """
    name = ALIASES.get(name, name)
    library, colon, rest = name.partition(":")
    if library in LIBRARIES and colon:
        form = LIBRARIES[library].free
        if not rest or form.count(":") == 2 and not re.fullmatch(r"[\w.]+:[\w.]+", rest):
            raise UserError(f"--arch is {name!r}; of {library} it is written {form}.")
        return name
    if name not in BUILDABLE:
        forms = ", ".join(family.free for family in LIBRARIES.values())
        raise UserError(
            f"--arch is {name!r}; it takes {', '.join(BUILDABLE)}, a model of a library as {forms}, "
            f"or a name of the reference's{nearest(name, (*BUILDABLE, *ALIASES))}"
        )
    return name
