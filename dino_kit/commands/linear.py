"""``dino-kit linear``: accuracy of a linear layer trained with labels on a checkpoint's features."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_kit import distributed, evaluation, files, log, weights
from dino_kit.config import fields
from dino_kit.config.evaluate import LinearConfig
from dino_kit.data.loader import default_workers
from dino_kit.errors import UserError
from dino_kit.evaluators import classifier, linear
from dino_kit.evaluators.grid_training import GridTraining
from dino_kit.evaluators.head_training import HeadTraining
from dino_kit.evaluators.linear import LinearFeatures
from dino_kit.evaluators.shares import shared_features
from dino_kit.features import labels_of
from dino_kit.weights import Loaded

_FEW_STEPS = 10_000  # an epoch of ImageNet in batches of 128


def run(config: LinearConfig) -> None:
    """Train a linear layer, or evaluate one; print a table and write it as JSON.

    Raises:
        UserError: checkpoint, data, head and flags do not fit; nothing is written then.
        RunFailed: the loss is not finite, with --fast at no rate.
    """
    files.require_folder("output_dir", config.output_dir)
    device = distributed.choose_device(config.device)
    loaded = evaluation.load_checkpoint(config)
    target = evaluation.place(config.output_dir, loaded, "linear_fast" if config.fast else "linear")
    work = _evaluate if config.evaluate else _train_fast if config.fast else _train
    try:
        distributed.start(device)  # before the images are listed, which one process does
        work(config, loaded, target, device)
    finally:
        distributed.stop()


def _train(config: LinearConfig, loaded: Loaded, target: Path, device: torch.device) -> None:
    training = HeadTraining(
        lr=config.lr, val_freq=config.val_freq, log=Path(f"{target}_log.txt"),
        **_setup(config, loaded, target, device),
    )  # fmt: skip
    _introduce(training)
    try:
        training.fit()
    except KeyboardInterrupt:
        if training.path.exists():
            same = "same command" + ("" if training.resume else " without --resume")
            log.notice(f"The {same} goes on from the last epoch in {training.path}.")
        raise
    if not distributed.is_main():
        return
    chance = training.results["last"].get("largest_class_percent")
    if chance is None:  # a layer of an earlier version, which left nothing out
        chance = _chance(labels_of(training.val), labels_of(training.train))
    left_out = training.left_out()
    own = {
        "results": training.results,
        "largest_class_percent": chance,
        "train_images": len(training.train) - left_out["train"],
        "test_images": len(training.val) - left_out["validation"],
        "scaled_lr": training.scaled_lr,
    }
    files.write_json(Path(f"{target}.json"), own | _record(config, training, own))
    if training.start == training.epochs:
        _say_finished(training)
    _table(
        {
            f"{name}, epoch {training.results[key]['epochs']}": training.results[key]
            for key, name in {"last": "at the end", "best": "at its best"}.items()
        }
    )
    _conclude(config, own, training, target)


def _train_fast(config: LinearConfig, loaded: Loaded, target: Path, device: torch.device) -> None:
    training = GridTraining(lrs=config.lrs, **_setup(config, loaded, target, device))
    _introduce_fast(training)
    training.fit()
    if not distributed.is_main():
        return
    result, best = training.result, training.best_on_test
    own = {
        "results": {"fast": result},
        "rates": training.rates,
        "best_on_test": best,
        "largest_class_percent": result["largest_class_percent"],
        "train_images": result["train_images"],
        "held_out_images": result["held_out_images"],
        "test_images": result["images"],
    }
    files.write_json(Path(f"{target}.json"), own | _record(config, training, own))
    if training.finished:
        _say_finished(training)
    _table_of_rates(training)
    lr = result["lr"]
    _table({f"rate {lr:g}, epoch {result['epochs']}": result})
    if best["test"]["top1"] > training.chosen["test"]["top1"]:
        log.say(
            f"chosen without the test images, of which {best['lr']:g} would have been the best"
        )
    edges = {training.lrs[0]: "lowest", training.lrs[-1]: "highest"}
    if lr in edges and len(edges) > 1:
        log.notice(
            f"The chosen rate, {lr:g}, is the {edges[lr]} of --lrs; one beyond may be better."
        )
    _conclude(config, own, training, target)


def _say_finished(training: HeadTraining | GridTraining) -> None:
    log.say(f"{training.path} holds this training already, finished")


def _conclude(
    config: LinearConfig, own: dict[str, Any], training: HeadTraining | GridTraining, target: Path
) -> None:
    log.say(
        f"{own['test_images']:,} images classified; answering always with "
        f"the largest class gives {own['largest_class_percent']:.2f} %"
    )
    log.say(f"written to {target}.json; the head is {training.path}, and classifies images by")
    words = ["dino-kit", "linear", config.weights, "--evaluate", *["--fast"] * config.fast]
    words += ["--val_data", "FOLDER"]
    words += ["--output_dir", config.output_dir] if config.output_dir else []
    log.say(f"  {shlex.join(words)}")


def _setup(
    config: LinearConfig, loaded: Loaded, target: Path, device: torch.device
) -> dict[str, Any]:
    """What both ways of training take."""
    train, val = evaluation.labelled_sources(config, target)
    _check_number(config, len(train.classes), "the data has")
    if len(train.classes) == 1:
        raise UserError(
            f"All images are of one class, {train.classes[0]}; a linear layer tells two or more "
            "apart."
        )
    total = config.total_batch_size or config.batch_size_per_gpu * distributed.world_size()
    return {
        "loaded": loaded,
        "flags": _architecture_flags(config),
        "features": LinearFeatures(
            loaded.backbone, config.n_last_blocks, config.avgpool_patchtokens
        ),
        "transform": evaluation.transform(loaded, config.image_size),
        "train": train,
        "val": val,
        "epochs": config.epochs,
        "total_batch_size": total,
        "batch_size_per_gpu": config.batch_size_per_gpu,
        "seed": config.seed,
        "num_workers": default_workers() if config.num_workers is None else config.num_workers,
        "device": device,
        "path": _head_path(target),
        "resume": config.resume == "auto",
    }


def _introduce(training: HeadTraining) -> None:
    """Say in three lines what is about to run."""
    _say_of_what(training)
    log.say(
        f"{len(training.train):,} images to train on and {len(training.val):,} to validate; "
        f"{training.loader.steps_per_epoch:,} steps of {training.total_batch_size} an epoch, "
        f"{training.epochs} epochs, learning rate {training.scaled_lr:g}"
    )
    steps = training.loader.total_steps
    if training.lr == LinearConfig.lr and steps < _FEW_STEPS:
        log.notice(
            f"The usual --lr {training.lr:g} is meant for the {100 * _FEW_STEPS:,} steps that "
            f"ImageNet takes; with {steps:,}, a higher one, such as 0.1, is likely better: try some."
        )
    if 0 < training.start < training.epochs:
        log.say(f"going on after epoch {training.start:,} of {training.epochs:,}")


def _introduce_fast(training: GridTraining) -> None:
    _say_of_what(training)
    lrs = training.lrs
    log.say(
        f"{len(training.train):,} images to train on and {len(training.val):,} to validate, the "
        f"centre of each; steps of {training.total_batch_size}, {training.epochs} epochs, "
        f"{len(lrs)} learning rates for a batch of {linear.REFERENCE_BATCH} "
        f"from {lrs[0]:g} to {lrs[-1]:g}"
    )


def _say_of_what(training: HeadTraining | GridTraining) -> None:
    log.say(
        f"{_described(training.features)}, {len(training.train.classes)} classes, on "
        f"{training.device}, {distributed.world_size()} process(es)"
    )


def _record(
    config: LinearConfig, training: HeadTraining | GridTraining, own: dict[str, Any]
) -> dict[str, Any]:
    """What a record of either way has, beside its ``own`` numbers."""
    return {
        "left_out": {
            "train": len(training.train) - own["train_images"],
            "validation": len(training.val) - own["test_images"],
        },
        "classes": len(training.train.classes),
        "features": _features(training.features),
        "total_batch_size": training.total_batch_size,
        "head": _file(training.path),
        "transform": evaluation.described(training.transform),
        "data": evaluation.data_flags(config),
        "read": {"train": training.train.root, "validation": training.val.root},
        "class_names": training.train.classes,
        "device": str(training.device),
        **evaluation.origin(training.loaded),
        **evaluation.repetition("linear", config),
    }


def _evaluate(config: LinearConfig, loaded: Loaded, target: Path, device: torch.device) -> None:
    path = Path(config.linear_weights or _head_path(target))
    if config.linear_weights is None and not path.is_file():
        raise UserError(
            f"There is no trained head {path}; leave --evaluate out to train it, or name another "
            "by --linear_weights."
        )
    saved = classifier.read_head(classifier.find_head(path))
    classifier.check_backbone(saved, loaded)
    features = classifier.features_for(
        saved, loaded.backbone, config.n_last_blocks, config.avgpool_patchtokens
    )
    if saved.transform is not None:
        loaded = loaded._replace(transform=saved.transform)
    transform = evaluation.transform(loaded, config.image_size)
    # To classify images takes none to learn from.
    train = config.train_data or (None if config.data_path else config.val_data)
    _, val = evaluation.labelled_sources(replace(config, train_data=train), target)
    number = saved.head.linear.out_features
    _check_number(config, number, f"{saved.path} is for")
    places = torch.tensor(classifier.places(saved, val.classes))
    age = "" if saved.epoch is None else f" after epoch {saved.epoch}"
    log.say(f"head {saved.path}{age}: {_described(features)}, {number} classes")

    rows, labels, _ = shared_features(
        features,
        val,
        transform,
        batch_size=config.batch_size_per_gpu,
        num_workers=default_workers() if config.num_workers is None else config.num_workers,
        device=device,
        description="features (validation)",
    )
    counts = linear.class_counts(labels, len(val.classes), device)
    found = linear.accuracy(saved.head.to(device), rows, places[labels])
    if not distributed.is_main():
        return
    result = {"top1": found["acc1"], "top5": found["acc5"], "loss": found["loss"]}
    chance = 100.0 * int(counts.max()) / int(counts.sum())
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(
        Path(f"{target}_evaluate.json"),
        {
            "results": result,
            "largest_class_percent": chance,
            "test_images": found["images"],
            "left_out": {"validation": len(val) - found["images"]},
            "classes": number,
            "features": _features(features),
            "head": _file(saved.path),
            "transform": evaluation.described(transform),
            "data": evaluation.data_flags(config),
            "read": {"validation": val.root},
            "class_names": saved.classes or val.classes,
            "device": str(device),
            **evaluation.origin(loaded),
            **evaluation.repetition("linear", config),
        },
    )
    _table({saved.path.name: result})
    log.say(
        f"{found['images']:,} images classified; answering always with their largest class gives "
        f"{chance:.2f} %"
    )
    log.say(f"written to {target}_evaluate.json")


def _head_path(target: Path) -> Path:
    return target.with_name(f"checkpoint_{target.name}.pth")


def _file(path: Path) -> dict[str, str]:
    return {"path": str(path.absolute()), "sha256": files.sha256(path)}


def _check_number(config: LinearConfig, number: int, there: str) -> None:
    if config.num_labels not in (None, number):
        raise UserError(
            f"--num_labels is {config.num_labels}, and {there} {number} classes; the flag can be "
            "left out."
        )


def _architecture_flags(config: LinearConfig) -> dict[str, Any]:
    """What was said of the architecture by flags, as :func:`dino_kit.weights.load` takes it."""
    known = inspect.signature(weights.load).parameters
    return {
        name: value
        for name, value in fields.to_plain(config).items()
        if name in known and value is not None
    }


def _chance(labels: Tensor, learnt: Tensor) -> float:
    """How many percent of ``labels`` are the commonest of ``learnt``."""
    return 100.0 * float((labels == learnt.mode().values).double().mean())


def _features(features: LinearFeatures) -> dict[str, Any]:
    names = ("n_last_blocks", "avgpool_patchtokens", "embed_dim")
    return {name: getattr(features, name) for name in names}


def _described(features: LinearFeatures) -> str:
    blocks = features.n_last_blocks
    what = f"the last {blocks} blocks" if blocks > 1 else "the last block"
    average = " and its average patch" if features.avgpool_patchtokens else ""
    return f"features of {what}{average}, {features.embed_dim} wide"


def _table(rows: dict[str, dict[str, Any]]) -> None:
    cells = [
        (name, *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("top1", "top5", "loss")))
        for name, row in rows.items()
    ]
    log.table("linear accuracy, %", ["", "top-1", "top-5", "loss"], cells)


def _table_of_rates(training: GridTraining) -> None:
    def percent(entry: dict[str, Any], images: str) -> str:
        return "diverged" if entry["diverged"] else f"{entry[images]['top1']:.2f}"

    cells = [
        (
            f"{entry['lr']:g}{'  (chosen)' if entry is training.chosen else ''}",
            percent(entry, "held_out"),
            percent(entry, "test"),
        )
        for entry in training.rates
    ]
    log.table("top-1 by learning rate, %", ["learning rate", "held out", "test"], cells)
    result = training.result
    rest = result["train_images"] - result["held_out_images"]
    log.say(
        f"of layers that learnt from {rest:,} images; the {result['held_out_images']:,} held out "
        f"chose the rate, and the layer that is kept learnt from all {result['train_images']:,}"
    )
