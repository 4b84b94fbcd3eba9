"""A training run: what outlives every phase of it, from the first line to the last."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from megaman import runtime
from megaman.console import log_event
from megaman.errors import UserError, summarize_error
from megaman.models.configs import unet_width
from megaman.models.float8 import require_float8
from megaman.training import checkpoint as checkpoints
from megaman.training import history as histories
from megaman.training.checkpoint import CheckpointSource, TrainState
from megaman.training.compute import INDENT, REQUESTS, choose_training_compute, to_record
from megaman.training.memory_plan import fit_to_memory, hold_to_limit
from megaman.training.memory_saving import reduce_memory
from megaman.training.optimizers import require_library
from megaman.training.report import TrainingReport
from megaman.training.run_start import choose_seed, complete_captions, make_state
from megaman.training.signals import StopSignal
from megaman.training.step_images import plan_step_images
from megaman.training.tensorboard import TrainingLog, open_training_log

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig
    from megaman.processes import Processes
    from megaman.threads import ThreadPolicy
    from megaman.training.adapters import Adapters
    from megaman.training.compute import TrainingCompute
    from megaman.training.datasets import Datasets
    from megaman.training.output import OutputFolder
    from megaman.training.step_images import StepImages

Prepared = TypeVar("Prepared")

log = logging.getLogger(__name__)


class Team(NamedTuple):
    """The processes of a run, accelerate's view of this one, and the images that they share in a
    step."""

    processes: Processes
    accelerator: Accelerator
    step_images: StepImages


class Run:
    """The processes of a run, how they compute, its state, its folder, its log, its history and its
    stop signal.

    state changes with every checkpoint, compute when memory runs out, history with every step; the
    rest stays. notes are lines to print about how the run computes.
    """

    def __init__(
        self,
        team: Team,
        compute: TrainingCompute,
        state: TrainState,
        output: OutputFolder,
        training_log: TrainingLog,
        notes: Sequence[str],
    ):
        self.processes, self._accelerator, self.step_images = team
        self.device: torch.device = self._accelerator.device
        self.rank, self.world_size = self.processes.rank, self.processes.count
        self.is_main_process = self.processes.is_main
        self.compute, self.state, self.output = compute, state, output
        self.log, self.notes = training_log, notes
        self.history = histories.restore(output.checkpoint, state.step)
        self.report = TrainingReport(
            output.path, self.history, self.is_main_process, output.resumes_in_place()
        )
        output.at_end.push(self._show_failure)
        self.stop_signal = StopSignal()
        self._elapsed_before, self._started = state.elapsed, time.monotonic()

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        datasets: Datasets,
        output: OutputFolder,
        policy: ThreadPolicy,
        processes: Processes,
    ) -> Run:
        """Complete the captions, and take over what a checkpoint stores.

        Raises UserError if the checkpoint belongs to a run with other settings, if the library of
        the optimizer is missing, or if the device has no float8 for the base.
        """
        require_library(config.optimizer.optimizer)
        saved = checkpoints.read_train_state(output.checkpoint) if output.checkpoint else None
        runtime.set_threads(policy)
        settings = config.settings()
        compute, notes = choose_training_compute(
            {flag: settings[flag] for flag in REQUESTS},
            config.explicit,
            runtime.choose_device(),
            unet_width(config.base.pretrained_model_name),
            saved.choices if saved else None,
        )
        if config.compute.base_precision == "fp8":
            require_float8(compute.device)
        if policy.remark:
            notes.append(f"{INDENT}{policy.remark}")
        runtime.keep_freed_memory()
        accelerator = _start_accelerator(compute)
        complete_captions(config, datasets, processes, tqdm)
        step_images, world_size, line = plan_step_images(config, processes.count, saved)
        notes += [line] if line else []
        seed, log_dir = processes.from_main(partial(choose_seed, config, saved, output))
        shared = step_images.settings(config.buckets.enable_bucket)
        settings = checkpoints.shared_settings(config, datasets, seed, shared)
        state = make_state(saved, (seed, log_dir), settings, datasets, world_size)
        if saved:
            name = str(output.checkpoint)
            checkpoints.require_same_settings(name, saved.settings, state.settings)
        training_log = open_training_log(
            Path(str(state.log_dir)), state.step + 1 if saved else None
        )
        team = Team(processes, accelerator, step_images)
        return cls(team, compute, state, output, training_log, notes)

    def fit_to_memory(self, config: TrainConfig) -> None:
        """Take the measures that the run needs to fit into memory; raises UserError if none
        suffices."""
        limit = hold_to_limit(self.device, config.compute.vram_limit)
        plan = fit_to_memory(
            self.compute,
            config.memory_request(),
            config.base.pretrained_model_name,
            min(self.processes.exchange(limit)),  # the same in every process
            cache_dir=config.cache.path(),
        )
        self.compute = replace(
            self.compute,
            gradient_checkpointing=plan.gradient_checkpointing,
            micro_batching=plan.micro_batching,
            vae_tile=plan.vae_tile or self.compute.vae_tile,
        )

    def reduce_memory(self, models: Sequence[nn.Module], resolution: int) -> str:
        """Take the next measure after memory ran out; returns it in words (memory_saving.py)."""
        self.compute, measure = reduce_memory(self.compute, models, resolution)
        return measure

    def restore(self, adapters: Adapters, optimizer: torch.optim.Optimizer) -> None:
        """Load the tensors of the checkpoint, if the run resumes from one."""
        if self.output.checkpoint is None:
            return
        checkpoints.restore(self.output.checkpoint, adapters, optimizer)
        if self.scaler and self.state.scaler:
            self.scaler.load_state_dict(self.state.scaler)
        if self.is_main_process and self.output.resumes_in_place():
            self.output.prune_checkpoints(self.state.step)

    def save_checkpoint(
        self, step: int, optimizer: torch.optim.Optimizer, evaluator: CheckpointSource
    ) -> bool:
        """Save the whole state in the main process.

        If the disk is full or gone, that is logged and False is returned; the next save tries
        again.
        """
        if not self.is_main_process:
            return True
        self.state = replace(
            self.state,
            step=step,
            elapsed=self.elapsed,
            choices=to_record(self.compute),
            scaler=self.scaler.state_dict() if self.scaler else None,
            evaluation=evaluator.record(),
        )
        folder = self.output.checkpoint_folder(step)
        try:
            adapters, files = evaluator.adapters, evaluator.files()
            checkpoints.save(folder, adapters, optimizer, self.state, self.history, files)
            self.output.prune_checkpoints(step)
        except (OSError, UserError) as error:
            log.info(
                "step %d: no checkpoint (%s); training continues, the next save tries again",
                step,
                summarize_error(error),
            )
            return False
        log_event(log, "checkpoint", f"step {step}: saved {folder}", step=step, path=str(folder))
        return True

    def save_history(self, step: int) -> None:
        """Add to this step's checkpoint, if there is one, what was evaluated or generated after it
        was saved."""
        folder = self.output.checkpoint_folder(step)
        if self.is_main_process and folder.is_dir():
            with contextlib.suppress(OSError):  # a resumed run evaluates once more
                self.history.save(folder / histories.HISTORY)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within this the clock runs, and a first signal to stop is only noted."""
        self._started = time.monotonic()
        with self.stop_signal:
            yield

    def _show_failure(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Show on the page why the run ends before it is finished."""
        if isinstance(error, KeyboardInterrupt):
            self.report.end("stopped", reason="")
        elif error is not None:
            self.report.end("failed", reason=summarize_error(error))

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before the checkpoint included."""
        return self._elapsed_before + time.monotonic() - self._started

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16."""
        return self._accelerator.scaler

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Have a model compute in the run's precision."""
        # In training mode accelerate would wrap it in DDP, which sends the whole base to the other
        # processes; exchange_gradients does what is left to do.
        return self._accelerator.prepare_model(model, evaluation_mode=True)

    def prepare_optimizer(self, optimizer: Prepared) -> Prepared:
        """Have an optimizer use the loss scaler."""
        return self._accelerator.prepare(optimizer)

    def autocast(self) -> AbstractContextManager:
        """A context in which models compute in the run's precision."""
        return self._accelerator.autocast()

    def backward(self, loss: torch.Tensor) -> None:
        """Add up the gradients of a loss (0-d), scaled in fp16."""
        self._accelerator.backward(loss)

    def exchange_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of these parameters over the processes, in one exchange.

        A process without an image in this step has none, which counts as zeros.
        """
        if self.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [cast(torch.Tensor, parameter.grad) for parameter in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.processes.add_up(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))

    def clip_gradients(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Clip the gradients and return their norm before (0-d)."""
        return cast(torch.Tensor, self._accelerator.clip_grad_norm_(parameters, max_norm))

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes."""
        self.processes.add_up(values)
        return values

    def any_process(self, condition: bool) -> bool:
        """Whether it is true in any of the processes."""
        return any(self.processes.exchange(condition))

    def progress_bar(self, iterable: Any = None, **options: Any) -> tqdm:
        """A tqdm bar, visible in the main process only, and only in a terminal."""
        return tqdm(iterable, **options, disable=None if self.is_main_process else True)

    def wait_for_everyone(self) -> None:
        """Wait until all processes are here."""
        self.processes.exchange(None)


def _start_accelerator(compute: TrainingCompute) -> Accelerator:
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns about old kernels
    return Accelerator(mixed_precision=compute.mixed_precision, cpu=compute.device.type == "cpu")
