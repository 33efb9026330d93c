"""What a run is worth while it goes on: the same few images, looked at again and again.

A probe costs the same at every point and however large the data is: it takes a fixed part of the
images, evenly spread. Without labels it tells in how many directions the embeddings of those images
extend and how often two crops of an image find each other, and draws what the network makes of
eight of them; with labels it also classifies by nearest neighbours.

Legend: n images, D width, S pixels of a side.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dino_kit import figures, files, geometry, log
from dino_kit.backbones.interface import HasSelfAttention
from dino_kit.data.augment import center_view, render
from dino_kit.data.bands import picture
from dino_kit.data.crops import View, sample_crop
from dino_kit.data.decode import decode
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.source import Source, Subset
from dino_kit.evaluators.attention import attention_maps, to_tensor
from dino_kit.evaluators.knn import knn
from dino_kit.evaluators.patches import look, similarity_map
from dino_kit.features import Features, embed, extract, require_some
from dino_kit.randomness import stream
from dino_kit.search import nearest
from dino_kit.weights import EvalTransform

LOOKS = "looks"  # the folder of the sheets
_WATCHED = 1000  # images whose embeddings are compared
_CROPPED = 256  # of them, those of which two crops are looked for
_SHOWN, _NEIGHBOURS = 8, 5
_BANK, _QUERIES = 10_000, 5_000  # labelled images that are searched and classified
_K, _TEMPERATURE = 20, 0.07  # the reference's
_SIDE = 112  # pixels of a picture on the sheet
_RANK_STEP, _RETRIEVAL_STEP = 0.01, 0.005  # what counts as a rise: relative; of all images


class Probe:
    """Measures a backbone, and draws what it makes of eight images.

    Args:
        source: the images that are trained on.
        labelled: bank and queries; None where there are no labels to go by.
        views: the two global views, whose crops have to find each other.
        seed: the run's; the crops are a function of it and so the same at every point.
        transform: how the images are prepared, of S pixels a side.
        folder: the run's folder; sheets go into its ``looks/``.
        device: where the backbone is.
        num_workers: processes that read images; 0 for this one.
    """

    def __init__(
        self,
        source: Source,
        labelled: tuple[Source, Source] | None,
        *,
        views: Sequence[View],
        seed: int,
        transform: EvalTransform,
        folder: str | Path,
        device: torch.device,
        num_workers: int = 0,
    ):
        self.images = evenly(source, _WATCHED)
        some = evenly(self.images, _CROPPED)
        self.crops = [
            _Crops(some, view, seed, number, transform.pixels) for number, view in enumerate(views)
        ]
        self.labelled = None
        if labelled is not None:
            self.labelled = evenly(labelled[0], _BANK), evenly(labelled[1], _QUERIES)
        self.transform, self.folder, self.device = transform, Path(folder), device
        self._how = {"device": device, "num_workers": num_workers, "description": ""}

    def __call__(
        self, backbone: nn.Module, epoch: int, earlier: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, Any]:
        """Probe ``backbone`` after ``epoch`` epochs; ``earlier`` are the results before this one.

        Returns:
            Plain values by name: ``effective_rank`` and ``view_retrieval`` (0 to 1), with labels
            ``knn_top1`` in percent and how it was measured; the ``sheet``'s path below the folder
            unless it could not be written,
            a ``sentence`` about what still rises, the number of ``images``, and ``seconds``.
        """
        began = time.monotonic()
        features, kept, left_out = self._embed(backbone, self.images)
        require_some(self.images, len(kept), left_out)
        images, embeddings = Subset(self.images, kept.tolist()), F.normalize(features, dim=1)
        first, second = self._pairs(backbone)
        result = {
            "epoch": epoch,
            "effective_rank": float(geometry.effective_rank(embeddings)),
            "view_retrieval": float(geometry.view_retrieval(first, second)),
            "images": len(images),
        }
        if self.labelled is not None:
            result |= self._classify(backbone)
        result["sentence"] = sentence(result, earlier)
        sheet = self._sheet(backbone, images, embeddings, result)
        path = self.folder / LOOKS / f"epoch{epoch:04}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_write(path) as file:
                sheet.save(file, format="PNG")
            result["sheet"] = f"{LOOKS}/{path.name}"
        except OSError as error:  # no reason to end the run, nor to lose the figures
            log.notice(f"{path} could not be written ({error.strerror}); there is no such sheet.")
        return result | {"seconds": round(time.monotonic() - began, 1)}

    def _pairs(self, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        """Of each image the embeddings (n, D) of its two crops, where both can be had."""
        first, second = (
            self._embed(backbone, crops, crop_without_resize=True) for crops in self.crops
        )
        return (
            F.normalize(one.features[torch.isin(one.kept, other.kept)], dim=1)
            for one, other in ((first, second), (second, first))
        )

    def _embed(self, backbone: nn.Module, source: Source, **other: Any) -> Features:
        return embed(backbone, source, **self.transform._asdict() | other, **self._how)

    def _classify(self, backbone: nn.Module) -> dict[str, Any]:
        bank, queries = (
            extract(backbone, source, **self.transform._asdict(), **self._how)
            for source in self.labelled
        )
        k = min(_K, len(bank.features))
        scores = knn(
            bank.features, bank.labels, queries.features, queries.labels, [k], _TEMPERATURE,
            search=nearest,
        )[k]  # fmt: skip
        return {
            "knn_top1": scores["top1"],
            "knn_k": k,
            "knn_bank": len(bank.features),
            "knn_queries": len(queries.features),
        }

    def _sheet(
        self, backbone: nn.Module, images: Source, embeddings: Tensor, result: Mapping[str, Any]
    ) -> Image.Image:
        """Eight images, each with what the network attends to and its five nearest images."""
        shown = evenly(images, _SHOWN).indices
        count = min(_NEIGHBOURS + 1, len(embeddings))
        similarity, index = nearest(embeddings, embeddings[shown], count)
        colours = figures.colour_table()
        panels: list[tuple[str, str, Image.Image]] = []
        for row, place in enumerate(shown):
            view = self._view(images, place)
            shown_image = self._picture(view)
            panels.append((f"image {row + 1}", "", shown_image))
            seen = figures.overlay(shown_image, self._map(backbone, view), colours)
            panels.append((_attends(backbone)[0], "", seen))
            others = [
                (float(s), int(i))
                for s, i in zip(similarity[row], index[row], strict=True)
                if int(i) != place
            ]
            panels += [
                (f"{likeness:.3f}", "", self._picture(self._view(images, other)))
                for likeness, other in others[: count - 1]
            ]
        return figures.sheet(
            f"Epoch {result['epoch']}",
            f"{_figures(result)}. In each row an image, {_attends(backbone)[1]}, and the nearest "
            "images with their cosine similarity.",
            panels,
            columns=len(panels) // len(shown),
        )

    def _map(self, backbone: nn.Module, view: np.ndarray) -> np.ndarray:
        """The mean of the heads' attention, or each patch's similarity to the whole: (h, w)."""
        seen = to_tensor(view, self.transform.mean, self.transform.std).to(self.device)
        if isinstance(backbone, HasSelfAttention):
            return attention_maps(backbone, seen).mean(dim=0).numpy()
        return similarity_map(look(backbone, seen)).numpy()

    def _view(self, images: Source, place: int) -> np.ndarray:
        """An image as the network sees it, (S, S, C)."""
        name = images.name(place)
        image = decode(images.read(place), name, self.transform.pixels)
        return center_view(image, *self.transform.sizes, name)

    def _picture(self, view: np.ndarray) -> Image.Image:
        """It as it is shown on the sheet."""
        return _enlarged(picture(decode(view, "the view", self.transform.pixels)))


class _Crops:
    """Of each image of ``source`` one crop of ``view``, the same each time it is read."""

    classes = None

    def __init__(self, source: Source, view: View, seed: int, number: int, pixels: Pixels):
        self.source, self.view, self.pixels = source, view, pixels
        self.seed, self.number = seed, number
        self.root = source.root

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> np.ndarray:
        image = decode(self.source.read(index), self.name(index), self.pixels)
        numbers = stream("probe crop", self.seed, index, self.number)
        parameters = sample_crop(self.view, image.height, image.width, numbers, self.name(index))
        return render(image, parameters)

    def label(self, index: int) -> None:
        return None

    def key(self, index: int) -> str:
        return self.source.key(index)

    def name(self, index: int) -> str:
        return self.source.name(index)


def _attends(backbone: nn.Module) -> tuple[str, str]:
    """What the second column shows, in a word and in a few."""
    if isinstance(backbone, HasSelfAttention):
        return "attention", "what the class token attends to"
    return "similarity", "how like the whole each patch is"


def evenly(source: Source, most: int) -> Subset:
    """At most ``most`` images of ``source``, evenly spread over it, and so over its classes."""
    count = min(most, len(source))
    return Subset(source, [index * len(source) // count for index in range(count)])


def sentence(result: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> str:
    """The figures of a probe, and whether they still rise since the one before."""
    figures_now = _figures(result)
    if not earlier:
        return f"{figures_now}."
    before = earlier[-1]
    rose = {
        "effective rank": result["effective_rank"] > before["effective_rank"] * (1 + _RANK_STEP),
        "view retrieval": result["view_retrieval"] > before["view_retrieval"] + _RETRIEVAL_STEP,
    }
    since = f"since epoch {before['epoch']}"
    rising = [name for name, rises in rose.items() if rises]
    still = {
        0: f"neither effective rank nor view retrieval has risen {since}",
        1: f"of the two, {rising[0] if rising else ''} still rises ({since})",
        2: f"both still rise ({since})",
    }[len(rising)]
    return f"{figures_now}; {still}."


def _figures(result: Mapping[str, Any]) -> str:
    parts = [
        f"effective rank {result['effective_rank']:.1f}",
        f"view retrieval {100 * result['view_retrieval']:.1f} %",
    ]
    if "knn_top1" in result:
        parts.insert(0, f"k-NN {result['knn_top1']:.1f} %")
    return ", ".join(parts)


def _enlarged(image: Image.Image) -> Image.Image:
    small = image.width < _SIDE
    return image.resize((_SIDE, _SIDE), Image.Resampling[("LANCZOS", "NEAREST")[small]])
