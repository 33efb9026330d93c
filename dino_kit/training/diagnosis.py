"""The name of a run's state, told from the measures of its health, and what to do about it.

At the start every run looks ill: the answers of fresh networks mean nothing, a centre that is not
settled lets all crops share a few prototypes, and a teacher that has nothing to say yet answers
evenly, as a collapsed one does. So a run is warming up until its learning rate has peaked and its
prototypes move, which the plan knows; from then on it has to show that its answers depend on what
it sees. The thresholds were set on healthy and on forced runs, and lie between them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

WARMING_UP, LEARNING = "warming up", "learning"
UNIFORM, ONE_POINT, DEAD = "uniform collapse", "one-point collapse", "dead student"
UNSTEADY = "unsteady teacher"
COLLAPSED = (UNIFORM, ONE_POINT, DEAD, UNSTEADY)

_LINES = 5  # that a state is told from, as the measures of one batch are noisy
_LEAST_LINES = 3
_SAME_ANSWER = 0.02  # nats that an answer has to tell about its crop
_AGREEMENT = 0.02  # nats of KL(teacher‖student) below which the student has nothing left to learn
_ONE_DIRECTION = 1.8  # effective rank of embeddings that all point the same way
_CERTAIN, _FEW = 0.1, 5  # nats of entropy, and prototypes, below which an answer is one of a few
# Of ln K: how far the teacher's entropy goes to and fro in these lines, and how far from one line to
# the next, but for one pair: a single odd line is no swing.
_SWING, _MOVE = 0.3, 0.09
_SPEAKING = 0.5  # nats that a teacher has to tell before a silent student is a fault
_DEAD_SHARE = 0.02  # of the teacher's information, below which the student's is none


class Diagnosis:
    """Follows a run from line to line and names its state.

    Args:
        out_dim: K, the number of prototypes.
        warmup_steps: steps during which a run is warming up.
    """

    def __init__(self, *, out_dim: int, warmup_steps: int):
        self.even = math.log(out_dim)  # the entropy of an even answer
        self.warmup_steps = warmup_steps
        self.state = WARMING_UP
        self._lines: deque[dict[str, float]] = deque(maxlen=_LINES)

    def update(self, done: int, measures: Mapping[str, float]) -> str:
        """The state after ``done`` steps, whose last one had these measures.

        ``measures`` are those of :class:`~dino_kit.training.health.Watch`; there are none where
        the step was dropped, and the state stays.
        """
        if measures:
            self._lines.append({name: measures[name] for name in _READ})
            if done > self.warmup_steps and len(self._lines) >= _LEAST_LINES:
                self.state = self._state()
        return self.state

    def alarm(self) -> str | None:
        """What is wrong and which knobs to turn, in a sentence or two; None where nothing is."""
        if self.state not in COLLAPSED:
            return None
        even = f" An even answer makes the loss ln out_dim = {self.even:.2f}."
        name = f"{self.state[0].upper()}{self.state[1:]}"
        what, knobs = FAULTS[self.state]
        return f"{name}: {what}.{even if self.state == UNIFORM else ''} {knobs}"

    def _state(self) -> str:
        mean = {name: sum(line[name] for line in self._lines) / len(self._lines) for name in _READ}
        told, understood = mean["teacher_information"], mean["student_information"]
        entropy = mean["teacher_entropy"]
        # A collapse is over only when answers depend on the crop again, not when the student lags.
        agree = mean["kl"] < _AGREEMENT or self.state in COLLAPSED
        silent = told < _SAME_ANSWER and agree
        if silent or mean["effective_rank"] < _ONE_DIRECTION:
            return UNIFORM if entropy > 0.5 * self.even else ONE_POINT
        if entropy < _CERTAIN and mean["prototypes_used"] < _FEW:
            return ONE_POINT
        if self._swings():
            return UNSTEADY
        if told > _SPEAKING and understood < _DEAD_SHARE * told:
            return DEAD
        return LEARNING

    def _swings(self) -> bool:
        """Whether the teacher's entropy goes to and fro, by more than noise, from line to line."""
        entropies = [line["teacher_entropy"] / self.even for line in self._lines]
        moves = sorted(abs(b - a) for a, b in pairwise(entropies))
        to_and_fro = sum(moves) - abs(entropies[-1] - entropies[0])
        return to_and_fro > _SWING and moves[1] > _MOVE

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "lines": list(self._lines)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]
        self._lines.extend(state["lines"])


_READ = (
    "teacher_entropy",
    "kl",
    "prototypes_used",
    "teacher_information",
    "student_information",
    "effective_rank",
)
# What each fault is, and the knobs to turn.
FAULTS = {
    UNIFORM: (
        ("the teacher answers every crop alike, with all prototypes about equally, and the student "
        "has nothing to learn from it"),
        ("Lower --teacher_temp and --warmup_teacher_temp, keep --norm_last_layer true, lengthen "
        "--freeze_last_layer, or lower --lr."),
    ),
    ONE_POINT: (
        "the teacher answers every crop with the same few prototypes",
        ("Raise --teacher_temp, lower --center_momentum so that the centre follows faster, raise "
        "--momentum_teacher, or take --centering sinkhorn, which spreads the answers over the "
        "prototypes."),
    ),
    DEAD: (
        "the student answers every crop alike, although the teacher does not",
        "Lower --lr, lengthen --warmup_epochs, lower --clip_grad, or take --precision fp32.",
    ),
    UNSTEADY: (
        ("the teacher's answers swing as a whole, between one prototype and all of them, so there "
        "is nothing steady to learn from"),
        ("Raise --momentum_teacher so that the teacher moves more slowly than the student, lower "
        "--lr, or lengthen --warmup_epochs."),
    ),
}
