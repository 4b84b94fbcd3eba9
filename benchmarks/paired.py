"""Run megaman_lora.py as it is, with bare steps of the same UNet between its own; a last JSON line
has the seconds.

    python benchmarks/paired.py 5 megaman_lora.py --demo --max_train_steps 215

After the first 5 steps and after every ten that follow, ten bare steps (bare.py's, on what the UNet
was given last) are done. In one process both meet the same memory and the same moment of the
machine, which from one process to the next can differ by more than what the loop costs. A part of
step_time.py, which runs it.

- `ours_s`: seconds a step of each ten of the loop, of which one writes the log
- `bare_s`: the same of the bare ones before, between and after them, one more than of ours
"""

from __future__ import annotations

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import bare
import torch
from diffusers import UNet2DConditionModel
from processes import LOGS_EVERY, TRAINING_BAR
from stamped import after_updates, now
from torch.optim.optimizer import register_optimizer_step_post_hook


class Pairs:
    """Takes turns with the training from the update of the bar that follows the warm-up."""

    def __init__(self, warmup: int):
        self.warmup = warmup
        self.ours_s: list[float] = []
        self.bare_s: list[float] = []
        self._left = 0.0  # when the loop was last given its turn
        self._forward = UNet2DConditionModel.forward

    def install(self) -> None:
        """Have the bar's updates, the UNet and the optimizer lead here."""

        def noting(unet, *inputs, **named):
            self._last = unet, inputs, named
            return self._forward(unet, *inputs, **named)

        def known(optimizer, *_):
            self._optimizer = optimizer

        self._noting = UNet2DConditionModel.forward = noting
        after_updates(TRAINING_BAR, lambda bar: self.after(bar.n))
        register_optimizer_step_post_hook(known)

    def after(self, step: int) -> None:
        """The loop ended this step."""
        if step < self.warmup or (step - self.warmup) % LOGS_EVERY:
            return
        ended = now()
        if self.bare_s:
            self.ours_s.append((ended - self._left) / LOGS_EVERY)
        UNet2DConditionModel.forward = self._forward
        self.bare_s.append(self.bare_steps())
        UNet2DConditionModel.forward = self._noting
        self._left = now()

    def bare_steps(self) -> float:
        """Seconds a bare step, by the loop's own optimizer; its gradients are none at this
        moment."""
        unet, inputs, named = self._last
        sample = inputs[0]
        trainable = [
            parameter for group in self._optimizer.param_groups for parameter in group["params"]
        ]
        scaler = torch.amp.GradScaler(sample.device.type, enabled=sample.dtype == torch.float16)
        noise = torch.randn_like(sample, dtype=torch.float32)
        began = now()
        for _ in range(LOGS_EVERY):
            bare.step(
                partial(unet, *inputs, **named),
                noise,
                sample.dtype,
                self._optimizer,
                trainable,
                scaler,
            )
        return (now() - began) / LOGS_EVERY


def main() -> None:
    pairs, program = Pairs(int(sys.argv[1])), Path(sys.argv[2]).resolve()
    sys.argv = [str(program), *sys.argv[3:]]
    sys.path.insert(0, str(program.parent))
    pairs.install()
    try:
        runpy.run_path(str(program), run_name="__main__")
    finally:
        print("\n" + json.dumps({"ours_s": pairs.ours_s, "bare_s": pairs.bare_s}), flush=True)


if __name__ == "__main__":
    main()
