"""Patches besides attention: similarity to the pooled feature, rollout and token mixing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_attention_command import WRITTEN, below, save_image
from torch import nn

from dino_kit import cli
from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.interface import Features
from dino_kit.backbones.maps import available
from dino_kit.errors import UserError
from dino_kit.evaluators.attention import fit, to_tensor
from dino_kit.evaluators.gallery import Picture
from dino_kit.evaluators.patches import look, mixing_rows, show, similarity_map, spread
from dino_kit.evaluators.rollout import rollout_map
from dino_kit.figures import colour_table, heat, overlay
from dino_kit.patch_figures import (
    SIGNED_COLOURS,
    mixing,
    rollout,
    save_patches,
    signed,
    similarity,
)

SIZES = {"patch_size": 4, "image_size": 16, "embed_dim": 24, "depth": 2}
COLOURS = colour_table(SIGNED_COLOURS)


def build(name: str, **options):
    heads = {"num_heads": 2} if name == "vit" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = create_backbone(name, **{**SIZES, **heads, **options})
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone.eval()


def picture(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(rows))


# What there is to see


def test_every_network_has_a_similarity_and_says_what_else():
    assert available(build("vit")) == ("attention", "rollout", "similarity")
    deepvit = build("deepvit", num_heads=2)
    assert available(deepvit) == ("reattention", "similarity")
    assert available(build("resmlp")) == ("mixing", "similarity")
    assert available(nn.Identity()) == ("similarity",)


@pytest.mark.parametrize("name", ["vit", "resmlp"])
@pytest.mark.parametrize("rows, columns", [(16, 16), (8, 24)])
def test_similarity_is_the_cosine_of_patch_and_pooled_feature(name, rows, columns):
    backbone, image = build(name), picture(rows, columns)
    with torch.no_grad():
        features = backbone.forward_features(image[None])
    patches, pooled = features.patches[0].numpy(), features.pooled[0].numpy()
    expected = patches @ pooled / np.linalg.norm(patches, axis=1) / np.linalg.norm(pooled)
    found = similarity_map(look(backbone, image))
    assert found.shape == (rows // 4, columns // 4) and found.dtype == torch.float32
    assert found.abs().max() <= 1 + 1e-6 and found.std() > 0.01
    np.testing.assert_allclose(found.flatten(), expected, atol=1e-5)


def test_patches_that_are_the_pooled_feature_are_like_it_and_their_opposites_are_not():
    pooled = torch.tensor([[3.0, 4.0]])
    patches = torch.tensor([[[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0], [0.0, 0.0]]])
    found = similarity_map(Features(pooled, patches, (2, 2)))
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (9, 7), (1, 1), (1, 20)])
def test_rows_of_the_mixing_are_those_of_the_network(grid):
    backbone = build("resmlp")
    places, rows = mixing_rows(backbone, grid)
    matrix = backbone.get_last_mixing(grid).detach()
    assert places == spread(grid) and rows.shape == (len(places), *grid)
    for (row, column), values in zip(places, rows, strict=True):
        assert torch.equal(values.flatten(), matrix[row * grid[1] + column])
    assert grid == (1, 1) or rows.min() < 0 < rows.max()
    assert not rows.requires_grad


@pytest.mark.parametrize(
    "grid, rows, columns",
    [((14, 14), [2, 7, 11], [2, 7, 11]), ((3, 3), [0, 1, 2], [0, 1, 2]), ((1, 2), [0], [0, 1]),
     ((9, 1), [1, 4, 7], [0])],
)  # fmt: skip
def test_patches_are_spread_over_the_grid(grid, rows, columns):
    assert spread(grid) == [(row, column) for row in rows for column in columns]


def test_a_network_that_mixes_otherwise_is_refused():
    with pytest.raises(UserError, match="^VisionTransformer mixes its tokens by no matrix"):
        mixing_rows(build("vit"), (4, 4))


def test_too_many_patches_are_refused(monkeypatch):
    monkeypatch.setattr("dino_kit.evaluators.attention._MOST_PATCHES", 11)
    with pytest.raises(UserError, match="12 patches of 4 × 4, and maps are shown of 11 at most"):
        look(build("resmlp"), picture(12, 16))


def test_a_network_looks_in_eval_mode_and_is_left_in_its_own():
    backbone = build("resmlp").train()
    features = look(backbone, picture(8, 8))
    assert backbone.training and features.pooled.is_inference()


# Pictures


def test_signed_colours_have_white_in_the_middle_and_ends_of_equal_depth():
    assert COLOURS[128].min() > 240
    (red_low, _, blue_low), (red_high, _, blue_high) = COLOURS[1].astype(int), COLOURS[255]
    assert blue_low > 2 * red_low and red_high > 2 * blue_high


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_a_signed_map_has_zero_in_the_middle_whatever_its_range(scale):
    values = scale * np.array([[0.0, 0.5], [-0.25, 2.0]], "f4")
    drawn = np.asarray(signed(values, (40, 60), COLOURS))
    assert drawn.shape == (40, 60, 3)
    for row, column, level in [(0, 0, 128), (0, 1, 160), (1, 0, 112), (1, 1, 255)]:
        inside = drawn[20 * row + 2 : 20 * row + 18, 30 * column + 2 : 30 * column + 28]
        assert (inside == COLOURS[level]).all(), (row, column)
    opposite = np.asarray(signed(-values, (40, 60), COLOURS))
    assert np.array_equal(opposite[22:38, 32:58], np.broadcast_to(COLOURS[1], (16, 26, 3)))
    blank = np.asarray(signed(0 * values, (40, 60), COLOURS))
    assert (blank[1:-1, 1:-1] == COLOURS[128]).all()


def test_the_patch_of_a_row_is_outlined_and_its_colour_stays_to_be_seen():
    values = np.ones((3, 4), "f4")
    plain = np.asarray(signed(values, (60, 80), COLOURS))
    drawn = np.asarray(signed(values, (60, 80), COLOURS, (1, 2)))
    changed = np.argwhere((plain != drawn).any(axis=-1))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    assert (top, left, bottom, right) == (18, 38, 41, 61)
    assert np.array_equal(plain[20:40, 40:60], drawn[20:40, 40:60])


@pytest.mark.parametrize("at", [(0, 0), (0, 3), (2, 0), (2, 3), (1, 0)])
def test_at_an_edge_the_outline_is_whole_too(at):
    drawn = np.asarray(signed(np.ones((3, 4), "f4"), (60, 80), COLOURS, at)).astype(int)
    black = np.argwhere(drawn.max(axis=-1) < 30)
    top, left = 20 * at[0], 20 * at[1]
    assert black[:, 0].min() == max(0, top - 1) and black[:, 0].max() == min(59, top + 20)
    assert black[:, 1].min() == max(0, left - 1) and black[:, 1].max() == min(79, left + 20)


def photo(rows: int, columns: int) -> Image.Image:
    rng = np.random.default_rng(rows)
    return Image.fromarray(rng.integers(0, 256, (rows, columns, 3)).astype(np.uint8))


def test_every_picture_and_the_numbers_are_written(tmp_path):
    rng, image, places = np.random.default_rng(0), photo(24, 40), [(0, 1), (2, 4)]
    cosines = rng.uniform(-1, 1, (3, 5)).astype("f4")
    rows = rng.normal(0, 1, (2, 3, 5)).astype("f4")
    parts = [similarity(image, cosines), mixing(image, places, rows)]
    paths = save_patches(tmp_path / "new", image, parts, title="picture", facts={"epoch": 7})
    names = ["mixing-row1-column2.png", "mixing-row3-column5.png"]
    assert [path.name for path in paths] == [
        "sheet.png", "img.png", "similarity.png", "overlay-similarity.png", *names, "patches.npz",
    ]  # fmt: skip
    assert set(paths) == set((tmp_path / "new").iterdir())

    def read(name: str) -> np.ndarray:
        with Image.open(tmp_path / "new" / name) as one:
            assert one.format == "PNG" and one.mode == "RGB"
            return np.asarray(one)

    inferno = colour_table()
    assert np.array_equal(read("img.png"), image)
    assert np.array_equal(read("similarity.png"), heat(cosines, (24, 40), inferno))
    assert np.array_equal(read("overlay-similarity.png"), overlay(image, cosines, inferno))
    for name, place, row in zip(names, places, rows, strict=True):
        assert np.array_equal(read(name), signed(row, (24, 40), COLOURS, place))
    with np.load(paths[-1]) as arrays:
        assert set(arrays.files) == {"similarity", "mixing", "mixing_patches", "epoch"}
        assert np.array_equal(arrays["similarity"], cosines)
        assert np.array_equal(arrays["mixing"], rows)
        assert arrays["mixing_patches"].tolist() == [[0, 1], [2, 4]]


@pytest.mark.parametrize("grid", [(14, 14), (1, 1), (1, 60), (60, 1), (2, 9)])
@pytest.mark.parametrize("kinds", [("mixing",), ("similarity",), ("mixing", "similarity")])
def test_a_sheet_has_the_rows_as_their_patches_lie_and_every_map(tmp_path, grid, kinds):
    rng, places = np.random.default_rng(0), spread(grid)
    rows = rng.normal(0, 1, (len(places), *grid)).astype("f4")
    cosines, image = rng.uniform(-1, 1, grid).astype("f4"), photo(grid[0] * 4, grid[1] * 4)
    parts = {"similarity": similarity(image, cosines), "mixing": mixing(image, places, rows)}
    shown = [part for kind, part in parts.items() if kind in kinds]
    paths = save_patches(tmp_path, image, shown, title="picture")
    with Image.open(paths[0]) as one:
        pixels = np.asarray(one)
    patch = max(1, round(232 / max(grid)))
    size, corners = (grid[0] * patch, grid[1] * patch), []
    panels = []
    if "mixing" in kinds:
        panels = [signed(row, size, COLOURS, at) for at, row in zip(places, rows, strict=True)]
    if "similarity" in kinds:
        panels.append(heat(cosines, size, colour_table()))
    for panel in map(np.asarray, panels):
        found = np.argwhere((pixels == panel[0, 0]).all(axis=-1))
        corner = next(
            (y, x) for y, x in found
            if np.array_equal(pixels[y : y + size[0], x : x + size[1]], panel)
        )  # fmt: skip
        corners.append(corner)
    if kinds == ("mixing",):
        order = np.lexsort(np.array(corners).T[::-1])
        assert order.tolist() == sorted(order)
        assert len({x for _, x in corners}) == len({column for _, column in places})


# The command


@pytest.fixture
def small(tmp_path):
    """A run's checkpoint of a ResMLP, and a picture of 30 × 20 pixels."""
    save(tmp_path, "resmlp")
    save_image(tmp_path / "photo.png", 30, 20)
    return tmp_path


