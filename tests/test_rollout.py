"""Attention rollout: the product of all blocks' mixing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dino_kit.backbones.build import create_backbone
from dino_kit.errors import UserError
from dino_kit.evaluators.rollout import rollout, rollout_map

SIZES = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}


def build(name: str = "vit", **options) -> nn.Module:
    torch.manual_seed(0)
    backbone = create_backbone(name, **{**SIZES, **options})
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return backbone


def picture(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(rows))


class Given(nn.Module):
    """A network of the attention that it is given, block by block (heads, T, T)."""

    patch_size, num_prefix_tokens = 2, 1

    def __init__(self, *maps: torch.Tensor):
        super().__init__()
        self.maps, self.depth, self.asked = maps, len(maps), []

    def get_last_selfattention(self, images):
        return self.get_selfattention(images, -1)

    def get_selfattention(self, images, block):
        self.asked.append((block, self.training, torch.is_grad_enabled()))
        return self.maps[block][None]


def test_two_blocks_are_multiplied_the_last_one_from_the_left():
    # The last block's class token looks at patch 1 alone, and patch 1 in the block before at patch 2.
    looks_at = torch.zeros(2, 1, 5, 5)
    for block, targets in enumerate([[0, 2, 2, 3, 4], [1, 1, 2, 3, 4]]):
        looks_at[block, 0, range(5), targets] = 1.0
    network = Given(*looks_at)
    # Half stays with the class token, which kept itself before; half is patch 1, by halves patch 2.
    torch.testing.assert_close(rollout(network, picture(4, 4)), torch.tensor([[0.5, 0.25, 0.25, 0, 0]]))
    torch.testing.assert_close(
        rollout_map(network, picture(4, 4)), torch.tensor([[0.25, 0.25], [0.0, 0.0]])
    )


@pytest.mark.parametrize("options", [{}, {"num_register_tokens": 3, "layer_scale": 0.3}], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (4, 4)])
def test_it_is_the_product_of_all_blocks(size, options):
    backbone, image = build(**options), picture(*size)
    patches, prefix = size[0] * size[1] // 16, backbone.num_prefix_tokens
    expected = torch.eye(prefix + patches, dtype=torch.float64)
    with torch.no_grad():
        for block in range(3):
            mean = backbone.get_selfattention(image[None], block)[0].double().mean(dim=0)
            expected = (0.5 * mean + 0.5 * torch.eye(len(mean))) @ expected
    every = rollout(backbone, image, prefix + patches)
    torch.testing.assert_close(every.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(every.sum(dim=1), torch.ones(prefix + patches))
    torch.testing.assert_close(rollout(backbone, image), every[:1])
    found = rollout_map(backbone, image)
    torch.testing.assert_close(found.flatten(), every[0, prefix:])
    assert found.shape == (size[0] // 4, size[1] // 4) and found.dtype == torch.float32
    assert patches == 1 or found.std() > 1e-4


def test_rows_are_scaled_to_sum_to_one():
    rows = torch.rand(2, 2, 5, 5)  # of no softmax
    torch.testing.assert_close(rollout(Given(*rows), picture(4, 4), 5).sum(dim=1), torch.ones(5))


def test_each_block_is_asked_for_once_without_learning():
    network = Given(*torch.full((4, 1, 5, 5), 0.2)).train()
    assert not rollout(network, picture(4, 4)).requires_grad
    assert sorted(network.asked) == [(block, False, False) for block in range(4)]
    assert network.training


def test_what_has_come_from_registers_is_left_out():
    """As much as a patch would have, were all attention even."""
    network = Given(torch.full((1, 8, 8), 1 / 8))
    network.num_prefix_tokens = 4
    assert rollout_map(network, picture(4, 4)).tolist() == [[1 / 16] * 2] * 2


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("deepvit", {}, "^DeepViT mixes and normalises its maps .* no self-attention; --maps reattention"),
        ("resmlp", {"num_heads": None}, "^ResMLP has no self-attention among all of its tokens"),
    ],
)
def test_a_network_without_attention_is_refused(name, options, said):
    sizes = {key: value for key, value in {**SIZES, **options}.items() if value is not None}
    backbone = create_backbone(name, **sizes)
    assert not hasattr(backbone, "get_selfattention")
    with pytest.raises(UserError, match=said):
        rollout(backbone, picture(16, 16))


def test_too_many_patches_are_refused(monkeypatch):
    monkeypatch.setattr("dino_kit.evaluators.attention._MOST_PATCHES", 3)
    with pytest.raises(UserError, match="4 patches of 2 × 2, and maps are shown of 3 at most"):
        rollout(Given(torch.ones(1, 5, 5)), picture(4, 4))
