"""Images of 1, 4 and 13 channels from end to end, and what of them the checkpoint carries."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tiny_run import TINY

import dino_kit
from dino_kit import cli, files, weights
from dino_kit.assemble import assemble
from dino_kit.backbones.build import create_backbone
from dino_kit.config import recipe
from dino_kit.config.train import TrainConfig
from dino_kit.data import statistics
from dino_kit.data.decode import decode
from dino_kit.data.pixels import Pixels
from dino_kit.data.sources.folder import FolderSource
from dino_kit.errors import UserError
from dino_kit.features import embed
from dino_kit.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from dino_kit.normalize import statistics as mean_and_std

FLAGS = [*TINY, *"--epochs 1 --warmup_epochs 0 --lr 0.05 --log_every_steps 1".split()]
HERE = ["--device", "cpu", "--num_workers", "0"]
IMAGES = 20


def stripes(number: int) -> np.ndarray:
    """(H, W) in [0, 1], of one of two kinds."""
    y, x = np.mgrid[:30, : 26 + number]
    return 0.5 + np.sin(x / (2 + number % 2 * 3)) / 4 + np.cos(y / 4) / 5


def write_gray(path: Path, number: int) -> None:
    """8 and 16 bits, pictures and arrays, mixed."""
    values = stripes(number)
    if number % 3 == 0:
        Image.fromarray((values * 65535).astype(np.uint16)).save(f"{path}.png")
    elif number % 3 == 1:
        Image.fromarray((values * 255).astype(np.uint8)).save(f"{path}.jpg", quality=95)
    else:
        np.save(f"{path}.npy", values.astype(np.float32))


def write_alpha(path: Path, number: int) -> None:
    values = np.stack([stripes(number) * share for share in (1.0, 0.8, 0.6, 0.9)], axis=2)
    Image.fromarray((values * 255).astype(np.uint8)).save(f"{path}.png")


def write_satellite(path: Path, number: int) -> None:
    """Bands of a TIFF's page, its pages, and arrays, mixed; white is 10000."""
    values = np.stack([stripes(number) * share for share in np.linspace(0.2, 1, 13)])  # (13, H, W)
    values = (values * 10000).astype(np.uint16)
    if number % 3 == 0:
        np.save(f"{path}.npy", values)
    elif number % 3 == 1:
        tifffile.imwrite(f"{path}.tif", values.transpose(1, 2, 0), photometric="minisblack",
                         planarconfig="contig", compression="zlib")  # fmt: skip
    else:
        tifffile.imwrite(f"{path}.tif", values, photometric="minisblack")


