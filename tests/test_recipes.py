"""Recipes: the shipped ones, and what is refused in a file."""

from __future__ import annotations

import re

import pytest

from dino_kit.config import architectures, fields, recipe
from dino_kit.config.train import TrainConfig
from dino_kit.errors import UserError

PUBLISHED = {
    "vits16_100ep": (69.3, 74.0),
    "vits16_300ep": (73.3, 76.0),
    "vits16_800ep": (74.5, 77.0),
    "vits8": (78.3, 79.7),
    "vitb16": (76.1, 78.2),
    "vitb8": (77.4, 80.1),
}


@pytest.fixture
def written(tmp_path):
    def write(content: str | bytes) -> str:
        path = tmp_path / "mine.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def refusal(path: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe.read(TrainConfig, path)
    return str(caught.value)


def heading(name: str) -> str:
    return " ".join(
        line.removeprefix("#").strip()
        for line in recipe.text_of(name).split("\n\n")[0].splitlines()
    )


def test_the_published_recipes_are_shipped():
    assert {*PUBLISHED, "cifar10_vit_tiny", "quickstart"} <= set(recipe.shipped())


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_shipped_recipe_is_valid_and_can_be_run(name):
    paths = {"data_path": "images", "output_dir": "out"}
    config = fields.create(TrainConfig, recipe.read(TrainConfig, name) | paths)
    assert architectures.family_of(config.arch).is_built_here
    # A recipe must not depend on the machine, and its batch norm must not be split.
    assert config.total_batch_size is not None
    assert not config.use_bn_in_head or config.batch_size_per_gpu >= config.total_batch_size


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_shipped_recipe_opens_with_its_command_cost_and_expected_number(name):
    text = heading(name)
    wanted = "dino-kit quickstart" if name == "quickstart" else f"dino-kit train {name} "
    assert wanted in text
    cost, expected = re.search(r"Cost: (.*?) Expect: (.*)", text).groups()
    assert re.search(r"\d", cost)
    assert re.search(r"\d %", expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_of_published_runs(name):
    knn, linear = PUBLISHED[name]
    assert f"Expect: k-NN {knn} %, linear {linear} %" in heading(name)


@pytest.mark.parametrize("name, knn", [("resmlp_s12", 62.6), ("resmlp_s24", 69.4)])
def test_a_resmlps_number_is_said_to_be_that_of_the_published_weights(name, knn):
    text = heading(name)
    assert f"not measured here. The published weights, pretrained by DINO, have k-NN {knn} %" in text
    assert "No code and no settings of their training were published" in text


def test_published_settings():
    """The README's two commands, and the arguments published with the four models."""
    read = {name: recipe.read(TrainConfig, name) for name in PUBLISHED}
    assert {name: values["total_batch_size"] for name, values in read.items()} == {
        "vits16_100ep": 512, "vits16_300ep": 1024, "vits16_800ep": 1024, "vits8": 1024,
        "vitb16": 1024, "vitb8": 1056,
    }  # fmt: skip
    paths = {"data_path": "images", "output_dir": "out"}
    default = fields.create(TrainConfig, paths)
    vanilla = fields.create(TrainConfig, read["vits16_100ep"] | paths)
    assert fields.differences(default, vanilla) == [("total_batch_size", None, 512)]
    assert read["vits16_800ep"]["global_crops_scale"] == (0.25, 1.0)
    assert read["vits16_800ep"]["local_crops_scale"] == (0.05, 0.25)
    assert read["vits16_800ep"]["local_crops_number"] == 10
    fixed_norms = [name for name, values in read.items() if values["norm_last_layer"]]
    assert fixed_norms == ["vits16_100ep", "vitb16", "vitb8"]


# Files


def test_a_recipe_is_read_in_every_spelling(written):
    path = written("\ufeff# mine\nout-dim: 64\nlr: 5e-4\nnorm_last_layer: off\n"
                   "blur_prob: [1, 0, 5e-1]\nembed_dim: null\ndepth: none\nseed: 010\n")
    assert recipe.read(TrainConfig, path) == {
        "out_dim": 64, "lr": 5e-4, "norm_last_layer": False, "blur_prob": (1.0, 0.0, 0.5),
        "embed_dim": None, "depth": None, "seed": 10,
    }  # fmt: skip
    assert recipe.read(TrainConfig, written("# nothing\n")) == {}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("epochs: 3\nlr: 1\nepochs: 3\n",
         "The recipe PATH has the key epochs twice, again in line 3; keep one."),
        ("out_dim: 3\nout-dim: 3\n",
         "The recipe PATH has the key out_dim twice, again in line 2; keep one."),
        ("lr: 1\nephocs: 3\n", ("The recipe PATH has in line 2 the key 'ephocs', which is no "
                               "setting; did you mean epochs?")),
        ("1: 3\n", "The recipe PATH has in line 1 the key '1', which is no setting."),
        ("diff: vits8\n", "The recipe PATH has in line 1 the key 'diff', which is no setting."),
        ("dist_url: env://\n",
         "The recipe PATH has in line 1 the key 'dist_url', which is no setting."),
        ("lr: fast\n", "lr in the recipe PATH is 'fast'; it takes a number from 0."),
        ("epochs: on\n", "epochs in the recipe PATH is True; it takes a whole number from 1."),
        ("epochs: {a: 1}\n",
         "epochs in the recipe PATH is {'a': '1'}; it takes a whole number from 1."),
        ("lr:\n", "lr in the recipe PATH is None; it takes a number from 0."),
        ("lr: .nan\n", "lr in the recipe PATH is '.nan'; it takes a number from 0."),
        ("epochs: 1:30\n", "epochs in the recipe PATH is '1:30'; it takes a whole number from 1."),
        ("- epochs: 3\n", "The recipe PATH should be lines of `name: value`."),
        ("epochs\n", "The recipe PATH should be lines of `name: value`."),
    ],
)  # fmt: skip
def test_a_faulty_recipe_is_refused_in_one_sentence(written, content, sentence):
    path = written(content)
    assert refusal(path).replace(path, "PATH") == sentence


@pytest.mark.parametrize(
    "content",
    [
        "lr: [1\n",
        "lr: 1\n bad: 2\n",
        "lr: 2024-13-45\n",  # a date to YAML, and none
        "lr: !!python/object:os.system 1\n",
        "lr: \x00\n",
        "a: 1\n---\nb: 2\n",
        "lr: " + "[" * 5000,
    ],
)
def test_what_is_no_yaml_is_refused_in_one_sentence(written, content):
    path = written(content)
    assert refusal(path).startswith(f"The recipe {path} is no YAML")


def test_what_cannot_be_read_is_refused_with_the_nearest_name(written, tmp_path):
    names = ", ".join(recipe.shipped())
    assert refusal("vits16_100epoch") == (
        "'vits16_100epoch' is neither a YAML file that can be read nor the name of a shipped "
        f"recipe, which are {names}; did you mean vits16_100ep?"
    )
    for unreadable in (str(tmp_path), written(b"\xff\xfe"), "a\0b"):
        assert "is neither a YAML file that can be read" in refusal(unreadable)
