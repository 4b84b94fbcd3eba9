"""Where the loop stands: its steps, what is due after each, and the losses on their way to the
log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from megaman import runtime
from megaman.training.optimizer import SkippedSteps
from megaman.training.pace import Pace
from megaman.training.report import StepReport
from megaman.training.status import BAR_FORMAT, Status

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig
    from megaman.training.optimizer import Optimizer, Schedule
    from megaman.training.run import Run

LOG_STEPS = 10  # steps between two looks at the loss: each look waits for the device

log = logging.getLogger(__name__)


class Due(NamedTuple):
    """What is to be done after a step, in this order."""

    log: bool
    save: bool
    stop: bool
    validate: bool


def steps_between(config: TrainConfig, schedule: Schedule) -> tuple[int, int]:
    """The steps between checkpoints, and between sample images; intervals in epochs are converted
    to steps, which a line shows."""
    save_steps, validation_steps = config.output.save_steps, config.validation.validation_steps
    if epochs := config.output.save_every_n_epochs:
        save_steps = schedule.steps_of(epochs)
        log.info("--save_every_n_epochs %d: a checkpoint every %d steps", epochs, save_steps)
    if epochs := config.validation.validation_epochs:
        validation_steps = schedule.steps_of(epochs)
        log.info("--validation_epochs %d: sample images every %d steps", epochs, validation_steps)
    return save_steps, validation_steps


def validates_at_start(run: Run, schedule: Schedule, validation_steps: int, is_over: bool) -> bool:
    """Whether sample images are due before the first step: of the base itself, or those that a run
    was killed before. is_over if there is no step left."""
    start = run.state.step
    is_due = start % validation_steps == 0 or start == schedule.total_steps or is_over
    is_done = run.output.samples_folder(start).exists() and start in run.history.samples
    return start == 0 or (is_due and not is_done)


class Progress:
    """Follows the steps of a run from where it starts or resumes.

    save_steps and validation_steps are the steps between checkpoints and between sample images.
    """

    def __init__(
        self,
        run: Run,
        schedule: Schedule,
        optimizer: Optimizer,
        save_steps: int,
        validation_steps: int,
    ):
        self._run, self._learning_rates = run, optimizer.learning_rates
        self._first, self._last = run.state.step + 1, schedule.total_steps
        self._save_steps, self._validation_steps = save_steps, validation_steps
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._finite: list[torch.Tensor] = []
        self._skipped = SkippedSteps(
            run.compute.mixed_precision, runtime.finer_precisions(run.compute)
        )
        self._images_per_step = schedule.images_per_step
        first_pause = run.elapsed - run.state.elapsed  # sample images of the base, perhaps
        self._pace = Pace(self._last, self._events_after, first_pause)
        bar = run.progress_bar(
            total=self._last, initial=run.state.step, desc="training", bar_format=BAR_FORMAT
        )
        self._status = Status(bar, run.history)

    def steps(self, is_over: bool = False) -> Iterator[int]:
        """The steps that are left, counted from 1: none if the run is over, and none after the one
        for which `due` was asked when it was."""
        step = self._first - 1
        if is_over:
            self._last = step
        while step < self._last:
            step += 1
            self._pace.resume()
            yield step
        self._status.close()

    def record(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, is_finite: torch.Tensor
    ) -> None:
        """Note this process's share of the loss of a step, the norm of the gradients before
        clipping, and whether that was finite (0-d)."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._finite.append(is_finite)
        self._status.advance()
        if step == self._first and self._run.device.type == "cpu":
            runtime.use_huge_pages()  # now that the memory of a step is allocated

    def due(self, step: int, is_over: bool = False) -> Due:
        """What is due after this step, which is the last one if the run is over; every process has
        to ask, as they stop together.

        After the last step everything is; a stop comes with a checkpoint, and a checkpoint is
        never ahead of the log.
        """
        if is_over:
            self._last = step
        is_last = step == self._last
        log_is_due = step % LOG_STEPS == 0
        save = step % self._save_steps == 0 or is_last
        # Several processes agree only when they exchange their losses anyway: asking makes the CPU
        # wait for the device.
        asks = self._run.world_size == 1 or log_is_due or save
        stop_received = self._run.stop_signal.received is not None
        is_stopping = asks and self._run.any_process(stop_received)
        save = save or is_stopping
        return Due(
            log=log_is_due or save,
            save=save,
            stop=is_stopping and not is_last,
            validate=step % self._validation_steps == 0 or is_last,
        )

    def flush(self, step: int) -> None:
        """Log the losses up to this step; raises UserError after too many skipped steps."""
        losses = self._run.total(torch.stack(self._losses)).tolist()
        if skipped := self._skipped.add(torch.stack(self._finite).tolist(), step):
            log.info(self._skipped_line(skipped))
        norms = torch.stack(self._norms).tolist()  # equal in all processes
        lrs = [
            [lr(done) for lr in self._learning_rates] for done in range(step - len(losses), step)
        ]
        self._run.history.add_steps(losses, norms, lrs)
        self._losses, self._norms, self._finite = [], [], []
        history = self._run.history
        self._run.log.add_steps(step, losses, self._learning_rates)
        self._run.log.add_curve(
            "train/loss_smoothed", history.smoothed.values[-len(losses) :], step
        )
        self._run.log.add_curve("train/gradient_norm", norms, step)
        self._run.log.add_evaluations(history.evaluations)
        self._pace.pause(len(losses), self._events_after(step - 1) - self._events_after(step))
        if self._run.is_main_process:
            self._run.log.flush()
            where = self._where(step)
            self._run.report.update(where)
            self._status.show(where)

    def _events_after(self, step: int) -> int:
        """How many checkpoints and samples are still to come."""
        intervals = (self._save_steps, self._validation_steps)
        return sum(self._last // interval - step // interval for interval in intervals)

    def _where(self, step: int) -> StepReport:
        seconds = self._pace.recent_seconds_per_step
        return StepReport(
            step,
            self._last,
            self._run.elapsed,
            self._pace.seconds_left(step),
            seconds,
            self._images_per_step / seconds if seconds else None,
            runtime.used_memory(self._run.device),
            self._run.state.step,
        )

    def _skipped_line(self, steps: list[int]) -> str:
        """What to report about steps that were skipped."""
        numbers, total = ", ".join(map(str, steps)), self._skipped.total
        scaler = self._run.scaler
        if scaler is None:
            return f"gradients that were not finite: step {numbers} skipped, {total} so far"
        # A scale that starts or has grown too high is how it finds the largest that fits.
        return (
            f"step {numbers} skipped while fp16's loss scale finds its size, which is usual: "
            f"{scaler.get_scale():g} now, {total} skipped so far"
        )

    def stop(self, step: int, is_saved: bool, resume_command: str) -> int:
        """Close bar and log after a signal to stop, and log how to resume; returns the exit
        code."""
        self._status.close()
        if self._run.is_main_process:  # another one's events would double the curve
            self._run.log.close()
        folder = f": {self._run.output.checkpoint_folder(step)}" if is_saved else ""
        log.info("stopped after step %d%s", step, folder)
        log.info("to resume: %s", resume_command)
        self._run.report.end("stopped")
        return self._run.stop_signal.exit_code
