"""A network that learnt from crops without resizing is never shown a resized image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TINY

import dino_kit
from dino_kit import cli, files, reporting, weights
from dino_kit.data.augment import center_view, eval_sizes
from dino_kit.data.bands import Bands
from dino_kit.data.loader import Loader
from dino_kit.data.sources.folder import FolderSource
from dino_kit.errors import BadImage
from dino_kit.evaluators import attention, linear
from dino_kit.evaluators.probe import Probe
from dino_kit.features import embed, extract
from dino_kit.preparation import view_groups
from dino_kit.weights import EvalTransform

S = 16  # pixels of a side of the global crops
FLAGS = [
    *TINY,
    *"--epochs 1 --warmup_epochs 0 --log_every_steps 1 --crop_without_resize true".split(),
]
WHERE = ["--device", "cpu", "--num_workers", "0"]


def middle(pixels: np.ndarray, height: int = S, width: int = S) -> np.ndarray:
    """Cut by hand: even margins, of which an odd one is rounded to the even number."""
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images of many shapes in ``whole``, and their centres in ``cut``."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for number in range(20):
        shape = (S + number, 40 - number, 3)
        pixels = rng.integers(100 * (number % 2), 156 + 100 * (number % 2), shape).astype(np.uint8)
        for name, seen in (("whole", pixels), ("cut", middle(pixels))):
            path = root / name / f"class{number % 2}" / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(seen).save(path)
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    line = ["train", "--data_path", str(data / "whole"), "--output_dir", str(out), *FLAGS]
    assert cli.main([*line, "--probe_data", str(data / "whole")]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def command(name: str, run: Path, *flags) -> int:
    return cli.main([name, str(run), *map(str, flags)])


def array(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# The view


@pytest.mark.parametrize("height, width", [(S, S), (S + 1, 40), (39, S + 3)])
@pytest.mark.parametrize("bands", [False, True])
def test_the_centre_is_cut_out_of_the_image_as_it_is(height, width, bands):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if bands:
        pixels = pixels.astype(np.float32) / 255
        image = Bands(pixels.transpose(2, 0, 1))
    assert eval_sizes(S, crop_without_resize=True) == (None, S)
    np.testing.assert_array_equal(center_view(image, None, S), middle(pixels))


def test_an_image_that_is_smaller_is_named_with_the_sizes():
    with pytest.raises(BadImage) as caught:
        center_view(Image.new("RGB", (15, 40)), None, S, "a/b.png")
    assert str(caught.value) == (
        "a/b.png is of 15 × 40 pixels, too few for a crop of 16 × 16 that is not resized; leave the "
        "image out, ask for smaller crops, or train without --crop_without_resize."
    )


# What the checkpoint says


def test_the_checkpoint_says_it_and_one_of_before_says_that_images_are_resized(run):
    found = weights.load(run).transform
    assert found.crop_without_resize and found.sizes == (None, S)
    assert EvalTransform.from_plain(found.plain()) == found
    plain = found.plain()
    del plain["crop_without_resize"]
    content = files.read_weights(run / "checkpoint.pth")
    del content["config"]["crop_without_resize"]
    torch.save(content, run / "checkpoint.pth")
    for old in (EvalTransform.from_plain(plain), weights.load(run).transform):
        assert not old.crop_without_resize and old.sizes == (S, S)


# What the network sees


def test_features_are_those_of_the_centres(data, trained):
    loaded = weights.load(trained)
    whole, cut = (FolderSource(data / name) for name in ("whole", "cut"))
    usual = EvalTransform(S, pixels=loaded.transform.pixels)
    expected = extract(loaded.backbone, cut, **usual._asdict(), description="").features
    found = extract(loaded.backbone, whole, **loaded.transform._asdict(), description="")
    assert torch.equal(found.features, expected) and not found.left_out
    resized = embed(loaded.backbone, whole, **usual._asdict(), description="").features
    assert not torch.allclose(resized, expected, atol=1e-3)


def test_knn_sees_the_centres_and_writes_it_down(data, run, tmp_path):
    for name in ("whole", "cut"):
        flags = ["--data_path", data / name, "--dump_features", tmp_path / name, "--nb_knn", 3]
        assert command("knn", run, *flags, "--output_dir", tmp_path / name, *WHERE) == 0
    for name in ("trainfeat.pth", "testfeat.pth"):
        one, other = (torch.load(tmp_path / part / name) for part in ("whole", "cut"))
        assert torch.equal(one, other)
    record = json.loads((tmp_path / "whole/knn.json").read_text())["transform"]
    assert record["crop_without_resize"] is True and record["center_crop"] == S
    assert record["resize"] is record["interpolation"] is None


def test_another_size_is_another_centre(data, run, tmp_path, capsys):
    where = ["--data_path", data / "whole", *WHERE, "--image_size"]
    assert command("knn", run, *where, 12, "--dump_features", tmp_path) == 0
    bank = torch.load(tmp_path / "trainfeat.pth")
    loaded = weights.load(run)
    smaller = loaded.transform._replace(image_size=12)
    every = embed(loaded.backbone, FolderSource(data / "whole"), **smaller._asdict(), description="")
    every = torch.nn.functional.normalize(every.features, dim=1)
    assert (bank[:, None] == every[None]).all(dim=2).any(dim=1).all()
    assert command("knn", run, *where, 44) == 2  # which none has room for
    said = capsys.readouterr().err
    assert "None of the " in said and "pixels, too few for a crop of 44 × 44" in said


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_evaluation_names_an_image_that_is_too_small(data, run, tmp_path, workers, capsys):
    shutil.copytree(data / "whole", tmp_path / "data")
    Image.new("RGB", (40, S - 1)).save(tmp_path / "data/class1/small.png")
    flags = ["--data_path", tmp_path / "data", "--device", "cpu", "--num_workers", workers]
    assert command("knn", run, *flags) == 0
    said = capsys.readouterr().err
    assert "1 of " in said and "cannot be used and is left out." in said
    assert "small.png is of 40 × 15 pixels, too few for a crop of 16 × 16" in said


def test_a_linear_layer_learns_from_crops_that_are_not_resized(data):
    source, size = FolderSource(data / "whole"), 8
    options = {"seed": 0, "epochs": 1, "total_batch_size": 20, "batch_size_per_gpu": 20}
    view = linear.training_view(size, crop_without_resize=True)
    [[batch]] = Loader(source, [[view]], **options)
    for crop, index in zip(batch.groups[0][0], batch.indices.tolist(), strict=True):
        pixels = array(Path(source.name(index)))
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (size, size), axis=(0, 1))
        seen = crop.numpy()  # (3, S, S)
        found = [(windows == one).all(axis=(2, 3, 4)).any() for one in (seen, seen[..., ::-1])]
        assert any(found)


def test_linear_sees_the_centres_and_keeps_it_with_the_layer(data, run):
    flags = ["--epochs", 1, "--lr", 1, *WHERE]
    assert command("linear", run, "--data_path", data / "whole", *flags) == 0
    record = json.loads((run / "linear.json").read_text())
    assert record["transform"]["resize"] is None
    results = []
    for name in ("whole", "cut"):
        assert command("linear", run, "--evaluate", "--val_data", data / name, *WHERE) == 0
        results.append(json.loads((run / "linear_evaluate.json").read_text())["results"])
    assert results[0] == results[1]
    classifier = dino_kit.load_classifier(run)
    one, other = (classifier.prepare(data / name / "class1/07.png") for name in ("whole", "cut"))
    assert torch.equal(one, other)
    Image.new("RGB", (3, 40)).save(run / "small.png")
    with pytest.raises(BadImage, match="small.png is of 3 × 40 pixels"):
        classifier.prepare(run / "small.png")


def test_the_probe_sees_the_centres(data, trained, tmp_path):
    loaded = weights.load(trained)
    views = view_groups(cli.parse("train", ["--data_path", "x", "--output_dir", "y", *FLAGS]))[0]
    results = []
    for name in ("whole", "cut"):
        source = FolderSource(data / name)
        probe = Probe(source, (source, source), views=views, seed=0, transform=loaded.transform,
                      folder=tmp_path / name, device=torch.device("cpu"))  # fmt: skip
        results.append(probe(loaded.backbone, 1))
        expected = array(data / "cut/class0/02.png")
        np.testing.assert_array_equal(probe._view(probe.images, 1), expected)
    for key in ("effective_rank", "knn_top1"):
        assert results[0][key] == results[1][key]
    probed = json.loads((trained / "probe.jsonl").read_text().splitlines()[-1])
    assert probed["effective_rank"] == pytest.approx(results[0]["effective_rank"])


@pytest.mark.parametrize(
    "flags, size", [([], (S, S)), (["8"], (8, 8)), (["9", "14"], (8, 12)), (["24"], (24, 24))]
)
@pytest.mark.parametrize("maps", [[], ["--maps", "similarity"]])
def test_attention_is_that_of_the_centre(data, run, tmp_path, flags, size, maps):
    picture = data / "whole/class1/09.png"  # 25 × 31
    flags = ["--image_size", *flags] if flags else []
    where = ["--image_path", picture, "--device", "cpu", "--output_dir", tmp_path / "out"]
    assert command("attention", run, *where, *flags, *maps) == 0
    np.testing.assert_array_equal(array(tmp_path / "out/img.png"), middle(array(picture), *size))
    record = json.loads((tmp_path / "out/attention.json").read_text())
    assert record["interpolation"] is None and record["crop_without_resize"] is True


def test_attention_leaves_out_what_is_too_small_by_name(data, run, capsys):
    where = ["--image_path", data / "whole", "--device", "cpu", "--image_size", "26"]
    assert command("attention", run, *where) == 0
    assert "notice: class1/07: it is of 33 × 23 pixels, too few for a crop of 24 × 24" in (
        capsys.readouterr().err
    )
    where[1] = data / "whole/class1/07.png"
    assert command("attention", run, *where) == 2
    assert "07.png: it is of 33 × 23 pixels" in capsys.readouterr().err


def test_a_page_of_fewer_patches_shows_less_and_nothing_smaller(data, run, monkeypatch):
    monkeypatch.setattr("dino_kit.attention_page.patches_for", lambda images, heads: (4, 2))
    seen = []
    to_tensor = attention.to_tensor
    monkeypatch.setattr(attention, "to_tensor", lambda x, *y: seen.append(x) or to_tensor(x, *y))
    picture = data / "whole/class1/09.png"
    assert command("attention", run, "--image_path", picture, "--html", "--device", "cpu") == 0
    for image, side in zip(seen, (S, 8), strict=True):
        np.testing.assert_array_equal(image, middle(array(picture), side, side))


def test_the_report_looks_at_the_centres(data, run, monkeypatch):
    seen = []
    to_tensor = attention.to_tensor
    monkeypatch.setattr(attention, "to_tensor", lambda x, *y: seen.append(x) or to_tensor(x, *y))
    loaded, source = weights.load(run), FolderSource(data / "whole")
    shown, note = reporting._attention(loaded, reporting._Data(source), torch.device("cpu"))
    assert len(seen) == len(shown) == 8 and "in 4 × 4 patches" in note
    centres = [array(path) for path in sorted((data / "cut").rglob("*.png"))]
    assert all(any(np.array_equal(image, centre) for centre in centres) for image in seen)
