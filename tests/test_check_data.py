"""``dino-kit check-data``: every number of what it finds, what it shows, and how it ends."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tars import write_tar

from dino_kit import cli
from dino_kit.assemble import view_groups
from dino_kit.checking import feeding, sheet, text
from dino_kit.checking.feeding import Cost, Device
from dino_kit.checking.summary import Broken, by_reason
from dino_kit.commands import check_data as command
from dino_kit.config import fields
from dino_kit.config.train import TrainConfig
from dino_kit.data import inspection
from dino_kit.data.inspection import inspect, spread
from dino_kit.data.loader import Loader, epoch_order
from dino_kit.data.pixels import RGB, Pixels
from dino_kit.data.sources.folder import FolderSource
from dino_kit.data.sources.objects import DatasetSource
from dino_kit.errors import UserError
from dino_kit.proposal import machine, speed

SMALL = [
    "--arch", "vit", "--embed_dim", "24", "--depth", "1", "--num_heads", "2", "--patch_size", "4",
    "--global_crops_size", "16", "--local_crops_size", "8", "--local_crops_number", "5",
    "--out_dim", "32", "--head_hidden_dim", "32", "--head_bottleneck_dim", "16",
    "--batch_size_per_gpu", "4", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No long timing; what is written goes to a folder of the test's own."""
    monkeypatch.setattr(machine, "_share_of_a_core", lambda: 1.0)
    monkeypatch.setattr(speed, "_SECONDS", 0.02)
    monkeypatch.setattr(feeding, "_SAMPLE", 3)
    monkeypatch.chdir(tmp_path)


def check(capsys, *words: str, status: int | None = None) -> dict:
    """The numbers of ``check-data``, and the status where it is asserted."""
    capsys.readouterr()
    ended = cli.main(["check-data", *map(str, words), *SMALL, "--json"])
    out = capsys.readouterr().out
    assert status in (None, ended)
    return json.loads(out)


def said(capsys, *words: str) -> tuple[str, int]:
    """Standard output without breaks between lines, and the status."""
    capsys.readouterr()
    status = cli.main(["check-data", *map(str, words), *SMALL])
    return re.sub(r"\s+", " ", capsys.readouterr().out), status


