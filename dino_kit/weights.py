"""From a checkpoint of any known layout to a backbone.

Layouts: a run's checkpoint, as dino_kit or the reference writes it (networks under ``student`` and
``teacher``, prefixes ``module.`` and ``backbone.``, a head beside the backbone, settings under
``config`` or ``args``), the bare tensors of a backbone, and the same under ``state_dict_ema``, as
the authors of CSWin publish them. What a file says of its architecture is held against its tensors'
shapes, and what the caller says against both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from dino_kit import files, shards
from dino_kit.backbones import recognition
from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.tensor_sizes import some
from dino_kit.config.pixels import AUTO, check_normalize, check_value_range
from dino_kit.data.augment import eval_sizes
from dino_kit.data.pixels import RGB, Pixels
from dino_kit.errors import UserError
from dino_kit.normalize import IMAGENET_MEAN, IMAGENET_STD, statistics

NEWEST = "checkpoint.pth"
_PUBLISHED = "state_dict_ema"  # under which code that trains by timm publishes a network
# What libraries call that which classifies; of it a backbone may have a norm.
_CLASSIFIERS = ("head", "heads", "head_dist", "fc", "classifier")


class EvalTransform(NamedTuple):
    """How images are prepared for a backbone."""

    image_size: int  # the side, in pixels, that the backbone was trained at
    # Of each channel, pixels in [0, 1]; None where a file of other channels than RGB does not say.
    mean: tuple[float, ...] | None = IMAGENET_MEAN
    std: tuple[float, ...] | None = IMAGENET_STD
    pixels: Pixels = RGB  # what an image becomes
    crop_without_resize: bool = False  # a pixel stays as large as it is in the image

    @property
    def sizes(self) -> tuple[int | None, int]:
        """See :func:`~dino_kit.data.augment.eval_sizes`."""
        return eval_sizes(self.image_size, self.crop_without_resize)

    def plain(self) -> dict[str, Any]:
        """As plain data; :meth:`from_plain` reads it."""
        return {
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            **self.pixels.plain(),
            "crop_without_resize": self.crop_without_resize,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> EvalTransform:
        """What :meth:`plain` gave; RGB images, resized, where it does not say."""
        return cls(
            plain["image_size"],
            tuple(plain["mean"]),
            tuple(plain["std"]),
            Pixels.from_plain(plain),
            plain.get("crop_without_resize", False),
        )


class Loaded(NamedTuple):
    """A backbone and where it comes from."""

    backbone: nn.Module  # in eval mode, on the CPU
    transform: EvalTransform
    architecture: dict[str, Any]  # name, and the sizes by which create_backbone built it
    which: str | None  # the network of the checkpoint; None where the file holds one backbone only
    path: str  # the file
    sha256: str
    matched: int  # tensors of the backbone, each found in the file
    epoch: int | None  # epochs done, where the file says so
    step: int | None

    def summary(self) -> str:
        """What was loaded, in a line."""
        of = f"{self.which} of {self.path}" if self.which else self.path
        age = "" if self.epoch is None else f", epoch {self.epoch}"
        return f"loaded {of}{age}: {self.architecture['name']}, {self.matched} tensors matched"


def load_backbone(path: str | Path, which: str = "teacher", **options: Any) -> nn.Module:
    """The backbone of a checkpoint, in eval mode, on the CPU; arguments as :func:`load`."""
    return load(path, which, **options).backbone


def load(
    path: str | Path,
    which: str = "teacher",
    *,
    arch: str | None = None,
    patch_size: int | None = None,
    in_chans: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    mlp_grid: str | None = None,
    arch_options: Sequence[str] | None = None,
    exif: str | None = None,
    value_range: Sequence[float] | None = None,
    normalize: str | Sequence[float] | None = None,
) -> Loaded:
    """Read a backbone and what is known of it; no code in the file is run.

    Args:
        path: a checkpoint, or a run's folder, whose ``checkpoint.pth`` is meant.
        which: network of the checkpoint, ``"teacher"`` or ``"student"``.
        arch: an architecture's name; like all sizes needed only where the file does not tell.
        patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, mlp_grid: as for
            ``create_backbone``.
        arch_options: ``KEY=VALUE`` of a library's model or a CSWin Transformer; see
            :mod:`~dino_kit.config.arch_options`.
        exif, value_range, normalize: what images become, as flags of ``dino-kit train`` say it.

    Raises:
        UserError: the file is missing or no checkpoint; it lacks the network; an argument
            contradicts it; its tensors are not all of those that the backbone has, and no others;
            or the number of heads, which no tensor shows, is neither said nor given.
    """
    path = _file(Path(path))

    def take(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str | None]:
        state, found = _network(content, which, path)
        return content, shards.whole(state), found

    content, state, which = shards.read(path, take)
    said = _settings(content)
    given = {
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "mlp_grid": mlp_grid,
        "arch_options": arch_options,
    }
    name, built_as, sizes = recognition.recognize(state, said, arch, given, path)
    # First weights are drawn only to be replaced, so the caller's random numbers are left alone.
    with torch.random.fork_rng(devices=[]):
        backbone = create_backbone(built_as, **sizes)
    matched = _fill(backbone, _for_backbone(state, backbone), path)
    return Loaded(
        backbone.eval(),
        _transform(said, backbone, exif, value_range, normalize, path),
        {"name": name, **sizes},
        which,
        str(path),
        files.sha256(path),
        matched,
        content.get("epoch") if which else None,
        content.get("step") if which else None,
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / NEWEST).is_file():
        return path / NEWEST
    others = sorted(entry.name for entry in path.iterdir())
    weights = [name for name in others if name.endswith((".pth", ".pt"))]
    if weights:
        raise UserError(
            f"The folder {path} has no {NEWEST}; it has {some(weights)}: give that file's path."
        )
    raise UserError(
        f"The folder {path} has no {NEWEST}, so it is no run's folder; it has "
        f"{some(others) if others else 'nothing in it'}."
    )


def _network(
    content: dict[str, Any], which: str, path: Path
) -> tuple[dict[str, Any], str | None]:
    """The backbone's tensors by their own names, and which network they are of."""
    networks = [key for key, value in content.items() if _is_network(value)]
    which = _PUBLISHED if networks == [_PUBLISHED] else which
    if which in networks:
        state: Mapping[str, Any] = content[which]
    elif networks:
        raise UserError(
            f"{path} holds no network {which!r}; it holds {some(networks)}: choose one by "
            "--checkpoint_key."
        )
    elif any(isinstance(value, Tensor) for value in content.values()):
        state, which = content, None
    else:
        raise UserError(f"{path} holds no weights; what it holds: {some(content) or 'nothing'}.")
    named = {str(name).removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith("backbone.") for name in named):
        # Beside it is DINO's head; a head within it may be the backbone's own, as a ConvNeXt's.
        named = {name: value for name, value in named.items() if not name.startswith("head.")}
    return {name.removeprefix("backbone."): value for name, value in named.items()}, which


