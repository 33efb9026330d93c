"""``dino-kit quickstart``: pretrain, evaluate and look, on digits that are on the machine already."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dino_kit import distributed, evaluation, files, log, reporting, weights
from dino_kit.assemble import assemble, untrained_backbone
from dino_kit.config import fields, recipe
from dino_kit.config.evaluate import QuickstartConfig
from dino_kit.config.train import TrainConfig
from dino_kit.data.sources.digits import DIGITS, DIGITS_MOVED, DigitsSource
from dino_kit.data.sources.opening import open_labelled_sources
from dino_kit.errors import UserError
from dino_kit.evaluators.gallery import Page, Picture, show
from dino_kit.evaluators.knn import knn
from dino_kit.features import extract

_K, _TEMPERATURE = 20, 0.07  # the reference's, and not chosen for these images
_ROWS = {"pixels": "raw pixels", "untrained": "untrained backbone", "teacher": "teacher"}
_COLUMNS = {DIGITS: "as they are", DIGITS_MOVED: "moved and larger"}


def run(config: QuickstartConfig) -> None:
    """Pretrain a small ViT on digits; print and write what its teacher's features are worth.

    Raises:
        UserError: the folder holds another run, or something here has the name of the data.
    """
    began = time.monotonic()
    for path in map(Path, _COLUMNS):
        if path.exists():
            raise UserError(
                f"The quickstart's own digits cannot be had here, because {path.absolute()} takes "
                "their name; start in another folder."
            )
    # The network is small: a second thread would mostly wait, and a worker makes crops meanwhile.
    torch.set_num_threads(1)
    settings = {name: getattr(config, name) for name in ("output_dir", "seed", "resume")}
    train = fields.create(TrainConfig, recipe.read(TrainConfig, "quickstart") | settings)
    assemble(train).train()

    out = Path(config.output_dir)
    device = distributed.choose_device(train.device)
    loaded = weights.load(out)
    size = loaded.transform.image_size
    usual = {"image_size": size, "mean": loaded.transform.mean, "std": loaded.transform.std}
    # Pixels are compared as they are: from 0 for paper to 1 for ink.
    networks = {
        "pixels": (_Pixels(size), usual | {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        "untrained": (untrained_backbone(train), usual),
        "teacher": (loaded.backbone, usual),
    }
    results = {
        name: {data: _accuracy(network, transform, data, device) for data in _COLUMNS}
        for name, (network, transform) in networks.items()
    }
    sheets = _look(loaded.backbone, size, out / "attention", config.output_dir)
    files.write_json(
        out / "quickstart.json",
        {
            "top1_percent": results,
            "k": _K,
            "temperature": _TEMPERATURE,
            "seconds": round(time.monotonic() - began),
            "device": str(device),
            **evaluation.origin(loaded),
            "settings": fields.to_plain(train),
            "versions": evaluation.versions(),
        },
    )
    page = reporting.write(config.output_dir, device=str(device))
    _tell(results, out, sheets, page)


def _tell(results: dict[str, dict[str, float]], out: Path, sheets: int, page: Path) -> None:
    log.say("")
    log.paragraph(
        f"k-NN: of the test digits, which training never saw, how many percent are of the class "
        f"that the {_K} nearest training digits vote for; nearest by their pixels, by the network "
        "before training, and by the teacher that it became."
    )
    log.table(
        "",
        ["nearest by", *_COLUMNS.values()],
        [
            (_ROWS[name], *(f"{percent:.1f}" for percent in by_data.values()))
            for name, by_data in results.items()
        ],
    )
    log.paragraph(
        "Pixels do well only while nothing moves: every digit of this collection lies in the "
        "middle, at one size, so equal digits have equal pixels. The network saw no label; from "
        "crops alone it learnt what stays the same when a digit moves and grows."
    )
    log.say("")
    log.paragraph(
        f"Everything is in {out}: the run, quickstart.json, and attention/, with a picture of "
        f"each head for {sheets} test digits. Open in a browser {page}, the whole run on one page, "
        f"and {out / 'attention' / 'attention.html'}, to explore what every patch looks at."
    )
    log.say("\nNext, with images of your own, labelled or not:")
    log.say("  dino-kit train --arch vit_small --patch_size 16 --data_path FOLDER --output_dir OUT")
    log.say("  dino-kit attention OUT --image_path PICTURE --html")
    log.say("  dino-kit report OUT")


class _Pixels(nn.Module):
    """What there is without a network: the pixels of an image, as its features."""

    def __init__(self, size: int):
        super().__init__()
        self.embed_dim = 3 * size * size

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def _accuracy(
    network: nn.Module, transform: dict[str, Any], data: str, device: torch.device
) -> float:
    """k-NN top-1, in percent, of the test digits of ``data`` among the training digits."""
    arrays: list[Tensor] = []
    for source in open_labelled_sources(data):
        arrays += extract(network, source, device=device, description="", **transform)[:2]
    return knn(*arrays, [_K], _TEMPERATURE)[_K]["top1"]


def _look(backbone: nn.Module, size: int, folder: Path, run: str) -> int:
    """Attention for one test digit of each class; returns how many that are."""
    source = DigitsSource("test")
    labels = [source.label(index) for index in range(len(source))]
    pictures = [
        Picture(
            f"test digit {name}", folder / f"digit{name}",
            Image.fromarray(source.read(labels.index(label))),
        )
        for label, name in enumerate(source.classes)
    ]  # fmt: skip
    origin = f"The network is the teacher of {run}, pretrained by dino-kit quickstart."
    page = Page(folder / "attention.html", len(pictures), origin)
    # At twice the size of the training crops there are 6 × 6 patches to look at, not 3 × 3.
    show(backbone, pictures, image_size=(2 * size, 2 * size), page=page)
    return len(pictures)
