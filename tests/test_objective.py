"""Loss, centre and Sinkhorn-Knopp."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from dino_kit import distributed
from dino_kit.errors import UserError
from dino_kit.objectives.centering import CENTERINGS, Center, SinkhornKnopp
from dino_kit.objectives.dino import cross_view_loss, dino_loss, next_center, teacher_targets
from dino_kit.objectives.sinkhorn import sinkhorn_knopp


def test_loss_golden(golden):
    arrays = {key: torch.from_numpy(v) for key, v in golden("loss").items() if key != "config"}
    config = json.loads(str(golden("loss")["config"]))
    crops, prototypes = config["ncrops"], config["out_dim"]
    center = torch.zeros(1, prototypes)
    steps = sorted({key.split("/")[0] for key in arrays if "/" in key}, key=int)
    for step in steps:
        student = arrays[f"{step}/student"].view(crops, -1, prototypes).requires_grad_()
        result = dino_loss(
            student,
            arrays[f"{step}/teacher"].view(2, -1, prototypes),
            center=center,
            temperature=float(arrays["teacher_temp_schedule"][arrays[f"{step}/epoch"]]),
            student_temp=config["student_temp"],
            center_momentum=config["center_momentum"],
        )
        result.loss.backward()
        center = result.center
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(result.loss, arrays[f"{step}/loss"], **close)
        torch.testing.assert_close(student.grad.flatten(0, 1), arrays[f"{step}/grad"], **close)
        torch.testing.assert_close(center, arrays[f"{step}/center"], **close)
    assert steps


def naive_loss(student, targets, temperature):
    """Pair by pair, in the student's precision."""
    terms = [
        -(targets[t] * (student[v] / temperature).log_softmax(-1)).sum(-1).mean()
        for t in range(2)
        for v in range(len(student))
        if t != v
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("crops", [2, 3, 10])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_loss_is_the_mean_over_pairs_of_different_crops(crops, scale):
    torch.manual_seed(0)
    student = (scale * torch.randn(crops, 5, 33)).requires_grad_()
    targets = teacher_targets(torch.randn(2, 5, 33), torch.randn(1, 33), 0.1)
    exact = student.detach().double().requires_grad_()
    expected = naive_loss(exact, targets.double(), 0.1)
    loss = cross_view_loss(student, targets, 0.1)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_loss_of_half_precision_logits_is_float32():
    torch.manual_seed(0)
    student = torch.randn(4, 3, 17, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randn(2, 3, 17).softmax(-1)
    loss = cross_view_loss(student, targets, 0.1)
    loss.backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, naive_loss(student.detach().float(), targets, 0.1))


def test_the_loss_stores_nothing_as_large_as_the_logits_but_themselves():
    stored = []
    student = torch.randn(10, 4, 64).requires_grad_()
    targets = torch.randn(2, 4, 64).softmax(-1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        cross_view_loss(student, targets, 0.1)
    large = {t.data_ptr() for t in stored if t.numel() >= student.numel()}
    assert large == {student.data_ptr()}
    assert sum(t.numel() for t in stored) <= student.numel() + targets.numel() + 10 * 4


def test_no_gradient_flows_into_the_teacher():
    teacher = torch.randn(2, 3, 8, requires_grad=True)
    result = dino_loss(
        torch.randn(4, 3, 8, requires_grad=True),
        teacher,
        center=torch.zeros(1, 8),
        temperature=0.04,
    )
    result.loss.backward()
    assert teacher.grad is None and not result.center.requires_grad


def test_the_loss_is_pure():
    student, teacher, center = torch.randn(4, 3, 8), torch.randn(2, 3, 8), torch.randn(1, 8)
    before = [t.clone() for t in (student, teacher, center)]
    results = [dino_loss(student, teacher, center=center, temperature=0.04) for _ in range(2)]
    assert all(map(torch.equal, *results))
    assert all(map(torch.equal, (student, teacher, center), before))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_the_loss(bad):
    for network in range(2):
        logits = [torch.randn(4, 3, 8), torch.randn(2, 3, 8)]
        logits[network][1, 2, 3] = bad
        loss = dino_loss(*logits, center=torch.zeros(1, 8), temperature=0.04).loss
        assert not loss.isfinite()


def plain_sinkhorn(logits, temperature, iterations):
    """By multiplication, as its authors write it; over- and underflows for large logits."""
    q = (logits.double().flatten(0, 1) / temperature).exp().T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True) * q.shape[0]
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T.view_as(logits)


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_the_plain_iteration(iterations):
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 10)
    got = sinkhorn_knopp(logits, 0.3, iterations)
    expected = plain_sinkhorn(logits, 0.3, iterations)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_sinkhorn_balances_the_prototypes():
    torch.manual_seed(0)
    targets = sinkhorn_knopp(torch.randn(2, 16, 8) + 3 * torch.randn(8), 1.0, iterations=50)
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 16))
    torch.testing.assert_close(targets.sum((0, 1)), torch.full((8,), 32 / 8), rtol=1e-4, atol=0)


