"""Draw pictures with a trained LoRA and put them on a page that opens in a browser.

    python generate_megaman.py --demo                                 the LoRA of megaman_lora.py --demo
    python generate_megaman.py --lora_path ./megaman_lora_output/lora_weights --prompts_file prompts.txt

The story, top to bottom: options, prompts, base and LoRA, jobs, what is there already, images,
gallery.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "error: Mega Man LoRA needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2]
    )

import shlex
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

from megaman import threads
from megaman.config import samplers
from megaman.config.generate import GenerateConfig, parse_generate_config
from megaman.errors import UserError, run_script
from megaman.files import split_strength
from megaman.hub import DEFAULT_BASE, is_base
from megaman.lora.peft_config import base_of
from megaman.models import prompt_weights
from megaman.models.configs import alias_notice, resolve_name, unet_width
from megaman.pages import grid
from megaman.pages.gallery import read_images, variant_labels, write_gallery
from megaman.sampling import output_folder, records
from megaman.sampling.jobs import Job, Way, base_file_of, file_of, in_batches, make_jobs, make_ways
from megaman.sampling.prompts import BUILT_IN, Prompt, read_prompts
from megaman.training.output import find_all


def main(argv: list[str]) -> int:
    config = parse_generate_config(argv)
    again = records.read(Path(config.again.from_image)) if config.again.from_image else None
    prompts, bad_lines = ([], []) if again else asked_for(config)
    plan = plan_again(config, again) if again else plan_anew(config)
    print("".join(f"{line}\n" for line in bad_lines), end="")
    if tags := [tag for prompt in prompts for tag in prompt_weights.tags(prompt.text)]:
        print(
            f"{', '.join(dict.fromkeys(tags))} in a prompt is left out: name LoRAs in --lora_path"
        )
    output_dir = Path(config.output.output_dir)
    gallery = output_folder.complete(output_dir, read_images(output_dir))
    if not gallery and (output_dir / "index.html").exists():
        raise UserError(
            f"--output_dir {output_dir} holds an index.html of something else",
            "Name another folder",
        )

    width = unet_width(plan.base)
    policy = threads.configure_threads(
        threads.threads_for_generation, again.threads if again else None
    )

    import torch
    from tqdm import tqdm

    from megaman import runtime
    from megaman.lora import adapter
    from megaman.lora import files as lora_files
    from megaman.models.base import load_base
    from megaman.runtime import choose_device, device_lines, package_versions, place, set_threads
    from megaman.sampling import denoise, generator
    from megaman.sampling.generator import Drawer

    # Base and LoRA, which is added to the base's own weights, unless the plain base has to draw
    # beside it.
    base_name = resolve_name(plan.base)
    placement = place(
        plan.precision, choose_device(config.compute.device), width, plan.memory_format
    )
    set_threads(policy)
    runtime.keep_freed_memory()
    print(f"loading {base_name}{' and the LoRA in ' * bool(plan.loras)}{plan.source}")
    if remark := alias_notice(plan.base):
        print(f"  {remark}")
    base = load_base(base_name, placement.dtype, memory_format=placement.layout)
    lora_configs = lora_files.load_loras(plan.loras, base.unet, base.text_encoder)
    hashes = {path: lora_files.short_hash(path) for path, _ in plan.loras}
    fused = (
        adapter.FusedLoras([base.unet, base.text_encoder], reversible=len(plan.ways) > 1)
        if plan.fused
        else None
    )

    # Jobs: what is to be drawn, in which batches, in what room.
    size = tuple(
        side or min(512, base.native_size)
        for side in (config.sampling.width, config.sampling.height)
    )
    jobs = (
        again.jobs()
        if again
        else make_jobs(
            prompts,
            config.prompts.num_images_per_prompt,
            config.prompts.negative_prompt,
            config.sampling.seed,
            size,
            config.sampling.num_inference_steps,
            config.sampling.guidance_scale,
        )
    )
    largest = max(jobs, key=lambda job: job.width * job.height)
    pixels = largest.width * largest.height
    batch_size = len(jobs) if again else config.compute.batch_size
    space = generator.make_room(
        runtime.free_memory(placement.device),
        tuple(map(runtime.parameter_bytes, (base.unet, base.vae, base.text_encoder))),
        generator.pass_sizes(base.unet, base.vae, pixels, base.vae_scale_factor),
        pixels,
        batch_size or runtime.default_batch_size(largest.height, largest.width),
        placement.device.type == "cuda",
    )
    space.tiling |= bool(again and again.vae_tiling)
    drawer = Drawer(base, fused, placement, space, plan.sampler, plan.clip_skip)
    at_most = batch_size or len(jobs)
    batches = (
        [jobs]
        if again
        else in_batches(  # what does not fit at once is drawn in parts
            jobs, lambda job: min(at_most, space.at_once(job.height, job.width)), drawer.chunks
        )
    )
    shared = {
        "scheduler": plan.sampler.name,
        "clip_skip": plan.clip_skip,
        "base": base_name,
        "fused": plan.fused,
        "device": placement.device.type,
        "dtype": str(placement.dtype).removeprefix("torch."),
        "memory_format": placement.memory_format,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }

    def record(job: Job, part: list[Job], way: Way, plain: bool = False) -> records.Record:
        return records.make(job, part, way, hashes, {**shared, "vae_tiling": space.tiling}, plain)

    # What is there already. A batch of which something is missing is drawn whole, so that its
    # pixels stay the same.
    stopped = None
    if config.again.resume:
        wanted = [(job.i, record(job, [job], way)) for way, job in product(plan.ways, jobs)]
        stopped = output_folder.first_of_stopped(output_dir, wanted)
    first = output_folder.first_free(output_dir) if stopped is None else stopped

    def missing(way: Way, batch: list[Job]) -> list[Job]:
        if again:
            return [batch[again.place]]
        return [
            job
            for job in batch
            if stopped is None
            or not output_folder.is_there(
                output_dir / file_of(job, way, first), record(job, batch, way)
            )
        ]

    todo = [
        (way, batch, left)
        for way, batch in product(plan.ways, batches)
        if (left := missing(way, batch))
    ]
    drawn_anew = {file_of(job, way, first) for way, _, left in todo for job in left}
    gallery = [
        image for image in gallery if image.file not in drawn_anew
    ]  # what it names there was deleted
    count, left_to_draw = (
        (1 if again else len(plan.ways) * len(jobs)),
        sum(len(left) for _, _, left in todo),
    )

    # What will happen.
    if again:
        print(
            f"again      {config.again.from_image}, seed {again.seed}, drawn in a batch of {len(jobs)} as it was"
        )
        less = space.at_once(again.height, again.width) < len(jobs)
        for remark in [
            *["there is memory for a smaller batch only"] * less,
            *differences(again, shared, hashes),
        ]:
            print(f"           {remark}: the pixels may differ")
    else:
        scales = len({way.scale for way in plan.ways})
        print(
            f"images     {len(jobs)}: {len(prompts)} prompts x {config.prompts.num_images_per_prompt}, "
            f"{spread(f'{job.width}x{job.height}' for job in jobs)}, {spread(job.steps for job in jobs)} steps of "
            f"{plan.sampler.title}, guidance {spread(f'{job.guidance:g}' for job in jobs)}, seed {jobs[0].seed}"
            + (", each beside the base's" if config.comparison.compare else "")
            + (
                f", each {len(plan.ways)} times: {len(plan.ways) // scales} LoRAs x {scales} strengths"
                if len(plan.ways) > 1
                else ""
            )
        )
    for lora, (path, strength) in zip(lora_configs, plan.loras, strict=True):
        strength *= plan.ways[0].scale if len(plan.ways) == 1 else 1
        print(
            f"LoRA       rank {lora.r}, alpha {lora.lora_alpha:g}"
            + (f", strength {strength:g}: {path}" if len(plan.loras) > 1 or strength != 1 else "")
        )
    print(*device_lines(placement, str(space)), sep="\n")
    if policy.remark:
        print(f"           {policy.remark}")
    if config.again.resume:
        there = (
            f"{count - left_to_draw} of {count} are"
            if stopped is not None
            else "nothing of this run is"
        )
        print(f"resuming   {there} there")

    # Images, batch by batch, each written as it comes. The page is whole at any time.
    output_dir.mkdir(parents=True, exist_ok=True)
    passes = {
        job.steps: denoise.count_passes(base.noise_scheduler, plan.sampler, job.steps)
        for job in jobs
    }
    runs = 2 if config.comparison.compare else 1
    bar = tqdm(
        total=sum(passes[batch[0].steps] for _, batch, _ in todo) * runs,
        desc="drawing",
        unit="step",
    )
    at_work = None
    if not todo:  # the page may still gain images that no page named
        page = write_gallery(output_dir, gallery, "Mega Man LoRA")
    try:
        for way, batch, left in todo:
            if way is not at_work:
                drawer.set_scales(way.strengths)
            at_work = way
            bases = drawer.draw(batch, bar.update, plain=True) if config.comparison.compare else []
            for job, part, image in bases:
                if job in left:
                    path = output_dir / base_file_of(file_of(job, way, first))
                    if stopped is None:
                        output_folder.refuse_taken(path)
                    records.save(path, image, record(job, part, way, plain=True))
            for job, part, image in drawer.draw(batch, bar.update):
                if job in left:
                    file = file_of(job, way, first)
                    own = record(job, part, way)
                    output_folder.refuse_taken(output_dir / file)
                    records.save(output_dir / file, image, own)
                    base_file = base_file_of(file) if config.comparison.compare else None
                    gallery.append(records.gallery_image(file, own, base_file))
            page = write_gallery(output_dir, gallery, "Mega Man LoRA")
    except KeyboardInterrupt:
        bar.close()
        print(
            f"stopped; what was drawn stays. To go on: python generate_megaman.py {shlex.join(resume_command(argv))}"
        )
        return 130
    bar.close()

    if len(plan.ways) > 1:
        sheet = output_dir / f"grid_{first:03d}.png"
        labels = dict(zip((image.file for image in gallery), variant_labels(gallery), strict=True))
        rows = [[file_of(job, way, first) for way in plan.ways] for job in jobs]
        grid.save_grid(
            sheet,
            [labels[file] for file in rows[0]],
            [
                (
                    f"{first + job.i:03d}, seed {job.seed}\n{job.prompt}",
                    [output_dir / file for file in files],
                )
                for job, files in zip(jobs, rows, strict=True)
            ],
        )
        print(f"the comparison as one picture: {sheet}")
    print(f"{count} images; open {page.resolve().as_uri()} in a browser")
    return 0


class Plan(NamedTuple):
    """How a run draws: the base, the LoRAs with their own strengths and where they come from, the
    ways to draw, whether the LoRAs are fused into the base, precision and memory format (place's
    words), the sampler, A1111's clip skip."""

    base: str
    loras: list[tuple[Path, float]]
    source: str
    ways: list[Way]
    fused: bool
    precision: str
    memory_format: str
    sampler: samplers.Sampler
    clip_skip: int


