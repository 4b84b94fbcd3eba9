"""Runs megaman_lora.py with bare steps of its UNet in between; part of step_time.py.

    python benchmarks/paired.py 5 megaman_lora.py --demo --max_train_steps 215

After the first 5 steps and after every ten that follow, ten steps of bare.py are computed on the
last inputs of the UNet. In one process, both have the same memory and the same state of the
machine, which can differ between processes by more than the loop costs. The last line is JSON:

- `ours_s`: seconds per step of each ten steps of the loop, one of which writes the log
- `bare_s`: the same for the bare steps before, between and after them, one more than ours
"""

from __future__ import annotations

import json
import runpy
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import bare
import torch
from diffusers import UNet2DConditionModel
from processes import LOGS_EVERY, TRAINING_BAR
from stamped import after_updates, now
from torch.optim.optimizer import register_optimizer_step_post_hook


class Pairs:
    """Alternates bare steps with training, from the end of the warm-up."""

    def __init__(self, warmup: int):
        self.warmup, self._step = warmup, 0
        self.ours_s: list[float] = []
        self.bare_s: list[float] = []
        self._left = 0.0  # when the loop was last given its turn
        self._forward = UNet2DConditionModel.forward
        self._last: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def install(self) -> None:
        """Hook into the progress bar, the UNet and the optimizer."""

        def record_optimizer(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self._optimizer = optimizer

        self._record_inputs()
        after_updates(TRAINING_BAR, lambda _: self.after_step())
        register_optimizer_step_post_hook(record_optimizer)

    def _record_inputs(self) -> None:
        def forward(unet: UNet2DConditionModel, *inputs: Any, **keywords: Any) -> Any:
            self._last = unet, inputs, keywords
            return self._forward(unet, *inputs, **keywords)

        cast(Any, UNet2DConditionModel).forward = forward

    def after_step(self) -> None:
        """Run bare steps after a step of the loop, if it is their turn."""
        self._step += 1
        since_warmup = self._step - self.warmup
        if since_warmup < 0 or since_warmup % LOGS_EVERY:
            return
        ended = now()
        if self.bare_s:
            self.ours_s.append((ended - self._left) / LOGS_EVERY)
        cast(Any, UNet2DConditionModel).forward = self._forward
        self.bare_s.append(self.bare_steps())
        self._record_inputs()
        self._left = now()

    def bare_steps(self) -> float:
        """Seconds per bare step, with the loop's own optimizer, which has no gradients now."""
        assert self._last is not None and self._optimizer is not None
        unet, inputs, keywords = self._last
        sample = inputs[0]
        groups = self._optimizer.param_groups
        trainable = list(chain.from_iterable(group["params"] for group in groups))
        scaler = torch.amp.GradScaler(sample.device.type, enabled=sample.dtype == torch.float16)
        noise = torch.randn_like(sample, dtype=torch.float32)
        began = now()
        for _ in range(LOGS_EVERY):
            bare.step(
                partial(unet, *inputs, **keywords),
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
