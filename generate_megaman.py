"""Generate images with a trained LoRA and put them on a page that opens in a browser."""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "error: Mega Man LoRA needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2]
    )

import logging
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megaman import shell
from megaman.config.current_folder import leave_deleted_folder
from megaman.config.generate import GenerateConfig, parse_generate_config
from megaman.console import install_logging
from megaman.errors import INTERRUPTED, plural, run_script
from megaman.files import split_strength
from megaman.locks import claim
from megaman.models.configs import unet_width
from megaman.pages.browser import show_page
from megaman.processes import Processes, join_processes, launcher, one_report
from megaman.sampling.jobs import PendingBatch, count_images, share_out
from megaman.sampling.output_folder import GalleryWriter, OutputFolder
from megaman.sampling.plan import GenerationPlan, summarize
from megaman.threads import ThreadPolicy, configure_threads, threads_for_generation
from megaman.training.saved_loras import saved_loras

if TYPE_CHECKING:
    from megaman.pages.gallery_images import GalleryImage
    from megaman.sampling.generator import ImageGenerator
    from megaman.sampling.image_saver import ImageSaver

log = logging.getLogger("megaman.generate")
FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
BAR: dict[str, Any] = {"unit": "image", "bar_format": FORMAT}


def main(argv: list[str]) -> int:
    install_logging()
    with one_report():
        config = parse_generate_config(argv)
        leave_deleted_folder()
        plan = make_plan(config)
        rule = partial(threads_for_generation, unet_width(plan.base))
    policy = configure_threads(rule, plan.threads)
    try:
        with join_processes("Finished images are kept: add --resume to the command") as processes:
            return run(config, plan, policy, processes)
    except KeyboardInterrupt:
        words = [*launcher(), "generate_megaman.py", *filter("--resume".__ne__, argv), "--resume"]
        log.info(f"stopped; finished images are kept. To resume: {shell.join(words)}")
        return INTERRUPTED


def run(
    config: GenerateConfig, plan: GenerationPlan, policy: ThreadPolicy, processes: Processes
) -> int:
    """Generate the plan's images, a share in each process; the main one writes the gallery."""
    output = Path(config.output.output_dir)
    with claim(output, "--output_dir"):
        folder = OutputFolder(output, config.comparison.clip_model) if processes.is_main else None
        from megaman.sampling.loading import load_generator

        device, skips_misfits = config.compute.device, bool(config.comparison.loras)
        plan, generator, jobs = load_generator(plan, policy, processes, device, skips_misfits)
        batches = generator.make_batches(jobs, plan.batch_size)
        writer, pending = None, []
        if folder is not None:
            recorder = generator.recorder
            resume, compare = config.again.resume, config.comparison.pairs_with_base
            writer = GalleryWriter(folder, recorder, plan.variants, jobs, resume, compare)
            pending = writer.pending(batches, plan.is_wanted)
            log.info(summarize(plan, config, jobs))
            for warning in plan.warnings(recorder, len(batches), generator.limits.tiling):
                log.info(f"           {warning}: the pixels may differ")
            log.info("\n".join(generator.summary(plan.shared_scale, batches)))
            for line in (policy.remark, processes.summary):
                log.info(line and f"           {line}")  # an empty line is not printed
            if resume:
                log.info(writer.summary(plan.count(jobs), pending))
        shares = processes.from_main(lambda: share_out(pending, processes.count))
        saver = cast("ImageSaver", processes.from_main(lambda: writer and writer.saver))
        saved = generate(generator, saver, shares[processes.rank], writer)
        saved = list(chain(*processes.exchange(saved)))
        if writer is not None:
            page = writer.add(saved)
            log.info("\n".join(writer.warnings()))
            if len(plan.variants) > 1:
                log.info(f"the comparison as one image: {writer.write_grid()}")
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
    return [(path, 1.0) for path in saved_loras(Path(config.comparison.checkpoints))]


def generate(
    generator: "ImageGenerator",
    saver: "ImageSaver",
    pending: Sequence[PendingBatch],
    writer: GalleryWriter | None,
) -> list["GalleryImage"]:
    """Generate the pending batches, each saved when done; returns the gallery's entries."""
    from tqdm import tqdm

    images, saved = count_images(pending), []
    is_hidden = writer is None or not pending
    with tqdm(total=images, desc="generating", disable=is_hidden, **BAR) as bar:

        def advance(part: float) -> None:
            bar.update(min(part, images - bar.n))  # what ran out of memory counts twice

        for group in generator.parallel_groups(pending):
            generator.set_variant(group[0].variant)
            for without_lora in (True, False):
                batches = [item.batch for item in group if item.jobs_to_save(without_lora)]
                if batches:
                    generated = generator.generate(batches, advance, without_lora)
                    saved += saver.save(group, generated, without_lora)
            if writer is not None:
                writer.add(saved)
    return saved


def command() -> int:
    """Run main as a command."""
    return run_script(main, sys.argv[1:], saves_memory="a smaller --height and --width")


if __name__ == "__main__":
    sys.exit(command())
