"""What a run generates and how: from a command line, or from the record of an image.

Both make the same plan, so that nothing later asks where it came from but the lines on screen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megaman.config import samplers
from megaman.config.generate import GenerateConfig
from megaman.errors import UserError, plural
from megaman.files import split_strength
from megaman.hub import DEFAULT_BASE, is_base
from megaman.lora import peft_config
from megaman.sampling import record_reader
from megaman.sampling.defaults import find_defaults
from megaman.sampling.jobs import Job, LoraVariant, make_jobs, make_variants
from megaman.sampling.pixel_grid import PixelGrid
from megaman.sampling.prompts import PromptSettings, load_prompts
from megaman.sampling.records import Record, Recorder

log = logging.getLogger(__name__)

PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # accelerate's words by dtype
COMPARED = ("device", "dtype", "base")  # fields of a record that change pixels
MAX_DEFAULT_SIDE = 512  # pixels of an image for which no size is given


@dataclass(frozen=True)
class GenerationPlan:
    """Everything that a run decides before torch is loaded.

    lora_source says where the LoRAs come from, as the user named it. make_jobs returns the jobs
    for a base of this native size in pixels. wanted is the index of the
    only job to save, None for all; batch_size, memory_format and precision are the command line's
    words; threads is the count in the image's record, None for a new run. pixel_grid is that of
    the pixel art next to each image.
    """

    base: str
    loras: tuple[tuple[Path, float], ...]
    lora_source: str
    variants: tuple[LoraVariant, ...]
    make_jobs: Callable[[int], list[Job]]
    wanted: int | None
    fuse: bool
    precision: str
    memory_format: str
    sampler: samplers.Sampler
    clip_skip: int
    batch_size: int | None
    vae_tiling: bool
    threads: int | None
    source: Record | None
    pixel_grid: PixelGrid | None = None

    @classmethod
    def from_config(
        cls, config: GenerateConfig, loras: Sequence[tuple[Path, float]]
    ) -> GenerationPlan:
        """The plan of a command line with its LoRAs, each with a strength.

        Logs what is unusual about the prompts. Raises UserError if a LoRA is missing or there is
        no prompt.
        """
        comparison, texts = config.comparison, config.prompts
        typed = None
        if texts.prompts or texts.prompts_file:
            typed = load_prompts(texts.prompts, texts.prompts_file, texts.negative_prompt)
        for path, _ in loras:
            peft_config.require(path)
        found = find_defaults([path for path, _ in loras], config.model.base_model)
        settings = choose_settings(config, found.settings)
        prompts = typed or load_prompts(found.prompts, None, texts.negative_prompt)
        bases = filter(None, (peft_config.base_of(path) for path, _ in loras))
        scale = 1.0 if comparison.lora_scale is None else comparison.lora_scale
        one_by_one = bool(comparison.checkpoints or comparison.loras)
        variants = make_variants(loras, comparison.lora_scales or [scale], one_by_one)
        if comparison.loras:
            variants.insert(0, LoraVariant((), 1.0, ("without_lora",)))

        named = comparison.loras or config.model.lora_path
        pixel_grid = _pixel_grid(config, [path for path, _ in loras])

        def jobs(native_size: int) -> list[Job]:
            defaults = default_settings(config, native_size, settings)
            made = make_jobs(prompts, defaults, config.prompts.num_images_per_prompt)
            return _checked(made, pixel_grid)

        return cls(
            base=config.model.base_model or next(bases, DEFAULT_BASE),
            loras=tuple(loras),
            lora_source=comparison.checkpoints or ", ".join(named),
            variants=tuple(variants),
            make_jobs=jobs,
            wanted=None,
            fuse=not comparison.pairs_with_base,
            precision="fp16",
            memory_format="auto",
            sampler=samplers.by_name(settings["scheduler"]),
            clip_skip=config.sampling.clip_skip,
            batch_size=config.compute.batch_size,
            vae_tiling=False,
            threads=None,
            source=None,
            pixel_grid=pixel_grid,
        )

    @classmethod
    def from_image(cls, config: GenerateConfig, image: Path) -> GenerationPlan:
        """The plan that generates an image again; --base_model and --lora_path may say where its
        base and its LoRAs are now.

        Raises UserError if the image has no record, if its base is gone, and if --lora_path names
        another number of LoRAs.
        """
        source = record_reader.read_record(image)
        paths = [_locate(path, image) for path, _, _ in source.loras]
        if "lora_path" in config.explicit:
            paths = [split_strength(path)[0] for path in config.model.lora_path]
        if len(paths) != len(source.loras):
            raise UserError(
                f"--lora_path: the image was generated with {plural(len(source.loras), 'LoRA')}",
                "Name as many, in the same order",
            )
        if not config.model.base_model and not is_base(source.base):
            raise UserError(
                f"--from_image: its base {source.base} is neither on this machine nor on the hub",
                "Name it in --base_model",
            )
        pixel_grid = _pixel_grid(config, list(map(Path, paths)))
        if pixel_grid is None and source.pixel_art:
            pixel_grid = PixelGrid(source.pixel_art, tuple(source.palette or ()))
        strengths = [strength for _, strength, _ in source.loras]
        loras = list(zip(map(Path, paths), strengths, strict=True))
        return cls(
            base=config.model.base_model or source.base,
            loras=tuple(loras),
            lora_source=", ".join(paths),
            variants=tuple(make_variants(loras, [source.lora_scale], one_by_one=False)),
            make_jobs=lambda native_size: _checked(source.jobs(), pixel_grid),
            wanted=source.place,
            fuse=source.fused,
            precision=PRECISIONS[source.dtype],
            memory_format=source.memory_format,
            sampler=samplers.by_name(source.scheduler),
            clip_skip=source.clip_skip,
            batch_size=len(source.batch),
            vae_tiling=source.vae_tiling,
            threads=source.threads,
            source=source,
            pixel_grid=pixel_grid,
        )

    def without(self, misfits: Mapping[Path, str]) -> GenerationPlan:
        """The plan without LoRAs that do not fit the base, by path with the reason, which names
        the path and is logged. Raises UserError if none is left."""
        for reason in misfits.values():
            log.info(f"skipped    {reason}")
        loras = tuple(lora for lora in self.loras if lora[0] not in misfits)
        if misfits and not loras:
            raise UserError("None of the LoRAs in --compare fits the base", "Name --base_model")
        kept = [
            variant
            for variant in self.variants
            if not any(p in misfits for _, p, _ in variant.loras)
        ]
        places = {lora: index for index, lora in enumerate(loras)}
        variants = [
            replace(each, loras=tuple((places[p, s], p, s) for _, p, s in each.loras))
            for each in kept
        ]
        return replace(self, loras=loras, variants=tuple(variants))

    def count(self, jobs: Sequence[Job]) -> int:
        """How many images of these jobs the run saves."""
        images = len(jobs) if self.wanted is None else 1
        return images * len(self.variants)

    @property
    def shared_scale(self) -> float:
        """The scale of the only variant; 1 if several compare their own."""
        return self.variants[0].scale if len(self.variants) == 1 else 1.0

    def is_wanted(self, job: Job) -> bool:
        """Whether the image of a job is saved."""
        return self.wanted is None or job.image_index == self.wanted

    def warnings(self, recorder: Recorder, batches: int, vae_tiling: bool) -> list[str]:
        """What differs from when the image was generated, which may change its pixels."""
        if self.source is None:
            return []
        warnings = []
        if batches > 1:
            warnings.append("there is memory for a smaller batch only")
        if vae_tiling and not self.source.vae_tile:  # with vae_tiling, an earlier rule's tiles
            other = "other " if self.source.vae_tiling else ""
            warnings.append(f"the VAE decodes in {other}tiles")
        before, now = self.source, recorder.run
        pairs = [(name, getattr(before, name), getattr(now, name)) for name in COMPARED]
        for package, version in before.versions.items():
            pairs.append((package, version, now.versions.get(package)))
        for (_, _, old_hash), (path, _) in zip(before.loras, self.loras, strict=True):
            pairs.append((f"LoRA {path}", old_hash, recorder.hashes[path]))
        changed = [pair for pair in pairs if pair[1] != pair[2]]
        return warnings + [f"{name} was {old} and is now {new}" for name, old, new in changed]


def _locate(lora: str, image: Path) -> str:
    """Where the LoRA of an image is. Earlier records have it as it was typed, which may be relative
    to a folder that is not the current one: often the one above the image's."""
    folders = [Path(), *image.absolute().parents[:2]]
    found = (path for folder in folders if (path := folder / lora).exists())
    return str(next(found, lora))


