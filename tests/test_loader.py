"""The loader: which images a step takes, and that nothing but seed and step decides the crops."""

from __future__ import annotations

import io
import multiprocessing
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_kit.data import loader as module
from dino_kit.data.crops import View
from dino_kit.data.loader import Batch, Loader, default_workers
from dino_kit.errors import UserError


class Pictures:
    """Small pictures, arrays and files by turns; those in ``broken`` cannot be read."""

    classes = None

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def read(self, index):
        if index in self.broken:
            return b"no image"
        shape = (9 + index % 4, 12 - index % 3, 3)
        pixels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
        if index % 2:
            return pixels
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    def label(self, index):
        return None

    def name(self, index):
        return f"picture {index}"


GLOBAL = View(6, (0.4, 1.0), blur_prob=1.0)
GROUPS = [[GLOBAL, View(6, (0.4, 1.0), solarize_prob=0.2)], [View(4, (0.05, 0.4))] * 3]
ONE = [[View(1, (0.4, 1.0), jitter_prob=0, gray_prob=0, blur_prob=0)]]


def load(source=None, groups=GROUPS, *, count=11, **options) -> Loader:
    options = {"seed": 5, "epochs": 3, "total_batch_size": 4, "batch_size_per_gpu": 4} | options
    return Loader(source or Pictures(count), groups, **options)


def by_place(*loaders: Loader) -> list[dict[int, tuple]]:
    """For each step: place in the global batch → image and crops, of all processes together."""
    steps = []
    for parts in zip(*loaders, strict=True):
        places = {}
        for batch in (batch for part in parts for batch in part):
            for column, place in enumerate(batch.places.tolist()):
                assert place not in places
                crops = tuple(group[:, column].numpy().tobytes() for group in batch.groups)
                places[place] = int(batch.indices[column]), crops
        steps.append(places)
    return steps


def images(places: dict[int, tuple]) -> list[int]:
    return [places[place][0] for place in sorted(places)]


@pytest.fixture(scope="module")
def expected():
    return by_place(load())


def test_a_batch_holds_the_crops_of_each_size_and_says_of_which_images():
    [step, *_] = load(batch_size_per_gpu=3)
    assert all(type(batch) is Batch for batch in step)
    for batch, size in zip(step, (2, 2), strict=True):
        globals_, locals_ = batch.groups
        assert globals_.shape == (2, size, 3, 6, 6) and locals_.shape == (3, size, 3, 4, 4)
        assert globals_.dtype == locals_.dtype == torch.uint8
        assert batch.indices.dtype == batch.places.dtype == torch.int64
        assert batch.indices.shape == batch.places.shape == (size,)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 15), st.integers(1, 3), st.integers(0, 2**40))