def save(folder: Path, name: str, **options) -> None:
    state = build(name, **options).state_dict()
    config = {"arch": name, "global_crops_size": options.get("image_size", 16), **options}
    if name == "vit":
        config["num_heads"] = 2
    (folder / "run").mkdir(exist_ok=True)
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    torch.save({"teacher": teacher, "config": config}, folder / "run/checkpoint.pth")


def command(small, *flags) -> int:
    words = ["attention", small / "run", "--image_path", small / "photo.png", *flags]
    return cli.main([str(word) for word in words])


SIMILARITY = {"similarity.png", "overlay-similarity.png"}
MIXING = {f"mixing-row{row}-column{column}.png" for row in (1, 3, 4) for column in (1, 3, 4)}
ALWAYS = {"sheet.png", "img.png", "patches.npz", "attention.json"}


@pytest.mark.parametrize(
    "flags, kinds, files",
    [([], ["mixing", "similarity"], MIXING | SIMILARITY), (["--maps", "mixing"], ["mixing"], MIXING),
     (["--maps", "similarity"], ["similarity"], SIMILARITY)],
)  # fmt: skip
def test_a_resmlp_is_shown_by_what_it_has(small, capsys, flags, kinds, files):
    assert command(small, *flags) == 0
    folder = small / "run/attention/photo"
    assert below(folder) == ALWAYS | files
    record = json.loads((folder / "attention.json").read_text("utf-8"))
    assert record["maps"] == kinds and record["image_size"] == [16, 16]
    shown = capsys.readouterr()
    assert f"written to {folder}; look first at sheet.png" in shown.out
    assert shown.err == "" if flags else shown.err == (
        "notice: ResMLP has no self-attention, so there are no attention maps; shown instead: rows "
        "of its last token mixing and the similarity of each patch to the pooled feature.\n"
    )
    with np.load(folder / "patches.npz") as arrays:
        found = dict(arrays)
    with Image.open(small / "photo.png") as image:
        seen = to_tensor(fit(image, (16, 16), 4))
    backbone = build("resmlp")
    if "similarity" in kinds:
        assert np.array_equal(found["similarity"], similarity_map(look(backbone, seen)))
    if "mixing" in kinds:
        assert np.array_equal(found["mixing"], mixing_rows(backbone, (4, 4)).rows)


