"""Settings of training: images that are held out, and what is done with their loss."""

from __future__ import annotations

from dataclasses import dataclass

from megaman.config.cli import flag
from megaman.config.values import COUNT, path, share_of_images


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out images and the best LoRA"""

    validation_split: float | None = flag(
        None,
        "share of the images that is held out, to see overfitting; 0.1 is usual",
        share_of_images,
        common=True,
    )
    validation_data_dir: str | None = flag(
        None, "held-out images in a folder of their own", path, metavar="FOLDER"
    )
    eval_steps: int | None = flag(
        None,
        "steps between evaluations (default: a tenth of the run, or more to stay below 3 percent "
        "of its time)",
        COUNT,
    )
    early_stopping_patience: int | None = flag(
        None, "stop after so many evaluations without a better LoRA", COUNT
    )
    use_ema: bool = flag(False, "also evaluate a moving average of the LoRA (EMA)", resume=True)

    @property
    def is_on(self) -> bool:
        """Whether anything is held out."""
        return self.validation_split is not None or self.validation_data_dir is not None
