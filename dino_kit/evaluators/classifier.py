"""A backbone and the linear layer that was trained on it: the file it is kept in, and its use.

The file has the keys of the reference's (``state_dict``, ``optimizer``, ``epoch``, ``best_acc``; the
layer as ``module.linear.…``), and says besides which classes, features, images and backbone the
layer is for. A file of the reference's, its published layers too, says nothing of these.

Legend: B images, S pixels of a side, E width of the features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from dino_kit import files, weights
from dino_kit.backbones.frozen import frozen
from dino_kit.data.augment import center_view
from dino_kit.data.decode import convert, decode
from dino_kit.data.sources.source import read_file
from dino_kit.errors import UserError
from dino_kit.evaluators.linear import LinearFeatures, LinearHead
from dino_kit.normalize import Normalize
from dino_kit.weights import EvalTransform, Loaded

HEAD = "checkpoint_linear.pth"
_TOGETHER = 64  # images that are predicted at once


class SavedHead(NamedTuple):
    """A linear layer and what its file says of it; None where it does not say."""

    path: Path
    head: LinearHead  # on the CPU
    classes: list[str] | None  # names, in the order of the logits
    features: dict[str, Any]  # arguments of LinearFeatures; none where the file does not say
    transform: EvalTransform | None  # how images were prepared
    backbone: dict[str, Any]  # path, sha256, network, and flags of its architecture
    epoch: int | None  # epochs done


class Classifier(nn.Module):
    """Images (B, channels, S, S), normalised, to logits (B, C).

    Attributes:
        classes: names, in the order of the logits; numbers where the layer's file has no names.
        transform: side, mean and deviation of the images that it was trained on, and their channels.
        features, head: what it consists of.
    """

    def __init__(
        self,
        features: LinearFeatures,
        head: LinearHead,
        classes: Sequence[str] | None,
        transform: EvalTransform,
    ):
        super().__init__()
        self.features, self.head, self.transform = features, head, transform
        self.classes = list(classes or map(str, range(head.linear.out_features)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def prepare(self, image: str | PathLike | Image.Image) -> Tensor:
        """An image, or its file, as the network takes it: (channels, S, S) float32, on the CPU.

        Raises:
            UserError: it cannot be read as an image of the network's channels, or is too small.
        """
        name = "The image" if isinstance(image, Image.Image) else str(image)
        if isinstance(image, Image.Image):
            image = convert(image, name, self.transform.pixels)
        else:
            image = decode(read_file(image), name, self.transform.pixels)
        pixels = center_view(image, *self.transform.sizes, name)
        normalize = Normalize(self.transform.mean, self.transform.std)
        return normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1))

    def predict(
        self, images: Sequence[str | PathLike | Image.Image], top: int = 1
    ) -> list[list[tuple[str, float]]]:
        """For each image its ``top`` classes, the likeliest first, each with its probability."""
        top = min(top, len(self.classes))
        device = self.head.linear.weight.device
        found = []
        for start in range(0, len(images), _TOGETHER):
            batch = torch.stack([self.prepare(x) for x in images[start : start + _TOGETHER]])
            with frozen(self, device):
                best = self(batch.to(device)).softmax(dim=1).topk(top, dim=1)  # (B, top)
            for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                names = [self.classes[place] for place in places]
                found.append(list(zip(names, values, strict=True)))
        return found


def load_classifier(
    path: str | Path,
    backbone: str | Path | None = None,
    *,
    which: str | None = None,
    n_last_blocks: int | None = None,
    avgpool_patchtokens: bool | None = None,
) -> Classifier:
    """The classifier that ``dino-kit linear`` trained, in eval mode, on the CPU.

    Args:
        path: a trained layer's file, or the folder with it.
        backbone: the checkpoint it was trained on, or its run's folder. Left out, it is looked for
            beside the layer and then where it was; a published layer does not say where.
        which: network of that checkpoint.
        n_last_blocks, avgpool_patchtokens: the layer's features; left out, what its file says, or
            as :class:`~dino_kit.evaluators.linear.LinearFeatures` has them.

    Raises:
        UserError: a file is missing or no such thing; the backbone has changed since; or an
            argument contradicts the layer.
    """
    saved = read_head(find_head(path))
    network, flags = (saved.backbone.get(name) for name in ("network", "flags"))
    checkpoint = Path(backbone) if backbone is not None else _find_backbone(saved)
    loaded = weights.load(checkpoint, which or network or "teacher", **(flags or {}))
    check_backbone(saved, loaded)
    features = features_for(saved, loaded.backbone, n_last_blocks, avgpool_patchtokens)
    transform = saved.transform or loaded.transform
    return Classifier(features, saved.head, saved.classes, transform).eval()


def find_head(path: str | Path) -> Path:
    """The file of a trained layer; of a folder, the one in it.

    Raises:
        UserError: the folder has none, or several to choose from.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / HEAD).is_file():
        return path / HEAD
    others = sorted(entry.name for entry in path.glob(f"{Path(HEAD).stem}_*.pth"))
    if len(others) == 1:
        return path / others[0]
    if others:
        raise UserError(f"The folder {path} has several heads: {', '.join(others)}; name one.")
    raise UserError(f"The folder {path} has no {HEAD}; `dino-kit linear` writes one.")


