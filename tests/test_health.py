"""The measures of a run's health, against what they are by definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dino_kit.training.health import Answers, Watch

K = 16


def answers(*batches) -> Answers:
    one = Answers()
    for batch in batches:
        one.add(batch)
    return one


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
