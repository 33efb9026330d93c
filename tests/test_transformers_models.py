"""``hf:FOLDER``: models of Hugging Face transformers by a local configuration."""

from __future__ import annotations

import json
import pickle
import socket
import sys

import pytest
import torch
from refusals import refusal

import dino_kit
from dino_kit.backbones.build import create_backbone, require_sizes
from dino_kit.backbones.interface import Backbone, HasSelfAttention

transformers = pytest.importorskip("transformers")

_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_STAGES = {"depths": [1, 2], "image_size": 32, "patch_size": 4}
CONFIGURATIONS = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _VIT,
    "dinov2_with_registers": {**_VIT, "num_register_tokens": 4},
    "dinov3_vit": {**_VIT, "num_register_tokens": 4},
    "beit": {**_VIT, "use_relative_position_bias": True},
    "swin": {**_STAGES, "embed_dim": 12, "num_heads": [2, 4], "window_size": 4},
    "convnext": {**_STAGES, "hidden_sizes": [8, 16], "num_stages": 2},
}
GLOBAL = ["vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit"]
PREFIX = {"deit": 2, "dinov2_with_registers": 5, "dinov3_vit": 5, "swin": 0, "convnext": 0}


@pytest.fixture
def built(tmp_path):
    """A backbone of a kind of configuration, by a folder of its own, away from its first weights."""

    def build(kind: str, said: dict | None = None, **options):
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        said = {"model_type": kind, **CONFIGURATIONS.get(kind, {}), **(said or {})}
        (folder / "config.json").write_text(json.dumps(said))
        torch.manual_seed(0)
        backbone = create_backbone(f"hf:{folder}", **{"image_size": 32, **options})
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return backbone.eval()

    return build


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_tokens_are_prefix_and_patches_as_the_model_gives_them_out(built, kind):
    backbone = built(kind)
    assert isinstance(backbone, Backbone)
    assert backbone.num_prefix_tokens == PREFIX.get(kind, 1)
    assert backbone.patch_size == 8
    for size in (32, 16, 48):
        images = torch.randn(2, 3, size, size)
        features = backbone.forward_features(images)
        assert features.grid == (size // 8, size // 8)
        outputs = backbone.get_intermediate_layers(images, 2)
        for output in outputs:
            assert output.shape == (2, backbone.num_prefix_tokens + (size // 8) ** 2, backbone.embed_dim)
        torch.testing.assert_close(outputs[-1][:, backbone.num_prefix_tokens :], features.patches)
        assert not torch.equal(outputs[0], outputs[1])
        if backbone.num_prefix_tokens == 1 and kind != "beit":
            torch.testing.assert_close(outputs[-1][:, 0], features.pooled)
        torch.testing.assert_close(backbone(images), features.pooled)
    assert not any(name.startswith("pooler.dense") for name in backbone.state_dict())


@pytest.mark.parametrize("kind", ["beit", "convnext", "dinov2", "dinov3_vit", "swin"])
def test_the_pooled_feature_is_that_of_the_model_s_own_pooler(built, kind):
    backbone = built(kind)
    images = torch.randn(2, 3, 32, 32)
    own = backbone.model(images).pooler_output.flatten(1)
    torch.testing.assert_close(backbone(images), own, atol=1e-5, rtol=1e-5)


def test_of_a_distilled_one_it_is_the_mean_of_both_tokens(built):
    backbone = built("deit")
    images = torch.randn(2, 3, 32, 32)
    both = backbone.model(images).last_hidden_state[:, :2]
    torch.testing.assert_close(backbone(images), both.mean(1))


@pytest.mark.parametrize("kind", GLOBAL)
def test_attention_is_the_model_s_own_in_every_block_and_the_rest_stays_fused(built, kind):
    backbone = built(kind)
    assert isinstance(backbone, HasSelfAttention)
    config = backbone.model.config
    assert config._attn_implementation == "sdpa"
    for size in (32, 48):
        images = torch.randn(2, 3, size, size)
        how = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
        config._attn_implementation = "eager"
        own = backbone.model(images, output_attentions=True, **how).attentions
        config._attn_implementation = "sdpa"
        for block in (0, 1, -1):
            maps = backbone.get_selfattention(images, block)
            torch.testing.assert_close(maps, own[block], atol=1e-6, rtol=0)
        torch.testing.assert_close(maps, backbone.get_last_selfattention(images), atol=0, rtol=0)
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
        assert config._attn_implementation == "sdpa"
    assert "no block 2" in refusal(backbone.get_selfattention, images, 2)


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "dinov2_with_registers"])
def test_attention_is_the_softmax_of_q_and_k_by_hand(built, kind):
    backbone = built(kind)
    seen = {}
    for name, module in backbone.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(lambda _, __, x, name=name: seen.__setitem__(name, x))
    images = torch.randn(2, 3, 32, 32)
    maps = backbone.get_last_selfattention(images)
    # Those of the last block are seen last.
    q, k = (
        [x for name, x in seen.items() if name.endswith(end)][-1].unflatten(-1, (4, 8)).transpose(1, 2)
        for end in ("q_proj", "k_proj")
    )
    by_hand = (q.double() @ k.double().mT / 8**0.5).softmax(-1).float()
    torch.testing.assert_close(maps, by_hand, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_what_has_windows_or_no_tokens_has_no_map(built, kind):
    assert not isinstance(built(kind), HasSelfAttention)


def test_at_its_own_size_a_swin_is_the_library_s_whatever_it_saw_before(built):
    backbone = built("swin", {"window_size": 4})
    images = torch.randn(2, 3, 32, 32)
    own = transformers.SwinModel(backbone.model.config)
    own.load_state_dict(backbone.state_dict())
    expected = own.eval()(images).last_hidden_state
    backbone(torch.randn(1, 3, 16, 16))  # smaller than a window
    torch.testing.assert_close(backbone.forward_features(images).patches, expected)


@pytest.mark.parametrize("kind", ["vit", "dinov3_vit", "swin"])
def test_nothing_is_drawn_by_a_generator(built, kind):
    of_maps = "attention_dropout" if kind == "dinov3_vit" else "attention_probs_dropout_prob"
    dropout = {of_maps: 0.5} | ({} if kind == "dinov3_vit" else {"hidden_dropout_prob": 0.5})
    backbone = built(kind, dropout, drop_path_rate=0.3).train()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), backbone(images))
    keep = torch.zeros(len(backbone.drop_path_rates), 2, dtype=torch.bool)
    assert len(keep) and not torch.equal(backbone(images, keep), backbone(images))


