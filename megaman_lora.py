"""Train a LoRA for Stable Diffusion on a folder of pictures.

    python megaman_lora.py --demo                                     everything embedded, minutes on a CPU
    python megaman_lora.py --data_dir ./megaman_images --max_train_steps 1000

The story, top to bottom: options, pictures, base, LoRA, encode once, loop, save.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("error: Mega Man LoRA needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2])

import contextlib
import importlib.metadata
import json
import logging
import math
import secrets
import shlex
import shutil
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megaman.dataset import MegaManDataset
from megaman.errors import UserError, brief, run_script
from megaman.files import replacing_folder, write_json, write_text
from megaman.names import is_inside, safe_name
from megaman.options import resuming, training_options
from megaman.output import find_all, new_log_dir, open_output, save_somewhere, step_of
from megaman.problems import too_bad, write_problems
from megaman.stops import StoppedError, StopSignal

LOG_EVERY = 10  # steps between two looks at the loss: each look waits for the device
PACKAGES = ["torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pillow"]

INSTRUCTIONS = Path(__file__).parent / "megaman" / "templates" / "instructions.txt"


def main(argv: list[str]) -> int:
    options = training_options(argv)

    # Pictures: found and looked at before anything heavy is imported.
    given = options.demo or "data_dir" in options.given
    dataset = find_pictures(options.data_dir, given, options.resolution, options.center_crop)
    if dataset is None:
        return int(options.strict)  # no pictures is what a check should find
    output_dir = Path(options.output_dir)
    if options.check_data:
        from megaman import doctor, report

        bar = partial(tqdm, desc="looking", unit="picture", total=len(dataset), disable=None)  # no bar in a file
        found = doctor.examine(dataset, options.resolution, progress=bar)
        print(*report.write_report(output_dir, found), sep="\n")
        return int(options.strict and found.wrong)
    checkpoint, leftovers = open_output(output_dir, options.resume_from_checkpoint, options.overwrite_output)
    if error := too_bad(dataset, options.skip_bad_images):
        report_problems(dataset, output_dir)
        raise error

    import numpy as np
    import torch
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list

    from megaman import cache, diffusion, finite, lora, lora_files, lora_metadata, memory, model_card, sample, schedule
    from megaman import checkpoint as checkpoints
    from megaman.base import UNUSED_CARD, actual_name, choose_device, load_base, moved, place, unused_nvidia_card
    from megaman.tracking import TrainingLog

    # Device and precision.
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it remarks on old kernels
    placement = place(options.mixed_precision, choose_device())
    accelerator = Accelerator(mixed_precision=placement.mixed_precision, cpu=placement.device.type == "cpu")
    device, world, process = accelerator.device, accelerator.num_processes, accelerator.process_index
    say = accelerator.print

    # What a resumed run takes over: its seed, its place, its TensorBoard folder.
    saved = checkpoints.read_progress(checkpoint) if checkpoint else None
    seed = options.seed if options.seed is not None else saved.seed if saved else secrets.randbelow(2**31)
    (seed,) = broadcast_object_list([seed])  # every process draws its own otherwise
    name = actual_name(options.pretrained_model_name)
    split = memory.Split(options.train_batch_size, options.gradient_accumulation_steps)
    effective = split.size * split.count * world
    must_match = {"pretrained_model_name": name, "lora_rank": options.lora_rank, "lora_alpha": options.lora_alpha,
                  "use_rslora": options.use_rslora, "target_modules": options.target_modules, "seed": seed,
                  "data": dataset.fingerprint(), "resolution": options.resolution, "center_crop": options.center_crop,
                  "crop_variants": options.crop_variants, "random_flip": options.random_flip,
                  "pictures a step": effective}  # fmt: skip
    if saved and (different := checkpoints.differences(saved.settings, must_match)):
        raise UserError(f"{checkpoint} is of another run: {'; '.join(different)}", "Give the same settings to resume")
    start = saved.step if saved else 0

    # Base and LoRA.
    say(f"loading {name}")
    if remark := moved(options.pretrained_model_name):
        say(f"  {remark}")
    base = load_base(name, placement.dtype)
    torch.manual_seed(seed)  # for the LoRA's random half
    trainable = lora.inject(base.unet, options.lora_rank, options.lora_alpha, options.target_modules,
                            options.use_rslora, options.lora_dropout)  # fmt: skip
    if options.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    unet = base.unet.to(device)

    # The frozen parts run once: every caption, every variant of every picture. Then they leave the device.
    base.text_encoder.to(device)
    captions = [*dataset.captions, options.validation_prompt, ""]
    text_states = cache.encode_captions(base.text_encoder, base.tokenizer, captions)
    base.text_encoder = base.text_encoder.to("cpu")
    base.vae.to(device)
    moments, _ = cache.encode_pictures(
        base.vae, dataset, options.crop_variants, options.random_flip, seed, options.dataloader_num_workers,
        lambda pictures: tqdm(pictures, desc="encoding", unit="picture", total=len(dataset), disable=process != 0),
    )  # fmt: skip
    base.vae.to("cpu")
    if process == 0:
        report_problems(dataset, output_dir)
    if error := too_bad(dataset, options.skip_bad_images):
        raise error

    # Steps, rate, optimizer.
    total = schedule.total_steps(len(moments), effective, options.num_train_epochs, options.max_train_steps)
    if start > total:
        raise UserError(f"{checkpoint} is at step {start}, beyond the {total} of this run", "Raise --max_train_steps")
    warmup_given = "lr_warmup_steps" in options.given
    warmup = schedule.warmup_steps(options.lr_scheduler, options.lr_warmup_steps, warmup_given, total)
    if warmup_given and options.lr_warmup_steps and options.lr_scheduler == "constant":
        say("--lr_scheduler constant has no warm-up: take constant_with_warmup for one")
    rate = schedule.rate_at(options.lr_scheduler, options.learning_rate, warmup, total)
    optimizer = torch.optim.AdamW(
        trainable,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=device.type in ("cuda", "cpu"),
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if checkpoint:
        checkpoints.restore(checkpoint, accelerator.unwrap_model(unet), optimizer.optimizer, accelerator.scaler)
        if accelerator.is_main_process and checkpoint.resolve().parent == output_dir.resolve():
            checkpoints.prune(output_dir, start, options.checkpoints_total_limit)

    # Say what will happen before it happens.
    made = len(dataset) - sum(dataset.found)
    mirrored = " with their mirror images" if options.random_flip else ""
    say(f"pictures   {len(dataset)} in {options.data_dir}, {sum(map(len, moments))} crops{mirrored}; "
        f"captions: {sum(dataset.found)} found, {made} made from file names")  # fmt: skip
    if cut := cache.count_cut(base.tokenizer, dataset.captions):
        say(f"           {cut} captions are longer than {base.tokenizer.model_max_length - 2} tokens and are cut there")
    say(f"steps      {total} of {effective} pictures ({options.train_batch_size} x "
        f"{options.gradient_accumulation_steps} accumulated x {world} process{'es' * (world > 1)}), "
        f"{total * effective / len(dataset):.1f} epochs, {options.lr_scheduler} rate up to {options.learning_rate:g}, "
        f"{warmup} warm-up")  # fmt: skip
    say(f"LoRA       rank {options.lora_rank}, alpha {options.lora_alpha:g}{' (rsLoRA)' * options.use_rslora}, "
        f"{sum(p.numel() for p in trainable):,} trainable parameters in {len(trainable) // 2} layers")  # fmt: skip
    say(f"device     {device}: {placement.why}; {options.resolution} px; seed {seed}")
    if unused_nvidia_card():
        say(f"           {UNUSED_CARD}")
    if options.resume_from_checkpoint:
        say(f"resuming   {checkpoint}, step {start}" if checkpoint else "resuming   no checkpoint yet: starting afresh")
        for later in find_all(output_dir) if checkpoint else []:
            if step_of(later) > start:
                say(f"           {later} is later and stays until this run comes to its step")

    # Where it is recorded.
    kept = saved and is_inside(saved.log_dir, options.logging_dir)  # a stranger's checkpoint could name any folder
    log_dir = Path(
        saved.log_dir if kept else new_log_dir(Path(options.logging_dir), safe_name(output_dir.resolve().name))
    )
    settings = {**{key: value for key, value in vars(options).items() if key != "given"}, "seed": seed}
    curves = TrainingLog(partial(open_writer, log_dir), start + 1 if saved else None, say)
    if accelerator.is_main_process:
        for path in leftovers:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        config = {"settings": settings, "base": name, "total_steps": total, "warmup_steps": warmup,
                  "device": str(device), "dtype": str(placement.dtype).removeprefix("torch."), "versions": versions,
                  "python": sys.version.split()[0], "log_dir": str(log_dir)}  # fmt: skip
        write_json(output_dir / "training_config.json", config)
        curves.add("add_text", "settings", f"```json\n{json.dumps(config, indent=2)}\n```", start)

    def draw_samples() -> list:
        drawn = accelerator.unwrap_model(unet)
        seeds = [seed + j for j in range(options.num_validation_images)]
        images = []
        for part in (seeds[first : first + at_once] for first in range(0, len(seeds), at_once)):
            states, empty = (text_states[text].expand(len(part), -1, -1) for text in (options.validation_prompt, ""))
            with accelerator.autocast():
                images += sample.draw_images(
                    drawn, base.vae, sample.make_sampler(base.scheduler), states, empty, part,
                    options.resolution, options.resolution, steps=25, guidance=7.5, on_step=stop.raise_if_received,
                )  # fmt: skip
        return images

    def one_at_a_time() -> None:
        nonlocal at_once
        if at_once == 1:
            raise UserError("one at a time they need more memory than there is")
        at_once = 1

    def validate(step: int) -> None:
        """Draw the fixed-seed images with the model in hand; whatever fails here, training goes on."""
        folder = output_dir / f"samples-{step}"
        if not options.num_validation_images or not accelerator.is_main_process:
            return
        try:
            base.vae.to(device)
            accelerator.unwrap_model(unet).eval()
            images = memory.until_it_fits(draw_samples, one_at_a_time)
            for j, image in enumerate(images):
                curves.add("add_image", f"validation/{j:02d}", np.asarray(image), step, dataformats="HWC")
            curves.flush()
            with replacing_folder(folder) as aside:
                for j, image in enumerate(images):
                    image.save(aside / f"{j:02d}.png")
            if not all(image.getbbox() for image in images):
                say(f"step {step}: a sample image is black all over; if more are, try --mixed_precision bf16 or no")
        except StoppedError:
            pass
        except Exception as error:
            say(f"step {step}: no sample images ({brief(error)}); training goes on")
        finally:
            accelerator.unwrap_model(unet).train()
            base.vae.to("cpu")

    def save_checkpoint(step: int) -> bool:
        """Save the whole state; a disk that is full or gone is named, and the next save tries again."""
        if not accelerator.is_main_process:
            return True
        progress = checkpoints.Progress(step, seed, str(log_dir), elapsed + time.monotonic() - began, must_match)
        try:
            checkpoints.save(output_dir, accelerator.unwrap_model(unet), optimizer.optimizer, accelerator.scaler,
                             progress, name, options.checkpoints_total_limit)  # fmt: skip
        except (OSError, UserError) as error:
            say(f"step {step}: no checkpoint ({brief(error)}); training goes on, the next save tries again")
            return False
        return True

    def draw(index: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, noise and timestep of one picture, from one of its crops."""
        pick = int(torch.randint(len(moments[index]), (1,), generator=generator))
        latents = diffusion.draw_latents(moments[index][pick][None], base.vae.config.scaling_factor, generator)
        noise = diffusion.draw_noise(latents.shape, options.noise_offset, generator)
        return latents, noise, diffusion.draw_timesteps(1, base.scheduler.config.num_train_timesteps, generator)

    def micro_batch(number: int) -> torch.Tensor:
        """The loss of micro-batch number ... of the run; what is random in it is drawn on the CPU, a picture each."""
        rows = range(number * split.size, (number + 1) * split.size)
        indices = [schedule.picture_at(row, len(moments), seed) for row in rows]
        drawn = [draw(index, schedule.random_for(seed, row)) for index, row in zip(indices, rows, strict=True)]
        latents, noise, timesteps = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        weights = None
        if options.snr_gamma:
            ratio = diffusion.snr(base.scheduler.alphas_cumprod, timesteps)
            kind = base.scheduler.config.prediction_type
            weights = diffusion.min_snr_weights(ratio, options.snr_gamma, kind).to(device)
        noisy = base.scheduler.add_noise(latents, noise, timesteps).to(device, placement.dtype)
        wanted = diffusion.target(base.scheduler, latents, noise, timesteps).to(device)
        states = torch.stack([text_states[dataset.captions[i]] for i in indices]).to(device, placement.dtype)
        if options.lora_dropout:
            schedule.seed_dropout(seed, number)
        noise_pred = unet(noisy, timesteps.to(device), encoder_hidden_states=states).sample
        return diffusion.loss(noise_pred, wanted, weights)

    def accumulate(step: int) -> torch.Tensor:
        """The gradients of one optimizer step; returns its loss."""
        step_loss = torch.zeros((), device=device)
        for micro in range(split.count):
            last = micro == split.count - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(unet):
                loss = micro_batch(((step - 1) * split.count + micro) * world + process) / split.count
                accelerator.backward(loss)
                step_loss += loss.detach()
        return step_loss

    def make_room() -> None:
        optimizer.zero_grad()
        if world > 1:
            raise UserError("One of the processes ran out of memory", "Lower --train_batch_size for all of them")
        say(f"too little memory: {memory.make_room(accelerator.unwrap_model(unet), split, options.resolution)}")

    # The loop. The last step does everything: log, save, draw. So does a step after which a stop is wanted.
    began, elapsed = time.monotonic(), saved.elapsed if saved else 0.0
    at_once = sample.images_at_once(options.resolution, options.resolution)
    losses: list[torch.Tensor] = []
    all_finite: list[torch.Tensor] = []
    skipped = finite.SkippedSteps()
    unet.train()
    with StopSignal() as stop:
        due = start % options.validation_steps == 0 or start == total
        if start == 0 or (due and not (output_dir / f"samples-{start}").exists()):  # killed before it came to that
            validate(start)
        bar = tqdm(total=total, initial=start, desc="training", unit="step", disable=not accelerator.is_main_process)
        for step in range(start + 1, total + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate(step - 1)
            losses.append(memory.until_it_fits(partial(accumulate, step), make_room))
            norm = accelerator.clip_grad_norm_(trainable, options.max_grad_norm)
            all_finite.append(finite.step_where_finite(optimizer, norm, accelerator.scaler))
            optimizer.zero_grad()
            bar.update()
            last, stopping = step == total, anywhere(accelerator, stop.received is not None)
            saving = step % options.save_steps == 0 or last or stopping
            if step % LOG_EVERY == 0 or saving:  # a checkpoint never stands ahead of the curve
                values = accelerator.reduce(torch.stack(losses), reduction="mean").tolist()
                if bad := skipped.note(torch.stack(all_finite).tolist(), step):
                    numbers = ", ".join(map(str, bad))
                    say(f"gradients that were not finite: step {numbers} skipped, {skipped.total} so far")
                losses, all_finite = [], []
                bar.set_postfix(loss=f"{sum(values) / len(values):.4f}", lr=f"{rate(step - 1):.2e}")
                for number, value in enumerate(values, start=step - len(values) + 1):
                    curves.add("add_scalar", "train/loss", value, number)
                    curves.add("add_scalar", "train/learning_rate", rate(number - 1), number)
                if accelerator.is_main_process:
                    curves.flush()
            saved_now = save_checkpoint(step) if saving else False
            if stopping and not last:
                bar.close()
                curves.close()
                say(f"stopped after step {step}" + (f": {output_dir / f'checkpoint-{step}'}" if saved_now else ""))
                say(f"to go on: python megaman_lora.py {shlex.join(resuming(argv))}")
                return stop.exit_code
            if step % options.validation_steps == 0 or last:
                validate(step)
        bar.close()

    # What remains.
    accelerator.wait_for_everyone()
    reason = ""
    if accelerator.is_main_process:
        seconds, samples = elapsed + time.monotonic() - began, output_dir / f"samples-{total}"
        notes = lora_metadata.run_notes(config, dataset.captions, base.scheduler.config.prediction_type,
                                        samples / "00.png", time.time() - seconds, time.time())  # fmt: skip
        card = model_card.write_card(config, dataset.captions, sum(dataset.found), samples)
        curves.close()
        wanted = output_dir / "lora_weights"
        save = partial(lora_files.save_lora, unet=accelerator.unwrap_model(unet), base_name=name, notes=notes,
                       precision=options.save_precision, others=card)  # fmt: skip
        folder, reason = save_somewhere(wanted, save)
        if reason:
            say(f"{wanted} cannot be written ({reason}): the LoRA is in {folder} instead")
        say(f"done in {math.floor(seconds / 60)} min {seconds % 60:.0f} s: {folder}")
        flags = ["--demo"] if options.demo else []
        if not options.demo or "output_dir" in options.given or folder != wanted:
            flags += ["--lora_path", folder.as_posix()]
        say(f"next: python generate_megaman.py {shlex.join(flags)}")
    accelerator.end_training()
    return 1 if reason else 0


def find_pictures(data_dir: str, given: bool, size: int, center_crop: bool) -> MegaManDataset | None:
    """The dataset, what cannot be used left out; None where the default folder has no picture yet."""
    folder = Path(data_dir)
    if not given and not folder.is_dir():
        folder.mkdir(parents=True)
    dataset = MegaManDataset(folder, None, size, center_crop)
    dataset.check()
    if len(dataset) or dataset.problems:
        return dataset
    if given:
        raise too_bad(dataset, skip_bad=False)
    guide = folder / "README.md"
    if not guide.exists():
        write_text(guide, INSTRUCTIONS.read_text(encoding="utf-8"))
    print(f"There are no pictures yet. Put 20 to 100 of them into {data_dir} and run the same command again.")
    print(f"How, with captions: {guide}. To see a whole run first: python megaman_lora.py --demo")
    return None


def report_problems(dataset: MegaManDataset, output_dir: Path) -> None:
    """Name each file that is left out, and each doubtful caption, here and in a file."""
    for line in write_problems(output_dir / "dataset_problems.json", dataset):
        print(line)


def open_writer(log_dir: Path, purge_step: int | None):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(log_dir), purge_step=purge_step)


def anywhere(accelerator, here: bool) -> bool:
    """Whether it is so in any of the processes; they have to stop at the same step."""
    if accelerator.num_processes == 1:
        return here
    import torch

    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device), reduction="sum"))


if __name__ == "__main__":
    less = "--gradient_checkpointing, a smaller --train_batch_size or a smaller --resolution"
    sys.exit(run_script(main, sys.argv[1:], saves_memory=less))
