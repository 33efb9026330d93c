"""A linear layer on frozen features: features, training and accuracy, against plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as pixels

from dino_kit import distributed
from dino_kit.backbones.build import create_backbone
from dino_kit.data import augment
from dino_kit.data.crops import sample_crop
from dino_kit.data.sources.folder import FolderSource
from dino_kit.errors import RunFailed, UserError
from dino_kit.evaluators import linear
from dino_kit.evaluators.linear import LinearFeatures, LinearHead, Step, accuracy, fit
from dino_kit.evaluators.shares import shared_features
from dino_kit.randomness import stream
from dino_kit.weights import EvalTransform

WIDTH, CLASSES = 12, 7


# Crops


def test_the_crops_to_train_on_are_torchvisions_by_default():
    view, theirs = linear.training_view(224), transforms.RandomResizedCrop(224)
    assert ((view.size,) * 2, view.scale, view.ratio) == (theirs.size, theirs.scale, theirs.ratio)
    assert view.flip_prob == transforms.RandomHorizontalFlip().p
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image, flips = Image.fromarray(noise), 0
    for number in range(20):
        drawn = sample_crop(linear.training_view(32), 60, 90, stream("crop", 0, 0, number))
        expected = pixels.resized_crop(image, *drawn.box, [32, 32], theirs.interpolation)
        expected = pixels.hflip(expected) if drawn.flip else expected
        assert np.array_equal(view.render(image, drawn), np.asarray(expected))
        assert not np.array_equal(augment.render(image, drawn), np.asarray(expected))  # bicubic
        flips += drawn.flip
    assert 0 < flips < 20


# Features


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_backbone(
            "vit", image_size=16, patch_size=4, embed_dim=WIDTH, depth=3, num_heads=2
        ).eval()


def as_the_reference_has_it(backbone, images, n: int, average: bool) -> torch.Tensor:
    layers = backbone.get_intermediate_layers(images, n)
    output = torch.cat([x[:, 0] for x in layers], dim=-1)
    if average:
        patches = torch.mean(layers[-1][:, 1:], dim=1)
        output = torch.cat((output.unsqueeze(-1), patches.unsqueeze(-1)), dim=-1)
        output = output.reshape(output.shape[0], -1)
    return output


@pytest.mark.parametrize("n, average", [(1, False), (1, True), (2, False), (3, False)])
@torch.no_grad()
def test_features_are_the_references_number_by_number(backbone, n, average):
    features, images = LinearFeatures(backbone, n, average), torch.randn(5, 3, 16, 16)
    found = features(images)
    assert found.shape == (5, features.embed_dim)
    assert torch.equal(found, as_the_reference_has_it(backbone, images, n, average))


@torch.no_grad()
def test_of_several_blocks_the_average_comes_last(backbone):
    features, images = LinearFeatures(backbone, 2, True), torch.randn(5, 3, 16, 16)
    found = features(images)
    assert features.embed_dim == 3 * WIDTH
    assert torch.equal(found[:, : 2 * WIDTH], LinearFeatures(backbone, 2)(images))
    torch.testing.assert_close(
        found[:, 2 * WIDTH :], backbone.forward_features(images).patches.mean(dim=1)
    )


@torch.no_grad()
def test_registers_are_no_patches_and_have_no_part_in_the_average():
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": WIDTH, "depth": 3, "num_heads": 2}
    backbone = create_backbone("vit", num_register_tokens=4, **sizes)
    features, images = LinearFeatures(backbone, 2, True), torch.randn(5, 3, 16, 16)
    before, last = backbone.get_intermediate_layers(images, 2)
    expected = torch.cat((before[:, 0], last[:, 0], last[:, -16:].mean(dim=1)), dim=1)
    torch.testing.assert_close(features(images), expected)
    assert not torch.allclose(expected[:, -WIDTH:], last[:, 1:].mean(dim=1), atol=1e-4)


class WithoutPrefix(nn.Module):
    """Blocks of patches only, the n-th from the end all n."""

    embed_dim, depth, num_prefix_tokens = WIDTH, 6, 0

    def get_intermediate_layers(self, images, n=1):
        noise = torch.linspace(-1, 1, 4)[:, None].expand(len(images), 4, WIDTH)
        return [noise + block for block in range(n, 0, -1)]


def test_without_prefix_tokens_the_patches_average_is_the_feature_of_a_block():
    found = LinearFeatures(WithoutPrefix(), 3)(torch.zeros(2, 3, 16, 16))
    expected = torch.tensor([3.0, 2.0, 1.0]).repeat_interleave(WIDTH).expand(2, -1)
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="that average already"):
        LinearFeatures(WithoutPrefix(), 3, True)


def test_four_blocks_unless_there_are_fewer(backbone):
    assert LinearFeatures(WithoutPrefix()).n_last_blocks == 4
    assert LinearFeatures(backbone).n_last_blocks == 3
    with pytest.raises(UserError, match="--n_last_blocks 4 is more than the 3 blocks"):
        LinearFeatures(backbone, 4)


# The layer


def test_first_weights_are_small_and_of_the_seed_alone():
    before = torch.random.get_rng_state()
    one, same, other = (LinearHead(400, 50, seed).linear for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    assert one.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(one.weight.mean().item()) < 3e-4 and not one.bias.any()


# Training


class Data:
    """Features by epoch and image, as crops make them, in batches of which the last is short."""

    def __init__(self, images: int = 22, batch: int = 8, epochs: int = 4):
        numbers = torch.Generator().manual_seed(1)
        self.features = torch.randn(epochs, images, WIDTH, generator=numbers)
        self.labels = torch.randint(0, CLASSES, (images,), generator=numbers)
        self.batch, self.epochs = batch, epochs
        self.steps_per_epoch = -(-images // batch)

    def batches(self, epoch: int):
        return zip(self.features[epoch].split(self.batch), self.labels.split(self.batch), strict=True)

    def steps(self, start: int = 0):
        for epoch in range(start, self.epochs):
            for features, labels in self.batches(epoch):
                yield Step(features, labels, len(labels))

    def fit(self, head, steps=None, lr: float = 0.5, **options):
        lines = []
        fit(
            head,
            linear.build_optimizer(head),
            self.steps() if steps is None else steps,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.epochs,
            lr=lr,
            validate=lambda: accuracy(head, self.features[0], self.labels),
            finished=lambda done, line: lines.append((done, line)),
            **options,
        )
        return lines


def test_training_is_that_of_plain_pytorch():
    data, head = Data(), LinearHead(WIDTH, CLASSES)
    plain = nn.Linear(WIDTH, CLASSES)
    plain.load_state_dict(head.linear.state_dict())
    lines = data.fit(head)

    optimizer = torch.optim.SGD(plain.parameters(), 0.5, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, data.epochs, eta_min=0)
    for epoch, (done, line) in enumerate(lines):
        losses, rate = [], optimizer.param_groups[0]["lr"]
        for features, labels in data.batches(epoch):
            loss = nn.CrossEntropyLoss()(plain(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(labels)
        scheduler.step()
        assert (done, line["epoch"]) == (epoch + 1, epoch)
        assert line["train_lr"] == pytest.approx(rate, abs=1e-12)
        assert line["train_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
        assert line["train_images"] == len(losses) and line["test_images"] == len(data.labels)
        assert list(line) == [
            "train_loss", "train_lr", "train_images", "epoch",
            "test_loss", "test_acc1", "test_acc5", "test_images",
        ]  # fmt: skip
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(head.linear.state_dict()[name], value, rtol=0, atol=1e-6)


def test_a_step_without_images_here_takes_the_others_gradient_and_nothing_of_its_own():
    data, head = Data(epochs=1), LinearHead(WIDTH, CLASSES)
    before = head.linear.weight.clone()
    none = Step(torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64), 8)
    ((_, line),) = data.fit(head, iter([none] * 3))
    assert torch.equal(before, head.linear.weight) and line["train_loss"] == 0


def test_a_step_without_images_anywhere_does_not_even_roll_on():
    data = Data(epochs=1)
    nothing = Step(torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64), 0)
    first, *_ = data.steps()
    heads = [LinearHead(WIDTH, CLASSES) for _ in range(2)]
    data.steps_per_epoch = 1
    ((_, expected),) = data.fit(heads[0], iter([first]))
    data.steps_per_epoch = 3
    ((_, line),) = data.fit(heads[1], iter([first, nothing, nothing]))
    assert torch.equal(heads[0].linear.weight, heads[1].linear.weight)
    assert line == expected
    with pytest.raises(UserError, match="None of the images of epoch 1 can be used"):
        data.fit(heads[1], iter([nothing] * 3))


def test_a_part_of_a_step_counts_by_its_share_of_the_whole():
    """What a process adds to the gradient's sum over processes is its images over all."""
    data, head = Data(images=4, batch=4, epochs=1), LinearHead(WIDTH, CLASSES)
    features, labels = data.features[0], data.labels
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        head = LinearHead(WIDTH, CLASSES)
        data.fit(head, iter([Step(features[rows], labels[rows], 4)]))
        parts.append(head.linear.weight - LinearHead(WIDTH, CLASSES).linear.weight)
    data.fit(head := LinearHead(WIDTH, CLASSES))
    whole = head.linear.weight - LinearHead(WIDTH, CLASSES).linear.weight
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("freq, validated", [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (9, [0, 3])])
def test_the_last_epoch_is_always_validated(freq, validated):
    lines = Data().fit(LinearHead(WIDTH, CLASSES), val_freq=freq)
    assert [line["epoch"] for _, line in lines if "test_acc1" in line] == validated