def test_a_vit_has_a_similarity_too(small):
    save(small, "vit")
    assert command(small, "--maps", "similarity") == 0
    assert below(small / "run/attention/photo") == ALWAYS | SIMILARITY
    assert command(small, "--maps", "attention", "--output_dir", small / "out") == 0
    assert below(small / "out") == {*WRITTEN, "attention.json"}


def test_a_vit_s_rollout_is_shown_as_one_map(small):
    save(small, "vit")
    assert command(small, "--maps", "rollout") == 0
    folder = small / "run/attention/photo"
    assert below(folder) == ALWAYS | {"rollout.png", "overlay-rollout.png"}
    record = json.loads((folder / "attention.json").read_text("utf-8"))
    assert record["maps"] == ["rollout"] and record["block"] is None
    with Image.open(small / "photo.png") as image:
        sight = fit(image, (16, 16), 4)
    expected = rollout_map(build("vit"), to_tensor(sight)).numpy()
    with np.load(folder / "patches.npz") as arrays:
        assert arrays.files == ["rollout"] and np.array_equal(arrays["rollout"], expected)
    with Image.open(folder / "sheet.png") as one, Image.open(folder / "rollout.png") as raw:
        assert np.array_equal(raw, heat(expected, (16, 16), colour_table()))
        drawn = np.asarray(one)
    panel = np.asarray(heat(expected, (232, 232), colour_table()))
    rows, columns = np.nonzero((drawn[:-231, :-231] == panel[0, 0]).all(axis=-1))
    assert any(
        np.array_equal(drawn[row : row + 232, column : column + 232], panel)
        for row, column in zip(rows, columns, strict=True)
    )