def plan_anew(config: GenerateConfig) -> Plan:
    """The plan of a command line."""
    given = [
        (Path(path), strength) for path, strength in map(split_strength, config.model.lora_path)
    ]
    comparison = config.comparison
    loras = (
        [(path, 1.0) for path in trained(Path(comparison.checkpoints))]
        if comparison.checkpoints
        else given
    )
    base = config.model.base_model or next(
        filter(None, [base_of(path) for path, _ in loras]), DEFAULT_BASE
    )
    scales = comparison.lora_scales or [
        1.0 if comparison.lora_scale is None else comparison.lora_scale
    ]
    ways = make_ways(loras, scales, one_by_one=bool(comparison.checkpoints))
    source = comparison.checkpoints or ", ".join(config.model.lora_path)
    return Plan(
        base,
        loras,
        source,
        ways,
        not comparison.compare,
        "fp16",
        "auto",
        samplers.find(config.sampling.scheduler),
        config.sampling.clip_skip,
    )


def plan_again(config: GenerateConfig, again: records.Record) -> Plan:
    """The plan of an image; the flags may say where its base and its LoRAs lie now."""
    told = (
        [split_strength(path)[0] for path in config.model.lora_path]
        if "lora_path" in config.explicit
        else None
    )
    paths = told or [path for path, _, _ in again.loras]
    if len(paths) != len(again.loras):
        raise UserError(
            f"--lora_path: the image was drawn with {len(again.loras)} LoRAs",
            "Name as many, in that order",
        )
    if not config.model.base_model and not is_base(again.base):
        raise UserError(
            f"--from_image: its base {again.base} is not here nor on the hub",
            "Name it in --base_model",
        )
    loras = [
        (Path(path), strength) for path, (_, strength, _) in zip(paths, again.loras, strict=True)
    ]
    precision = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}[again.dtype]
    ways = make_ways(loras, [again.lora_scale], one_by_one=False)
    return Plan(
        config.model.base_model or again.base,
        loras,
        ", ".join(paths),
        ways,
        again.fused,
        precision,
        again.memory_format,
        samplers.find(again.scheduler),
        again.clip_skip,
    )


