"""``dino-kit bench``: how fast this machine is, what holds it back, and whether a run fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from dino_kit import distributed, files, log
from dino_kit.assemble import (
    build_learner,
    build_loader,
    decoder,
    measure_step,
    view_groups,
    with_mlp_grid,
    with_total_batch,
)
from dino_kit.bench import fit as fitting
from dino_kit.bench import knn as ways
from dino_kit.bench.data import by_workers, in_process
from dino_kit.bench.machine import describe
from dino_kit.bench.step import measure_step as measure_phases
from dino_kit.checking import feeding
from dino_kit.config import fields
from dino_kit.config.bench import (
    BenchDataConfig,
    BenchFitConfig,
    BenchKnnConfig,
    BenchStepConfig,
)
from dino_kit.config.train import TrainConfig
from dino_kit.data import augment
from dino_kit.data.inspection import inspect
from dino_kit.data.loader import Loader, default_workers, usable_cores
from dino_kit.data.sources.opening import open_training_source
from dino_kit.data.sources.source import Subset
from dino_kit.errors import UserError
from dino_kit.evaluation import versions
from dino_kit.preparation import pixels_of, views_to_load
from dino_kit.proposal.machine import find_machine
from dino_kit.training.learner import MicroBatch
from dino_kit.training.precision import resolve_precision

_MANY = 1 << 20  # epochs, more than any measurement takes
_SAMPLE = 64  # images of which the data of a run are judged
_CPU = torch.device("cpu")


def data(config: BenchDataConfig) -> None:
    """Time reading, decoding and crops, in this process and in workers.

    Raises:
        UserError: no image can be read.
    """
    _require_place(config.json)
    source = open_training_source(config.data_path, download=config.download)
    # Where the run would be, though no network is here.
    groups = views_to_load(config, distributed.choose_device("auto"))
    pixels = pixels_of(config)
    workers = default_workers() if config.num_workers is None else config.num_workers

    def load(source: Any, batch: int, workers: int) -> Loader:
        return build_loader(_as_run(config, batch, workers), source, groups, _CPU, 0)

    how = {"batch_size": config.batch_size_per_gpu, "seconds": config.seconds}
    log.say(f"making crops of {source.root}")
    reads = decoder(config, groups)
    alone = in_process(source, groups, pixels, load, seed=config.seed, decode=reads, **how)
    rate = 1 / alone.seconds
    if workers:
        rate = by_workers(source, load, num_workers=workers, **how)
    one = 1 / alone.core_seconds
    _tell_phases("an image, in one process", alone.phases, alone.seconds)
    largest = max(alone.phases, key=alone.phases.__getitem__)
    who = f"{workers} workers prepare" if workers > 1 else "a worker" if workers else "this process"
    told = f"{who} {_rate(rate)}"
    log.paragraph(
        f"A core prepares {_rate(one)} images a second, and {told}. The most time, "
        f"{alone.phases[largest] / alone.seconds:.0%}, goes to {_words(largest)}."
        + " Colours and blur are left to the device." * any(
            view.render is augment.geometry for group in groups for view in group
        )
    )
    _write("bench data", config, _CPU, {
        "images_per_second": rate,
        "images_per_second_per_core": one,
        "images_per_second_in_process": 1 / alone.seconds,
        "num_workers": workers,
        "peak_bytes": alone.peak_bytes,
        "phases": alone.phases,
        "images": alone.images,
    })  # fmt: skip


def step(config: BenchStepConfig) -> None:
    """Time steps on random crops.

    Raises:
        UserError: the settings do not fit together.
        RunFailed: a step is not finite.
    """
    _require_place(config.json)
    device = distributed.choose_device(config.device)
    precision = resolve_precision(config.precision, config.use_fp16, device)
    config = with_total_batch(with_mlp_grid(config))
    log.say(f"timing steps of {config.total_batch_size} images on {device} in {precision}")
    any_step = replace(config, freeze_last_layer=0)  # those of the first epoch are cheaper
    cost = measure_phases(
        lambda: build_learner(any_step, _steps_an_epoch(config), device, precision),
        lambda: _random_batches(config, device),
        device,
        precision,
        config.seconds,
    )
    _tell_phases(f"a step of {cost.images} images", cost.phases, cost.seconds)
    memory = "" if cost.peak_bytes is None else f", with {_size(cost.peak_bytes)} at the fullest"
    log.paragraph(
        f"{_rate(cost.rate)} images a second{memory}. A step takes {_rate(cost.flops / 1e9)} "
        f"billion operations, {_rate(cost.flops / cost.seconds / 1e9)} billion a second: "
        f"{cost.utilisation:.0%} of what one large matrix product reaches here in {precision}."
    )
    _write("bench step", config, device, {
        "images_per_second": cost.rate,
        "peak_bytes": cost.peak_bytes,
        "phases": {name: seconds / cost.images for name, seconds in cost.phases.items()},
        "precision": precision,
        "seconds_a_step": cost.seconds,
        "images_a_step": cost.images,
        "flops_a_step": cost.flops,
        "matmul_flops_a_second": cost.matmul_rate,
        "utilisation": cost.utilisation,
    })  # fmt: skip


def knn(config: BenchKnnConfig) -> None:
    """Time exact k-NN by faiss, by torch and in the reference's way, all on one CPU."""
    _require_place(config.json)
    features = ways.random_features(
        config.num_train, config.num_queries, config.embed_dim, config.num_classes, config.seed
    )
    ks = sorted(set(config.nb_knn))
    log.say(
        f"{config.num_queries:,} queries, {config.num_train:,} × {config.embed_dim} features, k "
        f"{', '.join(map(str, ks))}"
    )
    cost = ways.measure_knn(features, ks, config.temperature, config.num_classes)
    slowest = cost.seconds[ways.REFERENCE]
    ratios = {way: slowest / seconds for way, seconds in cost.seconds.items()}
    log.table("", ["way", "seconds", "of a core", "times as fast", "top-1 %"], [
        [way, f"{seconds:.2f}", f"{cost.core_seconds[way]:.2f}", f"{ratios[way]:.1f}",
         " ".join(f"{cost.top1[way][k]:.2f}" for k in ks)]
        for way, seconds in cost.seconds.items()
    ])  # fmt: skip
    log.paragraph(
        f"dino-kit knn searches by faiss once for all k: {ratios[ways.FAISS]:.1f} times as fast as "
        "the reference's way, a matrix product and one-hot votes for each k."
    )
    seconds = cost.seconds[ways.FAISS]
    _write("bench knn", config, _CPU, {
        "images_per_second": config.num_queries / seconds,
        "peak_bytes": cost.peak_bytes[ways.FAISS],
        "phases": {
            "search": cost.search / config.num_queries,
            "vote": (seconds - cost.search) / config.num_queries,
        },
        "seconds": cost.seconds,
        "core_seconds": cost.core_seconds,
        "times_the_reference": ratios,
        "top1": cost.top1,
        "peak_bytes_by_way": cost.peak_bytes,
    })  # fmt: skip


