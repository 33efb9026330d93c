"""From checkpoints of every layout to a backbone; and what is refused."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

import dino_kit
from dino_kit import files
from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.recognition import recognize
from dino_kit.config.architectures import BUILDABLE, FAMILIES, VIT_SIZES, family_of
from dino_kit.errors import UserError
from dino_kit.weights import load, load_backbone

SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.5}


def build(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return create_backbone("vit", **{"image_size": 16, **SIZES, **changes}).eval()


def prefixed(backbone, prefix: str) -> dict:
    state = {f"{prefix}backbone.{name}": value for name, value in backbone.state_dict().items()}
    state[f"{prefix}head.mlp.0.weight"] = torch.zeros(3, 24)
    return state


def own_checkpoint(path, **changes):
    """A run's checkpoint; returns teacher and student."""
    teacher, student = build(), build(drop_path_rate=0.1)
    with torch.no_grad():
        student.cls_token += 1
    content = {
        "student": prefixed(student, "module."),
        "teacher": prefixed(teacher, ""),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []},
        "epoch": 2,
        "step": 40,
        "config": {"arch": "vit", "global_crops_size": 16, "out_dim": 9, **SIZES},
        "dino_loss": {"center": torch.zeros(1, 9)},
    }
    torch.save({**content, **changes}, path)
    return teacher, student


def same(backbone, other, size: int = 16) -> bool:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return torch.equal(backbone(images), other(images))


def test_a_runs_checkpoint_by_file_and_by_folder(tmp_path):
    teacher, student = own_checkpoint(tmp_path / "checkpoint.pth")
    loaded = load(tmp_path)
    assert same(loaded.backbone, teacher) and not loaded.backbone.training
    assert loaded.matched == len(teacher.state_dict()) and f"{loaded.matched} tensors" in (
        loaded.summary()
    )
    assert (loaded.which, loaded.epoch, loaded.step) == ("teacher", 2, 40)
    assert loaded.path == str(tmp_path / "checkpoint.pth")
    assert loaded.transform.image_size == 16
    assert same(load_backbone(tmp_path / "checkpoint.pth", which="student"), student)


def test_a_teacher_under_the_data_parallel_prefix(tmp_path):
    teacher = build()
    own_checkpoint(tmp_path / "checkpoint.pth", teacher=prefixed(teacher, "module."))
    assert same(load_backbone(tmp_path), teacher)


def test_loading_leaves_the_callers_random_numbers_alone(tmp_path):
    own_checkpoint(tmp_path / "checkpoint.pth")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_golden_reference_checkpoint(golden, which):
    """The sizes are given explicitly, as its name says something else than its tensors."""
    sizes = json.loads(str(golden("trajectory_adamw")["config"]))["backbone"]
    path = golden.path("reference_full_checkpoint.pth")
    loaded = load(
        path,
        which,
        **{name: sizes[name] for name in ("patch_size", "embed_dim", "depth", "num_heads",
                                          "mlp_ratio")},
    )
    # The weights with which the reference ended that trajectory.
    prefix = f"final_{which}/"
    expected = {
        name.removeprefix(prefix): torch.from_numpy(value)
        for name, value in golden("trajectory_adamw").items()
        if name.startswith(prefix)
    }
    content = files.read_weights(path)
    saved = {name.removeprefix("module."): value for name, value in content[which].items()}
    center = torch.from_numpy(golden("trajectory_adamw")[f"step{_last_step(golden)}/center"])
    torch.testing.assert_close(content["dino_loss"]["center"], center, rtol=0, atol=1e-6)
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-6)
    expected = {
        name.removeprefix("backbone."): value
        for name, value in expected.items()
        if name.startswith("backbone.")
    }
    found = dict(loaded.backbone.state_dict())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert loaded.matched == len(expected)
    assert loaded.backbone.num_heads == sizes["num_heads"]
    assert loaded.transform.image_size == sizes["img_size"]
    by_shapes = load_backbone(path, which, num_heads=sizes["num_heads"])
    assert same(loaded.backbone, by_shapes, sizes["img_size"])


def _last_step(golden) -> int:
    config = json.loads(str(golden("trajectory_adamw")["config"]))
    return config["epochs"] * config["steps_per_epoch"] - 1


