"""Train a LoRA for Stable Diffusion on a folder of pictures.

    python megaman_lora.py --demo                                     everything embedded, minutes on a CPU
    python megaman_lora.py --data_dir ./megaman_images --max_train_steps 1000

The story, top to bottom: options, pictures, base, LoRA, encode once, loop, save.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("error: Mega Man LoRA needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2])

import importlib.metadata
import json
import logging
import math
import re
import secrets
import shlex
import shutil
import time
from pathlib import Path

from megaman.captions import guessed_encoding
from megaman.dataset import MegaManDataset
from megaman.errors import UserError, run_script
from megaman.files import replacing, write_json, write_text
from megaman.names import is_inside, safe_name
from megaman.options import training_options

LOG_EVERY = 10  # steps between two looks at the loss: each look waits for the device
OURS = r"(checkpoint|samples)-\d+|lora_weights|training_config\.json"  # what a run leaves in --output_dir
PACKAGES = ["torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pillow"]

INSTRUCTIONS = """\
Put your pictures into this folder: JPG, PNG, BMP or WebP, 512x512 or larger, 20 to 100 of them. Subfolders are fine.
A caption is an optional text file of the same name beside its picture:

    megaman_01.png
    megaman_01.txt      mega man, blue robot, helmet, game character, detailed armor

Where it is missing, a caption is made from the picture's name. Then run:

    python megaman_lora.py

請把圖片放進這個資料夾：JPG、PNG、BMP 或 WebP，512x512 以上，20 到 100 張，可以放在子資料夾裡。
每張圖片可以附一個同名的文字檔作為標註，例如：

    megaman_01.png
    megaman_01.txt      mega man, blue robot, helmet, game character, detailed armor

沒有標註的圖片，會用檔名自動產生標註。放好之後執行：

    python megaman_lora.py
