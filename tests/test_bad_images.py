"""What becomes of images that cannot be used: written down once, told, held against a limit."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from synthetic_run import settings
from test_train import TINY, assert_same_run

from dino_kit import cli, files
from dino_kit.data import bad_images as module
from dino_kit.data.bad_images import BadImages, written
from dino_kit.data.crops import View
from dino_kit.data.loader import Loader
from dino_kit.data.pixels import RGB
from dino_kit.errors import UserError

ONE = [[View(4, (0.4, 1.0), jitter_prob=0, gray_prob=0, blur_prob=0)]]


class Pictures:
    """As many pictures as ``names``; those in ``broken`` cannot be read."""

    classes, root = None, "a list"

    def __init__(self, names, broken=()):
        self.names, self.broken = list(names), set(broken)

    def __len__(self):
        return len(self.names)

    def read(self, index):
        broken = self.names[index] in self.broken
        return b"no image" if broken else np.full((5, 5, 3), index, np.uint8)

    def label(self, index):
        return None

    key = name = lambda self, index: self.names[index]


def watched(source, folder, max_share: float = 1.0, **options):
    """The watch and its loader."""
    options = {"seed": 1, "epochs": 2, "total_batch_size": 4, "batch_size_per_gpu": 4} | options
    loader = Loader(source, ONE, on_bad_image="replace", **options)
    return BadImages(source, RGB, folder, max_share), loader


def names(count: int) -> list[str]:
    return [f"picture {number}.png" for number in range(count)]


def test_each_is_written_down_once_with_its_reason_and_the_first_is_told(tmp_path, capsys):
    source = Pictures(names(12), ["picture 3.png", "picture 7.png"])
    watch, loader = watched(source, tmp_path)
    watch.open()
    assert len(list(watch.watch(loader))) == len(loader) == 6
    assert len(watch) == 2
    content = (tmp_path / "bad_images.txt").read_text()
    assert sorted(content.splitlines()) == [
        f"picture {number}.png\tcannot be read as an image: it is in no format that Pillow knows."
        for number in (3, 7)
    ]
    said = capsys.readouterr().err
    first = content.split("\t")[0]
    assert said.count("notice") == 1 and f"notice: {first} cannot be read as an image" in said
    assert "Another image takes its place" in said and str(tmp_path / "bad_images.txt") in said
    assert written(tmp_path) == dict(line.split("\t") for line in content.splitlines())


def test_nothing_is_written_where_all_is_well(tmp_path, capsys):
    watch, loader = watched(Pictures(names(12)), tmp_path)
    watch.open()
    list(watch.watch(loader))
    assert len(watch) == 0 and not os.listdir(tmp_path) and capsys.readouterr() == ("", "")


STRANGE = ["tab\there.png", "two\nlines\r.png", "\udce9t\udce9.png", "日本 語.png", "a\u2028b.png"]


def test_names_of_every_kind_take_one_line_each(tmp_path):
    source = Pictures([*STRANGE, *names(7)], STRANGE)
    watch, loader = watched(source, tmp_path)
    list(watch.watch(loader))
    content = (tmp_path / "bad_images.txt").read_text(encoding="utf-8")
    assert content.count("\n") == content.count("\t") == len(STRANGE) == len(watch)
    assert {"tab\\there.png", "two\\nlines\\r.png", "日本 語.png"} <= set(written(tmp_path))
    again, loader = watched(source, tmp_path)
    again.open()
    list(again.watch(loader))
    lines = (tmp_path / "bad_images.txt").read_text(encoding="utf-8").split("\n")
    assert sorted(lines) == sorted(content.split("\n"))


def test_processes_and_later_runs_add_to_the_file_what_is_not_there(tmp_path):
    broken = [f"picture {number}.png" for number in (1, 4, 6, 9)]
    watches = [
        watched(Pictures(names(12), broken), tmp_path, rank=rank, world_size=2, seed=seed)
        for seed in (1, 2) for rank in (0, 1)
    ]  # fmt: skip
    for steps in zip(*(watch.watch(loader) for watch, loader in watches), strict=True):
        assert len(steps) == 4
    lines = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == broken
    assert {len(watch) for watch, _ in watches} == {4}


def test_what_was_mended_or_is_gone_is_struck_out_at_the_start(tmp_path):
    source = Pictures(names(12), ["picture 3.png", "picture 7.png", "picture 9.png"])
    watch, loader = watched(source, tmp_path)
    list(watch.watch(loader))
    source.broken.discard("picture 3.png")
    source.names[7] = "another.png"
    watch, _ = watched(source, tmp_path)
    watch.open()
    assert list(written(tmp_path)) == ["picture 9.png"] and len(watch) == 1
    watch.open(anew=True)
    assert len(watch) == 0 and not (tmp_path / "bad_images.txt").exists()


def test_what_is_too_small_for_its_crops_is_not_taken_for_mended(tmp_path):
    too_large = [View(9, None, blur_prob=0)]  # the pictures are of 5 pixels
    (tmp_path / "bad_images.txt").write_text("picture 3.png\tis of 5 × 5 pixels.\n", "utf-8")
    for views, stays in ((too_large, True), ([], False)):
        BadImages(Pictures(names(12)), RGB, tmp_path, 1.0, views).open()
        assert bool(written(tmp_path)) == stays


@pytest.mark.parametrize("images, broken, share, step", [
    (200, 2, 0.01, None), (200, 3, 0.01, 0), (200, 0, 0.0, None), (200, 1, 0.0, 0),
    (40, 1, 0.01, 0), (40, 20, 0.5, None),
])  # fmt: skip
def test_beyond_the_limit_the_run_ends(tmp_path, images, broken, share, step):
    """Of fewer than a thousand images all count, however few were looked at."""
    source = Pictures(names(images), names(broken))
    watch, loader = watched(source, tmp_path, share, epochs=1, total_batch_size=images - 1,
                            batch_size_per_gpu=images)  # fmt: skip
    if step is None:
        assert len(list(watch.watch(loader))) == 1
        return
    with pytest.raises(UserError) as caught:
        list(watch.watch(loader))
    said = str(caught.value)
    # Those that took their places were looked at, too.
    assert said.startswith(f"{broken} of the {images} images looked at so far cannot be used, ")
    assert f"--max_bad_share {share:g} allows {int(share * images)} of {images}; {tmp_path}" in said
    assert "\n" not in said


def test_never_more_are_bad_than_were_looked_at(tmp_path):
    watch, loader = watched(Pictures(names(40), names(30)), tmp_path, 0.1, epochs=1)
    with pytest.raises(UserError) as caught:
        list(watch.watch(loader))
    bad, seen = map(int, re.match(r"(\d+) of the (\d+) images", str(caught.value)).groups())
    assert seen == bad + 4  # which the first batch has


def test_of_many_images_the_first_thousand_are_not_judged_by_their_share(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_JUDGED", 20)
    source = Pictures(names(100), names(2))
    order = np.concatenate([batch.indices.numpy() for (batch,) in watched(
        Pictures(names(100)), tmp_path, epochs=1)[1]])  # fmt: skip
    meets = sorted(int(np.flatnonzero(order == index)[0]) // 4 for index in (0, 1))
    watch, loader = watched(source, tmp_path, 0.05, epochs=1)
    seen = 0
    looked_at = [4 * (step + 1) + bad for bad, step in enumerate(meets, 1)]
    allowed = [int(0.05 * max(count, 20)) for count in looked_at]
    assert allowed[0] >= 1  # a single one among the first does not end it
    if allowed[1] >= 2:
        assert len(list(watch.watch(loader))) == 25
        return
    with pytest.raises(UserError, match="--max_bad_share 0.05 allows 1 of"):
        for _ in watch.watch(loader):
            seen += 1
    assert seen == meets[1]


# A run


def write_pictures(folder, count: int = 12) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def train(data, out, *flags) -> int:
    line = ["train", "--data_path", str(data), "--output_dir", str(out), *TINY, "--epochs", "3",
            *map(str, flags)]  # fmt: skip
    return cli.main(line)


def test_a_run_goes_on_after_the_limit_once_it_allows_or_the_files_are_mended(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    write_pictures(data)
    whole = (data / "5.png").read_bytes()
    (data / "5.png").write_bytes(whole[:80])
    (data / "7.png").write_bytes(b"")
    assert train(data, out) == 2
    said = capsys.readouterr().err
    assert "images looked at so far cannot be used, and --max_bad_share 0.01" in said
    assert "Traceback" not in said and said.splitlines()[-1].startswith("dino-kit: error: ")
    assert train(data, out, "--max_bad_share", 0.2) == 0
    assert "2 of 12 images could not be used" in capsys.readouterr().err
    assert set(written(out)) == {str(data / "5.png"), str(data / "7.png")}
    assert cli.main(["report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "2 images could not be used, and others took their place (bad_images.txt" in page
    (data / "7.png").write_bytes(whole)
    assert train(data, out, "--max_bad_share", 0.1, "--resume", "never") == 0
    assert set(written(out)) == {str(data / "5.png")}


def test_a_run_that_was_interrupted_replaces_as_one_that_was_not(tmp_path, monkeypatch):
    data = tmp_path / "data"
    write_pictures(data, 20)
    for number in (3, 4, 11):
        (data / f"{number}.png").write_bytes(b"no image")
    flags = ["--max_bad_share", 0.5, "--save_every_steps", 1, "--probe_freq", 1]
    assert train(data, tmp_path / "whole", *flags) == 0

    real, calls = files.write_weights, []

    def interrupted(path, content):
        real(path, content)
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_weights", interrupted)
    assert train(data, tmp_path / "parts", *flags) == 130
    assert train(data, tmp_path / "parts", *flags, "--num_workers", 2) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert written(tmp_path / "whole").keys() == written(tmp_path / "parts").keys()


def test_the_probe_leaves_out_what_cannot_be_used(tmp_path):
    data, labelled = tmp_path / "data", tmp_path / "labelled"
    write_pictures(data, 20)
    for part in ("train", "val"):
        for kind in ("a", "b"):
            (labelled / part).mkdir(parents=True, exist_ok=True)
            write_pictures(labelled / part / kind, 6)
    (data / "0.png").write_bytes(b"no image")
    (labelled / "val/a/3.png").write_bytes(b"no image")
    flags = ["--max_bad_share", 0.5, "--probe_freq", 1, "--probe_data", labelled, "--epochs", 1]
    assert train(data, tmp_path / "out", *flags) == 0
    lines = (tmp_path / "out/probe.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert (line["images"], line["knn_bank"], line["knn_queries"]) == (19, 12, 11)
    assert len(lines) == 2 and (tmp_path / "out/looks/epoch0001.png").is_file()


def test_a_run_on_settings_without_these_fields_goes_on():
    """As checkpoints of earlier versions have them."""
    assert settings().on_bad_image == "skip" and settings().max_bad_share == 0.01