def test_golden_reference_checkpoint_needs_the_number_of_heads(golden):
    with pytest.raises(UserError, match="called vit_tiny, but .* give --num_heads"):
        load(golden.path("reference_full_checkpoint.pth"))


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_does_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    content = {"teacher": prefixed(build(), ""), "args": _RunsCode()}
    torch.save(content, "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_vit_for_a_named_architecture_contradicts_its_heads(tmp_path):
    backbone = create_backbone("vit_tiny", patch_size=16, image_size=32).eval()
    content = {"teacher": prefixed(backbone, ""), "config": {"arch": "vit_tiny"}}
    torch.save(content, tmp_path / "tiny.pth")
    assert same(load(tmp_path / "tiny.pth", arch="vit").backbone, backbone, 32)
    with pytest.raises(UserError, match="--num_heads 12 contradicts .* of 3 heads"):
        load(tmp_path / "tiny.pth", arch="vit", num_heads=12)


def test_an_architecture_that_is_not_built_is_told_of_the_file(tmp_path):
    content = {"teacher": prefixed(build(), ""), "config": {"arch": "resmlp_12"}}
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"^What .*other.pth says of itself cannot be built: "):
        load(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small"])
def test_a_bare_backbone_of_a_published_size_needs_no_flags(tmp_path, name):
    backbone = create_backbone(name, patch_size=16, image_size=32).eval()
    torch.save(backbone.state_dict(), tmp_path / "bare.pth")
    loaded = load(tmp_path / "bare.pth")
    assert loaded.architecture["name"] == name
    assert loaded.architecture["num_heads"] == VIT_SIZES[name]["num_heads"]
    assert loaded.which is None and loaded.transform.image_size == 32
    assert same(loaded.backbone, backbone, 32)


def test_a_bare_backbone_of_other_sizes_needs_the_number_of_heads(tmp_path):
    backbone = build(in_chans=5, qkv_bias=False, image_size=24)
    torch.save(backbone.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="give --num_heads"):
        load(tmp_path / "bare.pth")
    found = load(tmp_path / "bare.pth", num_heads=2).architecture
    assert found == {"name": "vit", "image_size": 24, "in_chans": 5, "qkv_bias": False, **SIZES}


@pytest.mark.parametrize("width, hidden", [(24, 60), (21, 51), (45, 49), (27, 127)])
def test_the_mlps_width_is_met_exactly(tmp_path, width, hidden):
    ratio = (hidden + 0.5) / width
    backbone = create_backbone(
        "vit", patch_size=4, image_size=8, embed_dim=width, depth=1, num_heads=3, mlp_ratio=ratio
    )
    torch.save(backbone.state_dict(), tmp_path / "bare.pth")
    loaded = load_backbone(tmp_path / "bare.pth", num_heads=3)
    assert loaded.blocks[0].mlp.fc1.out_features == hidden


def test_an_old_name_in_the_arguments_is_understood(tmp_path):
    backbone = create_backbone("vit_small", patch_size=8, image_size=16, depth=12)
    arguments = argparse.Namespace(arch="deit_small", patch_size=8)
    torch.save({"teacher": prefixed(backbone, ""), "args": arguments}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth", arch="vit_small").architecture["num_heads"] == 6


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"patch_size": 8}, r"--patch_size 8 contradicts .*checkpoint.pth, whose .* patch_size 4"),
        ({"embed_dim": 48}, "--embed_dim 48 contradicts .* embed_dim 24"),
        ({"depth": 3}, "--depth 3 contradicts .* depth 2"),
        ({"in_chans": 1}, "--in_chans 1 contradicts .* in_chans 3"),
        ({"mlp_ratio": 4.0}, r"--mlp_ratio 4.0 contradicts .* mlp_ratio 2\.5"),
        ({"num_heads": 3}, "--num_heads 3 contradicts .* of 2 heads"),
        ({"arch": "vit_small"}, "--arch vit_small contradicts .* says that it is vit"),
        ({"arch": "resnet50"}, "--arch resnet50 contradicts .* says that it is vit"),
        ({"which": "momentum"}, "no network 'momentum'; it holds student, teacher"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(tmp_path, flags, message):
    own_checkpoint(tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path, **flags)


def test_flags_that_agree_are_welcome(tmp_path):
    own_checkpoint(tmp_path / "checkpoint.pth")
    assert load(tmp_path, arch="vit", in_chans=3, **SIZES).backbone.num_heads == 2


@pytest.mark.parametrize("heads", [None, 2])
def test_a_named_architecture_by_flag_has_to_have_the_tensors_sizes(tmp_path, heads):
    torch.save(build().state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="--arch vit_tiny contradicts .* --embed_dim and --depth"):
        load(tmp_path / "bare.pth", arch="vit_tiny", num_heads=heads)


def test_a_named_architecture_has_its_own_heads(tmp_path):
    backbone = create_backbone("vit_tiny", patch_size=16, image_size=32)
    content = {"teacher": prefixed(backbone, ""), "config": {"arch": "vit_tiny"}}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="--num_heads 6 contradicts .* of 3 heads"):
        load(tmp_path / "x.pth", num_heads=6)


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    own_checkpoint(tmp_path / "checkpoint.pth", config={**SIZES, "arch": "vit", "patch_size": 8})
    with pytest.raises(UserError, match="says patch_size 8, and its tensors have 4; --patch_size"):
        load(tmp_path)
    assert load(tmp_path, patch_size=4).backbone.patch_size == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("norm.bias"), r"lacks norm\.bias\.$"),
        (lambda s: s.update(extra=torch.zeros(1)), r"has extra besides\.$"),
        (lambda s: s.update(cls_token=torch.zeros(1, 1, 5)), r"cls_token is \(1, 1, 5\)"),
        (lambda s: s.update(cls_token=3), "cls_token is int"),
        (lambda s: s.pop("pos_embed"), "no tensor pos_embed with 3 dimensions"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 16, 24)), "15 position embeddings"),
        (lambda s: s.update({"blocks.1000000000.norm1.bias": torch.zeros(24)}), "besides"),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.1.attn")]
            + [s.pop(name) for name in list(s) if name.startswith("blocks.1.mlp")],
            r"lacks blocks\.1\.attn\.qkv\.weight, .* and 5 more\.$",
        ),
    ],
)
def test_loading_is_strict(tmp_path, change, message):
    state = dict(build().state_dict())
    change(state)
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "bare.pth", num_heads=2)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"not a checkpoint", "not a checkpoint"),
        ({"a": 1, "b": 2}, "holds no weights; what it holds: a, b"),
        ({}, "holds no weights; what it holds: nothing"),
        ({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}, "no vision transformer"),
        ([torch.zeros(3)], "list"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, message):
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no file .*nothing.pth"):
        load(tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    "found, message",
    [
        ([], "it has nothing in it"),
        (["a.txt", "b.txt"], "no run's folder; it has a.txt, b.txt"),
        (["checkpoint0003.pth", "log.txt"], "it has checkpoint0003.pth: give that file's path"),
    ],
)
def test_a_folder_without_a_checkpoint_says_what_it_has(tmp_path, found, message):
    for name in found:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_the_package_offers_the_two_ways_in_and_imports_torch_only_for_them(tmp_path):
    teacher, _ = own_checkpoint(tmp_path / "checkpoint.pth")
    assert same(dino_kit.load_backbone(str(tmp_path)), teacher)
    assert dino_kit.create_backbone("vit", image_size=16, **SIZES).embed_dim == 24
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dino_kit.nothing  # noqa: B018
    program = (
        "import dino_kit, sys; dino_kit.__version__, dir(dino_kit);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


RESMLP = {"patch_size": 4, "embed_dim": 24, "depth": 2, "mlp_ratio": 2.5}


def build_resmlp(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return create_backbone("resmlp", **{"image_size": 16, **RESMLP, **changes}).eval()


def resmlp_checkpoint(path, backbone=None, **settings):
    backbone = backbone or build_resmlp()
    config = {"arch": "resmlp", "global_crops_size": 16, "mlp_grid": "mix", **RESMLP, **settings}
    torch.save({"teacher": prefixed(backbone, ""), "config": config}, path)
    return backbone


@pytest.mark.parametrize("mlp_grid", ["mix", "resize"])
def test_a_resmlps_checkpoint_says_how_it_meets_other_grids(tmp_path, mlp_grid):
    backbone = build_resmlp(mlp_grid=mlp_grid)
    resmlp_checkpoint(tmp_path / "checkpoint.pth", backbone, mlp_grid=mlp_grid)
    loaded = load(tmp_path)
    assert same(loaded.backbone, backbone) and same(loaded.backbone, backbone, 24)
    assert loaded.matched == len(backbone.state_dict())
    assert loaded.architecture == {
        "name": "resmlp", "image_size": 16, "in_chans": 3, "mlp_grid": mlp_grid, **RESMLP,
    }  # fmt: skip
    assert load(tmp_path, arch="resmlp", mlp_grid=mlp_grid, **RESMLP).architecture["depth"] == 2


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("options", [{}, {"patch_size": 8, "in_chans": 1}])
def test_published_weights_of_a_resmlp_need_no_flags(tmp_path, options, prefix):
    """They are bare tensors, with a classifier beside."""
    name = "resmlp_s12"
    backbone = create_backbone(name, **{"image_size": 32, "patch_size": 16, **options}).eval()
    state = {f"{prefix}{key}": value for key, value in backbone.state_dict().items()}
    state[f"{prefix}head.weight"] = torch.zeros(1000, backbone.embed_dim)
    state[f"{prefix}head.bias"] = torch.zeros(1000)
    torch.save(state, tmp_path / "bare.pth")
    loaded = load(tmp_path / "bare.pth")
    assert loaded.architecture["name"] == name and loaded.backbone.mlp_grid == "mix"
    assert loaded.architecture["patch_size"] == options.get("patch_size", 16)
    assert loaded.which is None and loaded.transform.image_size == 32
    for key, value in backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[key], value)


@pytest.mark.parametrize("name", sorted(set(BUILDABLE) - {family.free for family in FAMILIES}))
def test_every_named_architecture_is_known_by_its_tensors_alone(name):
    with torch.device("meta"):
        own = {"patch_size": 8} if family_of(name).takes_patch_size else {}
        state = create_backbone(name, image_size=32, **own).state_dict()
    given = dict.fromkeys(
        ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "mlp_grid",
         "arch_options")
    )  # fmt: skip
    assert recognize(state, {}, None, given, "it").name == name
    with pytest.raises(UserError, match="--depth 5 contradicts it"):
        recognize(state, {}, None, {**given, "depth": 5}, "it")


