"""Evaluates a run's LoRA on held-out images: keeps the best, averages (EMA), stops early."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from megaman.errors import plural, summarize_error
from megaman.training import checkpoint as checkpoints
from megaman.training.compute import INDENT
from megaman.training.ema import LoraEma, loaded
from megaman.training.evaluation_plan import MAX_SHARE, EvaluationPlan, plan_evaluations
from megaman.training.held_out import ImageSet
from megaman.training.judge import Judge
from megaman.training.validation import NUM_INFERENCE_STEPS

if TYPE_CHECKING:
    from megaman.config.run_settings import ValidationConfig
    from megaman.config.settings import TrainConfig
    from megaman.training.adapters import Adapters
    from megaman.training.optimizer import Schedule
    from megaman.training.run import Run

BEST, EMA = "best_adapter.safetensors", "ema_adapter.safetensors"  # in a checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """Which LoRA has the lowest loss on held-out images so far: that of this step ("held_out"), or
    the average at this step ("ema")."""

    step: int
    name: str
    loss: float


class Evaluator:
    """Evaluates the LoRA in training when it is due; all processes have the same results.

    Without a judge nothing is ever due. best is None until the first evaluation after step 0.

    Args:
        patience: evaluations without a better LoRA after which the run is over; None for never.
    """

    def __init__(
        self,
        adapters: Adapters,
        run: Run,
        judge: Judge | None,
        plan: EvaluationPlan,
        patience: int | None,
    ):
        self.adapters, self.plan, self.patience = adapters, plan, patience
        self._run, self._judge = run, judge
        self._parameters = checkpoints.named_parameters(adapters)
        self.best: Best | None = None
        self.best_tensors: dict[str, torch.Tensor] = {}
        folder, saved = run.output.checkpoint, run.state.evaluation
        if folder and saved and saved["best"]:
            self.best = Best(**saved["best"])
            self.best_tensors = checkpoints.read_adapter(folder / BEST, self._parameters)
        self.ema: LoraEma | None = None
        if plan.has_ema:
            path = folder / EMA if folder else None
            tensors = checkpoints.read_adapter(path, self._parameters) if path else None
            self.ema = LoraEma(self._parameters, tensors)
        self.is_over = self._has_lost_patience()

    def start(self) -> None:
        """Evaluate what is due at the step where the run starts, unless the checkpoint has it."""
        step = self._run.state.step
        evaluations = self._run.history.evaluations_of("held_out")
        if not any(evaluation.step == step for evaluation in evaluations):
            self._evaluate_if_due(step)

    def after_step(self, step: int) -> None:
        """Average in what the step has changed, and evaluate if that is due."""
        if self.ema:
            self.ema.update(step)
        self._evaluate_if_due(step)

    def record(self) -> dict[str, Any] | None:
        """What a checkpoint holds as JSON; None if nothing is held out."""
        if self._judge is None:
            return None
        best = asdict(self.best) if self.best else None
        return {"eval_steps": self.plan.eval_steps, "best": best}

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors that a checkpoint holds, by file."""
        files = {}
        if self.best:
            files[BEST] = self.best_tensors
        if self.ema:
            files[EMA] = self.ema.tensors
        return files

    @property
    def prefers_best(self) -> bool:
        """Whether lora_weights/ holds the best LoRA, as the steps after it were only there to find
        out, and not the last."""
        return self.patience is not None and self.best is not None

    def best_loaded(self) -> AbstractContextManager[None]:
        """A context in which the models have the best LoRA."""
        return loaded(self._parameters, self.best_tensors)

    def results(self) -> list[str]:
        """What was gained, as lines to print: a table of the losses."""
        if self.best is None:
            return []
        evaluations = self._run.history.evaluations_of("held_out")
        rows: dict[str, tuple[float | None, int]] = {"best": (self.best.loss, self.best.step)}
        for label, name in (("last", "held_out"), ("EMA", "ema")):
            if found := self._run.history.evaluations_of(name):
                rows[label] = (found[-1].loss, found[-1].step)
        if evaluations[0].step == 0:
            rows["start"] = (evaluations[0].loss, 0)
        lines = [f"loss on {plural(self.plan.num_images, 'held-out image')}:"]
        for label in ("start", "last", "best", "EMA"):
            if label in rows:
                loss, step = rows[label]
                lines.append(f"  {label:6} {_number(loss):10} step {step}")
        kind = " (EMA)" if self.best.name == "ema" else ""
        lines.append(f"lora_weights_best/ holds the best{kind}")
        if self.prefers_best:
            lines.append("lora_weights/ holds the best too, as the run could stop early")
        else:
            lines.append("lora_weights/ holds the last: --early_stopping_patience keeps the best")
        return lines

    def summary(self) -> list[str]:
        """What will be evaluated, as lines to print."""
        if self._judge is None:
            return []
        count, num_images = len(self._run.state.held_out or []), self.plan.num_images
        evaluated = "" if num_images == count else f", {num_images} of them evaluated"
        lines = [
            f"held out   {plural(count, 'image')}{evaluated}; loss every {self.plan.eval_steps} "
            f"steps, which adds about {self.plan.share:.1%} to the run's time"
        ]
        if self.plan.share > MAX_SHARE:
            lines.append(f"{INDENT}a larger --eval_steps costs less")
        if self.patience:
            lines.append(
                f"{INDENT}the run ends after {plural(self.patience, 'evaluation')} without a "
                "better LoRA; lora_weights/ will hold the best"
            )
        return lines

    def _evaluate_if_due(self, step: int) -> None:
        if self._judge is None or not self.plan.is_due(step):
            return
        try:
            self._evaluate(self._judge, step)
        except Exception as error:
            reason = summarize_error(error)
            log.info("step %d: no held-out loss (%s); training continues", step, reason)
        self.is_over = self._has_lost_patience()
        if self.is_over and step < self.plan.total_steps:
            log.info(
                "step %d: the run ends, as %d evaluations found no better LoRA", step, self.patience
            )

    def _evaluate(self, judge: Judge, step: int) -> None:
        loss = self._add(judge, step, "held_out", judge.held_out)
        self._keep_if_best(step, "held_out", loss, self._parameters)
        if self.plan.is_full(step) or self._has_lost_patience():
            if judge.probes.latents:
                self._add(judge, step, "train", judge.probes)
            if self.ema and step:
                with loaded(self._parameters, self.ema.tensors):
                    ema_loss = self._add(judge, step, "ema", judge.held_out)
                self._keep_if_best(step, "ema", ema_loss, self.ema.tensors)
        is_best = self.best is not None and self.best.step == step
        log.info("step %d: held-out loss %.4f%s", step, loss, ", the best" if is_best else "")

    def _add(self, judge: Judge, step: int, name: str, images: ImageSet) -> float:
        """Compute a loss and record it."""
        by_bin = judge.losses(images)
        loss = sum(by_bin) / len(by_bin)
        self._run.history.add_evaluation(step, name, loss, by_bin)
        return loss

    def _keep_if_best(
        self, step: int, name: str, loss: float, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        if step and loss < (self.best.loss if self.best else float("inf")):
            self.best = Best(step, name, loss)
            self.best_tensors = {
                key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()
            }

    def _has_lost_patience(self) -> bool:
        if self.patience is None or self.best is None:
            return False
        steps = [evaluation.step for evaluation in self._run.history.evaluations_of("held_out")]
        return len([step for step in steps if step > self.best.step]) >= self.patience


def make_evaluator(
    judge: Judge | None, adapters: Adapters, schedule: Schedule, config: TrainConfig, run: Run
) -> Evaluator:
    """The evaluator of a run, which logs what it will do; a resumed run evaluates as often as
    before unless --eval_steps is typed."""
    settings, saved = config.evaluation, run.state.evaluation
    plan = EvaluationPlan(
        eval_steps=settings.eval_steps or (saved["eval_steps"] if saved else schedule.total_steps),
        total_steps=schedule.total_steps,
        images_per_step=_images_per_step(schedule, config),
        sample_passes=_sample_passes(schedule, config.validation),
        num_images=len(judge.held_out.latents) if judge else 0,
        has_ema=settings.use_ema,
    )
    patience = settings.early_stopping_patience
    if settings.eval_steps is None and saved is None:
        plan = plan_evaluations(plan, patience)
    evaluator = Evaluator(adapters, run, judge, plan, patience)
    for line in evaluator.summary():
        log.info(line)
    return evaluator


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _sample_passes(schedule: Schedule, config: ValidationConfig) -> int:
    """How often an image passes the UNet to generate the run's sample images, with guidance."""
    epochs = config.validation_epochs
    interval = schedule.steps_of(epochs) if epochs else config.validation_steps
    times = schedule.total_steps // interval + 1
    return times * config.num_validation_images * NUM_INFERENCE_STEPS * 2


def _images_per_step(schedule: Schedule, config: TrainConfig) -> int:
    return 2 * schedule.images_per_step if config.data.class_data_dir else schedule.images_per_step
