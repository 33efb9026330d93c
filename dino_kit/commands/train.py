"""``dino-kit train``: pretrain a backbone by DINO."""

from __future__ import annotations

from pathlib import Path

from dino_kit import distributed, log
from dino_kit.config.train import TrainConfig
from dino_kit.errors import Interrupted, RunFailed


def run(config: TrainConfig) -> None:
    """Pretrain as ``config`` says, from the beginning or from where the folder's run stopped.

    Raises:
        UserError: the settings, the data or the folder do not fit.
        RunFailed: too many steps in a row were not finite.
    """
    try:
        _train(config)
    except (KeyboardInterrupt, Interrupted):
        if _newest(config).exists():
            same = "same command" + (" without --resume" if config.resume == "never" else "")
            log.notice(f"The {same} goes on from the last checkpoint in {config.output_dir}.")
        raise
    except RuntimeError as error:
        if not distributed.is_failure(error):
            raise
        raise RunFailed(
            "The processes of the run did not come together before it began; one of them has "
            f"stopped, or cannot be reached ({str(error).strip().splitlines()[0]})."
        ) from error
    finally:
        distributed.stop()


def _train(config: TrainConfig) -> None:
    from dino_kit.assemble import assemble
    from dino_kit.backbones.interface import HasSelfAttention

    run = assemble(config)
    run.train()
    if run.start == run.loader.total_steps:
        log.say(f"{config.output_dir} holds this run already, finished; look at it with")
    else:
        log.say(f"done: {_newest(config)}; look at it with")
    log.say(f"  dino-kit knn {config.output_dir} --data_path FOLDER_WITH_LABELS")
    page = " --html" if isinstance(run.learner.student.backbone, HasSelfAttention) else ""
    log.say(f"  dino-kit attention {config.output_dir} --image_path IMAGE{page}")
    log.say(f"  dino-kit report {config.output_dir}")


def _newest(config: TrainConfig) -> Path:
    # By its name, because training.checkpoint would import PyTorch before it is needed.
    return Path(config.output_dir, "checkpoint.pth")