def asked_for(config: GenerateConfig) -> tuple[list[Prompt], list[str]]:
    """The prompts of the command line or of a file, and what is wrong with that file's lines."""
    if config.prompts.prompts:
        return [Prompt(text) for text in config.prompts.prompts], []
    return read_prompts(
        BUILT_IN if config.prompts.prompts_file is None else Path(config.prompts.prompts_file)
    )


def trained(folder: Path) -> list[Path]:
    """The LoRAs that a training left in its output: the checkpoints, oldest first, then the
    finished one."""
    loras = [*find_all(folder), *(path for path in [folder / "lora_weights"] if path.is_dir())]
    if not loras:
        raise UserError(
            f"--checkpoints {folder} holds no checkpoint", "Name the --output_dir of a training"
        )
    return loras


def differences(again: records.Record, shared: dict, hashes: dict[Path, str]) -> list[str]:
    """What is not as it was when the image was drawn, in words."""
    pairs = [(name, getattr(again, name), shared[name]) for name in ("device", "dtype", "base")]
    pairs += [
        (package, version, shared["versions"].get(package))
        for package, version in again.versions.items()
    ]
    pairs += [
        (f"LoRA {path}", was, now)
        for (_, _, was), (path, now) in zip(again.loras, hashes.items(), strict=True)
    ]
    return [f"{name} was {was} and is now {now}" for name, was, now in pairs if was != now]


def spread(values: Iterable) -> str:
    """The values that occur, in words."""
    distinct = list(dict.fromkeys(map(str, values)))
    return distinct[0] if len(distinct) == 1 else f"{distinct[0]} and {len(distinct) - 1} other"


def resume_command(argv: list[str]) -> list[str]:
    """The command line that goes on where this one was stopped."""
    return [*(word for word in argv if word != "--resume"), "--resume"]


def command() -> int:
    """Run main as a command."""
    return run_script(main, sys.argv[1:], saves_memory="a smaller --height and --width")


if __name__ == "__main__":
    sys.exit(command())