def test_an_epoch_takes_every_image_once_and_drops_the_last_short_batch(batch, more, epochs, seed):
    count = batch + more
    loader = load(count=count, groups=ONE, seed=seed, epochs=epochs, total_batch_size=batch)
    steps = by_place(loader)
    assert loader.steps_per_epoch == count // batch
    assert len(steps) == len(loader) == loader.total_steps == epochs * (count // batch)
    for epoch in range(epochs):
        taken = steps[epoch * (count // batch) : (epoch + 1) * (count // batch)]
        indices = [index for places in taken for index in images(places)]
        assert len(indices) == count - count % batch
        assert len(set(indices)) == len(indices) and set(indices) <= set(range(count))
    assert all(sorted(places) == list(range(batch)) for places in steps)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 20), share=st.integers(1, 5), world_size=st.integers(1, 3),
    most=st.integers(1, 5), start=st.integers(0, 2),
)  # fmt: skip
def test_the_last_short_batch_can_be_taken_too(count, share, world_size, most, start):
    """Then, too, processes share it as evenly as can be, and one without images takes its step."""
    batch, epochs = share * world_size, 2
    options = {"count": count, "groups": ONE, "total_batch_size": batch, "epochs": epochs,
               "drop_last": False, "start_step": start}  # fmt: skip
    loaders = [
        load(rank=rank, world_size=world_size, batch_size_per_gpu=most, **options)
        for rank in range(world_size)
    ]
    steps, per_epoch = by_place(*loaders), -(-count // batch)
    assert {loader.steps_per_epoch for loader in loaders} == {per_epoch}
    assert len(steps) == max(0, epochs * per_epoch - start)
    whole = by_place(load(**options | {"start_step": 0}, batch_size_per_gpu=batch))
    assert steps == whole[start:]
    for epoch in range(epochs):
        taken = [image for places in whole[epoch * per_epoch :][:per_epoch]
                 for image in images(places)]  # fmt: skip
        assert sorted(taken) == list(range(count))
    for step in zip(*loaders, strict=True):
        sizes = [sum(len(part.indices) for part in parts) for parts in step]
        assert max(sizes) - min(sizes) <= 1
        assert all(len(part.indices) <= most for parts in step for part in parts)


def test_each_epoch_and_seed_has_an_order_of_its_own():
    options = {"count": 24, "groups": ONE, "total_batch_size": 24, "epochs": 4}
    orders = [tuple(images(places)) for seed in range(3)
              for places in by_place(load(seed=seed, **options))]  # fmt: skip
    assert len(set(orders)) == 12
    assert all(sorted(order) == list(range(24)) for order in orders)
    # The images that the last short batch would have held are others each time.
    steps = by_place(load(groups=ONE, epochs=9))
    left_out = [set(range(11)) - set(images(steps[i]) + images(steps[i + 1])) for i in (0, 2, 4)]
    assert set().union(*left_out) > left_out[0]


def test_every_seed_epoch_image_and_view_draws_numbers_of_its_own():
    view = View(4, (0.4, 1.0), blur_prob=1.0, render=radius)
    radii = [
        value
        for seed in (0, 1)
        for [batch] in load(groups=[[view] * 2, [view] * 3], seed=seed)
        for group in batch.groups
        for value in group.flatten().tolist()
    ]
    assert len(radii) == len(set(radii)) == 2 * 6 * 4 * 5


def radius(image, parameters):
    return torch.full((1, 1, 1), parameters.blur_radius, dtype=torch.float64)


def test_a_crop_does_not_depend_on_the_batch_or_on_the_other_images():
    def crops(**options):
        loader = load(epochs=1, **options)
        return {index: crop for places in by_place(loader) for index, crop in places.values()}

    expected = crops(total_batch_size=1)
    assert len(expected) == 11
    for options in ({"total_batch_size": 3}, {"total_batch_size": 11, "batch_size_per_gpu": 2},
                    {"count": 7, "total_batch_size": 7}):  # fmt: skip
        found = crops(**options)
        assert found.items() <= expected.items() and len(found) >= 7


@pytest.mark.parametrize("workers, start", [(1, "fork"), (2, "fork"), (2, "spawn"), (2, None)])
def test_workers_and_their_kind_change_nothing(expected, workers, start):
    if start not in (None, *multiprocessing.get_all_start_methods()):
        pytest.skip(f"this platform cannot {start}")
    found = load(num_workers=workers, multiprocessing_context=start)
    assert by_place(found) == expected


def test_the_work_is_done_by_the_workers():
    loader = load(groups=[[View(4, (0.4, 1.0), render=process_number)]], num_workers=2)
    numbers = {int(batch.groups[0].unique()) for step in loader for batch in step}
    assert len(numbers) == 2 and os.getpid() not in numbers


def process_number(image, parameters):
    return torch.full((3, parameters.size, parameters.size), os.getpid(), dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 20), st.integers(2, 4), st.integers(0, 2**40))
def test_several_processes_take_each_image_once_and_repeat_none(share, more, world_size, seed):
    """The reference's sampler repeats images, so that each process has as many."""
    batch = share * world_size
    count = batch + more
    options = {"count": count, "groups": ONE, "seed": seed, "total_batch_size": batch, "epochs": 1}
    loaders = [load(rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    steps = {len(loader) for loader in loaders}
    assert steps == {count // batch} == {len(load(**options))}
    taken = [index for places in by_place(*loaders) for index in images(places)]
    assert len(taken) == len(set(taken)) == count - count % batch


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size_per_gpu", [1, 3, 8])
def test_processes_and_accumulation_change_nothing(world_size, batch_size_per_gpu):
    expected = by_place(load(total_batch_size=8, batch_size_per_gpu=8))
    loaders = [
        load(total_batch_size=8, batch_size_per_gpu=batch_size_per_gpu, rank=rank,
             world_size=world_size)
        for rank in range(world_size)
    ]  # fmt: skip
    assert by_place(*loaders) == expected
    assert {len(loader) for loader in loaders} == {len(expected)}
    # A process's part is a run of places, so that ranks in order make up the global batch.
    local = 8 // world_size
    for rank, loader in enumerate(loaders):
        for places in by_place(loader):
            assert sorted(places) == list(range(rank * local, (rank + 1) * local))


@pytest.mark.parametrize("start", range(7))
def test_a_loader_that_starts_later_gives_the_tail_of_the_run(expected, start):
    loader = load(start_step=start, num_workers=start % 2)
    assert len(loader) == len(expected) - start and loader.total_steps == len(expected)
    assert by_place(loader) == expected[start:]


def test_random_numbers_of_the_caller_change_nothing(expected):
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            assert by_place(load()) == expected


def test_a_loader_can_be_gone_through_again(expected):
    loader = load()
    next(iter(loader))
    assert by_place(loader) == expected == by_place(loader)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 3))
def test_micro_batches_are_as_few_and_as_even_as_they_can_be(local, largest, world_size):
    [step] = load(
        count=local * world_size, groups=ONE, epochs=1, total_batch_size=local * world_size,
        batch_size_per_gpu=largest, rank=world_size - 1, world_size=world_size,
    )  # fmt: skip
    sizes = [len(batch.indices) for batch in step]
    assert sum(sizes) == local and max(sizes) <= largest and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-local // largest)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_view_may_be_rendered_to_floats(workers):
    view = View(4, (0.4, 1.0), render=means)
    [[batch], *_] = load(groups=[[view] * 2, [View(5, (0.4, 1.0))]], num_workers=workers)
    floats, pixels = batch.groups
    assert floats.shape == (2, 4, 3, 4, 4) and floats.dtype == torch.float32
    assert pixels.shape == (1, 4, 3, 5, 5) and pixels.dtype == torch.uint8
    source = Pictures(11)
    for column, index in enumerate(batch.indices.tolist()):
        data = source.read(index)
        image = data if index % 2 else np.asarray(Image.open(io.BytesIO(data)))
        assert torch.equal(floats[0, column], torch.full((3, 4, 4), float(image.mean())))


def means(image, parameters):
    return torch.full((3, parameters.size, parameters.size), float(np.asarray(image).mean()))


def test_a_view_may_be_rendered_to_an_array_in_any_memory():
    for render in (mirrored, writeable):
        [[batch], *_] = load(groups=[[View(4, (0.4, 1.0), render=render)]])
        assert batch.groups[0].tolist() == [[PATTERN.transpose(2, 0, 1).tolist()] * 4]


PATTERN = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def mirrored(image, parameters):
    return PATTERN[:, ::-1].copy()[:, ::-1]


def writeable(image, parameters):
    return PATTERN.copy()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"total_batch_size": 12}, "There are 11 images, fewer than one batch of 12; give --total_batch_size 11 or"),
        (
            {"total_batch_size": 7, "world_size": 2},
            "A total batch of 7 cannot be split evenly over 2 processes; change --total_batch_size",
        ),
    ],
)
def test_a_batch_that_cannot_be_is_refused(options, sentence):
    with pytest.raises(UserError) as caught:
        load(**options)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_broken_image_ends_the_run_with_its_name(expected, workers):
    broken = images(expected[2])[1]
    loader = load(Pictures(11, broken=(broken,)), num_workers=workers)
    seen = 0
    with pytest.raises(UserError) as caught:
        for _ in loader:
            seen += 1
    # The image is in each epoch; the first step that holds it is not given.
    assert seen == next(n for n, places in enumerate(expected) if broken in images(places))
    name = f"picture {broken} cannot be read as an image: "
    assert str(caught.value).startswith(name) and "\n" not in str(caught.value)


