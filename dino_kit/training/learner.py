"""One optimiser step of DINO: everything that it changes, and the rule that it changes all or nothing.

Legend: B images of a micro-batch, V views of an image, V_g views of one size, K prototypes,
L residual branches of a backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino_kit import distributed, ema, sharding
from dino_kit.backbones.stochastic_depth import draw_keep
from dino_kit.batch_norm import batch_norms
from dino_kit.objectives.dino import cross_view_loss
from dino_kit.training import checkpoint, optim
from dino_kit.training.health import Watch
from dino_kit.training.plan import Plan
from dino_kit.training.precision import DTYPES, LossScale


class MicroBatch(NamedTuple):
    """Normalised crops on the device."""

    groups: list[Tensor]  # per crop size (V_g, B, C, S_g, S_g); first the two global crops
    places: Tensor  # (B,) int64 on the host: each image's place in the global batch


class Outcome(NamedTuple):
    """What a step reports. Where it was dropped, nothing was measured or observed."""

    committed: bool
    overflowed: bool  # dropped because fp16 overflowed, which lowers the loss scale and is no fault
    measured: dict[str, Tensor]  # scalars of this process, still on the device
    observed: dict[str, Tensor]  # how healthy the run is, where that was asked; of all processes
    settings: dict[str, float]
    request: int = 0  # the largest that a process asked for
    suspect: bool = False  # the step was dropped, and this process's own loss was not finite


class Learner:
    """Student, teacher, objective and optimiser, with the step that moves them together.

    Args:
        student, teacher: :class:`~dino_kit.student_teacher.MultiCropNetwork`, on the device.
        centering: how teacher logits become targets; holds the centre.
        optimizer: over :func:`~dino_kit.training.optim.parameter_groups` of the student.
        plan: learning rate, weight decay, momentum and temperature by step.
        student_temp: temperature of the student's softmax.
        clip_grad: largest norm of each parameter tensor's gradient; 0 for no clipping.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        seed: of the run; stochastic depth is a function of it.
        plain_backbone: where the networks are sharded, the teacher's backbone before that, of
            :func:`~dino_kit.sharding.without_weights`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        centering,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        *,
        student_temp: float = 0.1,
        clip_grad: float = 3.0,
        precision: str = "fp32",
        seed: int = 0,
        plain_backbone: nn.Module | None = None,
    ):
        self.student, self.teacher = student, teacher
        self.centering, self.optimizer, self.plan = centering, optimizer, plan
        self.student_temp, self.clip_grad, self.seed = student_temp, clip_grad, seed
        self.device = next(student.parameters()).device
        self.autocast_dtype = None if precision == "fp32" else DTYPES[precision]
        self.loss_scale = LossScale() if precision == "fp16" else None
        self.is_sharded, self._plain_backbone = sharding.is_sharded(student), plain_backbone
        # The wrapper that averages gradients over the processes; the student itself on one, and
        # where it is sharded, as then it does so by itself.
        self.parallel_student = (
            student if self.is_sharded else distributed.data_parallel(student, self.device)
        )
        self._buffers = [*student.buffers(), *teacher.buffers()]

    def step(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        observe: bool = False,
        request: Callable[[], int] = int,
    ) -> Outcome:
        """Take one optimiser step on ``batches``, the micro-batches of this process.

        ``observe`` asks for the measures of :mod:`~dino_kit.training.health`, on all processes.
        ``request()`` is what this process wants to happen after the step, see
        :mod:`~dino_kit.training.interruption`; all processes learn of it.

        The teacher sees all of them before the student sees the first, because Sinkhorn-Knopp
        balances the whole step's logits. Nothing is changed unless the loss and every gradient
        are finite on every process.
        """
        settings = self.plan.at(step)
        buffers_before = [buffer.clone() for buffer in self._buffers]
        watch = Watch() if observe else None
        targets, candidate = self._teach(batches, settings["teacher_temp"], watch)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._learn(step, batches, targets, watch)

        parameters = [p for p in self.student.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if self.loss_scale is not None:
            torch._foreach_mul_(sharding.parts(gradients), 1.0 / self.loss_scale.scale)
        norms = sharding.norms(gradients)
        finite_loss, finite_gradients, requested = self._agree(loss, norms, request())

        committed = finite_loss and finite_gradients
        overflowed = finite_loss and not finite_gradients and self._can_rescale()
        if committed:
            self._commit(step, settings, gradients, norms, candidate)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, before in zip(self._buffers, buffers_before, strict=True):
                buffer.copy_(before)
        if self.loss_scale is not None and finite_loss:
            self.loss_scale.update(overflowed)
        measured = {"loss": loss, "grad_norm": norms.mean()} if committed else {}
        observed = watch.measures(loss) if watch and committed else {}
        suspect = not (committed or loss.isfinite())
        return Outcome(committed, overflowed, measured, observed, settings, requested, suspect)

    @torch.no_grad()
    def _teach(
        self, batches: Sequence[MicroBatch], temperature: float, watch: Watch | None
    ) -> tuple[list[Tensor], Any]:
        """Targets (2, B, K) for each micro-batch, and the state to commit if the step holds."""
        with self._autocast():
            features = [self.teacher.embed(batch.groups[:1]) for batch in batches]
            logits = [self.teacher.project(part) for part in features]
        targets, candidate = self.centering.targets(torch.cat(logits, dim=1), temperature)
        if watch:
            watch.saw_teacher(targets, torch.cat(features, dim=1))
        return list(targets.split([part.shape[1] for part in logits], dim=1)), candidate

    def _learn(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        targets: list[Tensor],
        watch: Watch | None,
    ) -> Tensor:
        """Accumulate the student's gradients; returns this process's mean loss."""
        images = sum(len(batch.places) for batch in batches)
        total = torch.zeros((), device=self.device)
        for position, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            last = position == len(batches) - 1
            with self._gradients_stay_local(unless=last):
                with self._autocast():
                    logits = self.parallel_student(batch.groups, self._keep(step, batch))
                loss = cross_view_loss(logits, target, self.student_temp)
                loss = loss * (len(batch.places) / images)
                (loss * self.loss_scale.scale if self.loss_scale else loss).backward()
            total += loss.detach()
            if watch:
                watch.saw_student(logits[:2].detach(), self.student_temp)
        return total

    def _commit(self, step: int, settings, gradients, norms: Tensor, candidate) -> None:
        if self.clip_grad:
            optim.clip_per_tensor_(gradients, norms, self.clip_grad)
        if self.plan.last_layer_frozen(step):
            optim.cancel_last_layer_gradients(self.student)
        optim.set_hyperparameters(self.optimizer, settings["lr"], settings["weight_decay"])
        self.optimizer.step()
        self.centering.commit(candidate)
        networks = (sharding.parts(net.parameters()) for net in (self.teacher, self.student))
        ema.update(*networks, settings["momentum"])

    def _agree(self, loss: Tensor, norms: Tensor, request: int) -> tuple[bool, bool, int]:
        """Whether loss and gradients are finite on every process, and the largest request.

        This is the step's one host sync.
        """
        asked = torch.full((), -request, dtype=torch.int32, device=self.device)
        flags = torch.stack((loss.isfinite(), norms.isfinite().all(), asked)).to(torch.int32)
        finite_loss, finite_gradients, asked = distributed.all_reduce_min(flags).tolist()
        return bool(finite_loss), bool(finite_gradients), -asked

    def _can_rescale(self) -> bool:
        return self.loss_scale is not None and self.loss_scale.can_shrink()

    def _keep(self, step: int, batch: MicroBatch) -> list[Tensor] | None:
        """Which residual branches each view keeps: (L, V_g, B) for each crop size."""
        rates = self.student.backbone.drop_path_rates
        if not any(rates):
            return None
        views = [group.shape[0] for group in batch.groups]
        keep = draw_keep(self.seed, step, batch.places, sum(views), rates)
        return list(keep.split(views, dim=1))

    def _autocast(self):
        if self.autocast_dtype is None:
            return nullcontext()
        # What autocast caches is every weight in half precision, which sharding is to spare.
        return torch.autocast(
            self.device.type, dtype=self.autocast_dtype, cache_enabled=not self.is_sharded
        )

    def _gradients_stay_local(self, unless: bool):
        if self.is_sharded:
            sharding.sum_gradients(self.student, unless)
            return nullcontext()
        if unless or self.parallel_student is self.student:
            return nullcontext()
        return self.parallel_student.no_sync()

    def go_alone(self) -> bool:
        """Let this process take steps without the others from now on; returns whether it can.

        It cannot where the networks, or the rows whose statistics a batch norm takes, lie on several.
        """
        if distributed.world_size() > 1 and (self.is_sharded or batch_norms(self.student)):
            return False
        self.parallel_student = self.student  # and the wrapper, which waits for the others, is gone
        return True

    def teacher_backbone(self) -> nn.Module | None:
        """The teacher's backbone, whole, for the main process; all processes have to call it.

        Where the networks are sharded it is a copy on the CPU.
        """
        if not self.is_sharded:
            return self.teacher.backbone
        return sharding.whole_copy(self.teacher.backbone, self._plain_backbone)

    def state_dict(self, whole: bool = True) -> dict[str, Any]:
        """The checkpoint's entries, under the reference's keys.

        Where the networks are sharded, all processes have to call it and the main one gets it; or
        each gets its own parts, not ``whole``.
        """
        state = {
            **checkpoint.network_states(self.student, self.teacher),
            "optimizer": self.optimizer.state_dict(),
            "dino_loss": self.centering.state_dict(),
        }
        if self.loss_scale is not None:
            state["fp16_scaler"] = self.loss_scale.state_dict()
        return sharding.gathered(state) if whole else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        checkpoint.load_network(self.student, state["student"])
        checkpoint.load_network(self.teacher, state["teacher"])
        moments = sharding.divided_optimizer(state["optimizer"], self.optimizer)
        self.optimizer.load_state_dict(moments)
        self.centering.load_state_dict(state["dino_loss"])
        if self.loss_scale is not None and "fp16_scaler" in state:
            self.loss_scale.load_state_dict(state["fp16_scaler"])
