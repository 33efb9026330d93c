"""How fast crops are made of encoded photographs, against the reference's own way of making them.

    python tests/benchmarks/data.py --data_path FOLDER
    python tests/benchmarks/data.py --data_path FOLDER --mosaic 4 --images 30

The reference's way is what its ``main_dino.py`` does with torchvision's transforms on Pillow images,
two crops of 224 and eight of 96 pixels. All ways take the same images in turn, in one process, on one
core; the figure is the middle of the rounds, in seconds of the core. A mosaic of 4 × 4 photographs of
about 500 pixels is one of 2,000 with details of a pixel, sharper than most that are so large.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from dino_kit.config import fields
from dino_kit.config.train import TrainConfig
from dino_kit.data import photometric
from dino_kit.data.decode import decode, decode_raster
from dino_kit.data.loader import Loader
from dino_kit.data.photograph import open_raster
from dino_kit.data.sources.opening import open_training_source
from dino_kit.preparation import views_to_load


class Blur:
    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Solarize:
    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < 0.2 else image


def reference() -> Callable[[bytes], list[torch.Tensor]]:
    """Source: Caron et al. 2021, appendix A; one crop after the other, through to normalised floats."""

    def crop(size: int, scale: tuple[float, float], *more: Callable) -> transforms.Compose:
        bicubic = transforms.InterpolationMode.BICUBIC
        jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale, interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomGrayscale(0.2),
                *more,
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    crops = [
        crop(224, (0.4, 1.0), Blur(1.0)),
        crop(224, (0.4, 1.0), Blur(0.1), Solarize()),
        *[crop(96, (0.05, 0.4), Blur(0.5))] * 8,
    ]

    def make(data: bytes) -> list[torch.Tensor]:
        with Image.open(io.BytesIO(data)) as image:
            image = image.convert("RGB")
        return [crop(image) for crop in crops]

    return make


class Held:
    """Encoded images that are in memory."""

    classes, root = None, "memory"

    def __init__(self, data: list[bytes]):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> bytes:
        return self.data[index]

    def label(self, index: int) -> None:
        return None

    def key(self, index: int) -> str:
        return str(index)

    name = key


def loader_of(data: list[bytes], decoder: Callable, **changes) -> Loader:
    """One epoch over the images in batches of eight, uint8 as it goes to the device."""
    values = {"data_path": "-", "output_dir": "-", **changes}
    config = fields.from_plain(TrainConfig, values)
    batch = min(8, len(data))
    return Loader(
        Held(data), views_to_load(config, torch.device("cpu")), seed=0, epochs=1, total_batch_size=batch,
        batch_size_per_gpu=batch, decode=decoder, drop_last=False,
    )  # fmt: skip


def ours(data: list[bytes], decoder: Callable, **changes) -> Callable[[], None]:
    loader = loader_of(data, decoder, **changes)

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def on_the_device(data: list[bytes]) -> Callable[[], None]:
    """What is left to the device, done on this core."""
    batches = [batch for step in loader_of(data, decode_raster, augment="device") for batch in step]

    def run() -> None:
        for batch in batches:
            for group, changes in zip(batch.groups, batch.changes, strict=True):
                photometric.change(group, changes)

    return run


def mosaics(photographs: list[bytes], side: int, count: int, width: int = 500, height: int = 375) -> list[bytes]:
    """JPEGs of ``side`` × ``side`` photographs each, cut to size or laid out again to fill it."""
    tiles = [np.asarray(decode(one, "x")) for one in photographs]
    made = []
    for first in range(count):
        rows = []
        for row in range(side):
            places = ((first * side * side + row * side + column) % len(tiles) for column in range(side))
            rows.append(np.concatenate([_filled(tiles[place], height, width) for place in places], axis=1))
        file = io.BytesIO()
        Image.fromarray(np.concatenate(rows)).save(file, "jpeg", quality=90)
        made.append(file.getvalue())
    return made


def _filled(tile: np.ndarray, height: int, width: int) -> np.ndarray:
    short = [(0, max(0, wanted - there)) for wanted, there in zip((height, width), tile.shape, strict=False)]
    return np.pad(tile, (*short, (0, 0)), mode="symmetric")[:height, :width]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data_path", required=True, help="JPEG files, as for dino-kit train")
    parser.add_argument("--images", type=int, default=100, help="of them, evenly spread")
    parser.add_argument("--mosaic", type=int, help="put so many by so many together to one large photograph")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="a file for the numbers")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    source = open_training_source(flags.data_path)
    count = min(flags.images, len(source))
    data = [source.read(place * len(source) // count) for place in range(count)]
    if flags.mosaic:
        data = mosaics(data, flags.mosaic, count)
    make = reference()

    def by_reference() -> None:
        for one in data:
            make(one)

    def decoded(decoder: Callable) -> Callable[[], None]:
        def run() -> None:
            for one in data:
                np.asarray(decoder(one, "x"))

        return run

    ways = {
        "the reference's way": by_reference,
        "--pixels exact": ours(data, decode),
        "--pixels fast": ours(data, open_raster),
        "--pixels fast, never reduced": ours(data, decode_raster),
        "--augment device, the workers' part": ours(data, open_raster, augment="device"),
        "--augment device, the device's part": on_the_device(data),
        "decoding alone": decoded(decode_raster),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    random.seed(0)
    torch.manual_seed(0)
    for number in range(flags.rounds + 1):
        for name, run in ways.items():
            began = time.process_time()
            run()
            if number:  # the first round warms up
                seconds[name].append((time.process_time() - began) / count)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    whole = middle["the reference's way"]
    print(f"{count} images of {sum(map(len, data)) / count / 1000:.0f} kB, {flags.rounds} rounds")
    for name, value in middle.items():
        print(f"{name:42} {1000 * value:6.2f} ms an image  {whole / value:5.2f} ×")
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump({"seconds_an_image": seconds, "ratio": {n: whole / v for n, v in middle.items()}}, file)


if __name__ == "__main__":
    main()