BROKEN = (2, 7, 8)


def columns(loader: Loader) -> list[list[tuple[int, int, tuple]]]:
    """For each step: image, place and crops of each column."""
    return [
        [
            (index, place, tuple(group[:, column].numpy().tobytes() for group in batch.groups))
            for batch in step
            for column, (index, place) in enumerate(
                zip(batch.indices.tolist(), batch.places.tolist(), strict=True)
            )
        ]
        for step in loader
    ]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_another_image_takes_the_place_of_one_that_cannot_be_used(expected, workers):
    loader = load(Pictures(11, BROKEN), on_bad_image="replace", num_workers=workers)
    steps = list(loader)
    found = [batch for (batch,) in steps]
    replaced, seen = 0, set()
    for batch, places in zip(found, expected, strict=True):
        assert batch.places.tolist() == [0, 1, 2, 3]
        told = [index for index, _ in batch.bad]
        for column, (index, place) in enumerate(zip(batch.indices, range(4), strict=True)):
            wanted, crops = places[place]
            own = tuple(group[:, column].numpy().tobytes() for group in batch.groups)
            if wanted in BROKEN:
                assert int(index) not in BROKEN and wanted in told
                replaced += 1
            else:
                assert (int(index), own) == (wanted, crops)
        assert set(told) >= {places[place][0] for place in range(4)} & set(BROKEN)
        for index, sentence in batch.bad:
            assert sentence.startswith(f"picture {index} cannot be read as an image: ")
            seen.add(index)
    assert replaced and seen == set(BROKEN)