def test_a_network_with_another_mlp_than_the_giant_s_is_no_giant():
    with torch.device("meta"):
        state = create_backbone("vit_giant", patch_size=8, image_size=16, mlp_ratio=4).state_dict()
    given = dict.fromkeys(
        ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "mlp_grid")
    )
    found = recognize(state, {}, None, {**given, "num_heads": 16}, "it")
    assert (found.name, found.options["mlp_ratio"]) == ("vit", 4)
    with pytest.raises(UserError, match="vit_giant has mlp_ratio 4.92308, and the .* mlp_ratio 4; "):
        recognize(state, {}, "vit_giant", given, "it")
    said = {"arch": "vit_giant"}
    with pytest.raises(UserError, match="but vit_giant has mlp_ratio 4.92308; give --num_heads"):
        recognize(state, said, None, given, "it")


@pytest.mark.parametrize("options", [{"num_register_tokens": 4}, {"layer_scale": 1e-5},
                                     {"num_register_tokens": 1, "layer_scale": 0.5}])  # fmt: skip
def test_registers_and_layer_scale_are_known_by_their_tensors(tmp_path, options):
    backbone = create_backbone("vit_tiny", patch_size=16, image_size=32, **options).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(backbone.state_dict(), tmp_path / "bare.pth")
    loaded = load(tmp_path / "bare.pth")
    assert loaded.architecture["name"] == "vit_tiny"
    assert set(options) == {"num_register_tokens", "layer_scale"} & loaded.architecture.keys()
    assert loaded.backbone.num_prefix_tokens == 1 + options.get("num_register_tokens", 0)
    assert same(loaded.backbone, backbone, 32)


