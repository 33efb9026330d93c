"""Optimisers, parameter groups and what is done to gradients."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn

from dino_kit import sharding
from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.vit import VisionTransformer
from dino_kit.errors import UserError
from dino_kit.heads import DINOHead
from dino_kit.student_teacher import MultiCropNetwork
from dino_kit.training import optim

TRAJECTORIES = [f"trajectory_{kind}" for kind in ("adamw", "adamw_free_g", "sgd", "lars_bn")]


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_decayed_parameters_golden(golden, name):
    config = json.loads(str(golden(name)["config"]))
    backbone, head = config["backbone"], config["head"]
    network = MultiCropNetwork(
        VisionTransformer(
            backbone["img_size"],
            backbone["patch_size"],
            embed_dim=backbone["embed_dim"],
            depth=backbone["depth"],
            num_heads=backbone["num_heads"],
        ),
        DINOHead(backbone["embed_dim"], **head),
    )
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, plain = optim.parameter_groups(network)
    assert [names[id(p)] for p in decayed["params"]] == config["regularised"]
    assert plain["weight_decay"] == 0
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    assert {id(p) for p in plain["params"]} == trained - {id(p) for p in decayed["params"]}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"body": nn.Linear(5, 7), "norm": nn.LayerNorm(7), "last_layer": nn.Linear(7, 3)}
    )


def give_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def adamw_step(p, g, state, lr, decay):
    m, v, t = state.get("m", 0), state.get("v", 0), state.get("t", 0) + 1
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    state.update(m=m, v=v, t=t)
    return p * (1 - lr * decay) - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def sgd_step(p, g, state, lr, decay):
    g = g + decay * p
    state["mu"] = 0.9 * state["mu"] + g if "mu" in state else g
    return p - lr * state["mu"]


def lars_step(p, g, state, lr, decay):
    if p.ndim != 1:
        g = g + decay * p
        if p.norm() > 0 and g.norm() > 0:
            g = g * 0.001 * p.norm() / g.norm()
    state["mu"] = 0.9 * state.get("mu", 0) + g
    return p - lr * state["mu"]


@pytest.mark.parametrize(
    ("name", "formula"), [("adamw", adamw_step), ("sgd", sgd_step), ("lars", lars_step)]
)
def test_steps_follow_the_formula_with_a_last_layer_frozen_at_first(name, formula):
    module = network()
    with torch.no_grad():
        module["body"].weight.zero_()  # LARS has no ratio here and must still move
    optimizer = optim.build_optimizer(name, optim.parameter_groups(module))
    expected = {n: p.detach().double() for n, p in module.named_parameters()}
    states = {n: {} for n in expected}
    for step in range(6):
        lr, decay = 0.01 * (step + 1), 0.04 * step
        give_gradients(module, step)
        if step < 2:
            optim.cancel_last_layer_gradients(module)
        optim.set_hyperparameters(optimizer, lr, decay)
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        assert len(gradients) == (4 if step < 2 else 6)
        for n, g in gradients.items():
            decayed = decay if optim.is_regularized(n, g) else 0.0
            expected[n] = formula(expected[n], g.double(), states[n], lr, decayed)
        copies = {n: g.clone() for n, g in gradients.items()}
        optimizer.step()
        assert all(torch.equal(gradients[n], copies[n]) for n in copies)
        for n, p in module.named_parameters():
            torch.testing.assert_close(p.detach().double(), expected[n], rtol=1e-5, atol=1e-6)
    assert module["body"].weight.any()


def test_a_frozen_last_layer_neither_moves_nor_gathers_moments():
    module = network()
    optimizer = optim.build_optimizer("adamw", optim.parameter_groups(module))
    optim.set_hyperparameters(optimizer, 0.1, 0.4)
    before = module["last_layer"].weight.detach().clone()
    give_gradients(module, 0)
    optim.cancel_last_layer_gradients(module)
    optimizer.step()
    assert torch.equal(module["last_layer"].weight, before)
    assert module["last_layer"].weight not in optimizer.state
    assert module["body"].weight in optimizer.state


def test_only_the_first_group_decays():
    optimizer = optim.build_optimizer("sgd", optim.parameter_groups(network()))
    optim.set_hyperparameters(optimizer, 0.25, 0.3)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.25, 0.3),
        (0.25, 0.0),
    ]


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipping_is_per_tensor(max_norm):
    torch.manual_seed(0)
    gradients = [scale * torch.randn(4, 5) for scale in (1e-4, 0.1, 1.0, 100.0)]
    gradients.append(torch.zeros(3))
    before = [g.clone() for g in gradients]
    norms = sharding.norms(gradients)
    torch.testing.assert_close(norms, torch.stack([g.norm() for g in before]))
    optim.clip_per_tensor_(gradients, norms, max_norm)
    for got, g in zip(gradients, before, strict=True):
        if g.norm() <= max_norm:
            assert torch.equal(got, g)
        else:
            torch.testing.assert_close(got, g * (max_norm / (g.norm() + 1e-6)))


def steps(module, optimizer, numbers):
    for step in numbers:
        give_gradients(module, step)
        optim.set_hyperparameters(optimizer, 0.01, 0.1)
        optimizer.step()


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_saved_optimizer_goes_on_bit_for_bit(name):
    straight = network()
    optimizer = optim.build_optimizer(name, optim.parameter_groups(straight))
    steps(straight, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"weights": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(straight, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network()
    resumed.load_state_dict(saved["weights"])
    optimizer = optim.build_optimizer(name, optim.parameter_groups(resumed))
    optimizer.load_state_dict(saved["optimizer"])
    steps(resumed, optimizer, range(3, 6))
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("adamw", torch.optim.AdamW),
        ("sgd", lambda groups: torch.optim.SGD(groups, lr=0, momentum=0.9)),
    ],
)
def test_states_go_to_and_from_the_optimizers_of_torch(name, plain):
    ours_module, plain_module = network(), network()
    ours = optim.build_optimizer(name, optim.parameter_groups(ours_module))
    theirs = plain(optim.parameter_groups(plain_module))
    steps(ours_module, ours, range(2))
    steps(plain_module, theirs, range(2))
    one, other = ours.state_dict(), theirs.state_dict()
    ours.load_state_dict(other)
    theirs.load_state_dict(one)
    steps(ours_module, ours, range(2, 4))
    steps(plain_module, theirs, range(2, 4))
    for a, b in zip(ours_module.parameters(), plain_module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="adamw, sgd, lars"):
        optim.build_optimizer("adam", optim.parameter_groups(network()))


@pytest.mark.parametrize(
    ("name", "options", "exempt"),
    [
        ("vit", {"num_heads": 2}, set()),  # the reference's groups, where both of them decay
        ("deepvit", {"num_heads": 2}, {"cls_token", "pos_embed"}),
        ("resmlp", {}, set()),
    ],
)
def test_what_decays_is_as_the_authors_of_a_backbone_have_it(name, options, exempt):
    network = nn.Module()
    network.backbone = create_backbone(name, image_size=16, embed_dim=8, depth=1, **options)
    groups = optim.parameter_groups(network)
    decayed = {id(p) for p in groups[0]["params"]}
    others = {id(p) for p in groups[1]["params"]}
    own = {n: p for n, p in network.backbone.named_parameters() if p.requires_grad}
    assert {n for n, p in own.items() if id(p) in others and p.ndim > 1} == exempt
    assert all(p.ndim > 1 for p in own.values() if id(p) in decayed)
    assert len(decayed) + len(others) == len(own)
