"""A DINO step done the reference's way, in plain PyTorch, for other ways to be measured against.

What it does is what section "As exact as the reference" of the README holds us to; how it does it
is the point here: attention maps are materialised, a log-softmax is kept for every crop, clipping
and the moving average are loops over parameters, every gradient's norm is fetched to the host, and
the optimiser goes from tensor to tensor. Written after the paper (Caron et al. 2021, arXiv:2104.14294)
and what is known of its code; nothing of it is copied.

Legend: B images, V crops of each, N tokens, D width, K prototypes.
"""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        maps = (q @ k.transpose(-2, -1)) * (dim // self.heads) ** -0.5
        maps = maps.softmax(dim=-1)  # (B, heads, N, N)
        return self.proj((maps @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, drop: float):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, update: Tensor) -> Tensor:
        if self.drop == 0.0 or not self.training:
            return update
        kept = 1.0 - self.drop
        mask = (kept + torch.rand(len(update), 1, 1, device=update.device)).floor()
        return update.div(kept) * mask


class VisionTransformer(nn.Module):
    def __init__(self, patch: int, dim: int, depth: int, heads: int, drop: float, image: int = 224):
        super().__init__()
        self.side = image // patch
        self.patch_embed = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.side**2 + 1, dim))
        rates = torch.linspace(0, drop, depth).tolist()
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self._positions(math.isqrt(x.shape[1] - 1))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, side: int) -> Tensor:
        if side == self.side:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = patches.reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        factor = (side + 0.1) / self.side
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat((cls, grid.permute(0, 2, 3, 1).reshape(1, side**2, -1)), dim=1)


class Head(nn.Module):
    def __init__(self, dim: int, prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )
        with warnings.catch_warnings():  # of the newer way to say it
            warnings.simplefilter("ignore", FutureWarning)
            last = nn.Linear(256, prototypes, bias=False)
            self.last_layer = nn.utils.weight_norm(last)
        self.last_layer.weight_g.data.fill_(1)
        self.last_layer.weight_g.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """Crops of one size in one pass of the backbone, one pass of the head for all."""

    def __init__(self, backbone: nn.Module, prototypes: int, dim: int):
        super().__init__()
        self.backbone, self.head = backbone, Head(dim, prototypes)

    def forward(self, crops: list[Tensor]) -> Tensor:
        features, first = [], 0
        for i in range(1, len(crops) + 1):
            if i == len(crops) or crops[i].shape[-1] != crops[first].shape[-1]:
                features.append(self.backbone(torch.cat(crops[first:i])))
                first = i
        return self.head(torch.cat(features))


class Step:
    """Student, teacher and what moves them; ``step(crops)`` takes one optimiser step.

    ``dtype`` is what autocast computes in, None for float32.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        prototypes: int,
        patch: int = 16,
        dtype: torch.dtype | None = None,
        drop: float = 0.1,
        device: str = "cpu",
    ):
        dim, depth, heads = sizes["embed_dim"], sizes["depth"], sizes["num_heads"]
        self.device, self.dtype = device, dtype

        def network(drop: float) -> Network:
            backbone = VisionTransformer(patch, dim, depth, heads, drop)
            return Network(backbone, prototypes, dim).to(device)

        self.student, self.teacher = network(drop), network(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        trainable = [p for p in self.student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.04},
            {"params": [p for p in trainable if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, foreach=False)
        self.center = torch.zeros(1, prototypes, device=device)

    def __call__(self, crops: list[Tensor]) -> float:
        autocast = torch.autocast(self.device, self.dtype) if self.dtype else nullcontext()
        with autocast:
            teacher = self.teacher(crops[:2])
            student = self.student(crops)
            loss = self_distillation(student, teacher, self.center, len(crops))
            self.center = next_center(self.center, teacher)
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        self.update()
        return value

    def update(self) -> None:
        clip_gradients(self.student, 3.0)
        self.optimizer.step()
        follow(self.teacher, self.student, 0.996)


def self_distillation(
    student: Tensor, teacher: Tensor, center: Tensor, crops: int, temperature: float = 0.04
) -> Tensor:
    """Loss of logits (V·B, K) against (2·B, K), crop by crop."""
    students = (student / 0.1).chunk(crops)
    teachers = F.softmax((teacher - center) / temperature, dim=-1).detach().chunk(2)
    total, terms = 0.0, 0
    for i, target in enumerate(teachers):
        for v, logits in enumerate(students):
            if v != i:
                total = total + torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
                terms += 1
    return total / terms


@torch.no_grad()
def next_center(center: Tensor, teacher: Tensor) -> Tensor:
    return center * 0.9 + torch.sum(teacher, dim=0, keepdim=True) / len(teacher) * 0.1


def clip_gradients(network: nn.Module, largest: float) -> list[float]:
    norms = []
    for _, p in network.named_parameters():
        if p.grad is not None:
            norm = p.grad.data.norm(2)
            norms.append(norm.item())
            factor = largest / (norm + 1e-6)
            if factor < 1:
                p.grad.data.mul_(factor)
    return norms


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for q, k in zip(student.parameters(), teacher.parameters(), strict=True):
        k.data.mul_(momentum).add_((1 - momentum) * q.detach().data)