def test_progress_counts_steps_and_tells_loss_and_accuracy():
    told = []
    data = Data()
    data.fit(LinearHead(WIDTH, CLASSES), advance=lambda rounds, text: told.append((rounds, text)))
    assert sum(rounds for rounds, _ in told) == data.epochs * data.steps_per_epoch
    lines = Data().fit(LinearHead(WIDTH, CLASSES))
    assert [text for _, text in told if text] == [
        f"epoch {done}/4  loss {line['train_loss']:.4f}  top-1 {line['test_acc1']:.2f} %"
        for done, line in lines
    ]


def test_in_a_long_epoch_the_loss_so_far_is_told():
    told, data = [], Data(images=50, batch=1, epochs=1)
    data.fit(LinearHead(WIDTH, CLASSES), advance=lambda rounds, text: told.append(text))
    assert [number for number, text in enumerate(told, 1) if text] == [20, 40, 50]
    assert told[19].startswith("epoch 1/1  loss ") and "top-1" not in told[19]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_anything_is_kept(value):
    data = Data()
    data.features[1, 3] = value
    kept = []
    with pytest.raises(RunFailed, match=r"loss of epoch 2 is .*--lr 0\.5"):
        fit(
            head := LinearHead(WIDTH, CLASSES),
            linear.build_optimizer(head),
            data.steps(),
            steps_per_epoch=data.steps_per_epoch,
            epochs=data.epochs,
            lr=0.5,
            validate=lambda: {"loss": 0.0, "acc1": 0.0, "acc5": None},
            finished=lambda done, line: kept.append(done),
        )
    assert kept == [1]