def read_head(path: Path) -> SavedHead:
    """A trained layer; no code in the file is run.

    Raises:
        UserError: the file is missing, or holds no linear layer.
    """
    content = files.read_weights(path)
    state = content.get("state_dict", content)
    state = unwrapped(state) if isinstance(state, Mapping) else {}
    weight, bias = (state.get(f"linear.{name}") for name in ("weight", "bias"))
    shapes = [tuple(getattr(tensor, "shape", ())) for tensor in (weight, bias)]
    if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
        raise UserError(
            f"{path} holds no linear head: tensors linear.weight (classes, width) and linear.bias "
            "(classes) are needed, as `dino-kit linear` and the reference write them."
        )
    head = LinearHead(shapes[0][1], shapes[0][0])
    head.load_state_dict({"linear.weight": weight, "linear.bias": bias})
    said = content.get("transform")
    return SavedHead(
        path,
        head,
        content.get("classes"),
        content.get("features", {}),
        said and EvalTransform.from_plain(said),
        content.get("backbone", {}),
        content.get("epoch"),
    )


def wrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors under the names that the reference's data-parallel wrapper gives."""
    return {f"module.{name}": value for name, value in state.items()}


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the layer's own names."""
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def places(saved: SavedHead, names: Sequence[str]) -> list[int]:
    """The layer's class of each of the classes ``names``.

    Raises:
        UserError: the layer does not know one; or it has no names, and another number of classes.
    """
    if saved.classes is None:
        number = saved.head.linear.out_features
        if len(names) != number:
            raise UserError(
                f"{saved.path} is for {number} classes without names, and the images have "
                f"{len(names)}; all are needed, to know which is which."
            )
        return list(range(number))
    unknown = [name for name in names if name not in saved.classes]
    if unknown:
        raise UserError(
            f"The images have classes that {saved.path} was not trained on: "
            f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}."
        )
    return [saved.classes.index(name) for name in names]


def check_backbone(saved: SavedHead, loaded: Loaded) -> None:
    """Raises :class:`UserError` where the layer was trained on other weights than ``loaded``."""
    then = (saved.backbone.get("sha256"), saved.backbone.get("network"))
    if saved.backbone and then != (loaded.sha256, loaded.which):
        network = f"the {then[1]} of " if then[1] else ""
        raise UserError(
            f"{saved.path} was trained on other weights than those of {loaded.path}: on {network}"
            f"{saved.backbone['path']} as it was then. Train a head anew by `dino-kit linear`; a "
            "checkpoint that is kept for good, such as checkpoint0020.pth, keeps its head."
        )


def features_for(
    saved: SavedHead,
    backbone: nn.Module,
    n_last_blocks: int | None = None,
    avgpool_patchtokens: bool | None = None,
) -> LinearFeatures:
    """The features that a layer takes, by its file and by what is given.

    Raises:
        UserError: what is given contradicts the file, or the width is another than the layer's.
    """
    given = {"n_last_blocks": n_last_blocks, "avgpool_patchtokens": avgpool_patchtokens}
    for name, value in given.items():
        said = saved.features.get(name, value)
        if value not in (None, said):
            raise UserError(f"--{name} {value} contradicts {saved.path}, which has {name} {said}.")
        given[name] = said
    features = LinearFeatures(backbone, **given)
    width = saved.head.linear.in_features
    if width != features.embed_dim:
        raise UserError(
            f"{saved.path} is for features {width} wide, and these are {features.embed_dim}: "
            f"{features.n_last_blocks} blocks of {backbone.embed_dim}"
            f"{' and an average' if features.avgpool_patchtokens else ''}; --n_last_blocks and "
            "--avgpool_patchtokens choose them."
        )
    return features


def _find_backbone(saved: SavedHead) -> Path:
    if not saved.backbone:
        raise UserError(
            f"{saved.path} does not say on which backbone it was trained; give its checkpoint too."
        )
    found = list(_candidates(saved))
    for place in found:
        if files.sha256(place) == saved.backbone["sha256"]:
            return place
    if found:
        return found[0]  # check_backbone says what is wrong with it
    raise UserError(
        f"The backbone of {saved.path} was {saved.backbone['path']}, and is neither there nor "
        "beside it; give its checkpoint too."
    )


def _candidates(saved: SavedHead) -> Iterator[Path]:
    """Where the backbone may lie: beside the layer, as a folder can be moved, or where it was."""
    was = Path(saved.backbone["path"])
    for place in (saved.path.parent / was.name, was):
        if place.is_file():
            yield place