def _pixel_grid(config: GenerateConfig, loras: Sequence[Path]) -> PixelGrid | None:
    value = config.output.pixel_art
    return None if value is None else PixelGrid.parse(value, loras)


def _checked(jobs: list[Job], pixel_grid: PixelGrid | None) -> list[Job]:
    """The jobs; raises UserError if an image has fewer pixels than the grid has cells."""
    if pixel_grid is not None:
        for job in jobs:
            pixel_grid.check(job.width, job.height)
    return jobs


def choose_settings(config: GenerateConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of the command line by flag; those that nobody typed as found, if they were."""
    settings = config.settings()
    typed = config.explicit if not config.model.demo else settings.keys()
    return {**settings, **{name: found[name] for name in found.keys() - typed}}


def default_settings(
    config: GenerateConfig, native_size: int, settings: Mapping[str, Any]
) -> PromptSettings:
    """The settings for prompts without their own, on a base of this native size."""
    side = min(MAX_DEFAULT_SIDE, native_size)
    return PromptSettings(
        negative_prompt=settings["negative_prompt"],
        width=config.sampling.width or side,
        height=config.sampling.height or side,
        seed=config.sampling.seed,
        guidance_scale=settings["guidance_scale"],
        num_inference_steps=settings["num_inference_steps"],
    )


def summarize(plan: GenerationPlan, config: GenerateConfig, jobs: Sequence[Job]) -> str:
    """The line that says what is generated."""
    if plan.source:
        return (
            f"again      {config.again.from_image}, seed {plan.source.seed}, "
            f"in a batch of {len(jobs)} as before"
        )
    prompts = 1 + max(job.prompt_index for job in jobs)
    seeds = [job.seed - job.image_index for job in jobs]
    parts = [
        f"images     {len(jobs)}: "
        f"{plural(prompts, 'prompt')} x {config.prompts.num_images_per_prompt}",
        _distinct(f"{job.width}x{job.height}" for job in jobs),
        f"{_steps(jobs)} of {plan.sampler.title}",
        f"guidance {_range(job.guidance_scale for job in jobs)}",
        f"seed {_distinct(seeds)}",
    ]
    if config.comparison.pairs_with_base:
        parts.append("each next to the base's")
    if plan.pixel_grid:
        parts.append(f"each as pixel art too: {plan.pixel_grid.summary()}")
    if config.comparison.loras:
        parts.append(f"each by the base and by {plural(len(plan.loras), 'LoRA')}")
        return ", ".join(parts)
    if len(plan.variants) > 1:
        scales = len({variant.scale for variant in plan.variants})
        loras = len(plan.variants) // scales
        factors = [plural(loras, "LoRA")] if loras > 1 else []
        factors += [plural(scales, "strength")] if scales > 1 else []
        parts.append(f"each {len(plan.variants)} times: {' x '.join(factors)}")
    return ", ".join(parts)


def _steps(jobs: Sequence[Job]) -> str:
    steps = {job.num_inference_steps for job in jobs}
    return plural(steps.pop(), "step") if len(steps) == 1 else f"{_range(steps)} steps"


def _range(values: Iterable[float]) -> str:
    """The lowest and the highest value, or the only one."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _distinct(values: Iterable[object]) -> str:
    """The first value, and how many others there are."""
    first, *others = dict.fromkeys(map(str, values))
    return f"{first} and {plural(len(others), 'other')}" if others else first
