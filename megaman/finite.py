"""Steps whose loss or gradient is not finite: skipped, counted, and in the end a reason to stop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megaman.errors import UserError

PATIENCE = 10  # bad steps in a row; a loss scale that is still finding its size takes fewer


def step_where_finite(
    optimizer: torch.optim.Optimizer, gradient_norm: torch.Tensor, scaler: torch.amp.GradScaler | None
) -> torch.Tensor:
    """Step the (accelerate-prepared) optimizer unless the gradients' norm is not finite; returns whether it is (0-d).

    A loss scaler decides for itself. Without one, torch's fused AdamW reads the same flag that a scaler sets, on the
    device, so that nothing has to wait for the answer.
    """
    finite = torch.isfinite(gradient_norm)
    inner = optimizer.optimizer
    if scaler is None and inner.defaults["fused"]:
        inner.found_inf = (~finite).float()
        optimizer.step()
    elif scaler is not None or finite:
        optimizer.step()
    return finite


class SkippedSteps:
    """Counts the steps that were skipped, over the run and in a row."""

    def __init__(self) -> None:
        self.total = self.in_a_row = 0

    def note(self, finite: Sequence[bool], last_step: int) -> list[int]:
        """Take in whether each of the steps up to last_step was finite; returns the numbers of those that were not.

        Raises UserError after PATIENCE of them in a row.
        """
        skipped = []
        for number, good in enumerate(finite, start=last_step - len(finite) + 1):
            self.in_a_row = 0 if good else self.in_a_row + 1
            if not good:
                self.total += 1
                skipped.append(number)
            if self.in_a_row == PATIENCE:
                raise UserError(
                    f"The gradients were not finite in {PATIENCE} steps in a row, up to step {number}",
                    "Likely causes: --learning_rate too high, --lora_alpha too high for --lora_rank, or fp16 (try "
                    "--mixed_precision bf16 or no). The last checkpoint is good",
                )
        return skipped