# Accuracy


@pytest.mark.parametrize("rows", [4096, 1, 5])
@pytest.mark.parametrize("classes", [3, 5, CLASSES])
def test_accuracy_counts_image_by_image(monkeypatch, rows, classes):
    monkeypatch.setattr(linear, "_ROWS", rows)
    head, features = LinearHead(WIDTH, classes), torch.randn(31, WIDTH)
    labels = torch.randint(0, classes, (31,))
    logits = head(features)
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    found = accuracy(head, features, labels)
    assert found["acc1"] == pytest.approx(100 * np.mean([rank == 0 for rank in ranks]))
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
    if classes < 5:
        assert found["acc5"] is None
    else:
        assert found["acc5"] == pytest.approx(100 * np.mean([rank < 5 for rank in ranks]))


@pytest.mark.parametrize("of_others", [3, 0])
@pytest.mark.parametrize("images", [1, 2])  # the second process has none, or one
def test_a_process_may_have_no_image_that_can_be_used_where_others_have(
    monkeypatch, tmp_path, images, of_others
):
    for number in range(images):
        (tmp_path / "class").mkdir(exist_ok=True)
        (tmp_path / f"class/{number}.png").write_bytes(b"no image")
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "total", lambda number, device: number + of_others)
    backbone = create_backbone("vit", patch_size=4, embed_dim=24, depth=1, num_heads=2)
    features, transform = LinearFeatures(backbone), EvalTransform(16, (0.5,) * 3, (0.5,) * 3)
    how = {"batch_size": 2, "num_workers": 0, "device": torch.device("cpu")}
    source = FolderSource(tmp_path)
    if of_others:
        found = shared_features(features, source, transform, **how)
        assert found.features.shape == (0, 24) and len(found.left_out) == images - 1
        return
    with pytest.raises(UserError, match=f"^None of the {images} images of"):
        shared_features(features, source, transform, **how)
