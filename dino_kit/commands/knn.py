"""``dino-kit knn``: weighted k-nearest-neighbour accuracy of a checkpoint on labelled images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kit import distributed, evaluation, files, log
from dino_kit.config.evaluate import KnnConfig
from dino_kit.data.loader import default_workers
from dino_kit.errors import UserError
from dino_kit.evaluators.knn import knn
from dino_kit.evaluators.shares import joined_features
from dino_kit.features import labels_of
from dino_kit.weights import Loaded

# The reference's four files of features, and one that says where they come from.
_FILES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")
_ORIGIN = "features.json"


def run(config: KnnConfig) -> None:
    """Classify each query by its neighbours; print a table and write it as JSON.

    Of several processes each makes a share of the features; the main one searches.

    Raises:
        UserError: checkpoint, data and flags do not fit; nothing is written then.
    """
    files.require_folder("output_dir", config.output_dir)
    files.require_folder("dump_features", config.dump_features)
    if config.load_features and not distributed.is_main():
        return
    if config.load_features:
        target = Path(config.output_dir or config.load_features) / "knn.json"
        arrays, origin = _read(Path(config.load_features))
        if config.weights:
            log.notice(f"--load_features reads features, so {config.weights} is not used.")
    else:
        loaded = evaluation.load_checkpoint(config)
        target = Path(f"{evaluation.place(config.output_dir, loaded, 'knn')}.json")
        device = distributed.choose_device(config.device)
        try:
            distributed.start(device)  # before the images are listed, which one process does
            arrays, origin = _extract(config, loaded, target, device)
        finally:
            distributed.stop()
        if not distributed.is_main():
            return

    train, train_labels, test, test_labels = arrays
    with log.progress(len(test), "neighbours") as advance:
        results = knn(
            train, train_labels, test, test_labels, config.nb_knn, config.temperature,
            advance=advance,
        )  # fmt: skip
    counts = {
        "train_images": len(train),
        "test_images": len(test),
        "classes": int(max(train_labels.max(), test_labels.max())) + 1,
    }
    chance = 100.0 * float((test_labels == train_labels.mode().values).double().mean())
    if config.dump_features:
        _write(Path(config.dump_features), arrays, origin)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(
        target,
        {
            "results": {str(k): percents for k, percents in results.items()},
            "largest_class_percent": chance,
            "temperature": config.temperature,
            **counts,
            **origin,
            **evaluation.repetition("knn", config),
        },
    )
    rows = [(str(k), *map(_percent, both.values())) for k, both in results.items()]
    log.table("k-NN accuracy, %", ["k", "top-1", "top-5"], rows)
    log.say(
        f"{counts['test_images']:,} images classified by {counts['train_images']:,} in "
        f"{counts['classes']} classes; answering always with the largest class gives {chance:.2f} %"
    )
    log.say(f"written to {target}")


def _extract(
    config: KnnConfig, loaded: Loaded, target: Path, device: torch.device
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """L2-normalised features and labels of the bank and of the queries, and their origin."""
    transform = evaluation.transform(loaded, config.image_size)
    sources = evaluation.labelled_sources(config, target)
    arrays: list[Tensor] = []
    left_out: dict[str, dict[str, str]] = {}
    for source, role in zip(sources, ("bank", "queries"), strict=True):
        labels = labels_of(source)
        features, kept, left_out[role] = joined_features(
            loaded.backbone,
            source,
            transform,
            batch_size=config.batch_size_per_gpu,
            num_workers=default_workers() if config.num_workers is None else config.num_workers,
            device=device,
            description=f"features ({role})",
        )
        arrays += [F.normalize(features, dim=1), labels[kept]]
    origin = {
        **evaluation.origin(loaded),
        "transform": evaluation.described(transform),
        "data": evaluation.data_flags(config),
        "read": dict(zip(("bank", "queries"), (source.root for source in sources), strict=True)),
        "left_out": left_out,
        "class_names": sources[0].classes,
        "device": str(device),
    }
    return tuple(arrays), origin


def _write(folder: Path, arrays: tuple[Tensor, ...], origin: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(_FILES, arrays, strict=True):
        files.write_weights(folder / name, array)
    files.write_json(folder / _ORIGIN, origin)
    log.say(f"features written to {folder}")


def _read(folder: Path) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What :func:`_write` or the reference wrote to ``folder``."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"--load_features {folder} lacks {', '.join(missing)}; --dump_features writes them."
        )
    arrays = tuple(_read_tensor(folder / name) for name in _FILES)
    origin: dict[str, Any] = {"features": {"path": str(folder.absolute())}}
    origin["features"] |= {name: files.sha256(folder / name) for name in _FILES}
    if (folder / _ORIGIN).is_file():
        try:
            text = (folder / _ORIGIN).read_text(encoding="utf-8")
            origin["features"]["origin"] = json.loads(text)
        except ValueError as error:
            raise UserError(f"{folder / _ORIGIN} is damaged: {error}.") from error
    return arrays, origin


def _read_tensor(path: Path) -> Tensor:
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything at a damaged file
        raise UserError(f"{path} is not a tensor that PyTorch can read, or is damaged.") from error
    if not isinstance(tensor, Tensor) or not tensor.ndim:
        raise UserError(f"{path} holds a {type(tensor).__name__} where a tensor of rows is needed.")
    return tensor


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
