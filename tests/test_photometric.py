"""Colours on the device: against the workers' way, operation by operation and crop by crop; and in a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_augment import FACTORS, SHAPES, TOLERANCES, colour_orders, parse, rainbow
from test_augment import picture as noise
from test_raster import Photographs, difference, own, photograph
from test_train import metrics, pictures, result, train, words  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory

from dino_kit import cli
from dino_kit.assemble import assemble, decoder, view_groups
from dino_kit.config import fields
from dino_kit.config.train import TrainConfig
from dino_kit.data import augment
from dino_kit.data.augment import CropParameters, geometry, render
from dino_kit.data.crops import View, sample_crop
from dino_kit.data.decode import decode, decode_raster
from dino_kit.data.loader import Batch, Loader
from dino_kit.data.photograph import open_raster
from dino_kit.data.photometric import Changes, change, changes_of
from dino_kit.data.raster import Raster
from dino_kit.errors import BadImage
from dino_kit.preparation import tell_what_is_left_out, views_to_load
from dino_kit.randomness import stream

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NOTHING = CropParameters(1, (0, 0, 1, 1))


def group_of(crops: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) as a group (1, N, 3, H, W), in memory as a loader has it."""
    return torch.from_numpy(crops)[None].permute(0, 1, 4, 2, 3)


def changed(crops: list, parameters: list[CropParameters]) -> np.ndarray:
    group = group_of(np.stack([np.asarray(crop) for crop in crops]))
    return change(group, changes_of([parameters]))[0].permute(0, 2, 3, 1).numpy()


def operated(image, name: str, factor: float = 0.0) -> np.ndarray:
    told = {
        "grayscale": {"gray": True}, "blur": {"blur_radius": factor},
        "solarize": {"solarize_threshold": factor},
    }.get(name, {"jitter": ((name, factor),)})  # fmt: skip
    return changed([image], [replace(NOTHING, **told)])[0]


def images() -> list:
    flat = np.full((30, 40, 3), (200, 3, 90), np.uint8)
    gray = np.repeat(np.array(photograph(40, 50))[..., :1], 3, axis=2)
    return [rainbow(), photograph(), *(noise(*shape) for shape in SHAPES), flat, gray]


def test_golden_operations_on_the_device(golden):
    arrays = golden("augmentation_ops")
    image = arrays.pop("image")
    done = set()
    for key, expected in arrays.items():
        name, numbers = parse(key)
        if name in ("crop", "hflip"):
            continue
        numbers = numbers or ([128] if name == "solarize" else [])
        off = difference(operated(image, name, *numbers), expected)
        assert np.abs(off).mean() <= TOLERANCES[name], key
        assert abs(off.mean()) <= 0.3, key
        assert np.abs(off).max() <= 9, key  # as the fast way
        done.add(name)
    assert done == set(TOLERANCES) - {"crop", "hflip"}


@pytest.mark.parametrize("name, factor", [(n, x) for n, (_, xs) in FACTORS.items() for x in xs])
def test_an_operation_is_the_workers_up_to_rounding(name, factor):
    for image in images():
        expected = getattr(augment, name)(Raster(np.array(image)), factor)
        off = np.abs(difference(operated(image, name, factor), expected))
        assert off.max() <= 1 and off.mean() <= 0.01


def test_gray_is_the_workers():
    for image in images():
        off = difference(operated(image, "grayscale"), augment.grayscale(Raster(np.array(image))))
        assert np.abs(off).max() <= 1 and np.abs(off).mean() <= 0.01


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.floats(0, 4) | st.just(1.0), min_size=1, max_size=4), st.sampled_from(SHAPES))
def test_crops_of_one_batch_are_blurred_each_by_its_radius(radii, shape):
    crops = [Raster(np.array(noise(*shape, seed=seed))) for seed in range(len(radii))]
    found = changed(crops, [replace(NOTHING, blur_radius=radius) for radius in radii])
    for crop, radius, one in zip(crops, radii, found, strict=True):
        off = np.abs(difference(one, augment.blur(crop, radius)))
        assert off.max() <= 1 and off.mean() <= 0.01


