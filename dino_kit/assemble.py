"""From a configuration to a run: sources, loader, networks, objective, optimiser, loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dino_kit import distributed, files, log, sharding
from dino_kit.backbones.build import create_backbone, require_sizes
from dino_kit.batch_norm import batch_norms, synchronised
from dino_kit.config import arch_options, architectures
from dino_kit.config.train import TrainConfig
from dino_kit.data import augment
from dino_kit.data.bad_images import BadImages
from dino_kit.data.crops import View
from dino_kit.data.decode import decode
from dino_kit.data.loader import Batch, Decode, Loader, default_workers
from dino_kit.data.photograph import open_raster
from dino_kit.data.photometric import change
from dino_kit.data.sources.opening import LISTS, open_labelled_sources, open_training_source
from dino_kit.data.sources.source import Source, fingerprint
from dino_kit.errors import UserError
from dino_kit.evaluators.probe import Probe
from dino_kit.heads import DINOHead
from dino_kit.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from dino_kit.objectives.centering import CENTERINGS
from dino_kit.preparation import (
    pixels_of,
    tell_what_is_left_out,
    transform_of,
    view_groups,
    views_to_load,
    with_normalization,
)
from dino_kit.proposal import speed
from dino_kit.proposal.fit import Speed
from dino_kit.resume import find_checkpoint
from dino_kit.student_teacher import MultiCropNetwork, build_student_teacher
from dino_kit.training import engine, optim
from dino_kit.training.compiling import compile_blocks
from dino_kit.training.diagnosis import Diagnosis
from dino_kit.training.learner import Learner, MicroBatch
from dino_kit.training.monitor import Monitor
from dino_kit.training.plan import plan_epochs
from dino_kit.training.precision import resolve_precision
from dino_kit.training.run import Run

REFERENCE_BATCH = 256  # the batch that --lr is given for


def assemble(
    config: TrainConfig,
    views: Sequence[Sequence[View]] | None = None,
    data: Any | None = None,
) -> Run:
    """Build the run that ``config`` describes, and load its newest checkpoint if there is one.

    ``views``, by crop size and the two global ones first, take the place of those that
    :func:`view_groups` makes of ``config``. ``data``, a source or any dataset of images, see
    :class:`~dino_kit.data.sources.objects.DatasetSource`, is read instead of ``data_path``.

    Raises:
        UserError: something in the configuration, the data or the folder does not fit.
    """
    files.require_folder("output_dir", config.output_dir)
    device = distributed.choose_device(config.device)
    precision = resolve_precision(config.precision, config.use_fp16, device)
    config = with_total_batch(with_mlp_grid(config))
    distributed.start(device, config.dist_timeout_minutes)
    lists = Path(config.output_dir) / LISTS
    source = open_training_source(
        config.data_path if data is None else data, lists, config.download
    )
    files.require_outside("output_dir", config.output_dir, source.root)
    names = fingerprint(source)
    saved = find_checkpoint(config, len(source), names, device)
    start = saved["step"] if saved else 0
    # What is written down goes on by its recipe or its checkpoint, and does not begin again.
    replaces, config = config.resume == "never", replace(config, resume="auto")
    config = with_normalization(config, source, saved, device)

    views = views_to_load(config, device, views)
    loader = build_loader(config, source, views, device, start)
    learner = build_learner(config, loader.steps_per_epoch, device, precision)
    skipped = engine.Skipped()
    monitor = Monitor(
        config.output_dir,
        steps_per_epoch=loader.steps_per_epoch,
        total_steps=loader.total_steps,
        images_per_step=config.total_batch_size,
        log_every_steps=config.log_every_steps,
        diagnosis=Diagnosis(out_dim=config.out_dim, warmup_steps=learner.plan.warmup_steps),
        start=start,
    )
    if saved:
        learner.load_state_dict(saved)
        monitor.load_state_dict(saved["monitor"], device)
        skipped = engine.Skipped(**saved["skipped"])
    probe = build_probe(config, source, device)
    introduce(config, source, learner, loader, precision)
    every = [view for group in views for view in group]
    bad_images = BadImages(
        source, pixels_of(config), config.output_dir, config.max_bad_share, every
    )
    transform = transform_of(config)
    prepare = Prepare(device, transform.mean, transform.std)
    return Run(
        config, source, names, learner, loader, prepare, monitor, probe, bad_images, skipped,
        start, replaces,
    )  # fmt: skip


class Prepare:
    """A loader's batch → crops on the device, with what was left to do there, normalised."""

    def __init__(
        self,
        device: torch.device,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.device = device
        self.normalize = Normalize(mean, std).to(device)

    def __call__(self, batch: Batch) -> MicroBatch:
        groups = [group.to(self.device, non_blocking=True) for group in batch.groups]
        groups = [
            self.normalize(change(group, changes) if changes else group)
            for group, changes in zip_longest(groups, batch.changes)
        ]
        return MicroBatch(groups, batch.places)


def with_mlp_grid(config: TrainConfig) -> TrainConfig:
    """``config`` with a ResMLP's rule for local crops written out: no tensor will show it."""
    if architectures.family_of(config.arch) is not architectures.RESMLP:
        return config
    return replace(config, mlp_grid=config.mlp_grid or architectures.MLP_GRID)


def with_total_batch(config: TrainConfig) -> TrainConfig:
    """``config`` with the total batch written out, so that it no longer depends on the machine."""
    if config.total_batch_size is None:
        total = config.batch_size_per_gpu * distributed.world_size()
        config = replace(config, total_batch_size=total)
    local = config.total_batch_size // distributed.world_size()
    in_parts = local > config.batch_size_per_gpu
    norms = _what_brings_batch_norms(config) if in_parts else None
    if norms:
        raise UserError(
            f"{norms} with a batch of {local} in parts of --batch_size_per_gpu "
            f"{config.batch_size_per_gpu} would normalise each part by itself, which is another "
            "method; raise --batch_size_per_gpu or lower --total_batch_size."
        )
    return config


def _what_brings_batch_norms(config: TrainConfig) -> str | None:
    """What of ``config`` gives the networks batch norms, for a sentence; None for nothing."""
    if config.use_bn_in_head:
        return "--use_bn_in_head"
    # Of a library's, not every model can be built without memory for its weights.
    here = architectures.family_of(config.arch).is_built_here
    with torch.device("meta") if here else nullcontext():
        backbone = create_backbone(config.arch, **backbone_options(config))
    return f"--arch {config.arch}, which has batch norms," if batch_norms(backbone) else None


def decoder(config: Any, views: Sequence[Sequence[View]]) -> Decode:
    """What reads the images of a run: ``config`` is whatever has the settings of crops."""
    # A function of the caller's own gets the image that it was told it would.
    usual = (augment.render, augment.geometry)
    own = any(view.render not in usual for group in views for view in group)
    return decode if own or config.pixels == "exact" else open_raster


def build_loader(
    config: TrainConfig,
    source: Source,
    views: Sequence[Sequence[View]],
    device: torch.device,
    start: int,
) -> Loader:
    workers = default_workers() if config.num_workers is None else config.num_workers
    return Loader(
        source,
        views,
        seed=config.seed,
        epochs=config.epochs,
        total_batch_size=config.total_batch_size,
        batch_size_per_gpu=config.batch_size_per_gpu,
        pixels=pixels_of(config),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=workers,
        start_step=start,
        decode=decoder(config, views),
        on_bad_image="replace" if config.on_bad_image == "skip" else "raise",
        pin_memory=device.type == "cuda",
    )


def build_probe(config: TrainConfig, source: Source, device: torch.device) -> Probe:
    labelled = None
    if config.probe_data:
        lists = Path(config.output_dir) / LISTS
        labelled = open_labelled_sources(config.probe_data, lists=lists, download=config.download)
    return Probe(
        source,
        labelled,
        views=view_groups(config)[0],
        seed=config.seed,
        transform=transform_of(config),
        folder=config.output_dir,
        device=device,
        num_workers=default_workers() if config.num_workers is None else config.num_workers,
    )


def backbone_options(config: TrainConfig) -> dict[str, Any]:
    """What :func:`create_backbone` takes of ``config``; sizes that were not given stay away."""
    names = ("embed_dim", "depth", "num_heads", "mlp_ratio", "reattention_blocks", "mlp_grid")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if architectures.family_of(config.arch).takes_patch_size:
        given["patch_size"] = config.patch_size
    return {
        "in_chans": config.in_chans,
        "image_size": config.global_crops_size,
        **given,
        **arch_options.pairs(config.arch_options),
    }


def untrained_backbone(config: TrainConfig) -> nn.Module:
    """The backbone that student and teacher of ``config`` start as, on the CPU, in eval mode."""
    with _seeded(config):
        return create_backbone(config.arch, **backbone_options(config)).eval()


@contextmanager
def _seeded(config: TrainConfig) -> Iterator[None]:
    """Within, weights are drawn from the run's seed: on the CPU, so that the device is no matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        yield


def untrained_student(config: TrainConfig) -> MultiCropNetwork:
    """The student of ``config`` as it begins, on the CPU."""
    with _seeded(config):
        backbone, head = _backbone_and_head(config, config.drop_path_rate, config.norm_last_layer)
    return MultiCropNetwork(backbone, head)


def _backbone_and_head(
    config: TrainConfig, drop_path_rate: float, norm_last_layer: bool
) -> tuple[nn.Module, DINOHead]:
    options = {"drop_path_rate": drop_path_rate, **backbone_options(config)}
    backbone = create_backbone(config.arch, **options)
    head = DINOHead(
        backbone.embed_dim,
        config.out_dim,
        use_bn=config.use_bn_in_head,
        norm_last_layer=norm_last_layer,
        nlayers=config.head_nlayers,
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.head_bottleneck_dim,
    )
    return backbone, head


def build_learner(
    config: TrainConfig, steps_per_epoch: int, device: torch.device, precision: str
) -> Learner:
    with _seeded(config):
        backbone, student_head = _backbone_and_head(
            config, config.drop_path_rate, config.norm_last_layer
        )
        teacher_backbone, teacher_head = _backbone_and_head(config, 0.0, True)
    sizes = [config.global_crops_size]
    sizes += [config.local_crops_size] if config.local_crops_number else []
    require_sizes(backbone, sizes, "; --local_crops_number 0 does without local crops")
    student, teacher = build_student_teacher(
        backbone, student_head, teacher_backbone, teacher_head
    )
    if distributed.world_size() > 1:
        student, teacher = (synchronised(network, device) for network in (student, teacher))
    plain = None
    if config.fsdp and distributed.world_size() > 1:
        plain = sharding.without_weights(teacher.backbone)
        for network in (student, teacher):
            sharding.shard(network, device)  # which moves it, part by part
    elif config.fsdp:
        log.notice("--fsdp has no effect on one process, which has to hold all weights.")
    student, teacher = student.to(device), teacher.to(device)
    student.backbone.checkpoint_activations = config.checkpoint_activations
    if config.compile:
        for network in (student, teacher):
            compile_blocks(network.backbone, device)
    plan = plan_epochs(
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        lr=config.lr * config.total_batch_size / REFERENCE_BATCH,
        min_lr=config.min_lr,
        warmup_epochs=config.warmup_epochs,
        weight_decay=config.weight_decay,
        weight_decay_end=config.weight_decay_end,
        momentum=config.momentum_teacher,
        warmup_teacher_temp=config.warmup_teacher_temp,
        teacher_temp=config.teacher_temp,
        warmup_teacher_temp_epochs=config.warmup_teacher_temp_epochs,
        freeze_last_layer=config.freeze_last_layer,
    )
    options = {"momentum": config.center_momentum} if config.centering == "center" else {}
    centering = CENTERINGS[config.centering](config.out_dim, device=device, **options)
    optimizer = optim.build_optimizer(config.optimizer, optim.parameter_groups(student))
    return Learner(
        student,
        teacher,
        centering,
        optimizer,
        plan,
        student_temp=config.student_temp,
        clip_grad=config.clip_grad,
        precision=precision,
        seed=config.seed,
        plain_backbone=plain,
    )


def measure_step(
    config: TrainConfig, source: Source, device: torch.device, precision: str, first: int = 4
) -> Speed:
    """What a step of ``config`` costs here, on images of ``source``; see :func:`speed.measure`.

    Raises:
        UserError: an image cannot be read.
        RuntimeError, MemoryError: not even a step of ``first`` images fits into memory.
    """
    # No step counts as one of the first epoch, whose last layer may be frozen, nor as accumulated.
    config = replace(config, num_workers=0, freeze_last_layer=0, total_batch_size=1)

    def load(images: int) -> Sequence[Batch]:
        sized = replace(config, total_batch_size=images, batch_size_per_gpu=images)
        views = views_to_load(sized, device)
        return next(iter(build_loader(sized, source, views, device, 0)))

    learner = build_learner(config, 10, device, precision)
    # By which numbers they are normalised makes no difference to the time.
    return speed.measure(learner, load, Prepare(device, (0.5,), (0.25,)), len(source), first)


def introduce(
    config: TrainConfig, source: Source, learner: Learner, loader: Loader, precision: str
) -> None:
    """Say in three lines what is about to run."""
    backbone = learner.student.backbone
    size = sum(p.numel() for p in backbone.parameters())
    log.say(
        f"{config.arch}, patch {backbone.patch_size}, {size / 1e6:.1f} M parameters, on "
        f"{learner.device} in {precision}, {distributed.world_size()} process(es)"
    )
    log.say(
        f"{len(source):,} images, {loader.steps_per_epoch:,} steps of {config.total_batch_size} an "
        f"epoch, {config.epochs} epochs, {loader.num_workers} data workers"
    )
    if loader.start_step:
        log.say(f"going on after step {loader.start_step:,} of {loader.total_steps:,}")
    log.say(f"writing to {config.output_dir}")
    tell_what_is_left_out(config)
