"""Generate images with a trained LoRA and put them on a page that opens in a browser."""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "error: Mega Man LoRA needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2]
    )

import logging
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.config.generate import GenerateConfig, parse_generate_config
from megaman.errors import UserError, install_logging, plural, run_script
from megaman.files import split_strength
from megaman.models.configs import alias_notice, resolve_name, unet_width
from megaman.pages.browser import show_page
from megaman.sampling.jobs import PendingBatch
from megaman.sampling.output_folder import GalleryWriter, OutputFolder
from megaman.sampling.plan import GenerationPlan, summarize
from megaman.threads import configure_threads, generation_workers, threads_for_generation
from megaman.training.output import different_loras, find_all

if TYPE_CHECKING:
    from megaman.sampling.generator import ImageGenerator

log = logging.getLogger("megaman.generate")
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"


def main(argv: list[str]) -> int:
    install_logging()
    config = parse_generate_config(argv)
    plan = make_plan(config)
    folder = OutputFolder(Path(config.output.output_dir), config.comparison.clip_model)
    width = unet_width(plan.base)
    policy = configure_threads(partial(threads_for_generation, width), plan.threads)

    from megaman import runtime
    from megaman.lora.stack import LoraStack, misfits
    from megaman.models.base import load_base
    from megaman.sampling.generator import ImageGenerator, Sampling
    from megaman.sampling.limits import limits_for

    device = runtime.choose_device(config.compute.device)
    compute = runtime.choose_compute(plan.precision, device, width, plan.memory_format)
    runtime.set_threads(policy)
    runtime.keep_freed_memory()

    base_name = resolve_name(plan.base)
    log.info(f"loading {base_name}{' and the LoRA in ' if plan.loras else ''}{plan.lora_source}")
    if notice := alias_notice(plan.base):
        log.info(f"  {notice}")
    base = load_base(base_name, compute.dtype, memory_format=compute.torch_memory_format)
    plan = plan.without(misfits(base, plan.loras) if config.comparison.loras else {})
    loras = LoraStack(base, plan.loras, plan.fuse, rescale=len(plan.variants) > 1)
    jobs = plan.make_jobs(base.native_size)
    limits = limits_for(base, jobs, plan.batch_size, device)
    limits.tiling = limits.tiling or plan.vae_tiling
    workers = generation_workers(width, policy) if device.type == "cpu" else None
    sampling = Sampling(plan.sampler, plan.clip_skip, workers, plan.pixel_grid)
    generator = ImageGenerator(base, loras, compute, limits, sampling)
    resume, compare = config.again.resume, config.comparison.pairs_with_base
    writer = GalleryWriter(folder, generator.recorder, plan.variants, jobs, resume, compare)
    batches = generator.make_batches(jobs, plan.batch_size)
    pending = writer.pending(batches, plan.is_wanted)

    log.info(summarize(plan, config, jobs))
    for warning in plan.warnings(generator.recorder, len(batches), limits.tiling):
        log.info(f"           {warning}: the pixels may differ")
    for line in loras.summary(plan.shared_scale):
        log.info(line)
    log.info("\n".join(runtime.device_lines(compute, limits.summary(max(map(len, batches))))))
    if policy.remark:
        log.info(f"           {policy.remark}")
    if resume:
        log.info(writer.summary(plan.count(jobs), pending))

    try:
        page = generate(generator, writer, pending)
    except KeyboardInterrupt:
        arguments = [word for word in argv if word != "--resume"]
        command = shlex.join(["python", "generate_megaman.py", *arguments, "--resume"])
        log.info(f"stopped; finished images are kept. To resume: {command}")
        return 130
    for warning in writer.warnings():
        log.info(warning)
    if len(plan.variants) > 1:
        log.info(f"the comparison as one picture: {writer.write_grid()}")
    show_page(page, plural(plan.count(jobs), "image"), config.output.open)
    return 0


def make_plan(config: GenerateConfig) -> GenerationPlan:
    """The plan of the image in --from_image, or else of the command line."""
    if config.again.from_image:
        return GenerationPlan.from_image(config, Path(config.again.from_image))
    return GenerationPlan.from_config(config, requested_loras(config))


def requested_loras(config: GenerateConfig) -> list[tuple[Path, float]]:
    """The LoRAs in --compare or --lora_path, or all in --checkpoints, oldest first."""
    if config.comparison.checkpoints is None:
        named = map(split_strength, config.comparison.loras or config.model.lora_path)
        return [(Path(path), strength) for path, strength in named]
    folder = Path(config.comparison.checkpoints)
    loras = different_loras(find_all(folder), folder / "lora_weights")
    if not loras:
        remedy = "Name the --output_dir of a training run"
        raise UserError(f"--checkpoints {folder} has no checkpoint", remedy)
    return [(path, 1.0) for path in loras]


def generate(
    generator: "ImageGenerator", writer: GalleryWriter, pending: list[PendingBatch]
) -> Path:
    """Generate the pending batches, each saved when it is done; returns the path of the page."""
    from tqdm import tqdm

    if not pending:
        return writer.write_page()  # with the images of a killed run
    images = sum(len(item.batch) for item in pending if item.missing)
    images += sum(len(item.batch) for item in pending if item.missing_base)
    with tqdm(total=images, desc="generating", unit="image", bar_format=BAR_FORMAT) as bar:

        def advance(part: float) -> None:
            bar.update(min(part, images - bar.n))  # what ran out of memory counts twice

        for group in generator.parallel_groups(pending):
            generator.set_variant(group[0].variant)
            for without_lora in (True, False):
                batches = [item.batch for item in group if item.jobs_to_save(without_lora)]
                if batches:
                    generated = generator.generate(batches, advance, without_lora)
                    writer.save_images(group, generated, without_lora)
            page = writer.write_page()
    return page


def command() -> int:
    """Run main as a command."""
    return run_script(main, sys.argv[1:], saves_memory="a smaller --height and --width")


if __name__ == "__main__":
    sys.exit(command())