def test_what_takes_the_place_depends_on_seed_epoch_and_image_alone():
    options = {"source": Pictures(11, BROKEN), "on_bad_image": "replace"}
    once = columns(load(**options))
    assert columns(load(**options, num_workers=3)) == once
    assert columns(load(**options, start_step=3)) == once[3:]
    parts = [columns(load(**options, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [one + two for one, two in zip(*parts, strict=True)] == once
    smaller = [sorted(step) for step in columns(load(**options, batch_size_per_gpu=3))]
    assert smaller == [sorted(step) for step in once]
    assert columns(load(**options, seed=6)) != once


def test_the_crops_are_not_those_that_the_other_image_has_of_its_own():
    """Else an image that stands in for another would be in the batch twice, with equal crops."""
    source = Pictures(4, broken=(0, 1, 2))
    options = {"total_batch_size": 4, "epochs": 1, "on_bad_image": "replace"}
    ((batch,),) = load(source, **options)
    assert batch.indices.tolist() == [3] * 4
    crops = {tuple(group[:, column].numpy().tobytes() for group in batch.groups)
             for column in range(4)}  # fmt: skip
    assert len(crops) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_where_nothing_can_take_the_place_the_run_ends_in_a_sentence(workers):
    loader = load(Pictures(11, tuple(range(11))), on_bad_image="replace", num_workers=workers)
    with pytest.raises(UserError, match=r"^picture \d+ cannot be .* Nor can .*, 100 times, .* \d+\.$"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_used_is_left_out_where_that_is_asked(expected, workers):
    loader = load(Pictures(11, BROKEN), on_bad_image="leave_out", num_workers=workers)
    steps = columns(loader)
    for step, places in zip(steps, expected, strict=True):
        kept = [(*places[place], place) for place in range(4) if places[place][0] not in BROKEN]
        assert step == [(index, place, crops) for index, crops, place in kept]
    assert sum(map(len, steps)) < sum(map(len, expected))
    ((batch,), *_) = load(Pictures(4, (0, 1, 2, 3)), on_bad_image="leave_out")
    assert batch.groups == [] and len(batch.indices) == len(batch.places) == 0
    assert len(batch.bad) == 4


def test_an_image_that_is_too_small_for_a_crop_as_it_is_can_be_replaced_too():
    groups = [[View(10, None, blur_prob=0)] * 2]  # pictures are 9 to 12 pixels high
    ((batch,), *_) = load(groups=groups, total_batch_size=11, batch_size_per_gpu=11,
                          on_bad_image="replace")  # fmt: skip
    assert [index for index, _ in batch.bad]
    assert all(9 + index % 4 >= 10 for index in batch.indices.tolist())


@pytest.mark.parametrize("on_bad_image", ["raise", "replace", "leave_out"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_cannot_read_ends_the_run_with_its_sentence(workers, on_bad_image):
    with pytest.raises(UserError, match=r"^a/b\.png cannot be opened: Gone\.$"):
        list(load(Unreadable(11), num_workers=workers, on_bad_image=on_bad_image))


class Unreadable(Pictures):
    def read(self, index):
        raise UserError("a/b.png cannot be opened: Gone.")


@pytest.mark.parametrize("cores, workers", [(1, 1), (3, 3), (10, 10), (64, 10)])
def test_there_are_as_many_workers_as_usable_cores_and_ten_at_most(monkeypatch, cores, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert default_workers() == workers


@pytest.mark.parametrize("cores, workers", [(4, 4), (64, 10), (None, 1)])
def test_where_the_usable_cores_are_unknown_all_are_counted(monkeypatch, cores, workers):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert module.usable_cores() == (cores or 1) and default_workers() == workers