def test_what_has_no_stochastic_depth_of_its_own_has_it_at_each_branch(built):
    backbone = built("vit", {"num_hidden_layers": 3}, drop_path_rate=0.2)
    assert backbone.drop_path_rates == pytest.approx((0, 0, 0.1, 0.1, 0.2, 0.2))


def test_a_mask_token_is_not_trained_and_all_else_is(built):
    still = [name for name, p in built("dinov2").named_parameters() if not p.requires_grad]
    assert still == ["model.embeddings.mask_token"]


@pytest.mark.parametrize(
    ("kind", "positions_decay"), [("vit", False), ("deit", False), ("dinov2", True)]
)
def test_decay_is_as_the_authors_have_it(built, kind, positions_decay):
    exempt = built(kind).no_weight_decay()
    assert ("model.embeddings.position_embeddings" not in exempt) == positions_decay
    assert "model.embeddings.cls_token" in exempt
    assert not any(name.endswith("q_proj.weight") for name in exempt)


def test_channels_size_and_options_are_the_run_s(built):
    backbone = built("vit", in_chans=5, image_size=16, hidden_size=16, num_attention_heads=2)
    assert backbone(torch.randn(1, 5, 16, 16)).shape == (1, 16)
    assert backbone.state_dict()["embeddings.position_embeddings"].shape[1] == 1 + 4
    backbone = built("vit", image_size=None)
    assert backbone.image_size == 32


