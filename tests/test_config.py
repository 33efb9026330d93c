"""Configurations: what is accepted, what is refused and in which words, and that all is used."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_kit.cluster import submission
from dino_kit.config import arch_options, architectures, fields, recipe
from dino_kit.config.commands import COMMANDS, ConfigConfig, train_part
from dino_kit.config.crops import Crops
from dino_kit.config.evaluate import AttentionConfig, Checkpoint, KnnConfig
from dino_kit.config.launch import SlurmConfig
from dino_kit.config.train import RESUMABLE, TrainConfig
from dino_kit.errors import UserError

PACKAGE = Path(fields.__file__).parent.parent
PATHS = {"data_path": "images", "output_dir": "out"}
SCHEMAS = [command.schema for command in COMMANDS.values()]


def train(**values) -> TrainConfig:
    return fields.from_plain(TrainConfig, PATHS | values)


def refusal(schema, name, value) -> str:
    with pytest.raises(UserError) as caught:
        fields.convert(schema, name, value)
    return str(caught.value)


# One value


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("lr", "5e-4", 5e-4),  # what PyYAML makes of 5e-4
        ("lr", 1, 1.0),
        ("epochs", "12", 12),
        ("seed", 2**32 - 1, 2**32 - 1),
        ("norm_last_layer", "Off", False),
        ("norm_last_layer", 1, True),
        ("norm_last_layer", True, True),
        ("embed_dim", None, None),
        ("global_crops_scale", ["0.14", 1], (0.14, 1.0)),
        ("blur_prob", 0, (0.0, 0.0, 0.0)),
        ("blur_prob", [1, 0.1, "5e-1"], (1.0, 0.1, 0.5)),
        ("arch", "deit_small", "vit_small"),
        ("device", "cuda:3", "cuda:3"),
    ],
)
def test_a_value_becomes_what_the_field_takes(name, given, expected):
    converted = fields.convert(TrainConfig, name, given)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("lr", "fast", "lr is 'fast'; it takes a number from 0."),
        ("lr", True, "lr is True; it takes a number from 0."),
        ("lr", "nan", "lr is 'nan'; it takes a number from 0."),
        ("lr", math.inf, "lr is inf; it takes a number from 0."),
        ("lr", -1, "lr is -1; it takes a number from 0."),
        ("lr", "", "lr is ''; it takes a number from 0."),
        ("lr", None, "lr is None; it takes a number from 0."),
        ("lr", [1, 2], "lr is [1, 2]; it takes a number from 0."),
        ("student_temp", 0, "student_temp is 0; it takes a number above 0."),
        ("drop_path_rate", 1, "drop_path_rate is 1; it takes a number from 0, below 1."),
        ("hue", 0.6, ("hue is 0.6; it takes one number, or three (first global, second global, "
                     "local views), each from 0 to 0.5.")),
        ("epochs", 0, "epochs is 0; it takes a whole number from 1."),
        ("epochs", True, "epochs is True; it takes a whole number from 1."),
        ("epochs", 2.0, "epochs is 2.0; it takes a whole number from 1."),
        ("epochs", "1e3", "epochs is '1e3'; it takes a whole number from 1."),
        ("epochs", "9" * 5000, f"epochs is '{'9' * 5000}'; it takes a whole number from 1."),
        ("lr", 10**400, f"lr is {10**400}; it takes a number from 0."),
        ("seed", 2**32, "seed is 4294967296; it takes a whole number from 0 to 4294967295."),
        ("norm_last_layer", "flase", "norm_last_layer is 'flase'; it takes true or false."),
        ("norm_last_layer", 2, "norm_last_layer is 2; it takes true or false."),
        ("optimizer", "adam", ("optimizer is 'adam'; it takes one of adamw, sgd, lars; did you "
                              "mean adamw?")),
        ("precision", 16, ("precision is 16; it takes one of auto, fp32, bf16, fp16; did you mean "
                           "fp16?")),
        ("data_path", 2012, "data_path is 2012; it takes text, which YAML needs in quotes here."),
        ("global_crops_scale", 0.4, "global_crops_scale takes 2 numbers, and got 1: 0.4."),
        ("global_crops_scale", [], "global_crops_scale takes 2 numbers, and got 0."),
        ("blur_prob", [1, 0], ("blur_prob takes one number, or three (first global, second global, "
                              "local views), each from 0 to 1, and got 2: 1 0.")),
        ("device", "gpu", "--device is 'gpu'; it takes auto, cpu, cuda, cuda:N or mps."),
        ("device", "cuda:", "--device is 'cuda:'; it takes auto, cpu, cuda, cuda:N or mps."),
        ("device", "cpu:0", "--device is 'cpu:0'; it takes auto, cpu, cuda, cuda:N or mps."),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(name, given, sentence):
    assert refusal(TrainConfig, name, given) == sentence


def test_a_list_of_numbers_takes_at_least_one():
    assert fields.convert(KnnConfig, "nb_knn", [20]) == (20,)
    assert refusal(KnnConfig, "nb_knn", []).startswith("nb_knn takes one or more whole numbers")
    assert refusal(KnnConfig, "nb_knn", [20, 0]) == (
        "nb_knn is 0; it takes one or more whole numbers, each from 1."
    )


def test_an_unknown_architecture_names_the_nearest():
    assert refusal(TrainConfig, "arch", "vit_smal").endswith("; did you mean vit_small?")
    assert refusal(TrainConfig, "arch", "resnet-50").endswith("; did you mean resnet50?")
    every = "vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_giant, vit,"
    assert every in refusal(TrainConfig, "arch", "zzz")


def test_names_of_the_reference_are_those_of_a_library():
    for name, stands_for in [
        ("resnet50", "torchvision:resnet50"),
        ("xcit_small_12_p8", "timm:xcit_small_12_p8_224"),
        ("deit_small", "vit_small"),
    ]:
        assert fields.convert(TrainConfig, "arch", name) == stands_for
        assert architectures.family_of(name) is architectures.family_of(stands_for)
    # What sizes pass is not known before the model is there.
    assert train(arch="torchvision:resnet50", global_crops_size=225).known_patch_size is None


def test_torchvision_and_timm_have_the_architectures_that_are_said_to_be_theirs():
    import timm
    from torchvision import models

    known = {
        "torchvision": models.list_models(module=models),
        "timm": timm.list_models(),
    }
    for name in architectures.ALIASES.values():
        library, colon, own = name.partition(":")
        assert not colon or own in known[library]


@pytest.mark.parametrize(
    ("name", "form"),
    [("timm:", "timm:NAME"), ("python:net", "python:PACKAGE.MODULE:CALLABLE"),
     ("python:a b:net", "python:PACKAGE.MODULE:CALLABLE")],
)  # fmt: skip
def test_a_librarys_name_has_a_form(name, form):
    assert refusal(TrainConfig, "arch", name).endswith(f"it is written {form}.")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["depth"], "takes words KEY=VALUE"),
        (["a=[1"], "whose value is no YAML"),
        (["a=1", "a=2"], "--arch_options has a twice."),
        (["in_chans=4"], "--arch_options has in_chans, which --in_chans says; give that."),
        (["img_size=4"], "which --global_crops_size says"),
        (["pretrained=true"], "is about weights"),
        (["checkpoint_path=x"], "is about weights"),
    ],
)
def test_options_of_an_architecture_that_cannot_be_are_refused(words, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        values = {"arch": "timm:resnet50", "arch_options": words}
        train(**{key: fields.convert(TrainConfig, key, value) for key, value in values.items()})


def test_an_option_that_has_a_flag_is_refused():
    with pytest.raises(UserError, match="--arch_options has depth, which a flag of that name"):
        train(arch="vit", embed_dim=24, depth=2, num_heads=2, arch_options=("depth=3",))
    assert train(arch="timm:resnet50", arch_options=("depth=3",)).arch_options == ("depth=3",)


def test_values_of_options_are_what_they_are_in_a_recipe():
    assert arch_options.pairs(["a=[2, 3]", "b=1e-5", "c=true", "d=gelu", "e="]) == {
        "a": [2, 3], "b": 1e-5, "c": True, "d": "gelu", "e": None,
    }  # fmt: skip


def test_patches_of_a_library_are_its_own():
    with pytest.raises(UserError, match="has patches of its own, so --patch_size cannot be given"):
        train(arch="torchvision:resnet50", patch_size=8)


def test_nearest_prefers_a_name_that_begins_as_the_given_one():
    known = ["batch_size_per_gpu", "patch_size"]
    assert fields.nearest("batch", known) == "; did you mean batch_size_per_gpu?"
    assert fields.nearest("zzz", known) == fields.nearest("", known) == "."


# Values together


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"global_crops_size": 225}, ("--global_crops_size 225 is not a multiple of --patch_size "
                                     "16; the nearest are 224 and 240.")),
        ({"local_crops_size": 8}, ("--local_crops_size 8 is not a multiple of --patch_size 16; the "
                                  "nearest is 16.")),
        ({"global_crops_scale": [1, 0.4]}, ("--global_crops_scale is 1 0.4; it takes two shares of "
                                           "the image, the smaller first, above 0 and at most 1.")),
        ({"local_crops_scale": [0, 0.4]}, ("--local_crops_scale is 0 0.4; it takes two shares of "
                                          "the image, the smaller first, above 0 and at most 1.")),
        ({"local_crops_scale": [0.1, 1.1]}, ("--local_crops_scale is 0.1 1.1; it takes two shares "
                                            "of the image, the smaller first, above 0 and at most 1.")),
        ({"local_crops_ratio": [2, 1]}, ("--local_crops_ratio is 2 1; it takes two numbers above "
                                         "0, the smaller first.")),
        ({"blur_radius_min": [0.1, 3, 0.1]}, "--blur_radius_min 3 is above --blur_radius_max 2."),
        ({"arch": "vit", "depth": 2}, ("--arch vit needs its sizes: --embed_dim, --num_heads "
                                      "missing.")),
        ({"arch": "vit", "depth": 2, "embed_dim": 10, "num_heads": 3},
         "--embed_dim 10 is not a multiple of --num_heads 3."),
        ({"embed_dim": 96, "mlp_ratio": 2}, ("--arch vit_small has sizes of its own, so "
         "--embed_dim, --mlp_ratio cannot be given; use --arch vit to choose them.")),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together_are_refused(values, sentence):
    with pytest.raises(UserError) as caught:
        train(**values)
    assert str(caught.value) == sentence


def test_what_fits_together_is_accepted():
    assert train(local_crops_number=0, local_crops_size=95).local_crops_size == 95
    assert train(arch="vit", depth=2, embed_dim=96, num_heads=3).mlp_ratio is None
    assert train(arch="resmlp", depth=2, embed_dim=25).mlp_grid is None
    assert train(arch="resmlp_s24", mlp_grid="resize").mlp_grid == "resize"
    assert train(patch_size=8, global_crops_size=232).global_crops_size == 232


def test_a_configuration_cannot_be_made_wrong_from_python_either():
    with pytest.raises(UserError, match="global_crops_size 225"):
        dataclasses.replace(train(), global_crops_size=225)
    with pytest.raises(dataclasses.FrozenInstanceError):
        train().epochs = 3


def test_required_fields_are_asked_for_by_name():
    with pytest.raises(UserError, match="^--data_path and --output_dir are missing.$"):
        fields.create(TrainConfig, {})
    with pytest.raises(UserError, match="^--output_dir is missing.$"):
        fields.create(TrainConfig, {"data_path": "images"})
    assert fields.create(TrainConfig, {}, missing_ok=True).data_path == ""


def test_one_checkpoint_is_needed_by_either_name():
    data = {"data_path": "images"}
    for names in ({"checkpoint": "a"}, {"pretrained_weights": "a"},
                  {"checkpoint": "a", "pretrained_weights": "a"}):
        assert fields.create(KnnConfig, names | data).weights == "a"
    assert fields.create(KnnConfig, {"load_features": "folder"}).weights is None
    with pytest.raises(UserError, match="^A checkpoint is missing"):
        fields.create(KnnConfig, data)
    with pytest.raises(UserError, match="^A checkpoint is missing"):
        fields.create(AttentionConfig, {"image_path": "a.png"})
    with pytest.raises(UserError, match="^Two checkpoints are given, a and --pretrained_weights b"):
        fields.create(KnnConfig, {"checkpoint": "a", "pretrained_weights": "b"} | data)


@pytest.mark.parametrize("names", [[], ["train_data"], ["val_data"], ["data_path", "train_data"],
                                   ["data_path", "train_data", "val_data"]])
def test_labelled_images_come_in_one_of_two_ways(names):
    with pytest.raises(UserError, match="give either --data_path, or both"):
        fields.create(KnnConfig, {"checkpoint": "a"} | dict.fromkeys(names, "folder"))


def test_attention_takes_one_or_two_sizes():
    values = {"checkpoint": "a", "image_path": "b"}
    assert fields.create(AttentionConfig, values | {"image_size": (480,)}).image_size == (480,)
    with pytest.raises(UserError, match="one or two numbers and got 3"):
        fields.create(AttentionConfig, values | {"image_size": (1, 2, 3)})


# The whole


def text() -> st.SearchStrategy[str]:
    # YAML has no way to write a surrogate.
    return st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def numbers(field: dataclasses.Field, kind: type) -> st.SearchStrategy:
    low, high, above, below = field.metadata["bounds"].values()
    smallest, largest = (low if above is None else above), (high if below is None else below)
    if kind is int:
        return st.integers(smallest, largest)
    return st.floats(
        smallest, largest, exclude_min=above is not None, exclude_max=below is not None,
        allow_nan=False, allow_infinity=False,
    )  # fmt: skip


@st.composite
def configurations(draw) -> TrainConfig:
    """Any valid settings: each field anything that it takes, but where fields hang together."""
    values = {}
    together = ("arch", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "mlp_grid",
                "reattention_blocks", "arch_options", "device", "in_chans", "normalize", "value_range")  # fmt: skip
    for field in dataclasses.fields(TrainConfig):
        if field.name in together or field.name.endswith(("crops_size", "_scale", "_ratio")):
            continue
        kind, optional = fields._kind(TrainConfig, field.name)
        if get_origin(kind) is Literal:
            strategy = st.sampled_from(get_args(kind))
        elif kind is bool:
            strategy = st.booleans()
        elif kind is str:
            strategy = text()
        elif get_origin(kind) is tuple:
            strategy = st.tuples(*[numbers(field, float)] * 3)
        else:
            strategy = numbers(field, kind)
        values[field.name] = draw(st.none() | strategy if optional else strategy)
    shares = st.floats(0, 1, exclude_min=True)
    for name in ("global_crops_scale", "local_crops_scale"):
        values[name] = tuple(sorted(draw(st.tuples(shares, shares))))
    if values["precision"] != "auto":
        values["use_fp16"] = None  # the two must not contradict each other
    if values["augment"] == "device":
        values["pixels"] = "fast"
    if values["fsdp"]:
        values["compile"] = False
    else:
        values["checkpoint_shards"] = False
    for low, high in zip(*(values[f"blur_radius_{end}"] for end in ("min", "max")), strict=True):
        if low > high:
            values["blur_radius_min"] = (0.0,) * 3
    limits = st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=2, unique=True)
    values["value_range"] = draw(st.none() | limits.map(sorted).map(tuple))
    channels = values["in_chans"] = draw(st.sampled_from([1, 3, 13]))
    numbers_of_all = st.tuples(*[st.floats(0.001, 1)] * 2 * channels)
    values["normalize"] = draw(
        st.sampled_from([None, "auto", (0.5, 0.25), *["imagenet"] * (channels == 3)])
        | numbers_of_all
    )
    values["patch_size"] = draw(st.integers(1, 64))
    values["global_crops_size"] = values["patch_size"] * draw(st.integers(1, 20))
    values["local_crops_size"] = values["patch_size"] * draw(st.integers(1, 20))
    values["device"] = draw(st.sampled_from(["auto", "cpu", "cuda", "cuda:1", "mps"]))
    heads = draw(st.integers(1, 12))
    values |= {"embed_dim": heads * 8, "depth": 2} | draw(
        st.just({"arch": "vit", "num_heads": heads})
        | st.builds(dict, arch=st.just("resmlp"), mlp_grid=st.sampled_from([None, "mix", "resize"]))
    )
    if values["arch"] == "vit" and values["patch_size"] % 2 == 0:
        values |= draw(
            st.builds(dict, arch=st.sampled_from(["vit", "deepvit"]))
            | st.builds(dict, arch=st.just("deepvit"), reattention_blocks=st.integers(1, 2))
        )
    return fields.create(TrainConfig, values)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "dumped.yaml"


@settings(max_examples=40, deadline=None)
@given(config=configurations())
def test_a_dumped_configuration_reads_back_to_the_same(config, recipe_file):
    recipe_file.write_text(recipe.dump(config), encoding="utf-8", newline="")
    values = recipe.read(TrainConfig, str(recipe_file))
    assert fields.create(TrainConfig, values) == config
    assert fields.from_plain(TrainConfig, fields.to_plain(config)) == config


@pytest.mark.parametrize(
    "path",
    ["a b", "C:\\images", "no", "12:30", "5e-4", "null", "#1", "a: b", " a ", "\x85", "a\u2028b", "a\nb",
     "über", "画像", "🦖", "\ufeffa", "'", '"', "x " * 2000, "..."],
)  # fmt: skip
def test_any_path_survives_a_dump(path, recipe_file):
    config = train(data_path=path)
    recipe_file.write_text(recipe.dump(config), encoding="utf-8", newline="")
    assert fields.create(TrainConfig, recipe.read(TrainConfig, str(recipe_file))) == config


def test_a_dump_is_grouped_and_tells_what_is_not_set():
    dumped = recipe.dump(fields.create(TrainConfig, {}, missing_ok=True))
    assert "# Backbone\narch: vit_small\n# arch_options: none\npatch_size: 16\n# embed_dim" in dumped
    assert "# data_path: required\n" in dumped
    assert "global_crops_scale: [0.4, 1.0]\n" in dumped


def test_plain_data_holds_nothing_but_what_a_checkpoint_may():
    plain = fields.to_plain(train())
    assert plain["blur_prob"] == [1.0, 0.1, 0.5]
    assert {type(value) for value in plain.values()} <= {int, float, str, bool, list, type(None)}
    assert fields.from_plain(TrainConfig, plain | {"of_a_later_version": 1}) == train()


def test_differences_are_named_with_both_values():
    assert fields.differences(train(), train()) == []
    assert fields.differences(train(), train(lr=1, blur_prob=0)) == [
        ("lr", 0.0005, 1.0),
        ("blur_prob", [1.0, 0.1, 0.5], [0.0, 0.0, 0.0]),
    ]


def test_what_may_change_on_resume_are_fields():
    assert set(fields.names(TrainConfig)) > RESUMABLE
    assert not RESUMABLE & {"epochs", "lr", "seed", "total_batch_size", "arch"}


def test_config_takes_every_setting_of_train():
    assert set(fields.names(ConfigConfig)) == {*fields.names(TrainConfig), "diff", "explain"}
    values = PATHS | {"epochs": 7, "diff": "other.yaml"}
    assert train_part(fields.create(ConfigConfig, values)) == train(epochs=7)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_has_a_default_that_it_accepts_and_help_that_is_a_sentence(schema):
    for field in dataclasses.fields(schema):
        assert field.metadata["help"].endswith("."), field.name
        assert len(field.metadata["help"]) > 10
        if field.default is not fields.REQUIRED:
            assert fields.convert(schema, field.name, field.default) == field.default


def names_read(module: str) -> set[str]:
    """Names that a module reads off a ``config``, and texts in functions that use ``getattr``."""
    found = set()
    path = PACKAGE / f"{module}.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            found |= {node.attr} if name == "config" else set()
        elif isinstance(node, ast.FunctionDef):
            inside = list(ast.walk(node))
            if any(getattr(getattr(n, "func", None), "id", "") == "getattr" for n in inside):
                found |= {str(n.value) for n in inside if isinstance(n, ast.Constant)}
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_is_read_by_its_command(name):
    schema = COMMANDS[name].schema
    module = COMMANDS[name].function.partition(":")[0]
    modules = [module.removeprefix("dino_kit.").replace(".", "/")]
    if issubclass(schema, Crops):
        modules += ["assemble", "preparation"]
    if issubclass(schema, TrainConfig):
        modules += ["training/run", "commands/train"]
    if issubclass(schema, Checkpoint):
        modules += ["evaluation"]
    if issubclass(schema, SlurmConfig):
        modules += ["cluster/submission"]
    by_other_names = {"checkpoint": "weights", "pretrained_weights": "weights",
                      "gpus_per_node": "gpus", "ngpus": "gpus"}  # fmt: skip
    wanted = {by_other_names.get(field, field) for field in fields.names(schema)}
    wanted.discard("profile")  # read with the words of the command line
    if issubclass(schema, SlurmConfig):
        wanted -= set(submission.OF_THE_SHELL)  # read one by one, by this table
    assert wanted - set().union(*map(names_read, modules)) == set()
