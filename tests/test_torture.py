"""A folder with every mode, format, name and fault that people have, trained on."""

from __future__ import annotations

import io
import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import tifffile
import torch
from PIL import Image, features
from test_train import TINY, assert_same, metrics, result

from dino_kit import cli, log
from dino_kit.assemble import assemble
from dino_kit.data.bad_images import written
from dino_kit.data.sources.folder import FolderSource


def picture(number: int, mode: str = "RGB", size: tuple[int, int] = (37, 26)) -> Image.Image:
    width, height = size
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(2, 9) + y / rng.uniform(2, 9)) * 100 + 128 for _ in range(4)]
    values = np.stack(waves, axis=2).clip(0, 255).astype(np.uint8)
    if mode in ("RGBA", "CMYK"):
        return Image.fromarray(values, mode)
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(values[..., n]) for n in (0, 1)])
    return Image.fromarray(values[..., :3]).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sixteen(number: int) -> np.ndarray:
    return np.asarray(picture(number, "L")).astype(np.uint16) * 257


def tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(1), "jpeg", exif=exif)


def animation(kind: str) -> bytes:
    frames = [picture(number) for number in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def bomb() -> bytes:
    """A PNG of some bytes that says it is 60,000 pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999)))


def parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())


def good() -> dict[str, bytes]:
    found = {
        f"modes/{mode}.png": encoded(picture(n, mode), "png")
        for n, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA"))
    }
    found |= {
        f"modes/{mode}.tif": encoded(picture(n, mode), "tiff")
        for n, mode in enumerate(("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB"), 10)
    }
    if parse_version(PIL.__version__) >= (11,):  # older Pillow cannot read what it has written
        found["modes/YCbCr.tif"] = encoded(picture(17, "YCbCr"), "tiff")
    found |= {f"modes/{mode}.jpg": encoded(picture(20, mode), "jpeg") for mode in ("L", "CMYK")}
    glass = picture(3, "P")
    found["modes/glass.png"] = encoded(glass, "png", transparency=bytes(range(256)))
    found["modes/sixteen.png"] = encoded(Image.fromarray(sixteen(4)), "png")
    found["modes/sixteen.tif"] = tiff(sixteen(5), compression="zlib")
    found["modes/float.tif"] = tiff((sixteen(6) / 65535).astype(np.float32))
    found["modes/colours of sixteen.tif"] = tiff(
        np.stack([sixteen(n) for n in (1, 2, 3)], axis=2), photometric="rgb"
    )
    found["formats/progressive.jpg"] = encoded(picture(30), "jpeg", progressive=True)
    found["formats/turned.JPEG"] = turned()
    found["formats/pages.tiff"] = tiff(np.stack([np.asarray(picture(n)) for n in (1, 2)]))
    found["formats/animated.gif"] = animation("gif")
    found["formats/animated.webp"] = animation("webp")
    found["formats/lossless.webp"] = encoded(picture(31, "RGBA"), "webp", lossless=True)
    found["formats/a.bmp"] = encoded(picture(32), "bmp")
    found["formats/a.ppm"] = encoded(picture(33), "ppm")
    found["formats/a.pgm"] = encoded(picture(34, "L"), "ppm")
    found["formats/gray.npy"] = npy(sixteen(7))
    found["formats/colour.npy"] = npy(np.asarray(picture(35)))
    found["formats/png called.jpg"] = encoded(picture(36), "png")
    found["formats/tail.jpg"] = encoded(picture(37), "jpeg") + b"and more" * 99
    if features.check("avif"):
        found["formats/a.avif"] = encoded(picture(38), "avif")
    for n, size in enumerate(((1, 1), (1, 300), (400, 2), (3, 3), (900, 700))):
        found[f"sizes/{n}.png"] = encoded(picture(n, size=size), "png")
    decomposed = unicodedata.normalize("NFD", "Größe é")
    for n, name in enumerate(
        ("a b.png", "-.png", "[x]*?.png", "日本語/写真.png", f"{decomposed}.png", "🦖.png",
         "quote'\".png", "x" * 200 + ".png", "deep/" * 20 + "deep.png", "%s {0}.png", "$HOME.png")
    ):  # fmt: skip
        found[f"names/{name}"] = encoded(picture(50 + n), "png")
    if os.name == "posix":
        found["names/new\nline\t.png"] = encoded(picture(70), "png")
        found["names/" + os.fsdecode(b"no\xe9text.png")] = encoded(picture(71), "png")
    return found


def bad() -> dict[str, bytes]:
    jpeg, png = encoded(picture(80), "jpeg"), encoded(picture(81), "png")
    return {
        "bad/cut.jpg": jpeg[: len(jpeg) // 2],
        "bad/cut.png": png[: len(png) // 2],
        "bad/empty.jpg": b"",
        "bad/page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "bad/noise.png": np.random.default_rng(0).bytes(5000),
        "bad/zipped.png": b"PK\x03\x04" + bytes(200),
        "bad/bomb.png": bomb(),
        "bad/header.bmp": encoded(picture(82), "bmp")[:30],
        "bad/cut.tif": tiff(sixteen(83))[:200],
        "bad/cut.npy": npy(sixteen(84))[:300],
        "bad/objects.npy": npy(np.array([{}, {}], object)),
        "bad/five.npy": npy(np.zeros((5, 9, 9), np.uint8)),
    }


# What is no file at all, though it has the name of one.
FAULTS_OF_PLACE = {"gone.png"} | ({"pipe.png"} if hasattr(os, "mkfifo") else set())
FOUND = len(good()) + len(bad()) + len(FAULTS_OF_PLACE) + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("torture") / "images of all kinds"
    for name, content in (good() | bad()).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    (root / ".hidden/x.png").write_bytes(b"not looked at")
    (root / "folder.png").mkdir()
    for name, target in (("loop", "."), ("deep/loop", ".."), ("gone.png", "nowhere"),
                         ("link.png", "modes/RGB.png")):  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(target)
    for name in FAULTS_OF_PLACE & {"pipe.png"}:
        os.mkfifo(root / name)
    return root


@pytest.fixture(autouse=True)
def fresh_notices(monkeypatch):
    monkeypatch.setattr(log, "_noticed", set())


FLAGS = ["--max_bad_share", "0.5", "--epochs", "3", "--save_every_steps", "7"]


def words(folder, out, *flags) -> list[str]:
    return ["--data_path", str(folder), "--output_dir", str(out), *TINY, *FLAGS, *map(str, flags)]


def train(folder, out, *flags) -> int:
    return cli.main(["train", *words(folder, out, *flags)])


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder, out) == 0
    return out


def test_what_can_be_used_is_listed_once_and_what_cannot_is_named_with_its_reason(folder, whole):
    source = FolderSource(folder)
    keys = {source.key(index) for index in range(len(source))}
    # A link to an image is an image; a link in a circle and what is hidden is not looked at.
    assert len(keys) == len(source) == FOUND
    assert keys == {*good(), *bad(), *FAULTS_OF_PLACE, "link.png"}
    reasons = {Path(name).name: reason for name, reason in written(whole).items()}
    assert reasons.keys() == {Path(name).name for name in bad()} | FAULTS_OF_PLACE
    for name, reason in {
        "empty.jpg": "the file is empty", "page.jpg": "it is in no format that Pillow knows",
        "cut.jpg": "runcated", "bomb.png": "too large to be read", "five.npy": "(5, 9, 9)",
        "objects.npy": "allow_pickle", "gone.png": "No such file",
    }.items():  # fmt: skip
        assert reason in reasons[name], (name, reasons[name])
    assert result(whole)["step"] >= 20


def test_the_notices_are_few_and_say_where_the_rest_is(folder, tmp_path, capsys):
    assert train(folder, tmp_path / "out", "--num_workers", 2) == 0
    said = capsys.readouterr().err
    notices = [line for line in said.splitlines() if "bad_images.txt" in line]
    assert len(notices) == 2 and "Another image takes its place" in notices[0]
    broken = len(bad()) + len(FAULTS_OF_PLACE)
    assert f"{broken} of {FOUND} images could not be used" in notices[1]
    assert "Traceback" not in said and "Warning" not in said


def test_the_run_is_the_same_again_and_with_workers_and_in_parts(folder, whole, tmp_path):
    assert train(folder, tmp_path / "again", "--num_workers", 1) == 0
    for name in ("student", "teacher", "optimizer", "dino_loss"):
        assert_same(result(whole)[name], result(tmp_path / "again")[name], name)
    assert metrics(whole) == metrics(tmp_path / "again")
    assert written(whole) == written(tmp_path / "again")


def test_crops_are_equal_bit_for_bit_with_none_one_and_four_workers(folder, tmp_path):
    steps = []
    for workers in (0, 1, 4):
        run = assemble(cli.parse("train", words(folder, tmp_path, "--num_workers", workers)))
        steps.append([batch for batches in run.loader for batch in batches])
    assert len(steps[0]) >= 20
    for others in steps[1:]:
        for one, other in zip(steps[0], others, strict=True):
            assert torch.equal(one.indices, other.indices) and one.bad == other.bad
            assert all(map(torch.equal, one.groups, other.groups))
    assert any(batch.bad for batch in steps[0])


def test_by_default_so_many_faults_end_the_run_in_a_sentence(folder, tmp_path, capsys):
    line = words(folder, tmp_path / "out")
    assert cli.main(["train", *line, "--max_bad_share", "0.01"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dino-kit: error: ") and "images looked at so far cannot be used" in error
    assert cli.main(["train", *line, "--on_bad_image", "raise"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "/bad/" in error and "cannot be" in error


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read_is_one_of_them(folder, tmp_path):
    shutil.copytree(folder / "modes", tmp_path / "data")
    (tmp_path / "data/RGB.png").chmod(0)
    assert train(tmp_path / "data", tmp_path / "out") == 0
    assert list(written(tmp_path / "out")) == [str(tmp_path / "data/RGB.png")]


def test_four_channels_of_it_train_too(folder, tmp_path):
    assert train(folder / "modes", tmp_path / "out", "--in_chans", 4) == 0
    names = {Path(name).name for name in written(tmp_path / "out")}
    assert names == {"sixteen.png", "sixteen.tif", "float.tif", "colours of sixteen.tif"}