def test_registers_of_another_form_are_no_registers(tmp_path):
    state = create_backbone("vit_tiny", patch_size=16, image_size=32).state_dict()
    torch.save({**state, "register_tokens": torch.zeros(4, 192)}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="no tensor register_tokens with 3 dimensions"):
        load(tmp_path / "bare.pth")


def test_golden_resmlp_is_read_from_its_tensors(golden, tmp_path):
    arrays = golden("resmlp")
    state = {
        name.removeprefix("state/"): torch.from_numpy(value)
        for name, value in arrays.items()
        if name.startswith("state/")
    }
    torch.save(state, tmp_path / "bare.pth")
    images, expected = (torch.from_numpy(arrays[name]) for name in ("images", "pooled"))
    with torch.inference_mode():
        pooled = load_backbone(tmp_path / "bare.pth")(images)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"patch_size": 8}, "--patch_size 8 contradicts .* patch_size 4"),
        ({"mlp_ratio": 4.0}, r"--mlp_ratio 4.0 contradicts .* mlp_ratio 2\.5"),
        ({"num_heads": 3}, "--num_heads 3 contradicts .*, which is a ResMLP and has no use for it"),
        ({"mlp_grid": "resize"}, "--mlp_grid resize contradicts .*, which says mlp_grid mix"),
        ({"arch": "resmlp_s12"}, "--arch resmlp_s12 contradicts .* says that it is resmlp"),
        ({"arch": "vit"}, "--arch vit contradicts .* says that it is resmlp"),
    ],
)
def test_a_flag_that_contradicts_a_resmlp_is_refused(tmp_path, flags, message):
    resmlp_checkpoint(tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path, **flags)


