"""The measures of a run's health, against what they are by definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dino_kit.training.health import Answers, Watch, effective_rank, spread, view_retrieval

K = 16


def answers(*batches) -> Answers:
    one = Answers()
    for batch in batches:
        one.add(batch)
    return one


def unit(*shape, seed=0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_entropies_of_even_peaked_and_different_answers():
    even = torch.full((2, 3, K), 1 / K)
    assert answers(even).entropy().item() == pytest.approx(math.log(K), abs=1e-6)
    assert answers(even).entropy_of_mean().item() == pytest.approx(math.log(K), abs=1e-6)
    one_point = F.one_hot(torch.full((2, 3), 5), K).float()
    assert answers(one_point).entropy() == answers(one_point).entropy_of_mean() == 0
    different = F.one_hot(torch.arange(8).view(2, 4), K).float()
    assert answers(different).entropy() == 0
    assert answers(different).entropy_of_mean().item() == pytest.approx(math.log(8), abs=1e-6)


def test_answers_of_uneven_batches_are_those_of_all_at_once():
    rows = torch.randn(10, K, generator=torch.Generator().manual_seed(0)).softmax(-1)
    whole, parts = answers(rows), answers(rows[:7], rows[7:])
    assert torch.allclose(whole.entropy(), parts.entropy())
    assert torch.allclose(whole.entropy_of_mean(), parts.entropy_of_mean())
    assert whole.prototypes == parts.prototypes == K


def test_kl_is_what_the_loss_holds_beside_the_teachers_entropy():
    """The loss of all pairs is the mean over them of KL(teacher‖student) + the teacher's entropy."""
    from dino_kit.objectives.dino import cross_view_loss

    numbers = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 6, K, generator=numbers)
    targets = torch.randn(2, 6, K, generator=numbers).mul(2).softmax(-1)
    loss = cross_view_loss(logits, targets, 0.1)
    watch = Watch()
    watch.saw_teacher(targets, torch.randn(2, 6, 4, generator=numbers))
    watch.saw_student(logits[:2], 0.1)
    measures = watch.measures(loss)
    p = (logits / 0.1).log_softmax(-1)
    pairs = [(t, v) for t in range(2) for v in range(5) if t != v]
    kl = torch.stack([F.kl_div(p[v], targets[t], reduction="batchmean") for t, v in pairs]).mean()
    assert measures["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert measures["loss_ratio"].item() == pytest.approx(loss.item() / math.log(K))
    marginal = targets.mean(dim=(0, 1))
    entropy = -(marginal * marginal.log()).sum()
    assert measures["prototypes_used"].item() == pytest.approx(entropy.exp().item(), rel=1e-5)
    own = -(targets * targets.log()).sum(-1).mean()
    assert measures["teacher_entropy"].item() == pytest.approx(own.item(), rel=1e-5)
    assert measures["teacher_information"].item() == pytest.approx((entropy - own).item(), rel=1e-4)
    student = p[:2].exp()
    student_mean = student.mean(dim=(0, 1))
    told = -(student_mean * student_mean.log()).sum() + (student * p[:2]).sum(-1).mean()
    assert measures["student_information"].item() == pytest.approx(told.item(), rel=1e-4)


def test_what_is_observed_is_finite_for_a_network_that_answers_with_one_prototype():
    watch = Watch()
    logits = torch.full((2, 4, K), -1e4)
    logits[..., 3] = 1e4
    watch.saw_teacher(F.one_hot(torch.full((2, 4), 3), K).float(), torch.ones(2, 4, 8))
    watch.saw_student(logits, 0.1)
    measures = watch.measures(torch.tensor(0.0))
    assert all(bool(value.isfinite()) for value in measures.values())
    assert measures["prototypes_used"] == 1 and measures["teacher_information"] == 0


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_the_effective_rank_counts_directions(shape):
    same = unit(1, shape[1]).expand(*shape)
    assert effective_rank(same).item() == pytest.approx(1, abs=1e-3)
    basis = torch.eye(shape[1])[torch.arange(shape[0]) % 4]
    assert effective_rank(basis).item() == pytest.approx(4, rel=1e-4)
    x = unit(*shape)
    singular = torch.linalg.svdvals(x.double())
    p = singular / singular.sum()
    assert effective_rank(x).item() == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-4)


def test_what_is_the_same_but_for_rounding_has_rank_one():
    x = unit(1, 32).expand(64, 32) + 1e-4 * unit(64, 32, seed=1)
    assert effective_rank(F.normalize(x, dim=-1)) < 1.05


def test_spread_is_the_total_variance():
    assert spread(unit(1, 8).expand(5, 8)).item() == pytest.approx(0, abs=1e-6)
    assert spread(torch.cat((unit(4, 8), -unit(4, 8)))).item() == pytest.approx(1)
    x = unit(30, 8)
    assert spread(x).item() == pytest.approx(x.var(dim=0, correction=0).sum().item(), rel=1e-5)


def test_views_that_are_nearest_find_each_other_and_ties_do_not():
    x = unit(6, 32)
    assert view_retrieval(x, x) == 1
    # Rolled by one, no view is nearest to its own; two swapped pairs leave the other four.
    assert view_retrieval(x, x.roll(1, dims=0)) == 0
    assert view_retrieval(x, x[[1, 0, 2, 3, 4, 5]]).item() == pytest.approx(4 / 6)
    assert view_retrieval(x[:1].expand(6, -1), x[:1].expand(6, -1)) == 0


def test_the_two_directions_of_retrieval_are_counted_apart():
    first = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    second = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    # first[0] finds second[0]; first[1] finds second[0] (0.96 against 0.8); second[0] finds
    # first[1]; second[1] finds first[1].
    assert view_retrieval(first, second).item() == pytest.approx(2 / 4)