def parameters():
    return st.builds(
        CropParameters,
        size=st.just(32), box=st.sampled_from([(10, 20, 120, 150), (0, 0, 150, 200), (5, 9, 32, 32)]),
        flip=st.booleans(), jitter=st.one_of(st.just(()), colour_orders()), gray=st.booleans(),
        blur_radius=st.none() | st.floats(0.1, 3.0), solarize_threshold=st.none() | st.just(128),
        vflip=st.booleans(), quarter_turns=st.integers(0, 3),
    )  # fmt: skip


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(parameters(), min_size=1, max_size=8), st.integers(0, 5))
def test_whole_crops_are_the_workers_up_to_rounding(drawn, seed):
    image = Raster(np.array(photograph(seed=seed)))
    found = changed([geometry(image, one) for one in drawn], drawn)
    off = np.abs(difference(found, np.stack([render(image, one) for one in drawn])))
    assert off.max() <= 2 and off.mean() <= 0.01


def test_crops_as_they_are_drawn_are_the_workers_and_pillows():
    """Over many crops of a run; against Pillow as the fast way is."""
    view = View(64, (0.14, 1.0), blur_prob=0.5, rotate90_prob=0.3)
    photographs = [photograph(200, 260, seed) for seed in range(4)]
    drawn = [sample_crop(view, 200, 260, stream("", number)) for number in range(200)]
    of = [photographs[number % 4] for number in range(200)]
    rasters = [Raster(np.array(image)) for image in of]
    found = changed([geometry(*both) for both in zip(rasters, drawn, strict=True)], drawn)
    fast, exact = (
        np.stack([render(*both) for both in zip(those, drawn, strict=True)]) for those in (rasters, of)
    )
    off = np.abs(difference(found, fast))
    assert off.max() <= 2 and off.mean() <= 0.001
    off = difference(found, exact)
    assert abs(off.mean()) <= 0.1 and np.abs(off).mean() <= 0.6


def test_operations_are_made_in_the_order_of_the_parameters():
    image = photograph(40, 40)
    orders = [("contrast", "hue", "brightness"), ("brightness", "contrast", "hue")]
    factors = {"brightness": 1.4, "contrast": 0.6, "hue": 0.2}
    drawn = [replace(NOTHING, jitter=tuple((n, factors[n]) for n in order)) for order in orders]
    found = changed([image] * 2, drawn)
    for one, order in zip(found, orders, strict=True):
        expected = Raster(np.array(image))
        for name in order:
            expected = augment.JITTER[name](expected, factors[name])
        assert np.abs(difference(one, expected)).max() <= 1
    assert np.abs(difference(*found)).max() > 5


def test_where_nothing_is_drawn_nothing_changes():
    crops = np.stack([np.asarray(photograph(24, 24, seed)) for seed in range(3)])
    changes = changes_of([[NOTHING] * 3])
    assert changes.stages == () and len(changes.crops) == len(changes.numbers) == 0
    group = group_of(crops)
    found = change(group, changes)
    assert torch.equal(found, group) and found.stride() == group.stride()
    assert found.data_ptr() != group.data_ptr()
    # Beside one that changes, too; and what is given stays as it is.
    one = changes_of([[NOTHING, replace(NOTHING, gray=True), NOTHING]])
    found = change(group, one)
    assert torch.equal(found[0, [0, 2]], group[0, [0, 2]])
    assert not torch.equal(found[0, 1], group[0, 1])
    np.testing.assert_array_equal(group[0].permute(0, 2, 3, 1), crops)


def test_a_place_is_that_of_its_view_and_image():
    crops = torch.randint(0, 256, (3, 2, 3, 4, 4), dtype=torch.uint8)
    drawn = [[NOTHING] * 2, [NOTHING, replace(NOTHING, solarize_threshold=0)], [NOTHING] * 2]
    found = change(crops, changes_of(drawn))
    expected = crops.clone()
    expected[1, 1] = 255 - expected[1, 1]
    assert torch.equal(found, expected)


# The device


