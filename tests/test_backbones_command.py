"""``dino-kit backbones``: names, sizes, and which maps each has."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dino_kit import cli
from dino_kit.backbones import catalogue
from dino_kit.config import architectures


def shown(capsys, *words) -> list[str]:
    assert cli.main(["backbones", *words]) == 0
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.fixture(autouse=True)
def screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_what_is_built_here_comes_with_sizes_and_maps(capsys):
    lines = shown(capsys)
    assert max(map(len, lines)) <= 80 and len(lines) < 60
    for name in catalogue.own_names():
        assert len(row(lines, name)) == 5
    assert row(lines, "vit_small")[1:] == ["21.7", "16", "384", "attention, rollout, similarity"]
    assert row(lines, "resmlp_s12") == ["resmlp_s12", "15.0", "16", "384", "mixing, similarity"]
    # Its maps are no attention: their rows do not sum to one.
    assert row(lines, "deepvit_s")[4] == "reattention, similarity"
    text = " ".join(lines)
    assert "reattention: " in text and "rows do not sum to one" in text
    assert "deit_small = vit_small" in text
    assert "torchvision:NAME, " in text and "timm:NAME, " in text


def test_a_pattern_lists_the_names_that_fit_a_name_of_the_reference_among_them(capsys):
    lines = shown(capsys, "deit*")
    assert row(lines, "deit_small")[1:] == ["21.7", "16", "384", "attention, rollout, similarity"]
    assert "deit_small is vit_small" in lines
    lines = shown(capsys, "torchvision:resnet1*")
    assert row(lines, "torchvision:resnet18")[1:] == ["11.2", "32", "512", "similarity"]
    assert not any("vit" in line for line in lines)


def test_of_many_there_are_names_and_how_many(capsys):
    lines = shown(capsys, "torchvision:*")
    assert "torchvision:swin_t" in lines
    assert lines[-1].startswith(f"{len(lines) - 1} names; sizes and maps are shown of 24 at most")
    lines = shown(capsys, "timm:*swin*")
    assert "timm:swin_tiny_patch4_window7_224" in lines and "torchvision:swin_t" not in lines


def test_a_pattern_of_any_library_asks_all_of_them():
    found = catalogue.matching("*swin_t*")
    assert {"swin_t", "torchvision:swin_t", "timm:swin_tiny_patch4_window7_224"} <= set(found)
    assert catalogue.matching("t*:resnet18") == ["torchvision:resnet18", "timm:resnet18"]
    assert catalogue.matching("vit_t*") == ["vit_tiny"]


def test_json_has_the_same(capsys):
    entries = json.loads("\n".join(shown(capsys, "resnet50", "--json")))
    assert entries == [
        {
            "name": "resnet50", "stands_for": "torchvision:resnet50", "parameters": 23508032,
            "patch_size": 32, "width": 2048, "maps": ["similarity"],
        }
    ]  # fmt: skip
    names = [entry["name"] for entry in json.loads("\n".join(shown(capsys, "--json")))]
    assert names == catalogue.own_names()
    many = json.loads("\n".join(shown(capsys, "torchvision:*", "--json")))
    assert len(many) > 24 and all(set(entry) == {"name"} for entry in many)


def test_a_model_of_the_user_s_own_can_be_looked_at(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "looked_at.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 6, 8, 8))\n"
        "def pooled():\n    return nn.Sequential(net(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    lines = shown(capsys, "python:looked_at:net")
    assert row(lines, "python:looked_at:net")[2:] == ["8", "6", "similarity"]
    assert row(shown(capsys, "python:looked_at:pooled"), "python:looked_at:pooled")[4] == ""


def test_what_fits_nothing_is_refused(capsys):
    assert cli.main(["backbones", "nothing*"]) == 2
    assert "No backbone's name fits 'nothing*'" in capsys.readouterr().err
    assert cli.main(["backbones", "vit_smal"]) == 2
    assert "did you mean vit_small?" in capsys.readouterr().err


def test_one_that_cannot_be_built_is_told_and_the_others_are_shown(capsys, monkeypatch):
    monkeypatch.setattr(catalogue, "own_names", lambda: ["vit_tiny", "resnet18", "no_such_net"])
    lines = shown(capsys)
    assert row(lines, "vit_tiny")[1] == "5.5"
    assert row(lines, "no_such_net")[1:] == ["–"] * 4
    assert "--arch is 'no_such_net'" in " ".join(lines)


def test_what_the_meta_device_cannot_build_is_built_in_memory(monkeypatch):
    built = []

    def create(name):
        device = torch.empty(1).device.type
        built.append(device)
        if device == "meta":
            raise NotImplementedError
        net = nn.Linear(2, 3)
        net.patch_size, net.embed_dim = 4, 3
        return net

    monkeypatch.setattr(catalogue, "create_backbone", create)
    assert catalogue.describe("vit_tiny").parameters == 9
    assert built == ["meta", "cpu"]


def test_what_is_listed_as_built_here_can_be_built():
    assert set(catalogue.own_names()) < set(architectures.BUILDABLE)
