"""``dino-kit train``: pretrain a backbone by DINO."""

from __future__ import annotations

from dino_kit import distributed, log
from dino_kit.assemble import assemble
from dino_kit.config.train import TrainConfig


def run(config: TrainConfig) -> None:
    """Pretrain as ``config`` says, from the beginning or from where the folder's run stopped."""
    try:
        run = assemble(config)
        if run.start == run.loader.total_steps:
            log.say(f"{config.output_dir} holds a finished run of {config.epochs} epochs.")
            run.monitor.close()
            return
        run.train()
        log.say(f"done: {config.output_dir}/checkpoint.pth; look at it with")
        log.say(f"  dino-kit knn {config.output_dir} --data_path FOLDER_WITH_LABELS")
        log.say(f"  dino-kit attention {config.output_dir} --image_path IMAGE --html")
    finally:
        distributed.stop()
