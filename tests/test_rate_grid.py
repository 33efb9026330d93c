"""Linear layers trained side by side: each as torch trains it alone, and none by another's doing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dino_kit.data.loader import epoch_order
from dino_kit.evaluators import rate_grid
from dino_kit.evaluators.linear import LinearHead, accuracy
from dino_kit.evaluators.rate_grid import RateGrid

WIDTH, CLASSES, IMAGES = 12, 7, 60
RATES = [0.001 * 2**power for power in range(13)]
FIT = {"epochs": 3, "batch_size": 16, "seed": 5}


@pytest.fixture(scope="module")
def data():
    numbers = torch.Generator().manual_seed(1)
    features = torch.randn(IMAGES, WIDTH, generator=numbers)
    return features, torch.randint(0, CLASSES, (IMAGES,), generator=numbers)


@pytest.fixture(scope="module")
def rows():
    """Three steps of 16 images and one of 2."""
    return torch.randperm(IMAGES, generator=torch.Generator().manual_seed(2))[:50].sort().values


def alone(data, rows, rate: float):
    """Weights after every step of torch's own SGD and schedule, at one rate."""
    features, labels = data
    layer, after = nn.Linear(WIDTH, CLASSES), []
    layer.load_state_dict(LinearHead(WIDTH, CLASSES).linear.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT["epochs"], eta_min=0)
    for epoch in range(FIT["epochs"]):
        order = rows[torch.from_numpy(epoch_order(FIT["seed"], epoch, len(rows)))]
        for batch in order.split(FIT["batch_size"]):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[batch]), labels[batch]).backward()
            optimizer.step()
            after.append({name: value.clone() for name, value in layer.state_dict().items()})
        scheduler.step()
    return after


def test_every_step_at_every_rate_is_that_of_plain_pytorch(data, rows, monkeypatch):
    grid, after = RateGrid(LinearHead(WIDTH, CLASSES), RATES, "cpu"), []
    step = RateGrid.step

    def recorded(self, *batch):
        step(self, *batch)
        after.append([self.head(place).linear.state_dict() for place in range(len(RATES))])

    monkeypatch.setattr(RateGrid, "step", recorded)
    told = []
    grid.fit(*data, rows, **FIT, advance=lambda rounds, text: told.append((rounds, text)))
    for place, rate in enumerate(RATES):
        expected = alone(data, rows, rate)
        assert len(expected) == len(after) == 12
        for number, layers in enumerate(after):
            for name, value in layers[place].items():
                torch.testing.assert_close(value, expected[number][name], rtol=1e-5, atol=1e-5)
    assert told == [(4, "epoch 1/3"), (4, "epoch 2/3"), (4, "epoch 3/3")]


def test_the_first_weights_stay_as_they_are(data, rows):
    head = LinearHead(WIDTH, CLASSES)
    before = head.linear.weight.clone()
    RateGrid(head, RATES, "cpu").fit(*data, rows, **FIT)
    assert torch.equal(head.linear.weight, before)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_rate_that_diverges_harms_no_other(data, rows, place):
    rates = [0.01, 0.1]
    mixed = [*rates[:place], 1e38, *rates[place:]]
    grids = [RateGrid(LinearHead(WIDTH, CLASSES), found, "cpu") for found in (rates, mixed)]
    for grid in grids:
        grid.fit(*data, rows, **FIT)
    assert grids[1].are_finite() == [number != place for number in range(3)]
    others = [number for number in range(3) if number != place]
    for before, number in enumerate(others):
        one, other = grids[0].head(before), grids[1].head(number)
        torch.testing.assert_close(one.linear.weight, other.linear.weight)
        torch.testing.assert_close(one.linear.bias, other.linear.bias)
    found = grids[1].classify(*data, rows)
    assert not found[place].loss < float("inf")
    assert [found[number].top1 for number in others] == [
        each.top1 for each in grids[0].classify(*data, rows)
    ]


@pytest.mark.parametrize("classes", [CLASSES, 4])
def test_layers_are_classified_by_as_one_by_one(data, rows, classes, monkeypatch):
    """Also some images at a time."""
    features, labels = data[0], data[1] % classes
    grid = RateGrid(LinearHead(WIDTH, classes), RATES[-3:], "cpu")
    grid.fit(features, labels, rows, **FIT)
    whole = grid.classify(features, labels, rows)
    monkeypatch.setattr(rate_grid, "_LOGITS", 7 * 3 * classes)
    for found, part, place in zip(whole, grid.classify(features, labels, rows), range(3), strict=True):
        expected = accuracy(grid.head(place), features[rows], labels[rows])
        for each in (found, part):
            assert each.top1 == pytest.approx(expected["acc1"])
            assert each.loss == pytest.approx(expected["loss"], abs=1e-5)
            assert (each.top5 is None) == (classes < 5)
            assert each.top5 is None or each.top5 == pytest.approx(expected["acc5"])