def test_nothing_comes_from_the_network_and_no_code_beside_it_runs(built, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    built("vit")
    code = {"AutoConfig": "mine.Mine", "AutoModel": "mine.Model"}
    for kind in ("mine", "vit"):  # unknown, and known beside code that claims to know better
        folder = tmp_path / f"{kind}_with_code"
        folder.mkdir()
        (folder / "mine.py").write_text("raise SystemExit('it ran')\n")
        said = {**_VIT, "model_type": kind, "auto_map": code}
        (folder / "config.json").write_text(json.dumps(said))
    assert "cannot be built" in refusal(create_backbone, f"hf:{tmp_path}/mine_with_code")
    assert create_backbone(f"hf:{folder}").embed_dim == 32
    assert "none is fetched" in refusal(create_backbone, "hf:google/vit-base-patch16-224")
    pretrained = {"use_pretrained_backbone": True, "use_timm_backbone": True, "backbone": "resnet18"}
    assert "has no patch_size" in refusal(built, "detr", pretrained)


@pytest.mark.parametrize(
    ("kind", "said", "options", "sentence"),
    [
        ("vit", {}, {"speed": 3}, "a ViTConfig, has no speed."),
        ("vit", {}, {"num_channels": 1}, "which --in_chans says"),
        ("vit", {"num_hidden_layers": "two"}, {}, "cannot be built: "),
        ("bert", {"num_hidden_layers": 1}, {}, "takes no images of 32 pixels"),
        ("vit_mae", _VIT, {}, "gives 5 tokens for 4 × 4 patches"),
        ("no_such_kind", {}, {}, "cannot be built: "),
    ],
)
def test_what_does_not_fit_is_refused(built, kind, said, options, sentence):
    assert sentence in refusal(built, kind, said, **options)


def test_sizes_that_are_cut_off_are_refused(built):
    backbone = built("vit")
    require_sizes(backbone, [32, 16])
    assert "it takes 8, 16, 24" in refusal(require_sizes, backbone, [20])


def test_without_the_package_the_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'dino_kit[hf]'" in refusal(create_backbone, "hf:somewhere")


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_backbone_can_be_pickled(built, kind):
    images = torch.randn(1, 3, 32, 32)
    backbone = built(kind)
    assert torch.equal(pickle.loads(pickle.dumps(backbone))(images), backbone(images))


@pytest.mark.parametrize("kind", ["vit", "dinov3_vit", "swin"])
def test_computing_blocks_again_changes_no_gradient(built, kind):
    backbone = built(kind, drop_path_rate=0.3).train()
    images = torch.randn(2, 3, 32, 32)
    keep = torch.arange(len(backbone.drop_path_rates) * 2).reshape(-1, 2) % 3 > 0
    found = []
    for again in (False, True):
        backbone.checkpoint_activations = again
        backbone.zero_grad()
        backbone(images, keep).square().sum().backward()
        found.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    for plain, computed_again in zip(*found, strict=True):
        torch.testing.assert_close(plain, computed_again, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_half_precision_is_near_the_full_one(built, kind):
    backbone = built(kind)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        full = backbone(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = backbone(images)
    assert (half.float() - full).norm() < 0.05 * full.norm()


def test_a_checkpoint_is_read_though_the_folder_has_moved(built, tmp_path):
    backbone = built("vit")
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    config = {"arch": f"hf:{tmp_path}/vit", "global_crops_size": 32}
    torch.save({"teacher": state, "config": config}, tmp_path / "checkpoint.pth")
    images = torch.randn(1, 3, 32, 32)
    load = dino_kit.load_backbone
    assert torch.equal(load(tmp_path / "checkpoint.pth")(images), backbone(images))
    (tmp_path / "vit").rename(tmp_path / "moved")
    assert "none is fetched" in refusal(load, tmp_path / "checkpoint.pth")
    again = load(tmp_path / "checkpoint.pth", arch=f"hf:{tmp_path}/moved")
    assert torch.equal(again(images), backbone(images))