"""


def main(argv: list[str]) -> int:
    options = training_options(argv)

    # Pictures: found and looked at before anything heavy is imported.
    given = options.demo or "data_dir" in options.given
    dataset = find_pictures(options.data_dir, given, options.resolution, options.center_crop)
    if dataset is None:
        return 0
    output_dir = Path(options.output_dir)
    checkpoint, leftovers = open_output(output_dir, options.resume_from_checkpoint, options.overwrite_output)

    import torch
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    from megaman import cache, diffusion, lora, lora_files, sample, schedule
    from megaman import checkpoint as checkpoints
    from megaman.base import UNUSED_CARD, actual_name, choose_device, load_base, moved, place, unused_nvidia_card

    # Device and precision.
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it remarks on old kernels
    placement = place(options.mixed_precision, choose_device())
    accelerator = Accelerator(
        mixed_precision=placement.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        cpu=placement.device.type == "cpu",
    )
    device, world, process = accelerator.device, accelerator.num_processes, accelerator.process_index
    say = accelerator.print

    # What a resumed run takes over: its seed, its place, its TensorBoard folder.
    saved = checkpoints.read_progress(checkpoint) if checkpoint else None
    seed = options.seed if options.seed is not None else saved.seed if saved else secrets.randbelow(2**31)
    (seed,) = broadcast_object_list([seed])  # every process draws its own otherwise
    name = actual_name(options.pretrained_model_name)
    must_match = {"pretrained_model_name": name, "lora_rank": options.lora_rank, "lora_alpha": options.lora_alpha,
                  "target_modules": options.target_modules, "seed": seed}  # fmt: skip
    if saved and (different := checkpoints.differences(saved.settings, must_match)):
        raise UserError(f"{checkpoint} is of another run: {'; '.join(different)}", "Give the same settings to resume")
    start = saved.step if saved else 0

    # Base and LoRA.
    say(f"loading {name}")
    if remark := moved(options.pretrained_model_name):
        say(f"  {remark}")
    base = load_base(name, placement.dtype)
    torch.manual_seed(seed)  # for the LoRA's random half
    trainable = lora.inject(base.unet, options.lora_rank, options.lora_alpha, options.target_modules)
    if options.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    unet = base.unet.to(device)

    # The frozen parts run once: every caption, every variant of every picture. Then they leave the device.
    base.text_encoder.to(device)
    captions = [*dataset.captions, options.validation_prompt, ""]
    text_states = cache.encode_captions(base.text_encoder, base.tokenizer, captions)
    base.text_encoder = base.text_encoder.to("cpu")
    base.vae.to(device)
    moments, damaged = cache.encode_pictures(
        base.vae, dataset, options.crop_variants, options.random_flip, seed, options.dataloader_num_workers,
        lambda pictures: tqdm(pictures, desc="encoding", unit="picture", total=len(dataset), disable=process != 0),
    )  # fmt: skip
    base.vae.to("cpu")
    report_problems(damaged if process == 0 else {})
    if not moments:
        raise UserError(f"No picture in {options.data_dir} can be read", "Put other pictures there")

    # Steps, rate, optimizer.
    effective = options.train_batch_size * options.gradient_accumulation_steps * world
    total = schedule.total_steps(len(moments), effective, options.num_train_epochs, options.max_train_steps)
    if start > total:
        raise UserError(f"{checkpoint} is at step {start}, beyond the {total} of this run", "Raise --max_train_steps")
    warmup = warmup_steps(options, total, say)
    rate = schedule.rate_at(options.lr_scheduler, options.learning_rate, warmup, total)
    optimizer = torch.optim.AdamW(
        trainable,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if checkpoint:
        checkpoints.restore(checkpoint, accelerator.unwrap_model(unet), optimizer.optimizer, accelerator.scaler)

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
    say(f"LoRA       rank {options.lora_rank}, alpha {options.lora_alpha:g}, "
        f"{sum(p.numel() for p in trainable):,} trainable parameters in {len(trainable) // 2} layers")  # fmt: skip
    say(f"device     {device}: {placement.why}; {options.resolution} px; seed {seed}")
    if unused_nvidia_card():
        say(f"           {UNUSED_CARD}")
    if options.resume_from_checkpoint:
        say(f"resuming   {checkpoint}, step {start}" if checkpoint else "resuming   no checkpoint yet: starting afresh")
        for later in checkpoints.find_all(output_dir) if checkpoint else []:
            if checkpoints.step_of(later) > start:
                say(f"           {later} is later and stays until this run comes to its step")

    # Where it is recorded.
    kept = saved and is_inside(saved.log_dir, options.logging_dir)  # a stranger's checkpoint could name any folder
    log_dir = Path(
        saved.log_dir if kept else new_log_dir(Path(options.logging_dir), safe_name(output_dir.resolve().name))
    )
    settings = {**{key: value for key, value in vars(options).items() if key != "given"}, "seed": seed}
    writer = None
    if accelerator.is_main_process:
        from torch.utils.tensorboard import SummaryWriter

        for path in leftovers:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        config = {"settings": settings, "base": name, "total_steps": total, "warmup_steps": warmup,
                  "device": str(device), "dtype": str(placement.dtype).removeprefix("torch."), "versions": versions,
                  "python": sys.version.split()[0], "log_dir": str(log_dir)}  # fmt: skip
        write_json(output_dir / "training_config.json", config)
        writer = SummaryWriter(str(log_dir), purge_step=start + 1 if saved else None)
        writer.add_text("settings", f"```json\n{json.dumps(config, indent=2)}\n```", start)

    def validate(step: int) -> None:
        """Draw the fixed-seed images with the model in hand."""
        if not options.num_validation_images or not accelerator.is_main_process:
            return
        drawn = accelerator.unwrap_model(unet).eval()
        base.vae.to(device)
        seeds = [seed + j for j in range(options.num_validation_images)]
        at_once = sample.images_at_once(options.resolution, options.resolution)
        images = []
        for part in (seeds[first : first + at_once] for first in range(0, len(seeds), at_once)):
            states, empty = (text_states[text].expand(len(part), -1, -1) for text in (options.validation_prompt, ""))
            with accelerator.autocast():
                images += sample.draw_images(
                    drawn, base.vae, sample.make_sampler(base.scheduler), states, empty, part,
                    options.resolution, options.resolution, steps=25, guidance=7.5,
                )  # fmt: skip
        base.vae.to("cpu")
        drawn.train()
        folder = output_dir / f"samples-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        for j, image in enumerate(images):
            with replacing(folder / f"{j:02d}.png") as aside:
                image.save(aside, format="PNG")
            writer.add_image(f"validation/{j:02d}", as_array(image), step, dataformats="HWC")

    def save_checkpoint(step: int) -> None:
        if accelerator.is_main_process:
            writer.flush()
            progress = checkpoints.Progress(step, seed, str(log_dir), elapsed + time.monotonic() - began, must_match)
            checkpoints.save(output_dir, accelerator.unwrap_model(unet), optimizer.optimizer, accelerator.scaler,
                             progress, name, options.checkpoints_total_limit)  # fmt: skip

    def draw(index: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, noise and timestep of one picture, from one of its crops."""
        pick = int(torch.randint(len(moments[index]), (1,), generator=generator))
        latents = diffusion.draw_latents(moments[index][pick][None], base.vae.config.scaling_factor, generator)
        noise = diffusion.draw_noise(latents.shape, options.noise_offset, generator)
        return latents, noise, diffusion.draw_timesteps(1, base.scheduler.config.num_train_timesteps, generator)

    def micro_batch(number: int) -> torch.Tensor:
        """The loss of micro-batch number ... of the run; what is random in it is drawn on the CPU, a picture each."""
        rows = range(number * options.train_batch_size, (number + 1) * options.train_batch_size)
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
        noise_pred = unet(noisy, timesteps.to(device), encoder_hidden_states=states).sample
        return diffusion.loss(noise_pred, wanted, weights)

    # The loop. The last step does everything: log, save, draw.
    began, elapsed = time.monotonic(), saved.elapsed if saved else 0.0
    if start == 0:
        validate(0)
    unet.train()
    losses: list[torch.Tensor] = []
    bar = tqdm(total=total, initial=start, desc="training", unit="step", disable=not accelerator.is_main_process)
    for step in range(start + 1, total + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step - 1)
        step_loss = torch.zeros((), device=device)
        for micro in range(options.gradient_accumulation_steps):
            with accelerator.accumulate(unet):
                loss = micro_batch(((step - 1) * options.gradient_accumulation_steps + micro) * world + process)
                accelerator.backward(loss)
                step_loss += loss.detach() / options.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trainable, options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(step_loss)
        bar.update()
        last = step == total
        saving = step % options.save_steps == 0 or last
        if step % LOG_EVERY == 0 or saving:  # a checkpoint never stands ahead of the curve
            values = accelerator.reduce(torch.stack(losses), reduction="mean").tolist()
            losses = []
            bar.set_postfix(loss=f"{sum(values) / len(values):.4f}", lr=f"{rate(step - 1):.2e}")
            if writer:
                for number, value in enumerate(values, start=step - len(values) + 1):
                    writer.add_scalar("train/loss", value, number)
                    writer.add_scalar("train/learning_rate", rate(number - 1), number)
        if saving:
            save_checkpoint(step)
        if step % options.validation_steps == 0 or last:
            validate(step)
    bar.close()

    # What remains.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        notes = {"ss_steps": str(total), "ss_seed": str(seed), "ss_learning_rate": f"{options.learning_rate:g}",
                 "ss_num_train_images": str(len(dataset)),
                 "ss_resolution": f"({options.resolution}, {options.resolution})",
                 "ss_lr_scheduler": options.lr_scheduler, "ss_mixed_precision": placement.mixed_precision}  # fmt: skip
        lora_files.save_lora(output_dir / "lora_weights", accelerator.unwrap_model(unet), name, notes)
        writer.close()
        seconds = elapsed + time.monotonic() - began
        say(f"done in {math.floor(seconds / 60)} min {seconds % 60:.0f} s: {output_dir / 'lora_weights'}")
        flags = ["--demo"] if options.demo else []
        if not options.demo or "output_dir" in options.given:
            flags += ["--lora_path", (output_dir / "lora_weights").as_posix()]
        say(f"next: python generate_megaman.py {shlex.join(flags)}")
    accelerator.end_training()
    return 0


