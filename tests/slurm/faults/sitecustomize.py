"""Imported by Python at its start: lets a job of the tests wait, fail or die in a step, once.

``DINO_KIT_FAULT`` is ``KIND:RANK:STEP``; ``hold`` waits in the step, in all processes, until the
signal of a preemption has come. Lives after that, in which the run goes on, are left alone.
"""

import os
import signal
import time

if os.environ.get("DINO_KIT_FAULT") and "SLURM_PROCID" in os.environ:
    from dino_kit.training.learner import Learner

    kind, rank, at = os.environ["DINO_KIT_FAULT"].split(":")
    take = Learner.step
    first = None  # the step with which this life began

    def step(learner, number, batches, observe, request):
        global first
        first = number if first is None else first
        if first == 0 and number == int(at):
            print(f"{kind} at step {at}", flush=True)
            if kind == "hold":
                while request() < 3:  # 2 is SIGTERM
                    time.sleep(0.05)
            elif os.environ["SLURM_PROCID"] == rank and kind == "raise":
                raise ValueError("the cow jumped over the moon")
            elif os.environ["SLURM_PROCID"] == rank and kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return take(learner, number, batches, observe, request)

    Learner.step = step
