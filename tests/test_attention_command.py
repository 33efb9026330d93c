"""`dino-kit attention` from end to end."""

from __future__ import annotations

import base64
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tars import write_tar

from dino_kit import attention_page, cli, files
from dino_kit.backbones.build import create_backbone
from dino_kit.commands.attention import folders
from dino_kit.data.sources.digits import DigitsSource
from dino_kit.data.sources.folder import FolderSource
from dino_kit.data.sources.lists import ListSource
from dino_kit.data.sources.objects import DatasetSource
from dino_kit.evaluators import attention
from dino_kit.evaluators.attention import (
    attention_maps,
    attention_rows,
    fit,
    threshold_mask,
    to_tensor,
)
from dino_kit.evaluators.gallery import Picture, show
from dino_kit.figures import masked

SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
NAMES = ("head0", "head1", "mean")
PICTURES = [f"{kind}-{name}.png" for kind in ("attn", "overlay") for name in NAMES]
WRITTEN = {*PICTURES, "sheet.png", "img.png", "attention.npz"}


def build(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = create_backbone("vit", **{"image_size": 16, **SIZES, **changes})
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone.eval()


def save_checkpoint(path: Path, teacher, student=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    networks = {
        name: {f"backbone.{key}": value for key, value in one.state_dict().items()}
        for name, one in (("teacher", teacher), ("student", student or teacher))
    }
    config = {"arch": "vit", "global_crops_size": teacher.image_size, **SIZES}
    torch.save({**networks, "config": config, "epoch": 3, "step": 9}, path)
    return path


def save_image(path: Path, width: int, height: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(width)
    Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def small(tmp_path):
    """A checkpoint of a run, and a picture of 30 × 20 pixels."""
    save_checkpoint(tmp_path / "run/checkpoint.pth", build())
    save_image(tmp_path / "photo.png", 30, 20)
    return tmp_path


def command(small, *flags) -> int:
    """With the picture, where the flags name no other."""
    words = ["attention", small / "run", "--image_path", small / "photo.png", *flags]
    return cli.main([str(word) for word in words])


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def maps_in(folder: Path) -> torch.Tensor:
    with np.load(folder / "attention.npz") as arrays:
        return torch.from_numpy(arrays["attention"])


def test_one_image_is_shown_beside_the_checkpoint(small, capsys):
    assert command(small) == 0
    folder = small / "run/attention/photo"
    assert below(small / "run") == {
        "checkpoint.pth",
        *(f"attention/photo/{name}" for name in (*WRITTEN, "attention.json")),
    }
    with Image.open(small / "photo.png") as image:
        seen = fit(image, (16, 16), 4)
    with Image.open(folder / "img.png") as image:
        assert np.array_equal(image, seen)
    assert torch.equal(maps_in(folder), attention_maps(build(), to_tensor(seen)))
    shown = capsys.readouterr()
    assert f"written to {folder}; look first at sheet.png" in shown.out
    assert "tensors matched" in shown.out and shown.err == ""


def test_the_record_says_what_was_looked_at_and_how(small):
    assert command(small, "--device", "cpu", "--threshold", "0.5") == 0
    record = json.loads((small / "run/attention/photo/attention.json").read_text("utf-8"))
    assert record["checkpoint"] == {
        "path": str(small / "run/checkpoint.pth"),
        "sha256": files.sha256(small / "run/checkpoint.pth"),
        "network": "teacher", "epoch": 3, "step": 9,
    }  # fmt: skip
    assert record["images"] == ["."] and record["image_size"] == [16, 16]
    assert record["threshold"] == 0.5 and record["device"] == "cpu"
    assert record["mean"] == [0.485, 0.456, 0.406] and record["std"] == [0.229, 0.224, 0.225]
    assert record["architecture"]["name"] == "vit"
    assert set(record["versions"]) >= {"python", "dino_kit", "torch", "pillow"}
    assert record["settings"]["image_path"] == str(small / "photo.png")


@pytest.fixture
def pictures(small):
    """Several images, two of the same name but for the ending, and a file that is no image."""
    root = small / "pictures"
    for name, width, height in [
        ("a.png", 20, 33), ("a.bmp", 24, 24), ("b.png", 9, 50), ("cats/a.png", 40, 20),
        ("cats/old/b.png", 16, 16),
    ]:  # fmt: skip
        save_image(root / name, width, height)
    (root / "cats/broken.png").write_bytes(b"no image")
    (root / "notes.txt").write_text("not shown")
    return root


FOLDERS = ["a.bmp", "a.png", "b", "cats/a", "cats/old/b"]


def test_a_folder_of_images_is_shown_without_what_cannot_be_read(small, pictures, capsys):
    assert command(small, "--image_path", pictures, "--html") == 0
    folder = small / "run/attention"
    assert below(folder) == {
        "attention.json", "attention.html",
        *(f"{one}/{name}" for one in FOLDERS for name in WRITTEN),
    }  # fmt: skip
    assert json.loads((folder / "attention.json").read_text("utf-8"))["images"] == FOLDERS
    for one, name in zip(FOLDERS, ["a.bmp", "a.png", "b.png"], strict=False):
        with Image.open(pictures / name) as image:
            seen = to_tensor(fit(image, (16, 16), 4))
        assert torch.equal(maps_in(folder / one), attention_maps(build(), seen))
    shown = capsys.readouterr()
    broken = os.path.join(str(pictures), "cats", "broken.png")
    others, left_out = shown.err.splitlines(keepends=True)
    assert others.endswith("holds files of other kinds too, left out: 1 × .txt.\n")
    assert left_out.startswith(f"notice: {broken} cannot be read as an image")
    assert left_out.endswith("It is left out.\n")
    assert f"a folder for each of {len(FOLDERS)} images" in shown.out
    assert f"open in a browser: {folder / 'attention.html'}\n" in shown.out


def test_a_page_has_the_images_and_where_they_come_from(small, pictures):
    out = small / "out"
    assert command(small, "--image_path", pictures, "--html", "--output_dir", out,
                   "--threshold", "0.7") == 0  # fmt: skip
    page = (out / "attention.html").read_text("utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [image["name"] for image in data["images"]] == FOLDERS
    assert {(image["rows"], image["columns"]) for image in data["images"]} == {(4, 4)}
    assert data["heads"] == 2 and data["keep"] == 0.7
    assert f"the teacher of {small / 'run/checkpoint.pth'} after epoch 3" in page
    assert f"dino-kit attention {small / 'run'}" in page


def test_a_page_of_many_images_has_the_first_with_fewer_patches(
    small, pictures, monkeypatch, capsys
):
    monkeypatch.setattr(attention_page, "patches_for", lambda images, heads: (6, 2))
    assert command(small, "--image_path", pictures, "--html", "--image_size", "12", "20") == 0
    page = (small / "run/attention/attention.html").read_text("utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [image["name"] for image in data["images"]] == FOLDERS[:2]
    assert {(image["rows"], image["columns"]) for image in data["images"]} == {(1, 3)}
    assert data["images"][0]["note"].endswith("in 1 × 3 patches, not in the 3 × 5 of its pictures.")
    assert maps_in(small / "run/attention/a.bmp").shape == (2, 3, 5)
    assert "attention.html (it has the first 2 images)\n" in capsys.readouterr().out


@pytest.mark.parametrize("block, place", [("0", 0), ("-2", 0), ("1", 1), ("-1", 1)])
def test_another_block_than_the_last_is_shown_and_named(small, block, place):
    assert command(small, "--block", block, "--html") == 0
    folder = small / "run/attention/photo"
    with Image.open(small / "photo.png") as image:
        seen = to_tensor(fit(image, (16, 16), 4))
    maps = [attention_maps(build(), seen, n) for n in range(2)]
    assert not torch.equal(*maps)
    assert torch.equal(maps_in(folder), maps[place])
    assert json.loads((folder / "attention.json").read_text("utf-8"))["block"] == place
    page = (folder / "attention.html").read_text("utf-8")
    which = ("block 0 of 0 to 1", "the last block")[place]
    assert f"Shown is the attention of {which} after the softmax" in page
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    scales = np.frombuffer(base64.b64decode(data["images"][0]["scales"]), "<f4").reshape(2, 17)
    assert np.array_equal(scales, attention_rows(build(), seen, place).max(dim=2)[0])
    sheet = (folder / "sheet.png").read_bytes()
    assert command(small) == 0
    assert (sheet == (folder / "sheet.png").read_bytes()) == bool(place)


def test_registers_are_no_patches_in_pictures_or_on_the_page(small):
    backbone = build(num_register_tokens=3, layer_scale=0.5)
    save_checkpoint(small / "run/checkpoint.pth", backbone)
    assert command(small, "--html") == 0
    folder = small / "run/attention/photo"
    with Image.open(small / "photo.png") as image:
        seen = to_tensor(fit(image, (16, 16), 4))
    whole = backbone.get_last_selfattention(seen[None])[0].detach()
    assert torch.allclose(maps_in(folder), whole[:, 0, 4:].unflatten(1, (4, 4)), atol=1e-6)
    page = (folder / "attention.html").read_text("utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["prefix"] == ["Class token", "Extra token 1", "Extra token 2", "Extra token 3"]
    assert "goes to the class token and the extra tokens." in page


def test_masks_hold_the_share_that_was_asked_for(small):
    assert command(small, "--threshold", "0.3") == 0
    folder = small / "run/attention/photo"
    names = [f"mask_th0.3_{name}.png" for name in NAMES]
    assert below(folder) == {*WRITTEN, "attention.json", *names}
    maps = maps_in(folder)
    rows = torch.cat((maps, maps.mean(dim=0, keepdim=True))).flatten(1)
    masks = threshold_mask(rows, 0.3).unflatten(1, (4, 4)).numpy()
    assert 0 < masks.sum() < masks.size
    with Image.open(folder / "img.png") as image:
        for name, mask in zip(names, masks, strict=True):
            with Image.open(folder / name) as found:
                assert np.array_equal(found, masked(image, mask))


@pytest.mark.parametrize(
    "flags, size",
    [
        (["16"], (24, 16)),
        (["9"], (12, 8)),
        (["8", "20"], (20, 8)),
        (["11", "19"], (16, 8)),
        (["20", "30"], (28, 20)),
    ],
)
def test_one_number_is_the_shorter_side_and_what_is_over_is_cut_off(small, flags, size):
    assert command(small, "--image_size", *flags, "--output_dir", small / "out") == 0
    width, height = size
    for name in ("img.png", *PICTURES):
        with Image.open(small / "out" / name) as image:
            assert image.size == size, name
    assert maps_in(small / "out").shape == (2, height // 4, width // 4)


def test_a_network_for_photos_is_looked_at_larger_than_it_was_trained_at(small):
    save_checkpoint(small / "run/checkpoint.pth", build(image_size=112))
    assert command(small, "--output_dir", small / "out") == 0
    assert maps_in(small / "out").shape == (2, 60, 60)


@pytest.mark.parametrize("html", [[], ["--html"]])
def test_the_recorded_command_repeats_the_result(small, html):
    flags = ["--threshold", "0.6", "--image_size", "8", "20", *html]
    save_image(small / "a name with spaces/it's.png", 30, 20)
    assert command(small, *flags, "--image_path", small / "a name with spaces/it's.png") == 0
    first = small / "run/attention/it's"
    record = json.loads((first / "attention.json").read_text("utf-8"))
    words = shlex.split(record["command"])
    assert words[:2] == ["dino-kit", "attention"]
    again = small / "again"
    assert cli.main([*words[1:], "--output_dir", str(again)]) == 0
    assert below(again) == below(first)
    for name in below(first) - {"attention.json", "attention.html"}:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    repeated = json.loads((again / "attention.json").read_text("utf-8"))
    assert {**repeated, "command": 0, "settings": 0} == {**record, "command": 0, "settings": 0}


def test_every_checkpoint_and_network_has_a_place_of_its_own(small):
    student = build()
    with torch.no_grad():
        student.blocks[-1].attn.qkv.weight.mul_(2)
    kept = save_checkpoint(small / "run/checkpoint0003.pth", build(), student)
    words = ["attention", "--image_path", str(small / "photo.png")]
    assert cli.main([*words, str(kept)]) == 0
    assert cli.main([*words, "--pretrained_weights", str(kept), "--checkpoint_key", "student"]) == 0
    assert below(small / "run") - {"checkpoint.pth", "checkpoint0003.pth"} == {
        f"attention_checkpoint0003{network}/photo/{name}"
        for network in ("", "_student")
        for name in (*WRITTEN, "attention.json")
    }
    with Image.open(small / "photo.png") as image:
        seen = to_tensor(fit(image, (16, 16), 4))
    for backbone, name in [(build(), ""), (student, "_student")]:
        found = maps_in(small / f"run/attention_checkpoint0003{name}/photo")
        assert torch.equal(found, attention_maps(backbone, seen))


def test_bare_weights_are_shown_too(small):
    torch.save(build().state_dict(), small / "bare.pth")
    words = ["attention", str(small / "bare.pth"), "--image_path", str(small / "photo.png")]
    assert cli.main([*words, "--num_heads", "2", "--html"]) == 0
    assert (small / "attention_bare/photo/attention.html").is_file()
    assert torch.equal(
        maps_in(small / "attention_bare/photo"),
        attention_maps(build(), to_tensor(fit(Image.open(small / "photo.png"), (16, 16), 4))),
    )


def test_pictures_are_normalised_as_the_network_wants_it_and_facts_are_stored(tmp_path):
    with Image.open(save_image(tmp_path / "a.png", 12, 8)) as image:
        seen = image.copy()
    scaling = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 0.5, 0.25)}
    sheets = []
    pictures = [Picture("a", tmp_path / "a", seen)]
    shown = show(build(), pictures, image_size=(8, 12), **scaling, facts={"epoch": 3},
                 advance=sheets.append)  # fmt: skip
    assert shown == 0 and sheets == [tmp_path / "a/sheet.png"]
    expected = attention_maps(build(), to_tensor(seen, **scaling))
    assert torch.equal(maps_in(tmp_path / "a"), expected)
    assert not torch.equal(expected, attention_maps(build(), to_tensor(seen)))
    with np.load(tmp_path / "a/attention.npz") as arrays:
        assert arrays["epoch"] == 3


def test_no_two_images_share_a_folder(tmp_path):
    found = ["a.png", "a.jpg", "a.png.jpg", "A.webp", "B.JPG", "c/a.png", "c.d.png"]
    for name in found:
        save_image(tmp_path / name, 4, 4) if name != "A.webp" else (tmp_path / name).touch()
    names = folders(FolderSource(tmp_path))
    assert len({name.casefold() for name in names}) == len(names) == len(found)
    assert {"B", "c/a", "c.d"} <= set(names)


def listed(tmp_path, *paths: str) -> list[str]:
    (tmp_path / "x.csv").write_text("path\n" + "\n".join(paths), encoding="utf-8")
    return folders(ListSource(tmp_path / "x.csv"))


def test_no_folder_for_pictures_leads_out_of_where_everything_goes(tmp_path):
    found = listed(tmp_path, "../a.png", "/b/./c//d.png", "e/../../f.png", "..")
    assert found == ["a", "b/c/d", "e/f", "image"]


def test_names_that_some_file_systems_take_for_one_have_folders_of_their_own(tmp_path):
    found = listed(tmp_path, "a.png", "A.png", "a.png", "e\u0301.png", "é.png", "a.png_2", "b.png")
    assert found == ["a.png", "A.png_2", "a.png_3", "e\u0301.png", "é.png_2", "a.png_2_2", "b"]


def test_a_number_is_named_after_its_source():
    source = DatasetSource([np.zeros((4, 4, 3), np.uint8)] * 2, "torchvision:CIFAR10:test")
    assert folders(source) == ["torchvision_CIFAR10_test_0", "torchvision_CIFAR10_test_1"]


def test_names_of_other_systems_are_such_that_windows_takes_them(tmp_path, monkeypatch):
    monkeypatch.setattr("dino_kit.commands.attention.os.name", "nt")
    keys = {0: "C:\\data\\a?.png", 1: "b:c/<d>.png"}
    source = type("Listed", (), {"root": "x", "__len__": lambda _: 2, "key": lambda _, i: keys[i]})
    assert folders(source()) == ["C_/data/a_", "b_c/_d_"]


@pytest.mark.parametrize("kind", ["folder", "tar", "list"])
def test_images_are_shown_wherever_they_lie_under_the_same_names(small, pictures, kind):
    names = ["a.bmp", "a.png", "b.png", "cats/a.png", "cats/old/b.png"]
    (pictures / "cats/broken.png").unlink()
    if kind == "tar":
        write_tar(small / "x.tar", {name: (pictures / name).read_bytes() for name in names})
    elif kind == "list":
        (pictures / "x.txt").write_text("\n".join(names))
    path = {"folder": pictures, "tar": small / "x.tar", "list": pictures / "x.txt"}[kind]
    assert command(small, "--image_path", path) == 0
    folder = small / "run/attention"
    assert json.loads((folder / "attention.json").read_text("utf-8"))["images"] == FOLDERS
    with Image.open(pictures / "cats/a.png") as image:
        seen = to_tensor(fit(image, (16, 16), 4))
    assert torch.equal(maps_in(folder / "cats/a"), attention_maps(build(), seen))


def test_of_digits_those_that_are_held_out_are_shown(small, monkeypatch):
    monkeypatch.chdir(small)
    monkeypatch.setattr(DigitsSource, "__len__", lambda self: 2)
    assert command(small, "--image_path", "digits") == 0
    images = json.loads((small / "run/attention/attention.json").read_text("utf-8"))["images"]
    assert images == [f"digits_{DigitsSource('test').key(index)}" for index in range(2)]


def test_halves_in_archives_of_their_own_are_shown_by_what_is_held_out(small, pictures):
    image = (pictures / "b.png").read_bytes()
    for half, name in (("train", "a/1.png"), ("val", "a/2.png")):
        write_tar(small / "data" / half / "0.tar", {name: image})
    assert command(small, "--image_path", small / "data") == 0
    assert (small / "run/attention/a/2/sheet.png").is_file()
    assert not (small / "run/attention/a/1").exists()


def test_a_long_index_is_kept_beside_the_run(small, pictures, monkeypatch):
    monkeypatch.setattr("dino_kit.data.sources.store._WORTH_A_FILE", 1)
    path = write_tar(small / "x.tar", {"a.png": (pictures / "b.png").read_bytes()})
    assert command(small, "--image_path", path) == 0
    assert len(list((small / "run/lists").iterdir())) == 1


def test_gray_and_transparent_images_are_shown_in_rgb(small):
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (20, 20), 1).save(small / "odd.png")
        assert command(small, "--image_path", small / "odd.png") == 0
        with Image.open(small / "run/attention/odd/img.png") as image:
            assert image.mode == "RGB"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image_path", "{}/nothing.png"], "nothing.png is neither an image nor a folder"),
        (["--image_path", "{}/nothing.tar"], "nothing.tar is missing"),
        (["--image_path", "torchvision:CIFAR"], "names no dataset of torchvision"),
        (["--image_path", "torchvision:MNIST:{}/none"], "--download fetches it"),
        (["--image_path", "{}/empty"], "There is no image in {}/empty: "),
        (["--image_path", "{}/broken.png"], "broken.png cannot be read as an image"),
        (["--image_path", "{}/one"], "broken.png cannot be read as an image"),
        (["--checkpoint", "{}/broken.png"], "broken.png is not a checkpoint"),
        (["--checkpoint", "{}/nothing"], "There is no file {}/nothing."),
        (["--checkpoint", "{}/empty"], "has no checkpoint.pth"),
        (["--checkpoint_key", "momentum"], "it holds teacher, student"),
        (["--embed_dim", "48"], "--embed_dim 48 contradicts"),
        (["--output_dir", "{}/photo.png"], "--output_dir {}/photo.png is a file; a folder is"),
        (["--output_dir", "{}/photo.png/below"], "{}/photo.png"),
        (["--image_size", "3"], "--image_size 3 makes the image 3 × "),
        (["--image_size", "16", "3"], "16 × 3 pixels, smaller than a patch of 4 × 4; give 4"),
        (["--image_size", "2000"], "2000 × 2000 pixels are 250,000 patches of 4 × 4"),
        (["--image_size", "1000000000"], "give a smaller --image_size"),
        (["--image_size", "0"], "--image_size is '0'"),
        (["--image_size", "8", "8", "8"], "--image_size takes one or two numbers and got 3"),
        (["--threshold", "0"], "--threshold is '0'; it takes a number above 0, at most 1."),
        (["--threshold", "60"], "--threshold is '60'; it takes a number above 0, at most 1."),
        (["--device", "abacus"], "abacus"),
    ],
)
@pytest.mark.parametrize("html", [[], ["--html"]])
def test_a_fault_is_a_sentence_and_writes_nothing(small, capsys, flags, message, html):
    (small / "empty").mkdir()
    (small / "one").mkdir()
    for name in ("broken.png", "one/broken.png"):
        (small / name).write_bytes(b"no image")
    before = {path.relative_to(small) for path in small.rglob("*")}
    words = ["--checkpoint", small / "run", "--image_path", small / "photo.png", *html]
    words += [flag.format(small) for flag in flags]
    assert cli.main(["attention", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert message.format(small) in error
    assert error.startswith("dino-kit: error: ") and error.count("\n") == 1
    assert {path.relative_to(small) for path in small.rglob("*")} == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["attention", "--image_path", "x.png"], "A checkpoint is missing"),
        (["attention", "run"], "--image_path is missing."),
        (["attention", "run", "--image_path", "x.png", "more"], "'more' belongs to no flag"),
        (["attention", "run", "--image", "x.png"], "no flag --image; did you mean --image_path?"),
    ],
)
def test_a_command_line_that_lacks_something_says_what(capsys, flags, message):
    assert cli.main(flags) == 2
    assert message in capsys.readouterr().err


def test_images_that_are_all_broken_are_a_fault(small, capsys):
    for name in ("a.png", "b.png"):
        (small / "many").mkdir(exist_ok=True)
        (small / "many" / name).write_bytes(b"")
    assert command(small, "--image_path", small / "many", "--html") == 2
    *notices, error = capsys.readouterr().err.splitlines()
    assert len(notices) == 2 and all(line.startswith("notice: ") for line in notices)
    assert error == "dino-kit: error: None of the 2 images can be shown."
    assert below(small / "run") == {"checkpoint.pth"}


def test_a_size_that_no_image_can_have_is_one_sentence_for_a_folder_too(small, pictures, capsys):
    assert command(small, "--image_path", pictures, "--image_size", "2") == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("dino-kit: error: --image_size 2 makes the image 2 × 2 pixels")
    assert below(small / "run") == {"checkpoint.pth"}


def test_a_strip_of_too_many_patches_is_left_out_by_name(small, pictures, monkeypatch, capsys):
    monkeypatch.setattr(attention, "_MOST_PATCHES", 20)  # b.png, 9 × 50, has more
    assert command(small, "--image_path", pictures, "--image_size", "8", "--html") == 0
    assert "notice: b: 44 × 8 pixels are 22 patches of 4 × 4" in capsys.readouterr().err
    record = json.loads((small / "run/attention/attention.json").read_text("utf-8"))
    assert record["images"] == [name for name in FOLDERS if name != "b"]
    assert command(small, "--image_path", pictures / "b.png", "--image_size", "8") == 2
    assert "22 patches" in capsys.readouterr().err


def test_a_network_for_other_channels_sees_so_many(small, capsys):
    save_checkpoint(small / "run/checkpoint.pth", build(in_chans=1))
    assert command(small) == 2  # a file of before runs said by what they normalise
    error = capsys.readouterr().err
    assert "give --normalize MEAN STD" in error and error.count("\n") == 1
    assert below(small / "run") == {"checkpoint.pth"}
    assert command(small, "--normalize", "0.5", "0.25") == 0
    record = json.loads(next((small / "run").rglob("attention.json")).read_text("utf-8"))
    assert record["in_chans"] == 1 and record["mean"] == [0.5]