@pytest.mark.parametrize("saved, arch", [(build, "resmlp_s12"), (build_resmlp, "vit_small")])
def test_an_architecture_of_another_family_than_the_tensors_is_refused(tmp_path, saved, arch):
    torch.save(saved().state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=f"--arch {arch} contradicts .* tensors are those of a"):
        load(tmp_path / "bare.pth", arch=arch, num_heads=2)
    content = {"teacher": prefixed(saved(), ""), "config": {"arch": arch}}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"contradicts itself: it says that it is {arch}, and its"):
        load(tmp_path / "x.pth")


def test_a_vit_has_no_use_for_a_rule_of_grids(tmp_path):
    own_checkpoint(tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="--mlp_grid mix .* is a vision transformer and has no use"):
        load(tmp_path, mlp_grid="mix")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("norm.alpha"), r"lacks norm\.alpha\.$"),
        (lambda s: s.update(extra=torch.zeros(1)), r"has extra besides\.$"),
        (lambda s: s.update({"norm.beta": torch.zeros(5)}), r"norm.beta is \(5,\)"),
        (lambda s: s.update({"blocks.0.attn.weight": torch.zeros(12, 12)}), "has 12 patches in its"),
        (lambda s: s.update({"blocks.0.attn.weight": 3}), "is no ResMLP of a known layout"),
        (lambda s: s.pop("patch_embed.proj.weight"), "is no ResMLP .* no tensor patch_embed.proj"),
        (lambda s: s.pop("blocks.0.attn.weight"), "no vision transformer and no ResMLP of a known"),
    ],
)
def test_loading_a_resmlp_is_strict(tmp_path, change, message):
    state = dict(build_resmlp().state_dict())
    change(state)
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "bare.pth")


def test_what_shows_in_no_tensor_is_read_from_what_the_file_says(tmp_path):
    network = create_backbone("vit", **SIZES, norm_eps=0.5)
    config = {"arch": "vit", "arch_options": ["norm_eps=0.5"], **SIZES}
    content = {"teacher": network.state_dict(), "config": config}
    torch.save(content, tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth")
    assert loaded.backbone.norm.eps == 0.5 and loaded.architecture["norm_eps"] == 0.5
    assert load(tmp_path / "a.pth", arch_options=("norm_eps=0.5",)).architecture["norm_eps"] == 0.5
    with pytest.raises(UserError, match="--arch_options norm_eps=0.1 contradicts .* norm_eps 0.5"):
        load(tmp_path / "a.pth", arch_options=("norm_eps=0.1",))
    with pytest.raises(UserError, match="vit has no option 'norm_ep'.* did you mean norm_eps"):
        load(tmp_path / "a.pth", arch_options=("norm_ep=0.1",))
    torch.save({**content, "config": {**config, "arch_options": 3}}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="says of itself cannot be read: its arch_options are 3"):
        load(tmp_path / "b.pth")