EVERYTHING = CropParameters(
    16, (0, 0, 16, 16), jitter=tuple((name, 0.1) for name in augment.JITTER), gray=True,
    blur_radius=1.3, solarize_threshold=99,
)  # fmt: skip


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_and_no_operation_goes_crop_by_crop():
    counts = []
    for images in (1, 7):
        group = torch.randint(0, 256, (2, images, 3, 16, 16), dtype=torch.uint8)
        changes = changes_of([[EVERYTHING] * images] * 2)
        with Calls() as calls:
            change(group, changes)
        waiting = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"}
        assert not waiting & set(calls.names)
        counts.append(len(calls.names))
    assert counts[0] == counts[1]


def test_changes_go_through_pinning_with_their_batch(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self)
    changes = changes_of([[EVERYTHING]])
    batch = Batch([torch.zeros(1)], torch.zeros(1), torch.zeros(1), (), [changes, None])
    found = pin_memory(batch)
    assert isinstance(found, Batch) and isinstance(found.changes[0], Changes)
    assert tuple(found.changes[0].stages) == changes.stages and found.changes[1] is None
    assert len(pinned) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use")
def test_a_gpu_makes_the_same_crops_without_being_waited_for():
    crops = np.stack([np.asarray(photograph(64, 64, seed)) for seed in range(40)])
    drawn = [
        sample_crop(View(64, None, solarize_prob=0.3), 64, 64, stream("", number))
        for number in range(40)
    ]
    group, changes = group_of(crops), changes_of([drawn])
    expected = change(group, changes)
    there = group.pin_memory().to("cuda")
    changes = pin_memory(changes)
    change(there, changes)  # loads what is loaded once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = change(there, changes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    off = (found.cpu().int() - expected.int()).abs()
    assert off.max() <= 2 and off.float().mean() <= 0.01


# In a run


def config_of(**changes) -> TrainConfig:
    sizes = {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 2}
    values = {"data_path": "-", "output_dir": "-", **sizes, **changes}
    return fields.from_plain(TrainConfig, values)


def renders(config: TrainConfig, device=CPU, views=None) -> list:
    return [{view.render for view in group} for group in views_to_load(config, device, views)]


def test_colours_are_left_to_a_cuda_device_or_where_that_is_asked_for():
    workers, device = [{augment.render}] * 2, [{augment.geometry}] * 2
    for where in (CPU, torch.device("mps")):
        assert renders(config_of(), where) == workers
        assert renders(config_of(augment="device"), where) == device
    assert renders(config_of(), CUDA) == device
    assert renders(config_of(augment="cpu"), CUDA) == workers
    assert renders(config_of(pixels="exact"), CUDA) == workers
    assert renders(config_of(in_chans=1, augment="device"), CUDA) == workers
    views = view_groups(config_of())
    views[1][0] = replace(views[1][0], render=own)
    assert renders(config_of(), CUDA, views) == [{augment.geometry}, {augment.render, own}]


def test_how_images_are_read_does_not_depend_on_where_colours_are_changed():
    for there in ("cpu", "device"):
        config = config_of(augment=there)
        assert decoder(config, views_to_load(config, CPU)) is open_raster
    config = config_of(pixels="exact")
    assert decoder(config, views_to_load(config, CUDA)) is decode


class Broken(Photographs):
    def read(self, index):
        if index == 4:
            raise BadImage("4.jpg is broken.")
        return super().read(index)


GROUPS = [[View(24, (0.4, 1.0), blur_prob=1.0)] * 2, [View(12, (0.05, 0.4), rotate90_prob=0.5)] * 2]
LEFT = [[replace(view, render=geometry) for view in group] for group in GROUPS]


def load(groups, source=None, **options) -> list[Batch]:
    options = {"seed": 3, "epochs": 1, "total_batch_size": 6, "batch_size_per_gpu": 3} | options
    loader = Loader(source or Photographs(), groups, decode=decode_raster, **options)
    return [batch for batches in loader for batch in batches]


def made(batch: Batch) -> list[torch.Tensor]:
    return [change(*both) for both in zip(batch.groups, batch.changes, strict=True)]


