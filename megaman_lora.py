"""Train a LoRA for Stable Diffusion on a folder of images.

    python megaman_lora.py --demo                    everything embedded, minutes on a CPU
    python megaman_lora.py --data_dir ./megaman_images --max_train_steps 1000

`main` does everything that needs no torch: options, images, refusals. `train` is the recipe.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "error: Mega Man LoRA needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2]
    )

from contextlib import ExitStack, suppress
from functools import partial

from megaman.config.current_folder import leave_deleted_folder
from megaman.config.train import TrainConfig, parse_train_config
from megaman.console import install_logging
from megaman.errors import run_script
from megaman.models.configs import unet_width
from megaman.processes import Processes, join_processes, one_report
from megaman.threads import ThreadPolicy, configure_threads, threads_for_training
from megaman.training.held_out_split import prepare_datasets
from megaman.training.output import OutputFolder, saved_threads

with suppress(Exception):  # main reports a Pillow that is missing or broken
    from megaman.data.dataset import MegaManDataset as MegaManDataset  # for users to import
    from megaman.training.datasets import Datasets


def main(argv: list[str]) -> int:
    """Run the command line and return the exit code."""
    install_logging()
    with one_report():
        config = parse_train_config(argv)
    leave_deleted_folder()
    install_logging(log_format=config.output.log_format)
    if config.run.system_info or config.run.plan:
        from megaman.training.questions import answer

        print(*answer(config), sep="\n")
        return 0
    if config.run.check_data:
        return print_data_report(config)
    with ExitStack() as stack:
        with one_report():
            output = stack.enter_context(OutputFolder.open(config.output))  # ours alone
            if (datasets := prepare_datasets(config, output)) is None:
                return 0
            rule = partial(threads_for_training, unet_width(config.base.pretrained_model_name))
        policy = configure_threads(rule, saved_threads(output.checkpoint))
        with join_processes("Resume with --resume_from_checkpoint latest") as processes:
            return train(config, datasets, output, policy, processes)


def train(
    config: TrainConfig,
    datasets: "Datasets",
    output: OutputFolder,
    policy: ThreadPolicy,
    processes: Processes,
) -> int:
    """Train a LoRA and save it in lora_weights/; returns the exit code."""
    from megaman.training.adapters import inject_lora, storing_unet
    from megaman.training.announce import announce, write_training_config
    from megaman.training.evaluation import make_evaluator
    from megaman.training.export import export_lora
    from megaman.training.judge import make_judge
    from megaman.training.optimizer import make_optimizer, make_schedule
    from megaman.training.prepare import embed_captions, encode_latents, open_base
    from megaman.training.progress import Progress, steps_between, validates_at_start
    from megaman.training.run import Run
    from megaman.training.sample_images import make_sample_images
    from megaman.training.samples import plan_samples
    from megaman.training.step import TrainingStep
    from megaman.training.training_set import make_training_sets

    run = Run.open(config, datasets, output, policy, processes)
    samples = plan_samples(config, datasets)
    run.fit_to_memory(config)
    base = open_base(config, datasets, run)

    # The frozen models run once, over all captions and images, and leave the memory.
    captions = embed_captions(base, datasets, samples, config, run)
    latents, evaluated = encode_latents(base, datasets, config, run)

    is_new, seed = run.output.checkpoint is None, run.state.seed
    with storing_unet(base, config.compute.base_precision):
        adapters = inject_lora(base, config.lora, run.compute, seed, samples.notes, is_new)
    training_sets = make_training_sets(config, datasets, latents, run)
    schedule = make_schedule(training_sets[0], config.optimizer, config.explicit, run)
    training_step = TrainingStep(base, adapters, training_sets, captions, config.loss, run)
    optimizer = make_optimizer(adapters, config.optimizer, schedule, run)
    run.restore(adapters, optimizer.torch_optimizer)

    announce(config, run, base, training_sets, adapters, schedule)
    training_config = write_training_config(config, run, base, training_sets, schedule, samples)
    judge = make_judge(base, captions, evaluated, config, run)
    evaluator = make_evaluator(judge, adapters, schedule, config, run)
    validate = make_sample_images(base, captions.sample_embeds, samples, datasets, config, run)
    save_steps, validation_steps = steps_between(config, schedule)
    with run.training():
        evaluator.start()
        if validates_at_start(run, schedule, validation_steps, evaluator.is_over):
            validate(run.state.step)  # at step 0 the LoRA changes nothing yet: this is the base
        progress = Progress(run, schedule, optimizer, save_steps, validation_steps)
        for step in progress.steps(evaluator.is_over):
            optimizer.set_lr(step)
            loss = training_step.accumulate(step)
            norm = run.clip_gradients(adapters.parameters, config.optimizer.max_grad_norm)
            progress.record(step, loss, norm, optimizer.step_if_finite(norm))
            evaluator.after_step(step)
            due = progress.due(step, evaluator.is_over)
            if due.log:
                progress.flush(step)
            is_saved = due.save and run.save_checkpoint(step, optimizer.torch_optimizer, evaluator)
            if due.stop:
                return progress.stop(step, is_saved, config.resume_command())
            if due.validate:
                validate(step)
        validate.generate_for_card(run.state.step)
    return export_lora(config, run, base, evaluator, datasets, training_config)


def print_data_report(config: TrainConfig) -> int:
    """--check_data: what is wrong with images and captions, without torch."""
    from tqdm import tqdm

    from megaman.training.data_check import check_data

    lines, exit_code = check_data(config, partial(tqdm, disable=None))
    for line in lines:
        print(line)
    return exit_code


def command() -> int:
    """Run main as a command."""
    remedy = "--gradient_checkpointing, a smaller --train_batch_size or a smaller --resolution"
    return run_script(main, sys.argv[1:], saves_memory=remedy)


if __name__ == "__main__":
    sys.exit(command())
