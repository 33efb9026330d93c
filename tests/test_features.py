"""Extraction: the transform, the order, the labels, and what happens to faults."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from dino_kit.data.sources.objects import DatasetSource
from dino_kit.errors import UserError
from dino_kit.features import embed, extract

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pictures:
    """Pictures of many shapes, encoded, in a list."""

    root = "a list"

    def __init__(self, count: int):
        self.classes = ["a", "b", "c"]
        rng = np.random.default_rng(0)
        self.images = [
            rng.integers(0, 256, (80 + 3 * i, 120 - 5 * i, 3), dtype=np.uint8) for i in range(count)
        ]
        self.labels = [i % 3 for i in range(count)]

    def __len__(self):
        return len(self.images)

    def read(self, index):
        if self.images[index] is None:
            return b"no image"
        file = io.BytesIO()
        Image.fromarray(self.images[index]).save(file, "png")
        return file.getvalue()

    def label(self, index):
        return self.labels[index]

    def name(self, index):
        return f"picture{index}"


class Probe(nn.Module):
    """Returns the pixels it is shown, and remembers how it ran."""

    def __init__(self, size: int):
        super().__init__()
        self.embed_dim = 3 * size * size
        self.dropout = nn.Dropout(0.5)
        self.seen: list[tuple] = []

    def forward(self, images):
        self.seen.append((len(images), self.training, torch.is_inference_mode_enabled()))
        return self.dropout(images.flatten(1))


@pytest.mark.parametrize("size, resize", [(70, 80), (64, 64), (32, 32), (98, 112)])
def test_the_backbone_sees_what_torchvisions_transform_gives(size, resize):
    source = Pictures(3)
    reference = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    features, *_ = extract(Probe(size), source, image_size=size)
    for row, image in zip(features, source.images, strict=True):
        assert torch.equal(row, reference(Image.fromarray(image)).flatten())


def test_normalisation_can_be_another():
    plain, *_ = extract(Probe(32), Pictures(2), image_size=32, mean=(0, 0, 0), std=(1, 1, 1))
    assert plain.min() >= 0 and plain.max() <= 1


@pytest.mark.parametrize("workers, batch", [(0, 3), (2, 3), (2, 1), (0, 100)])
def test_order_and_labels_are_the_sources(workers, batch):
    source = Pictures(7)
    probe = Probe(32).train()
    features, labels, left_out = extract(
        probe, source, image_size=32, batch_size=batch, num_workers=workers
    )
    expected = [extract(Probe(32), _One(source, i), image_size=32)[0][0] for i in range(7)]
    assert torch.equal(features, torch.stack(expected))
    assert features.dtype == torch.float32 and not features.is_inference()
    assert labels.tolist() == source.labels and labels.dtype == torch.int64 and left_out == {}
    assert sum(count for count, _, _ in probe.seen) == 7
    assert all(not training and inference for _, training, inference in probe.seen)
    assert probe.training


class _One(Pictures):
    def __init__(self, source, index):
        self.images, self.labels = [source.images[index]], [source.labels[index]]


def test_autocast_of_the_caller_does_not_reach_the_backbone():
    probe = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    probe.embed_dim = 4
    expected, *_ = extract(probe, Pictures(2), image_size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, *_ = extract(probe, Pictures(2), image_size=32)
    assert torch.equal(found, expected)


def test_an_unlabelled_image_is_named_before_any_work():
    source, probe = Pictures(4), Probe(32)
    source.labels[2] = None
    with pytest.raises(UserError, match="picture2 has no label"):
        extract(probe, source, image_size=32)
    assert not probe.seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [[3], [0, 1, 5]])  # some of a batch; a whole one and one more
def test_images_that_cannot_be_used_are_left_out_told_and_counted(workers, bad, capsys):
    source, whole = Pictures(6), Pictures(6)
    for index in bad:
        source.images[index] = None
    good = [index for index in range(6) if index not in bad]
    options = {"image_size": 32, "batch_size": 2, "num_workers": workers}
    features, kept, left_out = embed(Probe(32), source, **options)
    assert kept.tolist() == good and kept.dtype == torch.int64
    assert torch.equal(features, embed(Probe(32), whole, **options).features[good])
    assert list(left_out) == [f"picture{index}" for index in bad]
    assert all(f"{name} cannot be read" in reason for name, reason in left_out.items())
    assert f"{len(bad)} of 6 images of" in (said := capsys.readouterr().err)
    assert f"left out. picture{bad[0]} cannot be read" in said
    again, labels, counted = extract(Probe(32), source, **options)
    assert torch.equal(again, features) and counted == left_out
    assert labels.tolist() == [source.labels[index] for index in good]


def test_an_image_that_is_lost_needs_no_label():
    source = DatasetSource([(np.zeros((9, 9, 3), np.uint8), i % 2) for i in range(4)])
    source.dataset = _Lost(source.dataset)
    _, labels, left_out = extract(Probe(32), source, image_size=32)
    assert labels.tolist() == [0, 0, 1] and list(left_out) == ["list[1]"]


class _Lost(list):
    def __getitem__(self, index):
        return super().__getitem__(index if index != 1 else 99)


def test_where_no_image_can_be_used_there_is_a_sentence():
    source, probe = Pictures(3), Probe(32).train()
    source.images = [None] * 3
    with pytest.raises(UserError, match="None of the 3 images of .* can be used. picture0 cannot"):
        extract(probe, source, image_size=32)
    assert probe.training


class _Twice(Pictures):
    def name(self, index):
        return "the same"


def test_an_image_that_is_listed_twice_counts_twice(capsys):
    source = _Twice(3)
    source.images[:2] = [None] * 2
    assert len(extract(Probe(32), source, image_size=32).features) == 1
    assert "2 of 3 images of a list cannot be used and are left out" in capsys.readouterr().err
    source.images = [None] * 3
    with pytest.raises(UserError, match="None of the 3 images"):
        extract(Probe(32), source, image_size=32)


class _Gone(Pictures):
    def read(self, index):
        raise UserError("The archive is gone.")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_is_gone_ends_it(workers):
    with pytest.raises(UserError, match=r"^The archive is gone\.$"):
        embed(Probe(32), _Gone(4), image_size=32, num_workers=workers)
