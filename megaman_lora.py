"""Train a LoRA for Stable Diffusion on a folder of pictures.

    python megaman_lora.py --demo                                     everything embedded, minutes on a CPU
    python megaman_lora.py --data_dir ./megaman_images --max_train_steps 1000

The story, top to bottom: options, pictures, base, LoRA, encode once, loop, save.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "error: Mega Man LoRA needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2]
    )

import gc
import json
import logging
import math
import secrets
import shlex
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megaman import threads
from megaman.config.cli import resume_command
from megaman.config.train import parse_train_config
from megaman.data.captions import CaptionAugmentation
from megaman.data.dataset import MegaManDataset
from megaman.data.file_index import FileIndex
from megaman.data.folders import FolderConfig
from megaman.data.problems import check_usable, write_instructions, write_problems
from megaman.errors import UserError, install_logging, run_script, summarize_error
from megaman.files import write_json
from megaman.models.configs import alias_notice, resolve_name, unet_width
from megaman.training.output import (
    find_all,
    log_dir_of,
    open_output,
    remove,
    save_somewhere,
    saved_threads,
    step_of,
)
from megaman.training.signals import StopSignal

LOG_EVERY = 10  # steps between two looks at the loss: each look waits for the device


def main(argv: list[str]) -> int:
    install_logging(tqdm.write)
    config = parse_train_config(argv)
    if config.run.plan:
        from megaman.training.memory_plan import table

        print(
            *table(
                config.compute.mixed_precision, config.compute.vram_limit, **config.memory_request()
            ),
            sep="\n",
        )
        return 0

    # Pictures: found and looked at before anything heavy is imported. Where there are 100,000 of
    # them, Python would otherwise look through all of them again and again while others are made.
    gc.set_threshold(50_000, 10, 10)
    explicit_data = config.run.demo or "data_dir" in config.explicit
    cache_dir = config.cache.path()
    file_index = FileIndex(cache_dir)
    find = partial(
        find_pictures,
        config.data.data_dir,
        explicit_data,
        file_index,
        config.data.resolution,
        config.data.center_crop,
        FolderConfig(config.captions.caption_extension, config.data.dataset_repeats),
    )
    dataset = find()
    if dataset is None:
        return int(config.run.strict)  # no pictures is what a check should find
    output_dir = Path(config.output.output_dir)
    if config.run.check_data:
        from megaman.data import buckets
        from megaman.doctor import checks, report

        if config.captions.auto_caption:
            add_captions(config.captions.auto_caption, dataset)
            dataset = find()
        if (
            config.buckets.enable_bucket
        ):  # no base is read: the limits are as for Stable Diffusion 1.5, or a smaller one
            dataset.set_buckets(
                buckets.make_buckets(
                    native=min(512, config.data.resolution),
                    **config.buckets.limits(config.data.resolution),
                )
            )
        bar = partial(
            tqdm, desc="looking", unit="picture", total=len(dataset), disable=None
        )  # no bar in a file
        found = checks.examine(
            dataset, config.data.resolution, config.captions.trigger_word or None, bar
        )
        print(*report.write_report(output_dir, found), sep="\n")
        return int(config.run.strict and found.is_wrong)
    checkpoint, leftovers = open_output(
        output_dir, config.output.resume_from_checkpoint, config.output.overwrite_output
    )
    datasets = [dataset]  # and, where there are any, the class pictures
    if config.data.class_data_dir:
        datasets.append(
            find_pictures(
                config.data.class_data_dir,
                True,
                file_index,
                config.data.resolution,
                config.data.center_crop,
                FolderConfig(config.captions.caption_extension, 1, "--class_data_dir"),
            )
        )
    try:
        check_usable(datasets, config.data.skip_bad_images)
    except UserError:
        report_problems(datasets, output_dir)
        raise

    width = unet_width(config.base.pretrained_model_name)
    policy = threads.configure_threads(
        partial(threads.threads_for_training, width), saved_threads(checkpoint)
    )

    import numpy as np
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
    from torch.utils.tensorboard import SummaryWriter

    from megaman import runtime
    from megaman.data import buckets
    from megaman.data.batches import class_seed
    from megaman.data.encoding import drop_damaged, encode_dataset
    from megaman.data.latent_cache import LatentCache, prune, vae_folder
    from megaman.data.latents import OnlineLatents
    from megaman.data.vae_encoder import EncodingConfig, VaeEncoder, identify_vae
    from megaman.lora import adapter
    from megaman.lora import files as lora_files
    from megaman.models.base import load_base
    from megaman.models.text_encoding import CaptionEmbeddings, truncated_text
    from megaman.runtime import choose_device, device_lines, package_versions, set_threads
    from megaman.training import checkpoint as checkpoints
    from megaman.training import compute, model_card, run_metadata
    from megaman.training.compute import ASKED, choose
    from megaman.training.memory_plan import memory_limit, settle
    from megaman.training.optimizer import rate_at, total_steps, warmup_steps
    from megaman.training.step import Encoded, SkippedSteps, TrainingStep, step_where_finite
    from megaman.training.tensorboard import TrainingLog
    from megaman.training.validation import Validation

    # Device, precision and whatever else shapes the computation: by a rule, or as the checkpoint
    # says.
    saved = checkpoints.read_train_state(checkpoint) if checkpoint else None
    settings = config.settings()
    asked = {flag: settings[flag] for flag in ASKED}
    set_threads(policy)
    chosen, placement, remarks = choose(
        asked, config.explicit, choose_device(), width, saved and saved.choices
    )
    runtime.keep_freed_memory()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it remarks on old kernels
    patience = InitProcessGroupKwargs(
        timeout=timedelta(hours=12)
    )  # while one process writes captions
    accelerator = Accelerator(
        mixed_precision=placement.mixed_precision,
        cpu=placement.device.type == "cpu",
        kwargs_handlers=[patience],
    )
    device, world, process = (
        accelerator.device,
        accelerator.num_processes,
        accelerator.process_index,
    )
    say = accelerator.print

    # Captions that are missing, before anything is made of them: one process writes, the others
    # wait.
    if config.captions.auto_caption:
        if accelerator.is_main_process:
            add_captions(config.captions.auto_caption, dataset)
        accelerator.wait_for_everyone()
        dataset = datasets[0] = find()
    dataset.add_affixes(
        config.captions.trigger_word, config.captions.caption_prefix, config.captions.caption_suffix
    )
    augmentation = CaptionAugmentation(
        **{flag: settings[flag] for flag in CaptionAugmentation._fields}
    )

    # What a resumed run takes over: its seed, its place, its TensorBoard folder.
    seed = (
        config.run.seed
        if config.run.seed is not None
        else saved.seed
        if saved
        else secrets.randbelow(2**31)
    )
    (seed,) = broadcast_object_list([seed])  # every process draws its own otherwise
    name = resolve_name(config.base.pretrained_model_name)
    split, at_once = chosen.split, config.optimizer.train_batch_size * world
    effective = at_once * config.optimizer.gradient_accumulation_steps
    must_match = {
        "pretrained_model_name": name,
        "seed": seed,
        "data": dataset.fingerprint(),
        "class data": datasets[1].fingerprint() if config.data.class_data_dir else "none",
        **config.resume_settings(),
        "pictures a step": effective,
        "pictures of one bucket": at_once if config.buckets.enable_bucket else None,
    }
    if saved and (different := checkpoints.differences(saved.settings, must_match)):
        raise UserError(
            f"{checkpoint} is of another run: {'; '.join(different)}",
            "Give the same settings to resume",
        )
    start = saved.step if saved else 0

    # What it will need, before anything is loaded; in each process the same.
    limit = min(gather_object([memory_limit(device, config.compute.vram_limit)]))
    fitted = settle(
        placement,
        limit,
        split,
        chosen.gradient_checkpointing,
        world == 1,
        say,
        **config.memory_request(),
    )
    chosen.vae_tile = fitted.tile = fitted.tile or chosen.vae_tile

    # The base, whose parts are loaded as they are needed.
    say(f"loading {name}")
    if remark := alias_notice(config.base.pretrained_model_name):
        say(f"  {remark}")
    base = load_base(name, placement.dtype, device, placement.layout)
    adapter.check_targets(base.unet_layers, config.lora.target_modules)
    for each in datasets if config.buckets.enable_bucket else []:
        each.set_buckets(
            buckets.make_buckets(
                native=base.native_size, **config.buckets.limits(config.data.resolution)
            )
        )

    # The frozen parts run once, for every caption and every form of every picture, and leave device
    # and memory.
    captions = [caption for each in datasets for caption in each.captions]
    texts = CaptionEmbeddings(
        base,
        captions,
        [config.validation.validation_prompt, ""],
        config.captions.varies_tags,
        config.lora.train_text_encoder,
        device,
    )
    with accelerator.local_main_process_first():  # the others find it done
        bar = partial(tqdm, unit="picture", disable=process != 0)
        workers = config.data.dataloader_num_workers
        encoding = EncodingConfig(config.data.crop_variants, config.data.random_flip, seed, workers)
        if config.cache.no_cache:
            encoder = VaeEncoder(base.vae)
            sources = [OnlineLatents(encoder, each, encoding) for each in datasets]
            for each in datasets:
                drop_damaged(each, workers, partial(bar, desc="looking", total=len(each)))
        else:
            vae_id = identify_vae(base, file_index)
            sources = [
                encode_dataset(
                    lambda: base.vae,
                    each,
                    encoding,
                    file_index,
                    LatentCache(cache_dir and vae_folder(cache_dir, vae_id)),
                    partial(bar, desc="encoding", total=len(each)),
                )
                for each in datasets
            ]
            base.release("vae")
            if cache_dir and process == 0:
                prune(
                    cache_dir,
                    config.cache.cache_limit * 2**30,
                    set().union(*(each.files for each in sources)),
                )
    for each in datasets:
        each.set_truncated(truncated_text(base.tokenizer, each.captions))
    if process == 0:
        report_problems(datasets, output_dir)
    check_usable(datasets, config.data.skip_bad_images)

    # LoRA.
    torch.manual_seed(seed)  # for the LoRA's random half
    add_lora = partial(
        adapter.inject,
        rank=config.lora.lora_rank,
        alpha=config.lora.lora_alpha,
        use_rslora=config.lora.use_rslora,
        dropout=config.lora.lora_dropout,
    )
    chosen.apply(base.unet)
    models = [base.unet]  # those in training, each with its parameters and its peak rate
    groups = [
        {
            "params": add_lora(base.unet, target_modules=config.lora.target_modules),
            "lr": config.optimizer.learning_rate,
        }
    ]
    if text_encoder := base.text_encoder if config.lora.train_text_encoder else None:
        models.append(text_encoder)
        groups.append(
            {
                "params": add_lora(text_encoder, target_modules=adapter.TEXT_ENCODER_TARGETS),
                "lr": config.optimizer.text_encoder_lr,
            }
        )
    trainable = [parameter for group in groups for parameter in group["params"]]
    if fitted.checkpointing:
        compute.checkpoint_gradients(models)

    # Steps, rate, optimizer.
    kinds = [
        (augmentation, seed, 1.0),
        (CaptionAugmentation(), class_seed(seed), config.loss.prior_loss_weight),
    ]
    encoded = [
        Encoded(
            *each,
            base.vae_scale_factor,
            config.buckets.enable_bucket,
            config.optimizer.train_batch_size,
            config.optimizer.gradient_accumulation_steps,
            world,
            *kind,
        )
        for *each, kind in zip(datasets, sources, kinds, strict=False)
    ]
    batches, sizes = encoded[0].batches, encoded[0].sizes
    total = total_steps(
        batches.epoch_length,
        batches.step_length,
        config.optimizer.num_train_epochs,
        config.optimizer.max_train_steps,
    )
    epochs = total * batches.step_length / batches.epoch_length
    if start > total:
        raise UserError(
            f"{checkpoint} is at step {start}, beyond the {total} of this run",
            "Raise --max_train_steps",
        )
    warmup_given = "lr_warmup_steps" in config.explicit
    warmup = warmup_steps(
        config.optimizer.lr_scheduler, config.optimizer.lr_warmup_steps, warmup_given, total
    )
    if (
        warmup_given
        and config.optimizer.lr_warmup_steps
        and config.optimizer.lr_scheduler == "constant"
    ):
        say("--lr_scheduler constant has no warm-up: take constant_with_warmup for one")
    rates = [rate_at(config.optimizer.lr_scheduler, group["lr"], warmup, total) for group in groups]
    optimizer = torch.optim.AdamW(
        groups,
        betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        eps=config.optimizer.adam_epsilon,
        weight_decay=config.optimizer.adam_weight_decay,
        fused=device.type != "mps",
    )
    *prepared, optimizer = accelerator.prepare(*models, optimizer)
    embed = texts
    if text_encoder:
        embed = partial(texts, text_encoder=prepared[-1])
    if checkpoint:
        checkpoints.restore(
            checkpoint, base.unet, optimizer.optimizer, accelerator.scaler, text_encoder
        )
        if accelerator.is_main_process and checkpoint.resolve().parent == output_dir.resolve():
            checkpoints.prune(output_dir, start, config.output.checkpoints_total_limit)

    # Say what will happen before it happens.
    say(
        *dataset.summary(sources[0].total_crops, config.data.random_flip),
        *sources[0].summary(),
        sep="\n",
    )
    if config.data.class_data_dir:
        weight = config.loss.prior_loss_weight
        say(f"class      {len(datasets[1])} in {config.data.class_data_dir}, loss times {weight:g}")
    if config.buckets.enable_bucket:
        say(f"buckets    {buckets.summary(sizes)}; {batches.epoch_length} batches an epoch")
    say(
        f"steps      {total} of {'up to ' * config.buckets.enable_bucket}{effective} pictures "
        f"({config.optimizer.train_batch_size} x {config.optimizer.gradient_accumulation_steps} accumulated "
        f"x {world} process{'es' * (world > 1)}), {epochs:.1f} epochs, {config.optimizer.lr_scheduler} rate up to "
        f"{config.optimizer.learning_rate:g}"
        + (f" and {config.optimizer.text_encoder_lr:g} (text encoder)" if text_encoder else "")
        + f", {warmup} warm-up"
    )
    say(
        f"LoRA       rank {config.lora.lora_rank}, alpha {config.lora.lora_alpha:g}"
        f"{' (rsLoRA)' * config.lora.use_rslora}, {sum(p.numel() for p in trainable):,} trainable parameters in "
        f"{len(trainable) // 2} layers"
        + (f", {len(groups[1]['params']) // 2} of them in the text encoder" if text_encoder else "")
    )
    say(
        *device_lines(placement, chosen.attention, f"{config.data.resolution} px", f"seed {seed}"),
        *remarks,
        sep="\n",
    )
    if policy.remark:
        say(f"           {policy.remark}")
    if config.output.resume_from_checkpoint:
        say(
            f"resuming   {checkpoint}, step {start}"
            if checkpoint
            else "resuming   no checkpoint yet: starting afresh"
        )
        for later in [
            path for path in find_all(output_dir) if checkpoint and step_of(path) > start
        ]:
            say(f"           {later} is later and stays until this run comes to its step")

    # Where it is recorded.
    log_dir = log_dir_of(saved and saved.log_dir, config.output.logging_dir, output_dir)
    curves = TrainingLog(
        partial(SummaryWriter, str(log_dir), ""), start + 1 if saved else None, say
    )
    if accelerator.is_main_process:
        remove(leftovers)
        training_config = {
            "settings": settings | {"seed": seed},
            "base": name,
            "total_steps": total,
            "warmup_steps": warmup,
            "epochs": epochs,
            "buckets": dataset.buckets and buckets.record(dataset.buckets, sizes),
            "device": str(device),
            "dtype": str(placement.dtype).removeprefix("torch."),
            "versions": package_versions(),
            "class_pictures": sum(map(len, datasets[1:])),
            "python": sys.version.split()[0],
            "log_dir": str(log_dir),
            "choices": chosen.record(base.unet),
        }
        write_json(output_dir / "training_config.json", training_config)
        curves.add(
            "add_text", "settings", f"```json\n{json.dumps(training_config, indent=2)}\n```", start
        )

    stop = StopSignal()
    seeds = [seed + j for j in range(config.validation.num_validation_images)]
    validation = Validation(
        base,
        texts.prompt_embeds,
        config.validation.validation_prompt,
        seeds,
        config.data.resolution,
        fitted.tile_vae,
        config.cache.no_cache,
        accelerator.autocast,
        say,
        stop.raise_if_received,
    )

    def validate(step: int) -> None:
        """Draw the fixed-seed images with the model in hand."""
        if accelerator.is_main_process:
            images = validation.draw(step, output_dir / f"samples-{step}")
            curves.add_images("validation", map(np.asarray, images), step)

    def save_checkpoint(step: int) -> bool:
        """Save the whole state; a disk that is full or gone is named, and the next save tries
        again."""
        if not accelerator.is_main_process:
            return True
        state = checkpoints.TrainState(
            step,
            seed,
            str(log_dir),
            elapsed + time.monotonic() - began,
            must_match,
            chosen.record(base.unet),
        )
        try:
            checkpoints.save(
                output_dir,
                base.unet,
                optimizer.optimizer,
                accelerator.scaler,
                state,
                name,
                config.output.checkpoints_total_limit,
                text_encoder,
            )
        except (OSError, UserError) as error:
            say(
                f"step {step}: no checkpoint ({summarize_error(error)}); training goes on, the next save tries again"
            )
            return False
        return True

    training = TrainingStep(
        prepared,
        base.noise_scheduler,
        encoded,
        embed,
        accelerator.backward,
        accelerator.no_sync,
        process,
        device,
        placement.dtype,
        base.scaling_factor,
        config.loss.noise_offset,
        config.loss.snr_gamma,
        config.lora.lora_dropout > 0,
    )

    def make_room() -> None:
        optimizer.zero_grad()
        if world > 1:
            raise UserError(
                "One of the processes ran out of memory", "Lower --train_batch_size for all of them"
            )
        say(f"too little memory: {compute.make_room(models, split, config.data.resolution)}")

    # The loop. The last step does everything: log, save, draw. So does a step after which a stop is
    # wanted.
    began, elapsed = time.monotonic(), saved.elapsed if saved else 0.0
    losses, all_finite, skipped = [], [], SkippedSteps()
    for model in models:
        model.train()
    with stop:
        due = start % config.validation.validation_steps == 0 or start == total
        if start == 0 or (
            due and not (output_dir / f"samples-{start}").exists()
        ):  # killed before it came to that
            validate(start)
        bar = tqdm(
            total=total,
            initial=start,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        for step in range(start + 1, total + 1):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate(step - 1)
            losses.append(
                runtime.retry_on_oom(partial(training.accumulate, step, split), make_room)
            )
            norm = accelerator.clip_grad_norm_(trainable, config.optimizer.max_grad_norm)
            all_finite.append(step_where_finite(optimizer, norm, accelerator.scaler))
            optimizer.zero_grad()
            bar.update()
            if step == start + 1 and device.type == "cpu":
                runtime.use_huge_pages()
            last, stopping = step == total, anywhere(accelerator, stop.received is not None)
            saving = step % config.output.save_steps == 0 or last or stopping
            if step % LOG_EVERY == 0 or saving:  # a checkpoint never stands ahead of the curve
                values = accelerator.reduce(torch.stack(losses), reduction="mean").tolist()
                if bad := skipped.note(torch.stack(all_finite).tolist(), step):
                    numbers = ", ".join(map(str, bad))
                    say(
                        f"gradients that were not finite: step {numbers} skipped, {skipped.total} so far"
                    )
                losses, all_finite = [], []
                bar.set_postfix(
                    loss=f"{sum(values) / len(values):.4f}", lr=f"{rates[0](step - 1):.2e}"
                )
                curves.add_steps(step, values, rates)
                if accelerator.is_main_process:
                    curves.flush()
            saved_now = save_checkpoint(step) if saving else False
            if stopping and not last:
                bar.close()
                curves.close()
                say(
                    f"stopped after step {step}"
                    + (f": {output_dir / f'checkpoint-{step}'}" if saved_now else "")
                )
                say(f"to go on: python megaman_lora.py {shlex.join(resume_command(argv))}")
                return stop.exit_code
            if step % config.validation.validation_steps == 0 or last:
                validate(step)
        bar.close()

    # What remains.
    accelerator.wait_for_everyone()
    reason = ""
    if accelerator.is_main_process:
        seconds, samples = elapsed + time.monotonic() - began, output_dir / f"samples-{total}"
        notes = run_metadata.training_metadata(
            training_config,
            dataset.by_folder(),
            base.noise_scheduler.config.prediction_type,
            samples / "00.png",
            time.time() - seconds,
            time.time(),
        )
        card = model_card.write_card(
            training_config,
            dataset.captions,
            dataset.num_written_captions,
            samples,
        )
        curves.close()
        wanted = output_dir / "lora_weights"
        save = partial(
            lora_files.save_lora,
            models=lora_files.models_by_part(base.unet, text_encoder),
            base_name=name,
            metadata=notes,
            precision=config.output.save_precision,
            extra_files=card,
        )
        folder, reason = save_somewhere(wanted, save)
        if reason:
            say(f"{wanted} cannot be written ({reason}): the LoRA is in {folder} instead")
        say(f"done in {math.floor(seconds / 60)} min {seconds % 60:.0f} s: {folder}")
        flags = ["--demo"] if config.run.demo else []
        if not config.run.demo or "output_dir" in config.explicit or folder != wanted:
            flags += ["--lora_path", folder.as_posix()]
        say(f"next: python generate_megaman.py {shlex.join(flags)}")
    accelerator.end_training()
    if world > 1:
        # Gloo's thread needs the GIL to free the last barrier's tensor. Without this pause it may
        # not have it before this thread frees the process group, which joins that thread while it
        # holds the GIL: neither ever ends.
        time.sleep(0.5)
    return 1 if reason else 0


def find_pictures(
    data_dir: str,
    given: bool,
    file_index: FileIndex,
    size: int,
    center_crop: bool,
    folder_config: FolderConfig,
) -> MegaManDataset | None:
    """The dataset, what cannot be used left out; None where the default folder has no picture
    yet."""
    folder = Path(data_dir)
    if not given and not folder.is_dir():
        folder.mkdir(parents=True)
    dataset = MegaManDataset(folder, None, size, center_crop, folder_config)
    dataset.check(file_index)
    if len(dataset) or dataset.skipped:
        return dataset
    if given:
        check_usable([dataset], skip_bad=False)
    print(
        f"There are no pictures yet. Put 20 to 100 of them into {data_dir} and run the same command again."
    )
    print(
        f"How, with captions: {write_instructions(folder)}. To see a whole run first: python megaman_lora.py --demo"
    )
    return None


def add_captions(model: str, dataset: MegaManDataset) -> None:
    """Have a model write captions beside the pictures that lack one."""
    from megaman.data import captioner

    bar = partial(tqdm, desc="captioning", unit="picture")
    captioner.caption_missing(model, dataset, bar)


def report_problems(datasets: list[MegaManDataset], output_dir: Path) -> None:
    """Name each file that is left out, and each doubtful caption, here and in a file."""
    for line in write_problems(output_dir / "dataset_problems.json", datasets):
        print(line)


def anywhere(accelerator, here: bool) -> bool:
    """Whether it is so in any of the processes; they have to stop at the same step."""
    if accelerator.num_processes == 1:
        return here
    import torch

    return bool(
        accelerator.reduce(torch.tensor(float(here), device=accelerator.device), reduction="sum")
    )


def command() -> int:
    """Run main as a command."""
    remedy = "--gradient_checkpointing, a smaller --train_batch_size or a smaller --resolution"
    return run_script(main, sys.argv[1:], saves_memory=remedy)


if __name__ == "__main__":
    sys.exit(command())