def _is_network(value: Any) -> bool:
    return isinstance(value, Mapping) and any(str(name).endswith(".weight") for name in value)


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that wrote the file, by name; none where it does not say."""
    said = content.get("config", content.get("args"))
    said = said if isinstance(said, Mapping) else getattr(said, "__dict__", {})
    return {name: value for name, value in said.items() if value is not None}


def _transform(
    said: Mapping[str, Any],
    backbone: nn.Module,
    exif: str | None,
    value_range: Sequence[float] | None,
    normalize: str | Sequence[float] | None,
    path: Path,
) -> EvalTransform:
    """How images are prepared: as the file says, where it does, else as the caller says."""
    channels = backbone.in_chans
    check_value_range(value_range)
    check_normalize(normalize, channels)
    given = {"exif": exif, "value_range": value_range, "normalize": normalize}
    # A run that knew of these settings says all of them; what is missing there was not set.
    told = "exif" in said
    known = said if told else given
    check_normalize(known.get("normalize"), channels)
    pixels = Pixels.from_plain({**known, "in_chans": channels})
    mean, std = None, None
    if channels == 3 or known.get("normalize") not in (None, AUTO):
        mean, std = statistics(known.get("normalize"), channels)
    size, as_it_is = said.get("global_crops_size"), bool(said.get("crop_without_resize"))
    found = EvalTransform(size or backbone.image_size, mean, std, pixels, as_it_is)
    if exif not in (None, pixels.exif):
        _contradict("exif", exif, pixels.exif, path)
    if value_range is not None and tuple(value_range) != pixels.value_range:
        _contradict("value_range", value_range, pixels.value_range, path)
    if normalize is not None and statistics(normalize, channels) != (mean, std):
        _contradict("normalize", normalize, (*(mean or ()), *(std or ())) or None, path)
    return found


def _contradict(name: str, given: Any, said: Any, path: Path) -> NoReturn:
    given, said = (
        " ".join(f"{x:g}" for x in value) if isinstance(value, list | tuple) else value or "none"
        for value in (given, said)
    )
    raise UserError(f"--{name} {given} contradicts {path}, which says {name} {said}.")


def _for_backbone(state: Mapping[str, Any], backbone: nn.Module) -> Mapping[str, Any]:
    """``state`` by the backbone's names, where it knows others too, and without a classifier."""
    wanted = set(backbone.state_dict())

    def without_classifier(state: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in state.items()
            if name in wanted or name.partition(".")[0] not in _CLASSIFIERS
        }

    own = without_classifier(state)
    if set(own) != wanted and hasattr(backbone, "from_published"):
        return without_classifier(backbone.from_published(state))
    return own


def _fill(backbone: nn.Module, state: Mapping[str, Any], path: Path) -> int:
    """Load ``state`` strictly; return the number of tensors."""
    wanted = backbone.state_dict()
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    if missing or unexpected:
        lacks = f"lacks {some(missing)}" if missing else ""
        more = f"has {some(unexpected)} besides" if unexpected else ""
        raise UserError(
            f"{path} does not fit the backbone that its tensors describe: it "
            f"{' and '.join(filter(None, (lacks, more)))}."
        )
    for name, tensor in wanted.items():
        shape = getattr(state[name], "shape", None)
        if shape != tensor.shape:
            raise UserError(
                f"{path} does not fit the backbone that its tensors describe: {name} is "
                f"{tuple(shape) if shape is not None else type(state[name]).__name__} and should "
                f"be {tuple(tensor.shape)}."
            )
    backbone.load_state_dict(state)
    return len(wanted)