def encoded(number: int, width: int = 20, height: int = 18, mode: str = "RGB", kind: str = "PNG",
            **how) -> bytes:  # fmt: skip
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 60,000 × 60,000 pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def sixteen_bits() -> bytes:
    """A PNG of 16 bits in colours, 12 × 8, as Pillow does not write them."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    rows = b"".join(b"\0" + bytes(12 * 6) for _ in range(8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 12, 8, 16, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def animation() -> bytes:
    frames = [Image.new("L", (20, 18), shade) for shade in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(7, 30, 20, kind="JPEG", exif=exif)


JPEG = encoded(1, 64, 48, kind="JPEG", quality=90)
CONTENT = {
    "train/cat/a.jpg": JPEG,
    "train/cat/b.png": encoded(2),
    "train/cat/c.png": encoded(3, mode="RGBA"),
    "train/cat/empty.jpg": b"",
    "train/cat/half.jpg": JPEG[:700],
    "train/cat/page.jpg": b"<!DOCTYPE html><html>Not found</html>",
    "train/dog/a.png": encoded(4, mode="L"),
    "train/dog/b.png": encoded(2),  # a copy of a cat
    "train/dog/bomb.png": bomb(),
    "train/dog/deep.png": sixteen_bits(),
    "train/dog/empty.jpg": b"",
    "train/dog/moves.gif": animation(),
    "train/dog/turned.jpg": turned(),
    "train/Größe 猫/a.jpg": encoded(5, 10, 10, kind="JPEG"),
    "train/Größe 猫/b.jpg": encoded(6, 20, 18, kind="JPEG"),
    "val/cat/x.jpg": JPEG,  # a copy of one to train on
    "val/cat/y.jpg": JPEG,
    "val/dog/z.bmp": encoded(8, kind="BMP"),
}  # fmt: skip
BAD = {
    "train/cat/empty.jpg": "the file is empty",
    "train/cat/half.jpg": "truncated",
    "train/cat/page.jpg": "in no format that Pillow knows",
    "train/dog/bomb.png": "too large",
    "train/dog/empty.jpg": "the file is empty",
}


def write(root: Path, content: dict[str, bytes] = CONTENT) -> Path:
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def of_split(numbers: dict) -> None:
    """Assert what ``CONTENT`` is, in whatever it is stored."""
    gif = Image.open(io.BytesIO(CONTENT["train/dog/moves.gif"])).mode  # not the same in all Pillows
    train, val = numbers["parts"]
    assert numbers["images"] == len(CONTENT) == 18
    assert (train["name"], train["images"], train["checked"], train["readable"]) == (
        "train", 15, 15, 10,
    )  # fmt: skip
    assert (val["name"], val["images"], val["checked"], val["readable"]) == ("val", 3, 3, 3)
    assert train["classes"] == {"Größe 猫": 2, "cat": 6, "dog": 7}
    assert list(train["classes"]) == ["Größe 猫", "cat", "dog"]
    assert val["classes"] == {"cat": 2, "dog": 1}
    assert train["unlabelled"] == val["unlabelled"] == 0
    for part in (train, val):
        name = part["name"]
        assert part["bytes"] == sum(
            len(data) for key, data in CONTENT.items() if key.startswith(name)
        )
    assert train["sizes"] == [
        [20, 18, 6], [10, 10, 1], [12, 8, 1], [30, 20, 1], [64, 48, 1]
    ]  # fmt: skip
    assert (train["distinct_sizes"], val["distinct_sizes"]) == (5, 2)
    assert val["sizes"] == [[64, 48, 2], [20, 18, 1]]
    assert (train["median"], val["median"]) == ([20, 18], [64, 48])
    assert train["smallest"] == ["train/dog/deep.png", 12, 8]
    assert train["largest"] == ["train/cat/a.jpg", 64, 48]
    assert train["modes"] == dict(Counter({"RGB": 7, "L": 1, "RGBA": 1}) + Counter([gif]))
    assert train["formats"] == {"PNG": 5, "JPEG": 4, "GIF": 1}
    assert val["formats"] == {"JPEG": 2, "BMP": 1}
    assert train["smaller_than_crop"] == 2
    assert train["oddities"] == {"turned": 1, "animated": 1, "cut": 1, "transparent": 1}
    assert val["oddities"] == {"turned": 0, "animated": 0, "cut": 0, "transparent": 0}
    assert {one["image"] for one in numbers["broken"]} == set(BAD)
    for one in numbers["broken"]:
        assert BAD[one["image"]] in one["reason"]
        assert one["image"].rpartition("/")[2] in one["path"]
        assert one["path"] not in one["reason"]
    copies = ["train/cat/b.png", "train/dog/b.png"]
    leak = ["train/cat/a.jpg", "val/cat/x.jpg", "val/cat/y.jpg"]
    assert numbers["duplicates"] == {
        "superfluous": 3,
        "groups": [leak, copies],  # the empty files are broken, and no copies of each other
        "across_parts": [leak],
        "across_classes": [copies],
    }


def test_every_number_is_right_with_workers_and_without(capsys, tmp_path):
    root = write(tmp_path / "data")
    alone = check(capsys, root, "--num_workers", "0", status=1)
    of_split(alone)
    two = check(capsys, root, "--num_workers", "2", status=1)
    for numbers in (alone, two):
        found = numbers.pop("speed")
        assert found["device"] == "cpu" and found["precision"] == "fp32"
        assert found["images_a_second_of_the_device"] > 0 and found["num_workers"] >= 1
    assert alone == two
    assert alone["contact_sheet"] == str(Path("check_data/contact_sheet.png"))
    assert (tmp_path / "check_data/contact_sheet.png").is_file()


def test_archives_are_told_as_their_folder(capsys, tmp_path):
    of_split(check(capsys, write_tar(tmp_path / "data.tar", CONTENT), status=1))


def test_a_list_has_the_classes_that_it_says(capsys, tmp_path):
    root = write(tmp_path / "data")
    rows = ["path,label", "val/cat/x.jpg,tabby", "val/cat/y.jpg,persian", "val/dog/z.bmp,"]
    (root / "some.csv").write_text("\n".join(rows))
    numbers = check(capsys, root / "some.csv", status=0)
    (part,) = numbers["parts"]
    assert (part["name"], part["classes"], part["unlabelled"]) == (
        "", {"persian": 1, "tabby": 1}, 1,
    )  # fmt: skip
    assert numbers["duplicates"]["across_classes"] == [["val/cat/x.jpg", "val/cat/y.jpg"]]
    assert numbers["duplicates"]["across_parts"] == []
    assert numbers["broken"] == []


def test_images_without_classes_are_no_fault(capsys, tmp_path):
    root = write(tmp_path / "data", {"a.png": encoded(1), "sub/b.png": encoded(2)})
    (part,) = check(capsys, root, status=0)["parts"]
    assert (part["classes"], part["unlabelled"]) == (None, 2)
    told, status = said(capsys, root)
    assert "There are no classes, and training needs none." in told
    assert "Nothing is broken. No image is there twice." in told and status == 0


def test_bands_have_a_mode_of_their_own(capsys, tmp_path):
    root = tmp_path / "bands"
    root.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        np.save(root / f"{number}.npy", rng.integers(0, 9000, (13, 24, 20), dtype=np.uint16))
    np.save(root / "rgb.npy", rng.integers(0, 9000, (3, 24, 20), dtype=np.uint16))
    numbers = check(capsys, root, "--in_chans", "13", "--num_workers", "2", status=1)
    (part,) = numbers["parts"]
    assert part["modes"] == {"uint16 × 13": 3} and part["formats"] == {"NPY": 3}
    assert (part["median"], part["readable"]) == ([20, 24], 3)
    assert [one["image"] for one in numbers["broken"]] == ["rgb.npy"]
    assert "--in_chans 3 fits" in numbers["broken"][0]["reason"]


def test_pages_of_a_tiff_that_are_bands_are_no_animation(capsys, tmp_path):
    root = tmp_path / "pages"
    root.mkdir()
    pages = [Image.fromarray(np.full((20, 24), value, np.uint16)) for value in range(5)]
    pages[0].save(root / "a.tif", save_all=True, append_images=pages[1:])
    (part,) = check(capsys, root, "--in_chans", "5", status=0)["parts"]
    assert part["modes"] == {"uint16 × 5": 1} and part["formats"] == {"TIFF": 1}
    assert part["oddities"]["animated"] == 0
    (part,) = check(capsys, root, status=0)["parts"]
    assert part["modes"] == {"I;16": 1} and part["oddities"]["animated"] == 1


def test_pixels_without_a_file_are_counted_and_compared_too():
    one = np.zeros((20, 20, 3), np.uint8)
    palette = Image.new("P", (20, 20))
    other = palette.copy()
    palette.putpalette([0] * 768)
    other.putpalette([9] * 768)
    from_a_file = Image.open(io.BytesIO(encoded(1)))
    broken = Image.open(io.BytesIO(JPEG[:700]))
    images = [one, one.copy(), one.reshape(40, 10, 3), palette, other, from_a_file, broken]
    found = inspect(DatasetSource(images), description="")
    assert list(found.faults) == [6] and "truncated" in found.faults[6]
    assert found.modes_and_formats[int(found.kinds[5])] == ("RGB", "PNG")
    found = inspect(DatasetSource(images[:5]), description="")
    assert found.readable.all()
    assert len({tuple(row) for row in found.digests.tolist()}) == 4
    assert found.modes_and_formats == [("uint8 × 3", ""), ("P", "")]
    assert found.bytes.tolist()[0] == 1200


def test_what_goes_to_workers_can_be_pickled(tmp_path):
    source = FolderSource(write(tmp_path / "data", {"a.png": encoded(1)}))
    views = [view for group in view_groups(run_of("--data_path", "x")) for view in group]
    dataset = pickle.loads(pickle.dumps(inspection._Looks(source, spread(1, None), RGB, views)))
    assert [(look.width, look.height) for look in dataset.__getitems__([0])] == [(20, 18)]


def test_the_rotation_counts_in_the_size_where_it_is_applied(capsys, tmp_path):
    root = write(tmp_path / "data", {"a.jpg": turned(), "b.png": encoded(1)})
    (part,) = check(capsys, root)["parts"]
    assert part["largest"] == ["a.jpg", 30, 20]
    assert "by EXIF" in said(capsys, root)[0]
    (part,) = check(capsys, root, "--exif", "apply")["parts"]
    assert part["largest"] == ["a.jpg", 20, 30] and part["oddities"]["turned"] == 1
    assert "by EXIF" not in said(capsys, root, "--exif", "apply")[0]


def test_an_image_too_small_for_crops_that_are_not_resized_is_broken(capsys, tmp_path):
    root = write(tmp_path / "data", {"a.png": encoded(1), "small.png": encoded(2, 20, 15)})
    assert check(capsys, root, status=0)["broken"] == []
    numbers = check(capsys, root, "--crop_without_resize", "true", status=1)
    (one,) = numbers["broken"]
    assert one["image"] == "small.png" and "too few for a crop of 16 × 16" in one["reason"]


def test_a_part_of_the_images_is_spread_evenly(capsys, tmp_path):
    names = {f"{number:02}.png": encoded(number) for number in range(21)}
    numbers = check(capsys, write(tmp_path / "data", names), "--max_images", "5", status=0)
    (part,) = numbers["parts"]
    assert (part["images"], part["checked"], part["readable"]) == (21, 5, 5)
    assert spread(21, 5).tolist() == [0, 5, 10, 15, 20]
    assert spread(3, None).tolist() == spread(3, 9).tolist() == [0, 1, 2]
    told, _ = said(capsys, tmp_path / "data", "--max_images", "5")
    assert "5 of 21" in told and "Nothing among those looked at is broken." in told


def test_where_nothing_can_be_read_the_rest_is_left_out(capsys, tmp_path):
    root = write(tmp_path / "data", {"a.jpg": b"", "b.jpg": b"no image"})
    numbers = check(capsys, root, "--num_workers", "2", status=1)
    (part,) = numbers["parts"]
    assert (part["readable"], part["median"], part["smallest"], part["sizes"]) == (0, None, None, [])
    assert numbers["contact_sheet"] is None and numbers["speed"] is None
    assert not Path("check_data").exists()
    told, status = said(capsys, root)
    assert "2 images are broken" in told and "That is 100 % of what was" in told
    assert "There is no image to show." in told and status == 1


# What is said


def test_the_terminal_tells_it_in_order(capsys, tmp_path):
    told, status = said(capsys, write(tmp_path / "data"))
    assert status == 1
    expected = [
        "Images in", "train", "val", "Größe 猫", "Most frequent sizes: 20 × 18 (7), 64 × 48 (3)",
        "Smallest: train/dog/deep.png, 12 × 8", "Largest: train/cat/a.jpg, 64 × 48",
        "Modes: RGB (10), L (", "Formats: JPEG (6), PNG (5), BMP (1), GIF (1)",
        "5 images are broken:", "2 × cannot be read as an image: the file is empty.",
        "3 images are copies of another, byte for byte, in 2 groups:",
        "train/cat/a.jpg = val/cat/x.jpg = val/cat/y.jpg",
        "1 group in two parts of the split", "1 group in two classes",
        "2 smaller than a global crop of 16 pixels", "1 on the side or mirrored by EXIF",
        "1 with more than one picture inside", "1 of 16 bits a channel", "1 with transparency",
        "contact_sheet.png", "One worker prepares", "This machine's CPU takes",
    ]  # fmt: skip
    place = 0
    for part in expected:
        assert part in told[place:], part
        place = told.index(part, place)


def test_json_is_alone_on_standard_output(capsys, tmp_path):
    capsys.readouterr()
    root = write(tmp_path / "data")
    assert cli.main(["check-data", str(root), *SMALL, "--json"]) == 1
    out, err = capsys.readouterr()
    assert out.isascii() and json.loads(out)["images"] == 18
    assert "5 images are broken" in err and "contact_sheet.png" in err


def test_many_faults_and_copies_are_not_all_shown(capsys, tmp_path):
    content = {f"bad/{number:02}.jpg": b"" for number in range(14)}
    content |= {f"worse/{number:02}.jpg": b"text" for number in range(3)}
    content |= {f"good/{number:02}.png": encoded(number // 6) for number in range(72)}
    told, status = said(capsys, write(tmp_path / "data", content))
    assert status == 1 and "17 images are broken" in told
    assert "bad/04.jpg … 9 more" in re.sub(r"\S+/(?=bad/)", "", told) and "bad/05.jpg" not in told
    assert "worse/02.jpg" in told and "--json lists all." in told  # each reason is shown
    assert "60 images are copies of another, byte for byte, in 12 groups" in told
    assert "good/03.png and 2 more" in told and "… 7 more; --json lists all." in told
    assert "two parts" not in told and "two classes" not in told


def test_of_many_classes_the_largest_and_smallest_are_shown(capsys, tmp_path):
    content = {
        f"class{size:02}/{number}.png": encoded(100 * size + number, 8, 8)
        for size in range(1, 26)
        for number in range(size)
    }
    told, _ = said(capsys, write(tmp_path / "data", content))
    shown = set(re.findall(r"class\d\d(?= │)", told))
    assert shown == {f"class{n:02}" for n in (*range(1, 11), *range(16, 26))}
    assert "… 5 more" in told
    assert len(check(capsys, tmp_path / "data")["parts"][0]["classes"]) == 25


def test_reasons_that_differ_in_a_number_are_one():
    broken = [Broken(str(n), "", f"truncated ({n} bytes)") for n in range(3)]
    broken.insert(1, Broken("x", "", "empty"))
    assert [(reason, len(ones)) for reason, ones in by_reason(broken)] == [
        ("truncated (0 bytes)", 3), ("empty", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999, "999 B"), (1400, "1.4 kB"), (52_000, "52 kB"), (1.3e9, "1.3 GB"),
     (2e15, "2000 TB")],
)  # fmt: skip
def test_bytes_are_told_by_their_size(count, told):
    assert text._bytes(count) == told


# The contact sheet


def run_of(*words: str) -> TrainConfig:
    return cli.parse("train", [*SMALL, "--output_dir", "x", *words])


@pytest.mark.parametrize("chans", [3, 13])
def test_the_sheet_shows_the_crops_of_the_runs_first_step(tmp_path, monkeypatch, chans):
    rng = np.random.default_rng(0)
    for number in range(12):
        shape = (24, 20, 3) if chans == 3 else (24, 20, 13)
        image = rng.integers(0, 255, shape, dtype=np.uint8)
        if chans == 3:
            Image.fromarray(image).save(tmp_path / f"{number}.png")
        else:
            np.save(tmp_path / f"{number}.npy", image)
    config = run_of("--data_path", str(tmp_path), "--in_chans", str(chans), "--seed", "5")
    source, pixels, groups = FolderSource(tmp_path), Pixels(chans), view_groups(config)
    (step,) = next(iter(Loader(source, groups, seed=5, epochs=3, total_batch_size=8,
                               batch_size_per_gpu=8, pixels=pixels)))  # fmt: skip
    drawn = []
    monkeypatch.setattr(sheet, "_picture", lambda crop: drawn.append(crop) or Image.new("RGB", (9, 9)))
    monkeypatch.setattr(sheet, "_framed", lambda image: image)
    shown = []
    monkeypatch.setattr(sheet.figures, "sheet", lambda *words: shown.append(words))
    sheet.contact_sheet(source, groups, pixels, 5, "title")
    assert len(drawn) == 8 * 6
    for place in range(8):
        row = drawn[6 * place : 6 * place + 6]
        for view in range(2):
            assert torch.equal(row[view], step.groups[0][view, place])
        for view in range(4):
            assert torch.equal(row[2 + view], step.groups[1][view, place])
    (title, subtitle, panels, columns), = shown
    assert (title, columns, len(panels)) == ("title", 7, 56)
    assert "seed 5; 1 more local crops of each are not shown" in subtitle
    assert ("stretched" in subtitle) == (chans != 3)
    names = [panels[7 * place][0] for place in range(8)]
    assert names == [source.key(int(index)) for index in step.indices]
    assert [label for label, _, _ in panels[1:7]] == [
        "global 1", "global 2", "local 1", "local 2", "local 3", "local 4"
    ]  # fmt: skip


def test_the_sheet_passes_over_what_cannot_be_read(tmp_path):
    content = {f"{number}.png": encoded(number) for number in range(6)}
    order = [int(index) for index in epoch_order(0, 0, 6)]
    for place in (0, 3, 4):
        content[f"{order[place]}.png"] = b""
    source = FolderSource(write(tmp_path / "data", content))
    groups = view_groups(run_of("--data_path", "x"))
    batches = list(sheet.first_batches(source, groups, RGB, 0))
    assert [int(batch.indices[0]) for batch in batches] == [order[1], order[2], order[5]]


@pytest.mark.parametrize(("training", "shown"), [("unlabeled", "unlabeled"), ("", "train")])
def test_the_sheet_is_of_the_part_that_a_run_reads(capsys, tmp_path, monkeypatch, training, shown):
    root = write(tmp_path / "data", {f"{part}/{n}.png": encoded(n) for part in ("train", "unlabeled")
                                     for n in range(2)})  # fmt: skip
    data = SimpleNamespace(
        root="somewhere", parts=("train", "unlabeled"), training=training,
        open=lambda part: FolderSource(root / part),
    )  # fmt: skip
    monkeypatch.setattr(command, "open_data", lambda *words: data)
    seen = []
    monkeypatch.setattr(command, "contact_sheet", lambda source, *more: seen.append(source.root))
    assert len(check(capsys, root, status=0)["parts"]) == 2
    assert seen == [str(root / shown)]


def test_small_pictures_are_enlarged_in_squares_and_large_ones_reduced():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    crop = torch.from_numpy(pixels).permute(2, 0, 1)
    drawn = np.asarray(sheet._picture(crop))
    assert drawn.shape == (192, 192, 3)
    assert np.array_equal(drawn, pixels.repeat(96, 0).repeat(96, 1))
    assert sheet._picture(torch.zeros(3, 224, 224, dtype=torch.uint8)).size == (192, 192)
    assert sheet._picture(torch.rand(13, 24, 24)).size == (192, 192)
    framed = sheet._framed(Image.new("RGB", (400, 100), "black"))
    assert framed.size == (192, 192)
    assert framed.getpixel((96, 96)) == (0, 0, 0) and framed.getpixel((96, 20)) == (255, 255, 255)
    assert sheet._scaled(Image.new("RGB", (5000, 1))).size == (192, 1)


def test_the_file_is_a_sheet_of_rows(capsys, tmp_path):
    numbers = check(capsys, write(tmp_path / "data"), "--output_dir", tmp_path / "out")
    drawn = Image.open(numbers["contact_sheet"])
    assert drawn.format == "PNG" and drawn.width > 7 * 192 and drawn.height > 8 * 192


# The speed


@pytest.mark.parametrize(
    ("cost", "device", "workers", "sentences"),
    [
        (  # 0.1 s an image beside 10 images a second
            Cost(0.0, 0.02, 0.08, 64), Device("cuda", "H", 55, 16), 6,
            ["The GPU (H) takes 55 images a second, and --num_workers 6 suffices."],
        ),
        (Cost(0.0, 0.02, 0.08, 64), Device("cuda", "H", 50.4, 16), 5, []),
        (
            Cost(0.0, 0.01, 0.03, 64), Device("cuda", "", 900, 4), 4,
            ["The GPU takes 900 images a second, of which the 4 cores here can prepare 100: ",
             "it waits 89% of the time, with --num_workers 4 as with more."],
        ),
        (  # a slow disk keeps workers waiting, and no core busy
            Cost(0.3, 0.01, 0.09, 64), Device("cuda", "", 20, 4), 8, ["--num_workers 8 suffices."],
        ),
        (
            Cost(0.0, 0.01, 0.03, 64), Device("cpu", "", 0.9, 2), 1,
            ["This machine's CPU takes 0.9 images a second; --num_workers 1 suffices.",
             "A GPU needs a worker for every 25 images a second that it takes."],
        ),
        (
            Cost(0.0, 0.01, 0.01, 64), Device("cpu", "", 100, 2), 1,
            ["takes 100 images a second through the networks, and 50 where it also makes the crops",
             "; --num_workers 1 suffices."],
        ),
    ],
)  # fmt: skip
def test_workers_are_advised_by_what_the_device_takes(cost, device, workers, sentences):
    assert feeding.workers(cost, device) == workers
    told = feeding.advice(cost, device)
    assert all(sentence in told for sentence in sentences)


def test_the_cost_of_an_image_is_of_those_that_can_be_read(tmp_path):
    content = {f"{number}.png": encoded(number, 200, 200) for number in range(6)}
    source = FolderSource(write(tmp_path / "data", content | {"bad.png": b""}))
    found = inspect(source, description="")
    found.seconds[:] = 0.5, 0.25
    found.seconds[6] = 100, 100  # the bad one, last by its name
    assert list(found.faults) == [6]
    groups = view_groups(run_of("--data_path", "x"))
    cost = feeding.cost([found], source, groups, RGB, 0)
    assert (cost.read, cost.decode) == (0.5, 0.25)
    assert cost.crops == 0.0 and cost.sampled == 3  # the sample took less than to decode, it says
    assert cost.rate == pytest.approx(1 / 0.75)


def test_a_step_that_does_not_fit_into_memory_is_said(capsys, tmp_path, monkeypatch):
    def measure(*arguments):
        raise MemoryError

    monkeypatch.setattr(speed, "measure", measure)
    numbers = check(capsys, write(tmp_path / "data", {"a.png": encoded(1)}), status=0)
    assert "images_a_second_a_worker" in numbers["speed"] and "device" not in numbers["speed"]


def test_the_step_has_the_batch_and_the_precision_of_the_run(capsys, tmp_path, monkeypatch):
    asked = []

    def measure(learner, load, prepare, images, first):
        asked.append((learner.autocast_dtype, images, first, len(load(2)[0].indices)))
        asked.append(learner.plan.last_layer_frozen(0))
        return speed.Speed(1.0, 0.5, 0.0, 0.0, 0, 0)

    monkeypatch.setattr(speed, "measure", measure)
    root = write(tmp_path / "data", {f"{n}.png": encoded(n) for n in range(5)} | {"bad.png": b""})
    more = ["--precision", "bf16", "--total_batch_size", "8"]
    numbers = check(capsys, root, *more, status=1)
    # Of the images that can be read; and the prototypes are trained, as in all but a run's start.
    assert asked == [(torch.bfloat16, 5, 1, 2), False]
    assert numbers["speed"]["images_a_second_of_the_device"] == pytest.approx(8 / (1 + 8 * 0.5))


def test_fewer_images_than_a_batch_are_said(capsys, tmp_path):
    root = write(tmp_path / "data", {f"{n}.png": encoded(n) for n in range(4)})
    assert "--total_batch_size" not in said(capsys, root)[0]
    told, _ = said(capsys, root, "--total_batch_size", "9")
    assert "a batch of 9, so a run needs --total_batch_size 4 or less" in told


# The command line


def test_a_recipe_stands_before_the_images(tmp_path):
    config = cli.parse("check-data", ["quickstart", "FOLDER", "--seed", "3"])
    assert (config.data_path, config.global_crops_size, config.arch) == ("FOLDER", 12, "vit")
    assert (config.total_batch_size, config.seed) == (32, 3)
    assert config.num_workers == 1  # as the recipe says
    assert cli.parse("check-data", ["FOLDER"]).global_crops_size == 224
    by_flag = cli.parse("check-data", ["quickstart", "--data_path", "FOLDER"])
    assert (by_flag.data_path, by_flag.global_crops_size) == ("FOLDER", 12)
    with pytest.raises(UserError, match="'C' belongs to no flag"):
        cli.parse("check-data", ["quickstart", "B", "C"])
    (tmp_path / "own.yaml").write_text("max_images: 3\n")
    with pytest.raises(UserError, match="'max_images', which is no setting"):
        cli.parse("check-data", [str(tmp_path / "own.yaml"), "FOLDER"])


def test_a_recipe_of_another_precision_makes_way_for_a_flag(tmp_path):
    (tmp_path / "own.yaml").write_text("use_fp16: true\n")
    config = cli.parse("check-data", [str(tmp_path / "own.yaml"), "F", "--precision", "fp32"])
    assert (config.use_fp16, config.precision) == (None, "fp32")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "nowhere should be a folder of images, and there is nothing."),
        ([], "--data_path is missing."),
        (["vits8"], "vits8 is a recipe; name the images, too: dino-kit check-data vits8 FOLDER."),
        (["data", "--global_crops_size", "50"], "--global_crops_size 50 is not a multiple of"),
        (["data", "--arch", "resnet-50"], "did you mean resnet50?"),
        (["data", "--output_dir", "file"], "--output_dir file is a file; a folder is needed."),
        (["data", "--use_fp16", "true", "--precision", "bf16"], "contradicts --precision bf16"),
    ],
)
def test_what_does_not_fit_ends_before_any_image_is_read(
    words, sentence, capsys, tmp_path, monkeypatch
):
    write(tmp_path / "data", {"a.png": encoded(1)})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "inspect", None)
    assert cli.main(["check-data", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_more_than_an_image_that_is_lost_ends_the_check(capsys, tmp_path, monkeypatch):
    def gone(self, index):
        raise UserError("The archive has gone.")

    write(tmp_path / "data", {"a.png": encoded(1)})
    monkeypatch.setattr(FolderSource, "read", gone)
    assert cli.main(["check-data", "data", "--num_workers", "0", *SMALL]) == 2
    assert capsys.readouterr().err.endswith("dino-kit: error: The archive has gone.\n")
    looks = inspection._Looks(FolderSource("data"), spread(1, None), RGB, [])
    assert looks.__getitems__([0]) == "The archive has gone."  # no traceback of a worker's


def test_a_command_that_returns_nothing_has_succeeded(monkeypatch, capsys):
    monkeypatch.setattr("dino_kit.commands.config.run", lambda config: None)
    assert cli.main(["config"]) == 0
    monkeypatch.setattr("dino_kit.commands.config.run", lambda config: 1)
    assert cli.main(["config"]) == 1


def test_every_setting_of_a_step_and_of_crops_is_as_train_has_it():
    """Under one name stands one thing, so that a recipe means here what it means there."""
    ours = cli.COMMANDS["check-data"].schema
    shared = set(fields.names(ours)) & set(fields.names(TrainConfig))
    own = {"data_path", "output_dir"}  # required there
    for name in shared - own:
        assert fields._field(ours, name).default == fields._field(TrainConfig, name).default
        assert fields._kind(ours, name) == fields._kind(TrainConfig, name)
    assert {"in_chans", "hue", "out_dim", "arch"} <= shared