def fit(config: BenchFitConfig) -> int:
    """Judge a run before it starts; the status is 1 if it does not fit into memory.

    Raises:
        UserError: no image can be read, or the settings do not fit together.
    """
    _require_place(config.json)
    device = distributed.choose_device(config.device)
    precision = resolve_precision(config.precision, config.use_fp16, device)
    config = with_total_batch(with_mlp_grid(config))
    source = open_training_source(config.data_path, download=config.download)
    batch = config.total_batch_size
    if batch > len(source):
        raise UserError(
            f"There are {len(source)} images, fewer than one batch of {batch}; give "
            f"--total_batch_size {len(source)} or less."
        )
    groups, pixels = views_to_load(config, device), pixels_of(config)
    views = [view for group in groups for view in group]
    found = inspect(source, pixels, views, most=_SAMPLE, description="")
    reads = decoder(config, groups)
    cost = feeding.cost([found], source, groups, pixels, config.seed, reads)
    if cost is None:
        raise UserError(f"None of {len(found)} images of {source.root} can be read.")
    log.say(f"timing a step on {device} in {precision}")
    machine = find_machine(device, usable_cores(), default_workers())
    readable = Subset(source, found.indices[found.readable].tolist())
    try:
        speed = measure_step(config, readable, device, precision, 1 if device.type == "cpu" else 4)
    except (MemoryError, torch.OutOfMemoryError):
        log.paragraph(
            f"It does not fit: not even a step of a few images has room in the memory of {device}. "
            "A smaller --arch, larger --patch_size or fewer --local_crops_number need less."
        )
        _write("bench fit", config, device, {
            "fits": False, "largest_batch": 0, "images_per_second": None, "peak_bytes": None,
            "phases": {}, "limit": None, "hours": None,
        })  # fmt: skip
        return 1
    workers = default_workers() if config.num_workers is None else config.num_workers
    asked = fitting.Asked(
        len(source), config.epochs, batch, min(batch, config.batch_size_per_gpu), workers
    )
    verdict = fitting.judge(asked, speed, cost, machine)
    taker = feeding.Device(machine.device, machine.name, verdict.compute_rate, machine.cores)
    _tell_fit(verdict, asked, machine)
    log.paragraph(feeding.advice(cost, taker))
    if machine.is_busy:
        log.notice(
            f"The machine is busy: other programs leave {machine.share:.0%} of a core to a thread, "
            "and on a free machine the run is faster."
        )
    _write("bench fit", config, device, {
        "images_per_second": verdict.rate,
        "peak_bytes": verdict.needed_bytes,
        "phases": {"compute": 1 / verdict.compute_rate, "read": cost.read, "decode": cost.decode,
                   "crops": cost.crops},
        "precision": precision,
        "images": len(source),
        "num_workers": workers,
        "advised_num_workers": feeding.workers(cost, taker),
        **asdict(verdict),
    })  # fmt: skip
    return 0 if verdict.fits else 1


