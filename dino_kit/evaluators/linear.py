"""A linear layer on frozen features: which features, the layer, its training and its accuracy.

Source: Caron et al. 2021, section 4.1 (linear evaluation) and appendix F; the protocol is that of
the reference's ``eval_linear.py``. Training takes (features, labels) step by step and does not ask
where they come from: from crops as they are made, or from a store.

Legend: B images, n images of a set, P prefix tokens, N patches, D width of the backbone, E width of
the features, C classes, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dino_kit import distributed
from dino_kit.data import augment
from dino_kit.data.crops import View
from dino_kit.errors import RunFailed, UserError
from dino_kit.schedules import cosine

REFERENCE_BATCH = 256  # the batch that a learning rate is given for
BLOCKS = 4  # joined unless told otherwise
MOMENTUM = 0.9
TOP = 5
_ROWS = 4096  # classified at once
_STEPS_BETWEEN_LOSSES = 20  # a loss that is shown has to be waited for


def training_view(size: int, crop_without_resize: bool = False) -> View:
    """The crops that a linear layer learns from: a box of 8 to 100 % of the image, and a flip.

    torchvision's ``RandomResizedCrop(size)`` and ``RandomHorizontalFlip()`` as they are by default,
    which resize bilinearly, where pretraining and validation do so bicubically. Of a backbone that
    learnt from crops without resizing it is such a crop.
    """
    return View(
        size=size,
        scale=None if crop_without_resize else (0.08, 1.0),
        jitter_prob=0.0,
        gray_prob=0.0,
        blur_prob=0.0,
        render=partial(augment.render, resample=Image.Resampling.BILINEAR),
    )


class LinearFeatures(nn.Module):
    """What a linear layer sees of an image: images (B, 3, S, S) to (B, E).

    The normalised class tokens of the last blocks, first to last; then, if asked for, the average
    of the last block's patches. For one block these two alternate, number by number, as in the
    reference, whose published ViT-B layers need it. Where a backbone has no prefix tokens, the
    average of each block's patches takes the class token's place.

    Args:
        backbone: as :class:`~dino_kit.backbones.interface.Backbone` describes.
        n_last_blocks: how many blocks; None for 4, or all where there are fewer.
        avgpool_patchtokens: whether the patches' average is joined.

    Raises:
        UserError: the backbone has fewer blocks, or no class token to which an average would add.
    """

    def __init__(
        self,
        backbone: nn.Module,
        n_last_blocks: int | None = None,
        avgpool_patchtokens: bool | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.n_last_blocks = min(BLOCKS, backbone.depth) if n_last_blocks is None else n_last_blocks
        self.avgpool_patchtokens = bool(avgpool_patchtokens)
        if self.n_last_blocks > backbone.depth:
            raise UserError(
                f"--n_last_blocks {self.n_last_blocks} is more than the {backbone.depth} blocks "
                "that the backbone has."
            )
        if self.avgpool_patchtokens and not backbone.num_prefix_tokens:
            raise UserError(
                "--avgpool_patchtokens joins the patches' average to the class token; this "
                "backbone has none, and its feature is that average already: leave the flag out."
            )
        self.embed_dim = backbone.embed_dim * (self.n_last_blocks + self.avgpool_patchtokens)  # E

    def forward(self, images: Tensor) -> Tensor:
        layers = self.backbone.get_intermediate_layers(images, self.n_last_blocks)  # (B, P+N, D)
        prefix = self.backbone.num_prefix_tokens
        joined = torch.cat([x[:, 0] if prefix else x.mean(dim=1) for x in layers], dim=1)
        if not self.avgpool_patchtokens:
            return joined  # (B, E)
        average = layers[-1][:, prefix:].mean(dim=1)  # (B, D)
        if self.n_last_blocks == 1:
            return torch.stack((joined, average), dim=2).flatten(1)
        return torch.cat((joined, average), dim=1)


class LinearHead(nn.Module):
    """One linear layer: features (B, E) to logits (B, C); weights normal (0, 0.01), biases 0.

    ``seed`` alone decides the first weights, on every device.
    """

    def __init__(self, dim: int, num_classes: int, seed: int = 0):
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, dim, num_classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)


class Step(NamedTuple):
    """What a process contributes to a step of training."""

    features: Tensor  # (B, E); B may be 0
    labels: Tensor  # (B,) int64
    total: int  # images of the step over all processes


def build_optimizer(head: LinearHead) -> torch.optim.SGD:
    """SGD with momentum 0.9, without weight decay; :func:`fit` sets the rate."""
    return torch.optim.SGD(head.parameters(), lr=0.0, momentum=MOMENTUM, weight_decay=0.0)


def fit(
    head: LinearHead,
    optimizer: torch.optim.Optimizer,
    steps: Iterator[Step],
    *,
    steps_per_epoch: int,
    epochs: int,
    lr: float,
    start: int = 0,
    val_freq: int = 1,
    validate: Callable[[], dict[str, float | None]],
    finished: Callable[[int, dict[str, float | None]], object] = lambda done, line: None,
    advance: Callable[..., object] = lambda rounds=1, text="": None,
) -> None:
    """Train ``head`` from epoch ``start`` on.

    Args:
        head, optimizer: on the steps' device; :func:`build_optimizer` makes the latter.
        steps: those of epoch ``start`` first.
        lr: the first epoch's rate, for the batch as it is; it falls by half a cosine towards 0, and
            is constant within an epoch.
        val_freq: ``validate`` is called after epoch 0, after each so many more, and after the last.
        validate: see :func:`accuracy`.
        finished: called with the number of epochs done and the last one's numbers, by the names of
            the reference's log; ``train_loss`` is the mean over images.
        advance: as :func:`dino_kit.log.progress` hands it out.

    Raises:
        RunFailed: the loss of an epoch is not finite.
        UserError: an epoch had no images.
    """
    told = ""
    for epoch in range(start, epochs):
        rate = cosine(epoch, base=lr, final=0.0, total_steps=epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, images = torch.zeros((), device=head.linear.weight.device), 0
        for number, step in enumerate(islice(steps, steps_per_epoch), 1):
            if step.total:  # where all are left out nothing moves, by its momentum neither
                total += _learn(head, optimizer, step)
            images += step.total
            if number < steps_per_epoch:
                text = ""
                if number % _STEPS_BETWEEN_LOSSES == 0:
                    mean = total.item() * distributed.world_size() / max(images, 1)
                    text = f"epoch {epoch + 1}/{epochs}  loss {mean:.4f}{told}"
                advance(1, text)
        if not images:
            raise UserError(f"None of the images of epoch {epoch + 1} can be used.")
        loss = distributed.all_reduce_sum(total).item() / images
        if not loss < float("inf"):
            raise RunFailed(
                f"The loss of epoch {epoch + 1} is {loss}, so the training stopped; --lr {lr:g} "
                "for this batch is likely too high, or the checkpoint's weights are broken."
            )
        line: dict[str, float | None] = {
            "train_loss": loss, "train_lr": rate, "train_images": images, "epoch": epoch,
        }  # fmt: skip
        if epoch % val_freq == 0 or epoch == epochs - 1:
            found = validate()
            line |= {f"test_{name}": value for name, value in found.items()}
            told = f"  top-1 {found['acc1']:.2f} %"
        finished(epoch + 1, line)
        advance(1, f"epoch {epoch + 1}/{epochs}  loss {loss:.4f}{told}")


def _learn(head: LinearHead, optimizer: torch.optim.Optimizer, step: Step) -> Tensor:
    """One step by the mean gradient over all processes' images; their summed loss on this one."""
    loss = F.cross_entropy(head(step.features), step.labels, reduction="sum")
    optimizer.zero_grad()
    (loss / step.total).backward()
    # A sum, as the last batch of an epoch need not be split evenly.
    for parameter in head.parameters():
        parameter.grad = distributed.all_reduce_sum(parameter.grad)
    optimizer.step()
    return loss.detach()