def find_pictures(data_dir: str, given: bool, size: int, center_crop: bool) -> MegaManDataset | None:
    """The dataset, its unreadable pictures left out and named; None where the default folder has no picture yet."""
    folder = Path(data_dir)
    if not given and not folder.is_dir():
        folder.mkdir(parents=True)
    dataset = MegaManDataset(folder, None, size, center_crop)
    problems = dataset.check()
    report_problems(problems)
    for path in filter(None, map(guessed_encoding, dataset.pictures)):
        print(f"captions   {path} is not UTF-8 and was read as Windows-1252: save it as UTF-8 if that is wrong")
    if len(dataset):
        return dataset
    if given or problems:
        raise UserError(f"--data_dir {data_dir} holds no picture that can be used", "Put JPG, PNG, BMP or WebP there")
    guide = folder / "README.md"
    if not guide.exists():
        write_text(guide, INSTRUCTIONS)
    print(f"There are no pictures yet. Put 20 to 100 of them into {data_dir} and run the same command again.")
    print(f"How, with captions: {guide}. To see a whole run first: python megaman_lora.py --demo")
    return None


def report_problems(problems: dict[Path, str]) -> None:
    for picture, reason in problems.items():
        print(f"left out: {picture}: {reason}")


def open_output(output_dir: Path, resume: str | None, overwrite: bool) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from, or None; and what an earlier run left that is to go once this one can begin.

    Raises UserError where that was not asked for: nobody's LoRA is overwritten unmeant.
    """
    checkpoint = None
    if resume:
        from megaman.checkpoint import find

        checkpoint = find(resume, output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    leftovers = [path for path in output_dir.iterdir() if re.fullmatch(OURS, path.name)]
    continues = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    barely_begun = resume == "latest" and not (output_dir / "lora_weights").exists()
    if continues or (barely_begun and not checkpoint):
        return checkpoint, []
    if leftovers and not overwrite:
        ways = "Go on with --resume_from_checkpoint latest, name another --output_dir, or add --overwrite_output"
        raise UserError(
            f"--output_dir {output_dir} holds an earlier run", "Name another --output_dir" if resume else ways
        )
    return checkpoint, leftovers


def warmup_steps(options, total: int, say) -> int:
    """The warm-up in steps: none for constant; the default is cut to a tenth of a short run."""
    if options.lr_scheduler == "constant":
        if "lr_warmup_steps" in options.given and options.lr_warmup_steps:
            say("--lr_scheduler constant has no warm-up: take constant_with_warmup for one")
        return 0
    return options.lr_warmup_steps if "lr_warmup_steps" in options.given else min(options.lr_warmup_steps, total // 10)


def new_log_dir(logging_dir: Path, name: str) -> Path:
    """A folder of its own for this run under --logging_dir, so that two runs never share a curve."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    taken = [logging_dir / f"{name}-{stamp}{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 100))]]
    return next(path for path in taken if not path.exists())


def as_array(image):
    import numpy as np

    return np.asarray(image)


if __name__ == "__main__":
    less = "--gradient_checkpointing, a smaller --train_batch_size or a smaller --resolution"
    sys.exit(run_script(main, sys.argv[1:], saves_memory=less))