@pytest.mark.parametrize("on_bad_image", ["replace", "leave_out"])
def test_a_loader_leaves_to_the_device_what_workers_would_do(on_bad_image):
    how = {"source": Broken(), "on_bad_image": on_bad_image}
    sizes = set()
    for whole, left in zip(load(GROUPS, **how), load(LEFT, **how), strict=True):
        assert torch.equal(whole.indices, left.indices) and whole.changes == [None, None]
        sizes.add(len(left.indices))
        for one, other in zip(whole.groups, made(left), strict=True):
            off = (one.int() - other.int()).abs()
            assert off.max() <= 2 and off.float().mean() <= 0.01
    assert (2 in sizes) == (on_bad_image == "leave_out")


@pytest.mark.parametrize(
    "options", [{"num_workers": 1, "multiprocessing_context": "spawn"}, {"num_workers": 4}]
)
def test_workers_leave_the_same(options):
    for one, other in zip(load(LEFT), load(LEFT, **options), strict=True):
        assert torch.equal(one.indices, other.indices)
        assert all(map(torch.equal, one.groups, other.groups))
        for here, there in zip(one.changes, other.changes, strict=True):
            assert here.stages == there.stages
            assert torch.equal(here.crops, there.crops)
            assert torch.equal(here.numbers, there.numbers)


def test_a_batch_without_images_has_no_changes():
    class AllBroken(Photographs):
        def read(self, index):
            raise BadImage("broken")

    batch, *_ = load(LEFT, AllBroken(), on_bad_image="leave_out")
    assert batch.groups == [] and batch.changes == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_sees_the_same_crops_either_way(pictures, tmp_path, workers):  # noqa: F811
    prepared = {}
    for where in ("cpu", "device"):
        flags = ("--augment", where, "--num_workers", workers)
        run = assemble(cli.parse("train", words(pictures, tmp_path / where, *flags)[1:]))
        batch = next(iter(run.loader))[0]
        assert all((changes is None) == (where == "cpu") for changes in batch.changes)
        prepared[where] = run.prepare(batch).groups
        run.train()
    for one, other in zip(*prepared.values(), strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        # Of 255, in deviations of ImageNet's.
        assert (one - other).abs().max() <= 2 / 255 / 0.22
    first, second = (metrics(tmp_path / where)[0]["loss"] for where in ("cpu", "device"))
    assert first == pytest.approx(second, rel=1e-3)


def test_a_run_on_the_device_goes_on_bit_for_bit_and_may_go_on_otherwise(pictures, tmp_path):  # noqa: F811
    flags = ("--augment", "device", "--save_every_steps", 1)
    assert train(pictures, tmp_path / "whole", *flags) == 0
    run = assemble(cli.parse("train", words(pictures, tmp_path / "parts", *flags)[1:]))
    run.loader._batches.batch_sampler.total_steps = run.loader.total_steps = 3
    run.train()
    other = assemble(cli.parse("train", words(pictures, tmp_path / "parts", "--augment", "cpu")[1:]))
    assert other.start == 3
    assert train(pictures, tmp_path / "parts", *flags) == 0
    whole, parts = (result(tmp_path / name)["student"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert metrics(tmp_path / "parts")[-1] == metrics(tmp_path / "whole")[-1]


def test_pillow_is_not_on_the_device(tmp_path, capsys):
    line = f"train --data_path {tmp_path} --output_dir {tmp_path / 'out'} --augment device --pixels exact"
    assert cli.main(line.split()) == 2
    told = capsys.readouterr().err
    assert "--pixels exact is Pillow's result, made on the CPU" in told and "--augment cpu" in told


def test_other_channels_than_rgb_are_told_to_stay_with_the_workers(capsys):
    tell_what_is_left_out(config_of(in_chans=4, augment="device"))
    assert "--augment device is for RGB images; at --in_chans 4" in capsys.readouterr().err
    tell_what_is_left_out(config_of(in_chans=3, augment="device"))
    tell_what_is_left_out(config_of(in_chans=4, saturation=0, hue=0, gray_prob=0))
    assert capsys.readouterr().err == ""