def class_counts(labels: Tensor, classes: int, device: torch.device) -> Tensor:
    """How many of all processes' ``labels`` are of each class, (classes,) int64, on the CPU.

    ``labels`` (n,) are this process's; what is below 0 is of none. ``device`` is where processes
    talk to each other.
    """
    counts = torch.bincount(labels[labels >= 0].cpu(), minlength=classes)
    return distributed.all_reduce_sum(counts.to(device)).cpu()


@torch.no_grad()
def accuracy(head: LinearHead, features: Tensor, labels: Tensor) -> dict[str, float | None]:
    """How ``head`` classifies the images of all processes together.

    Args:
        features: (n, E), this process's share, on any device.
        labels: (n,), int64, their classes.

    Returns:
        ``loss``, the mean cross-entropy; ``acc1`` and ``acc5``, the percentages of images whose
        class is the first, or one of the first five; None for the latter below five classes;
        ``images``, their number.
    """
    weight = head.linear.weight
    sums = [0.0, 0.0, 0.0, float(len(labels))]  # loss, first, among five, images
    for rows, truth in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
        logits, truth = head(rows.to(weight.device)), truth.to(weight.device)  # (rows, C)
        hits = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == truth[:, None]
        sums[0] += F.cross_entropy(logits, truth, reduction="sum").item()
        sums[1] += hits[:, 0].sum().item()
        sums[2] += hits.sum().item()
    # Apple's GPUs have no float64, and a process there is alone.
    where = weight.device if weight.device.type == "cuda" else "cpu"
    sums = distributed.all_reduce_sum(torch.tensor(sums, dtype=torch.float64, device=where))
    loss, first, five, images = sums.tolist()
    return {
        "loss": loss / images,
        "acc1": 100.0 * first / images,
        "acc5": 100.0 * five / images if weight.shape[0] >= TOP else None,
        "images": int(images),
    }