def test_sinkhorn_survives_large_logits():
    torch.manual_seed(0)
    targets = sinkhorn_knopp(1e4 * torch.randn(2, 16, 8), 0.04)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 16))


def on_two_processes(monkeypatch, function, parts):
    """``function`` on each of two parts at once, their collectives joined."""
    barrier, slots, results = threading.Barrier(2), [None, None], [None, None]

    def reduced(combine):
        def collective(tensor):
            rank = int(threading.current_thread().name)
            slots[rank] = tensor.clone()
            barrier.wait()
            result = combine(torch.stack(slots))
            barrier.wait()
            return result

        return collective

    monkeypatch.setattr(distributed, "all_reduce_sum", reduced(lambda t: t.sum(0)))
    monkeypatch.setattr(distributed, "all_reduce_mean", reduced(lambda t: t.mean(0)))
    monkeypatch.setattr(distributed, "all_reduce_max", reduced(lambda t: t.amax(0)))

    def work(rank):
        results[rank] = function(parts[rank])

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    return results


def test_centre_and_sinkhorn_are_over_all_processes(monkeypatch):
    torch.manual_seed(0)
    logits, center = torch.randn(2, 8, 5), torch.randn(1, 5)
    parts = logits.split(4, dim=1)
    centers = on_two_processes(monkeypatch, lambda part: next_center(center, part, 0.9), parts)
    for got in centers:
        torch.testing.assert_close(got, next_center(center, logits, 0.9))
    targets = on_two_processes(monkeypatch, lambda part: sinkhorn_knopp(part, 0.1), parts)
    torch.testing.assert_close(torch.cat(targets, dim=1), sinkhorn_knopp(logits, 0.1))


@pytest.mark.parametrize("name", CENTERINGS)
def test_only_a_commit_changes_the_state(name):
    centering = CENTERINGS[name](8)
    before = centering.state_dict()["center"].clone()
    assert before.shape == (1, 8) and not before.any()
    logits = torch.randn(2, 5, 8) + 1
    first, candidate = centering.targets(logits, 0.04)
    again, _ = centering.targets(logits, 0.04)
    assert torch.equal(first, again)
    assert torch.equal(centering.state_dict()["center"], before)
    assert first.shape == (2, 5, 8) and first.dtype == torch.float32
    centering.commit(candidate)
    moved = not torch.equal(centering.state_dict()["center"], before)
    assert moved == (name == "center")


def test_the_centre_is_the_one_before_the_step():
    centering = Center(8, momentum=0.7)
    center = torch.zeros(1, 8)
    for _ in range(3):
        logits = torch.randn(2, 5, 8) + 1
        targets, candidate = centering.targets(logits, 0.04)
        torch.testing.assert_close(targets, teacher_targets(logits, center, 0.04))
        centering.commit(candidate)
        center = 0.7 * center + 0.3 * logits.mean((0, 1))
        torch.testing.assert_close(centering.state_dict()["center"], center)


@pytest.mark.parametrize("name", CENTERINGS)
def test_a_centering_goes_on_from_its_state(name):
    centering = CENTERINGS[name](8)
    centering.commit(centering.targets(torch.randn(2, 5, 8), 0.04)[1])
    other = CENTERINGS[name](8)
    other.load_state_dict(centering.state_dict())
    logits = torch.randn(2, 5, 8)
    assert torch.equal(other.targets(logits, 0.04)[0], centering.targets(logits, 0.04)[0])


@pytest.mark.parametrize("state", [{}, {"center": torch.zeros(1, 9)}])
@pytest.mark.parametrize("centering", [Center(8), SinkhornKnopp(8)])
def test_a_centre_of_another_size_is_refused(centering, state):
    with pytest.raises(UserError, match="out_dim"):
        centering.load_state_dict(state)


def test_a_centre_that_would_become_infinite_spoils_the_loss():
    """So that the step is dropped: the loss alone would stay finite, the centre not."""
    logits = torch.randn(2, 5, 8)
    logits[0, 1, 2] = -float("inf")
    student = torch.randn(4, 5, 8)
    plain = cross_view_loss(student, teacher_targets(logits, torch.zeros(1, 8), 0.04), 0.1)
    assert plain.isfinite()
    targets, candidate = Center(8).targets(logits, 0.04)
    assert not candidate.isfinite().all()
    assert not cross_view_loss(student, targets, 0.1).isfinite()
