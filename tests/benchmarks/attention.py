"""The last block's attention alone, against computing every block's maps on the way to it.

    python tests/benchmarks/attention.py
    python tests/benchmarks/attention.py --arch vit_small --patch_size 8 --size 480 --rounds 5

``get_last_selfattention`` of a network with random weights, on one random picture, and a network
with the same weights whose blocks all compute their maps, softmax and all, as the reference's do.
Both are timed in turn, in one process; the most memory of each is that of a process of its own,
above what it had before the call. Prints the largest difference of the maps, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
from torch import Tensor

import dino_kit
from dino_kit.bench.machine import Peak, cpu_model

WAYS = ("last", "every")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = dino_kit.create_backbone(arguments.arch, patch_size=arguments.patch_size).eval()
    images = torch.randn(1, 3, arguments.size, arguments.size)
    if arguments.memory_of:
        with torch.no_grad():
            model(images[..., : 4 * arguments.patch_size, : 4 * arguments.patch_size])
            peak = Peak()
            maps(arguments.memory_of, model, images)
        print(json.dumps(peak.bytes()))
        return
    print(f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with torch.no_grad():
        last, every = (maps(way, model, images) for way in WAYS)
        print(f"maps {tuple(last.shape)}, largest difference {(last - every).abs().max():.1e}")
        for _ in range(arguments.rounds):
            for way in WAYS:
                began = time.perf_counter()
                maps(way, model, images)
                seconds[way].append(time.perf_counter() - began)
    least = {way: min(taken) for way, taken in seconds.items()}
    most = {way: in_a_process(way) for way in WAYS}
    for way, what in zip(WAYS, ("the last block's maps", "every block's maps"), strict=True):
        print(f"{what:<22} {least[way]:.3f} s  {most[way] / 1e6:,.0f} MB")
    ratios = {name: of["last"] / of["every"] for name, of in (("time", least), ("memory", most))}
    print(f"ratio                  {ratios['time']:.2f}     {ratios['memory']:.2f}")


def maps(way: str, model: torch.nn.Module, images: Tensor) -> Tensor:
    """The last block's attention (1, h, T, T)."""
    return model.get_last_selfattention(images) if way == "last" else of_every(model, images)


def of_every(model: torch.nn.Module, images: Tensor) -> Tensor:
    """The same, where each block multiplies its values by maps that it holds."""
    x = model._tokens(images)
    for block in model.blocks:
        weights = None  # the reference's blocks leave theirs, too, before the next begins
        y = block.norm1(x)
        attention = block.attn
        q, k, v = attention._heads(attention.qkv(y), 3)  # (1, h, T, d)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + attention.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return weights


def in_a_process(way: str) -> int:
    line = [sys.executable, __file__, *sys.argv[1:], "--memory_of", way]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