KINDS = {
    1: (write_gray, ()),
    4: (write_alpha, ()),
    13: (write_satellite, ("--value_range", "0", "10000")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("data")
    for channels, (write, _) in KINDS.items():
        for number in range(IMAGES):
            folder = root / str(channels) / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / str(number), number)
    return {channels: root / str(channels) for channels in KINDS}


def words(data, channels, out, *flags) -> list[str]:
    return ["train", "--data_path", str(data[channels]), "--output_dir", str(out), "--in_chans",
            str(channels), *KINDS[channels][1], *FLAGS, *map(str, flags)]  # fmt: skip


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("runs")
    for channels in KINDS:
        assert cli.main(words(data, channels, root / str(channels))) == 0
    return {channels: root / str(channels) for channels in KINDS}


def numbers(out) -> list[float]:
    return files.read_weights(Path(out) / "checkpoint.pth")["config"]["normalize"]


@pytest.mark.parametrize("channels", KINDS)
def test_channels_go_from_end_to_end(data, runs, channels, tmp_path, capsys):
    out = runs[channels]
    root, flags = str(data[channels]), HERE
    assert (out / "looks" / "epoch0001.png").is_file()
    assert cli.main(["knn", str(out), "--data_path", root, *flags]) == 0
    record = json.loads((out / "knn.json").read_text())
    half = len(numbers(out)) // 2
    assert half == channels
    assert record["transform"]["in_chans"] == channels and record["transform"]["exif"] == "ignore"
    assert record["transform"]["mean"] == numbers(out)[:half]
    assert record["transform"]["std"] == numbers(out)[half:]
    assert record["transform"]["value_range"] == ([0, 10000] if channels == 13 else None)

    assert (
        cli.main(["linear", str(out), "--data_path", root, "--epochs", "2", "--lr", "1", *flags])
        == 0
    )
    assert cli.main(["linear", str(out), "--evaluate", "--val_data", root, *flags]) == 0
    trained = json.loads((out / "linear.json").read_text())
    assert trained["results"]["last"]["top1"] is not None
    picture = next((data[channels] / "class0").iterdir())
    classifier = dino_kit.load_classifier(out)
    assert classifier.prepare(picture).shape == (channels, 16, 16)
    assert classifier.predict([picture])[0][0][0] in ("class0", "class1")

    assert cli.main(["attention", str(out), "--image_path", str(picture), "--html", "--output_dir",
                     str(tmp_path), "--device", "cpu"]) == 0  # fmt: skip
    sheet = Image.open(tmp_path / "img.png")
    assert sheet.mode == "RGB" and np.asarray(sheet).std() > 10
    assert "data:image" in (tmp_path / "attention.html").read_text()
    similarity = tmp_path / "similarity"
    assert cli.main(["attention", str(out), "--image_path", str(picture), "--maps", "similarity",
                     "--output_dir", str(similarity), "--device", "cpu"]) == 0  # fmt: skip
    assert (similarity / "overlay-similarity.png").is_file()
    assert (
        cli.main(["report", str(out), "--output", str(tmp_path / "report.html"), "--device", "cpu"])
        == 0
    )
    page = (tmp_path / "report.html").read_text()
    assert "in_chans" in page and "cannot" not in capsys.readouterr().err


@pytest.mark.parametrize("channels", KINDS)
def test_what_needs_rgb_is_left_out_with_one_notice(data, channels, tmp_path, capfd):
    flags = ("--num_workers", 1, "--epochs", 2)
    assert cli.main(words(data, channels, tmp_path, *flags)) == 0
    said = capfd.readouterr().err
    notice = f"--saturation, --hue, --gray_prob need RGB images, and are left out at --in_chans {channels}."
    assert said.count(notice) == said.count("RGB") == 1


def test_no_notice_where_nothing_is_left_out(data, tmp_path, capfd):
    none = [word for name in ("saturation", "hue", "gray_prob") for word in (f"--{name}", 0)]
    assert cli.main(words(data, 1, tmp_path, *none)) == 0
    assert "RGB" not in capfd.readouterr().err


def test_the_recipe_in_the_folder_repeats_the_run(runs, tmp_path):
    written = recipe.read(TrainConfig, str(runs[13] / "config.yaml"))
    assert written["normalize"] == tuple(numbers(runs[13])) and written["in_chans"] == 13
    again = ["train", str(runs[13] / "config.yaml"), "--output_dir", str(tmp_path)]
    assert cli.main(again) == 0
    one, other = (
        files.read_weights(out / "checkpoint.pth")["teacher"] for out in (runs[13], tmp_path)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("flags", [(), ("--normalize", "auto")])
def test_a_run_goes_on_by_what_it_has_measured(data, tmp_path, flags, monkeypatch):
    first = assemble(cli.parse("train", words(data, 1, tmp_path, "--epochs", 2)[1:]))
    first.save(0)
    before = numbers(tmp_path)
    monkeypatch.setattr("dino_kit.preparation.measure", lambda *_: pytest.fail("measured again"))
    run = assemble(cli.parse("train", words(data, 1, tmp_path, "--epochs", 2, *flags)[1:]))
    assert list(run.config.normalize) == before
    run.train()
    assert numbers(tmp_path) == before


def test_other_pixels_are_another_run(data, runs, capsys):
    for flags, said in {
        ("--normalize", "0.5", "0.25"): "normalize was",
        ("--exif", "apply"): "exif was ignore and is now apply",
        ("--value_range", "0", "1000"): "value_range was [0.0, 10000.0]",
        ("--vflip", "0.5"): "vflip was",
    }.items():
        assert cli.main(words(data, 13, runs[13], *flags)) == 2
        assert said in capsys.readouterr().err


def test_what_is_measured_is_the_mean_over_images_of_all_their_pixels(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.random((2, 5 + n, 9), np.float32) ** (n + 1) for n in range(4)]
    for n, array in enumerate(arrays):
        np.save(tmp_path / f"{n}.npy", array)
    mean, std, images = statistics.measure(FolderSource(tmp_path), Pixels(in_chans=2))
    assert images == 4
    means = np.mean([a.mean(axis=(1, 2), dtype=np.float64) for a in arrays], axis=0)
    squares = np.mean([(a.astype(np.float64) ** 2).mean(axis=(1, 2)) for a in arrays], axis=0)
    np.testing.assert_allclose(mean, means, rtol=1e-3)
    np.testing.assert_allclose(std, np.sqrt(squares - means**2), rtol=1e-3)
    assert all(value == float(f"{value:.4g}") for value in (*mean, *std))


def test_rgb_images_are_measured_too_from_a_sample_spread_evenly(tmp_path, monkeypatch):
    for n in range(10):
        Image.new("RGB", (4, 4), (n * 20, 100, 255 * (n % 2))).save(tmp_path / f"{n}.png")
    source = FolderSource(tmp_path)
    mean, std, _ = statistics.measure(source, Pixels())
    assert mean == pytest.approx([90 / 255, 100 / 255, 0.5], rel=1e-3)
    assert std == pytest.approx([np.std(np.arange(10) * 20) / 255, 0, 0.5], rel=1e-3, abs=1e-6)
    monkeypatch.setattr(statistics, "SAMPLE", 2)
    assert statistics.measure(source, Pixels())[0][0] == pytest.approx(50 / 255, rel=1e-3)


def test_a_channel_that_is_the_same_everywhere_is_only_centred(tmp_path, capsys):
    (data := tmp_path / "data").mkdir()
    for n in range(8):
        Image.new("RGBA", (20, 20), (30 * n, 255 - 20 * n, 5 * n, 255)).save(data / f"{n}.png")
    line = words({4: data}, 4, tmp_path / "out")
    run = assemble(cli.parse("train", line[1:]))
    assert run.config.normalize[3] == 1.0 and run.config.normalize[7] == 1.0
    assert "Channel 4 has the same value" in capsys.readouterr().err


def test_images_that_cannot_be_measured_are_left_out_and_named(tmp_path, capsys):
    (data := tmp_path / "data").mkdir()
    for n in range(8):
        np.save(data / f"{n}.npy", np.full((20, 20), n / 4, np.float32))
    line = words({1: data}, 1, tmp_path / "out")
    assert cli.main(line) == 2
    said = capsys.readouterr()
    assert "normalised as measured on 5 images" in said.out
    assert "npy holds floats from 1." in said.err and "Traceback" not in said.err
    assert "3 of the 8 images looked at so far cannot be used, and --max_bad_share" in said.err
    for n in range(5):
        (data / f"{n}.npy").unlink()
    assert cli.main([*line, "--total_batch_size", "2"]) == 2
    assert f"None of 3 images of {data} can be used" in (said := capsys.readouterr().err)
    assert f"{data}/7.npy holds floats from 1.75 to 1.75" in said and said.count("\n") == 1


# Mean and deviation


def test_numbers_stand_for_all_channels_or_for_each():
    assert mean_and_std(None, 3) == mean_and_std("imagenet", 3) == (IMAGENET_MEAN, IMAGENET_STD)
    assert mean_and_std((0.5, 0.25), 2) == ((0.5, 0.5), (0.25, 0.25))
    assert mean_and_std([0.1, 0.2, 0.3, 0.4], 2) == ((0.1, 0.2), (0.3, 0.4))
    assert mean_and_std([0.1, 0.2], 1) == ((0.1,), (0.2,))


def test_floats_are_pixels_from_0_to_1_and_stay_as_they_are_in_the_callers_hands():
    levels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    floats = levels / 255
    before = floats.clone()
    assert torch.equal(Normalize()(levels), Normalize()(floats))
    assert torch.equal(floats, before)
    assert torch.equal(Normalize((0.0,) * 3, (1.0,) * 3)(floats), floats)


# What the checkpoint says


def test_a_checkpoint_says_what_images_become(runs):
    loaded = weights.load(runs[13])
    assert loaded.transform.pixels == Pixels(13, "ignore", (0.0, 10000.0))
    assert [*loaded.transform.mean, *loaded.transform.std] == numbers(runs[13])
    assert loaded.architecture["in_chans"] == 13
    assert dino_kit.load_backbone(runs[1])(torch.zeros(2, 1, 16, 16)).shape == (2, 24)
    plain = loaded.transform.plain()
    assert weights.EvalTransform.from_plain(plain) == loaded.transform
    old = {name: plain[name] for name in ("image_size", "mean", "std")}  # before there were others
    assert weights.EvalTransform.from_plain(old).pixels == Pixels()


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--in_chans", "3"), "--in_chans 3 contradicts .* in_chans 13"),
        (("--exif", "apply"), "--exif apply contradicts .* says exif ignore"),
        (("--value_range", "0", "1"), "--value_range 0 1 contradicts .* value_range 0 10000"),
        (("--normalize", "0.5", "0.25"), "--normalize 0.5 0.25 contradicts .* says normalize 0"),
        (("--normalize", "imagenet"), "--normalize imagenet is for 3 channels, and there are 13"),
        (
            ("--normalize", "1", "2", "3"),
            "of 13 channels takes 2 numbers, a mean and a deviation, or 26",
        ),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(data, runs, capsys, flags, said):
    assert cli.main(["knn", str(runs[13]), "--data_path", str(data[13]), *flags]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_what_a_run_did_not_set_is_said_too(data, runs, capsys):
    line = ["knn", str(runs[1]), "--data_path", str(data[1])]
    assert cli.main([*line, "--value_range", "0", "4095"]) == 2
    said = capsys.readouterr().err
    assert "--value_range 0 4095 contradicts" in said and "says value_range none" in said


def test_a_run_of_before_takes_what_is_said(runs, tmp_path):
    """Its config has no word on pixels."""
    content = files.read_weights(runs[1] / "checkpoint.pth")
    for name in ("exif", "value_range", "normalize", "in_chans"):
        del content["config"][name]
    torch.save(content, tmp_path / "checkpoint.pth")
    found = weights.load(
        tmp_path, exif="apply", value_range=(0, 4095), normalize=(0.5, 0.25)
    ).transform
    assert found.pixels == Pixels(1, "apply", (0, 4095)) and found.mean == (0.5,)
    assert weights.load(tmp_path).transform.mean is None
    with pytest.raises(UserError, match="give --normalize MEAN STD"):
        Normalize(*weights.load(tmp_path).transform[1:3])


def test_a_linear_layer_of_before_goes_on(data, tmp_path, capsys):
    """Its file has no word on pixels either, which were RGB."""
    out, flags = str(tmp_path), HERE
    assert cli.main(words(data, 4, out, "--in_chans", 3, "--probe_freq", 0)) == 0
    line = ["linear", out, "--data_path", str(data[4]), "--epochs", "1", *flags]
    assert cli.main(line) == 0
    head = tmp_path / "checkpoint_linear.pth"
    content = files.read_weights(head)
    assert content["transform"]["in_chans"] == 3
    for name in ("in_chans", "exif", "value_range"):
        del content["transform"][name]
    torch.save(content, head)
    capsys.readouterr()
    assert cli.main(line) == 0
    assert "holds this training already" in capsys.readouterr().out
    assert dino_kit.load_classifier(tmp_path).transform.pixels == Pixels()


def test_flags_that_agree_are_welcome(data, runs):
    normalize = [str(number) for number in numbers(runs[13])]
    flags = [*"--in_chans 13 --exif ignore --value_range 0 10000 --normalize".split(), *normalize]
    line = ["knn", str(runs[13]), "--data_path", str(data[13]), *HERE]
    assert cli.main([*line, *flags]) == 0


def test_bare_weights_of_other_channels_need_mean_and_deviation(data, runs, tmp_path, capsys):
    backbone = dino_kit.load_backbone(runs[1])
    torch.save(backbone.state_dict(), tmp_path / "bare.pth")
    line = ["knn", str(tmp_path / "bare.pth"), "--data_path", str(data[1]), "--num_heads", "2", *HERE]
    assert dino_kit.load_backbone(tmp_path / "bare.pth", num_heads=2).in_chans == 1
    assert cli.main(line) == 2
    assert "give --normalize MEAN STD" in capsys.readouterr().err
    assert cli.main([*line, "--normalize", *map(str, numbers(runs[1]))]) == 0
    found = json.loads((tmp_path / "knn_bare.json").read_text())
    assert cli.main(["knn", str(runs[1]), *line[2:4], *line[6:]]) == 0
    linear = ["linear", *line[1:], "--normalize", *map(str, numbers(runs[1])), "--epochs", "1"]
    assert cli.main(linear) == 0
    picture = next((data[1] / "class0").iterdir())
    classifier = dino_kit.load_classifier(tmp_path / "checkpoint_linear_bare.pth")
    assert classifier.transform.mean == (numbers(runs[1])[0],) and classifier.predict([picture])
    assert found["results"] == json.loads((runs[1] / "knn.json").read_text())["results"]


def test_a_turned_picture_has_the_features_of_the_upright_one_where_exif_applies(tmp_path):
    upright = Image.fromarray((stripes(8) * 255).astype(np.uint8)).convert("RGB")
    upright.save(tmp_path / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "1.png", exif=exif)
    backbone = create_backbone(
        "vit", patch_size=4, image_size=16, embed_dim=24, depth=1, num_heads=2
    )
    source = FolderSource(tmp_path)
    first, second = embed(
        backbone, source, image_size=16, pixels=Pixels(exif="apply"), description=""
    ).features
    torch.testing.assert_close(first, second)
    first, second = embed(backbone, source, image_size=16, description="").features
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing_of_the_crops(data, tmp_path, workers):
    flags = ("--vflip", 0.5, "--rotate90", 0.75, "--num_workers", workers)
    run = assemble(cli.parse("train", words(data, 13, tmp_path, *flags)[1:]))
    [batch], *_ = run.loader
    assert batch.groups[0].shape == (2, 8, 13, 16, 16) and batch.groups[0].dtype == torch.float32
    assert 0 <= batch.groups[0].min() < batch.groups[0].max() <= 1
    alone = assemble(cli.parse("train", words(data, 13, tmp_path, *flags, "--num_workers", 0)[1:]))
    [expected], *_ = alone.loader
    assert all(
        torch.equal(one, other) for one, other in zip(batch.groups, expected.groups, strict=True)
    )


def test_crops_that_are_not_resized_name_the_image_that_is_too_small(data, tmp_path, capsys):
    flags = ("--crop_without_resize", "true", "--normalize", 0.5, 0.25)
    assert cli.main(words(data, 4, tmp_path / "fits", *flags, "--probe_freq", 0)) == 0
    (small := tmp_path / "small").mkdir()
    Image.new("RGBA", (15, 40)).save(small / "small.png")
    line = words(
        {4: small}, 4, tmp_path / "out", *flags, "--total_batch_size", 1, "--probe_freq", 0
    )
    assert cli.main(line) == 2
    said = capsys.readouterr().err
    assert "small.png is of 15 × 40 pixels, too few for a crop of 16 × 16" in said


def test_one_ratio_for_all_crops(data, tmp_path):
    config = cli.parse("train", words(data, 4, tmp_path, "--crop_ratio", 1, 1)[1:])
    views = [view for group in dino_kit.assemble.view_groups(config) for view in group]
    assert {view.ratio for view in views} == {(1.0, 1.0)}


def test_a_recipe_of_other_channels_can_be_run(data, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    line = ["recipe", str(data[13]), "--in_chans", "13", "--value_range", "0", "10000", "--hours", "0.02",
            "--device", "cpu", "--output", str(out)]  # fmt: skip
    assert cli.main(line) == 0
    values = recipe.read(TrainConfig, str(out))
    assert values["in_chans"] == 13 and values["value_range"] == (0.0, 10000.0)
    assert values["saturation"] == values["hue"] == values["gray_prob"] == (0.0,) * 3
    text = " ".join(out.read_text().replace("\n#", "").split())
    assert "13 channels" in text and "--value_range 0.0 10000.0" in text
    config = cli.parse("train", [str(out), "--output_dir", str(tmp_path / "out")])
    assert config.in_chans == 13


def test_a_recipe_says_which_channels_would_fit(data, capsys):
    assert cli.main(["recipe", str(data[13]), "--hours", "0.02", "--device", "cpu"]) == 2
    assert "--in_chans 13 fits" in capsys.readouterr().err


def test_a_view_of_eight_bits_is_what_it_was(data):
    """RGB images go the way they went: 8 bits through every step."""
    name = str(next((data[4] / "class0").glob("*.png")))
    image = decode(Path(name).read_bytes(), name)
    assert isinstance(image, Image.Image) and image.mode == "RGB"


def test_channels_have_to_be_said(data, tmp_path, capsys):
    line = ["train", "--data_path", str(data[13]), "--output_dir", str(tmp_path), *FLAGS]
    assert cli.main(line) == 2
    assert "--in_chans 13 fits" in capsys.readouterr().err
    with pytest.raises(UserError, match="--in_chans is '0'"):
        cli.parse("train", [*line[1:], "--in_chans", "0"])


@pytest.mark.slow
def test_two_processes_measure_the_same(data, runs, tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "launch/train.py", *words(data, 13, tmp_path / "two")[1:]]  # fmt: skip
    root = Path(__file__).parent.parent
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("normalised as measured") == 1 and done.stderr.count("RGB") == 1
    assert numbers(tmp_path / "two") == numbers(runs[13])
    one, other = (
        files.read_weights(out / "checkpoint.pth")["teacher"]
        for out in (runs[13], tmp_path / "two")
    )
    # The bias of the keys has no gradient, and AdamW magnifies the rounding.
    for name, tensor in ((n, t) for n, t in one.items() if not n.endswith("attn.qkv.bias")):
        assert (tensor - other[name]).norm() <= 1e-4 * tensor.norm() + 1e-9, name