def _tell_fit(verdict: fitting.Verdict, asked: fitting.Asked, machine: Any) -> None:
    largest, allowed = verdict.largest_batch, verdict.allowed_bytes
    rows = [
        ["memory of a step", _size(verdict.needed_bytes)],
        ["memory that it may take", "?" if allowed is None else _size(allowed)],
        ["most images at a time", "?" if largest is None else f"{largest:,}"],
        ["images a second, networks alone", _rate(verdict.compute_rate)],
        ["images a second, the whole run", _rate(verdict.rate)],
        ["limited by", verdict.limit],
        [f"hours for {asked.epochs:,} epochs", f"{verdict.hours:,.3g}"],
    ]
    log.table("", ["", ""], rows)
    if not verdict.fits:
        log.paragraph(
            f"It does not fit into the memory of {machine.memory_of}, {_size(machine.memory)} free, "
            "not all of which is to be taken: "
            + (
                f"--batch_size_per_gpu {largest} would, with --total_batch_size {asked.batch} the "
                "same run in parts."
                if largest
                else "not even one image does; a smaller --arch or fewer crops need less."
            )
        )
    log.paragraph(
        f"{asked.epochs:,} epochs of {asked.images:,} images take about {_hours(verdict.hours)} at "
        f"{_rate(verdict.rate)} images a second."
    )


def _as_run(config: BenchDataConfig, batch: int, workers: int) -> TrainConfig:
    """A run that reads as ``config`` says, without an end. As it has no network, any crop fits."""
    own = {"output_dir": "-", "patch_size": 1, "epochs": _MANY, "num_workers": workers}
    sizes = {"batch_size_per_gpu": batch, "total_batch_size": batch}
    return fields.from_plain(TrainConfig, {**fields.to_plain(config), **own, **sizes})


def _random_batches(config: BenchStepConfig, device: torch.device) -> list[MicroBatch]:
    total = config.total_batch_size
    parts = np.array_split(np.arange(total), math.ceil(total / config.batch_size_per_gpu))
    return [
        MicroBatch(
            [
                torch.randn(len(views), len(places), config.in_chans, views[0].size,
                            views[0].size, device=device)
                for views in view_groups(config)
            ],
            torch.from_numpy(places),
        )
        for places in parts
    ]  # fmt: skip


def _steps_an_epoch(config: BenchStepConfig) -> int:
    """As many as of ImageNet; how many there are decides only the schedules."""
    return max(1_281_167 // config.total_batch_size, 1)


def _tell_phases(what: str, phases: Mapping[str, float], whole: float) -> None:
    rows = [
        [_words(name), f"{1000 * seconds:,.2f}", f"{seconds / whole:.0%}"]
        for name, seconds in phases.items()
    ]
    rows.append(["together", f"{1000 * whole:,.2f}", ""])
    log.table("", [what, "ms", "share"], rows)


def _require_place(file: str | None) -> None:
    """Raises :class:`UserError` before any work where the numbers cannot be written."""
    if file is not None and files.Path(file).is_dir():
        raise UserError(f"--json {file} is a folder; give the name of a file to write.")


def _write(command: str, config: Any, device: torch.device, numbers: dict[str, Any]) -> None:
    if config.json is None:
        return
    about = {
        "command": fields.command_line(command, config, without=("json",)),
        "machine": describe(device),
        "versions": versions(),
        "settings": fields.to_plain(config),
    }
    files.write_json(config.json, {**numbers, **about})
    log.say(f"written to {config.json}")


def _words(phase: str) -> str:
    return phase.replace("_", " ")


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _hours(hours: float) -> str:
    return f"{hours:,.3g} hours" if hours < 48 else f"{hours / 24:,.3g} days"