def test_a_resmlp_is_looked_at_in_the_size_that_its_mixing_is_made_for(small):
    save(small, "resmlp", image_size=112)
    assert command(small, "--output_dir", small / "out") == 0
    with np.load(small / "out/patches.npz") as arrays:
        assert arrays["similarity"].shape == (28, 28)
    assert command(small, "--output_dir", small / "out", "--image_size", "8", "20") == 0
    with np.load(small / "out/patches.npz") as arrays:
        assert arrays["similarity"].shape == (2, 5)
        assert arrays["mixing"].shape == (6, 2, 5)


def test_of_resized_images_the_maps_are_on_the_native_grid(small):
    save(small, "resmlp", mlp_grid="resize")
    assert command(small, "--output_dir", small / "out", "--image_size", "8", "20") == 0
    with np.load(small / "out/patches.npz") as arrays:
        assert arrays["similarity"].shape == (4, 4) and arrays["mixing"].shape == (9, 4, 4)
    with Image.open(small / "out/similarity.png") as image:
        assert image.size == (20, 8)


def test_a_folder_of_images_leaves_out_what_cannot_be_shown(small, capsys, monkeypatch):
    monkeypatch.setattr("dino_kit.evaluators.attention._MOST_PATCHES", 20)
    for name, width, height in [("a", 20, 20), ("b", 9, 90), ("c", 30, 20)]:
        save_image(small / f"many/{name}.png", width, height)
    (small / "many/d.png").write_bytes(b"no image")
    assert command(small, "--image_path", small / "many", "--image_size", "8") == 0
    record = json.loads((small / "run/attention/attention.json").read_text("utf-8"))
    assert record["images"] == ["a", "c"]
    said = capsys.readouterr().err
    assert "notice: b: 80 × 8 pixels are 40 patches" in said and "d.png cannot be read" in said


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("resmlp", ["--maps", "attention"], ("ResMLP has no self-attention, so --maps attention has "
         "nothing to show; it takes mixing or similarity here.")),
        ("vit", ["--maps", "mixing"], ("VisionTransformer has no token mixing by a matrix, so --maps "
         "mixing has nothing to show; it takes attention, rollout or similarity here.")),
        ("resmlp", ["--maps", "rollout"], ("ResMLP has no self-attention, so --maps rollout has "
         "nothing to show; it takes mixing or similarity here.")),
        ("vit", ["--maps", "rollout", "--html"],
         "--html is for attention maps, and --maps is rollout; leave it out."),
        ("vit", ["--maps", "rollout", "--block", "0"],
         "--block is for attention maps, and --maps is rollout; leave it out."),
        ("resmlp", ["--block", "-1"],
         "--block is for attention maps, and ResMLP has no self-attention; leave it out."),
        ("vit", ["--block", "2"], "There is no block 2; in a network of depth 2 they are 0 to 1, or"),
        ("vit", ["--block", "-3"], "There is no block -3; in a network of depth 2"),
        ("vit", ["--block", "last"], "--block is 'last'; it takes a whole number."),
        ("resmlp", ["--html"],
         "--html is for attention maps, and ResMLP has no self-attention; leave it out."),
        ("resmlp", ["--threshold", "0.6"],
         "--threshold is for attention maps, and ResMLP has no self-attention; leave it out."),
        ("vit", ["--maps", "similarity", "--html"],
         "--html is for attention maps, and --maps is similarity; leave it out."),
        ("resmlp", ["--maps", "heads"],
         "--maps is 'heads'; it takes one of attention, rollout, reattention, classattention, "
         "mixing, similarity."),
        ("resmlp", ["--num_heads", "2"], "is a ResMLP and has no use for it."),
        ("resmlp", ["--maps", "similarity", "--image_size", "3"], "smaller than a patch of 4 × 4"),
        ("resmlp", ["--mlp_grid", "none", "--embed_dim", "48"], "--embed_dim 48 contradicts"),
    ],
)  # fmt: skip
def test_a_fault_is_a_sentence_and_writes_nothing(small, capsys, name, flags, message):
    save(small, name)
    before = {path.relative_to(small) for path in small.rglob("*")}
    assert command(small, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("dino-kit: error: ") and error.count("\n") == 1
    assert {path.relative_to(small) for path in small.rglob("*")} == before


def test_pictures_are_normalised_as_the_network_wants_it_and_facts_are_stored(tmp_path):
    scaling, image = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 0.5, 0.25)}, photo(8, 12)
    sheets, backbone = [], build("resmlp")
    show(backbone, [Picture("a", tmp_path / "a", image)], ("similarity",), image_size=(8, 12),
         **scaling, facts={"epoch": 3}, advance=sheets.append)  # fmt: skip
    assert sheets == [tmp_path / "a/sheet.png"]
    with np.load(tmp_path / "a/patches.npz") as arrays:
        expected = similarity_map(look(backbone, to_tensor(image, **scaling)))
        assert np.array_equal(arrays["similarity"], expected) and arrays["epoch"] == 3
