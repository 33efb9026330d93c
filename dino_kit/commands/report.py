"""``dino-kit report``: a run as one page that needs nothing else."""

from __future__ import annotations

from dino_kit import distributed, reporting
from dino_kit.config.report import ReportConfig


def run(config: ReportConfig) -> None:
    """Write the page of the run in ``config.out``, as far as the run has come.

    Raises:
        UserError: that is no run's folder, or the page or the images cannot be where they are said
            to be; nothing is written then.
    """
    if distributed.is_main():
        reporting.write(
            config.out, config.output, config.image_path, config.device, config.download
        )
