"""Draw pictures with a trained LoRA and put them on a page that opens in a browser.

    python generate_megaman.py --demo                                 the LoRA of megaman_lora.py --demo
    python generate_megaman.py --lora_path ./megaman_lora_output/lora_weights --prompts_file prompts.txt

The story, top to bottom: options, prompts, base and LoRA, images, gallery.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("error: Mega Man LoRA needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2])

import re
from itertools import product
from pathlib import Path
from typing import NamedTuple

from megaman.adapter_config import base_of
from megaman.errors import UserError, run_script
from megaman.gallery import GalleryImage, read_images, thumbnail_of, variant_labels, write_gallery
from megaman.names import safe_name, split_strength
from megaman.options import DEFAULT_BASE, generation_options
from megaman.output import find_all
from megaman.prompts import BUILT_IN, read_prompts


def main(argv: list[str]) -> int:
    options = generation_options(argv)
    prompts = options.prompts or read_prompts(BUILT_IN if options.prompts_file is None else Path(options.prompts_file))
    output_dir = Path(options.output_dir)
    named = [(Path(path), strength) for path, strength in map(split_strength, options.lora_path)]
    loras = [(path, 1.0) for path in trained(Path(options.checkpoints))] if options.checkpoints else named
    gallery = read_images(output_dir)
    if not gallery and (output_dir / "index.html").exists():
        raise UserError(f"--output_dir {output_dir} holds an index.html of something else", "Name another folder")
    first = first_free(output_dir)

    import torch
    from tqdm import tqdm

    from megaman import cache, grid, lora, lora_files, png, sample
    from megaman.base import UNUSED_CARD, actual_name, choose_device, load_base, moved, place, unused_nvidia_card

    # Base and LoRA.
    wanted = options.base_model or next(filter(None, [base_of(path) for path, _ in loras]), DEFAULT_BASE)
    base_name = actual_name(wanted)
    placement = place("fp16", choose_device(options.device))
    print(f"loading {base_name} and the LoRA in {options.checkpoints or ', '.join(options.lora_path)}")
    if remark := moved(wanted):
        print(f"  {remark}")
    base = load_base(base_name, placement.dtype)
    configs = lora_files.load_loras(loras, base.unet, base.text_encoder)
    base.unet.to(placement.device, placement.dtype)
    base.vae.to(placement.device)
    base.text_encoder.to(placement.device, placement.dtype)
    scales = options.lora_scales or [1.0]
    ways = lora_ways(loras, scales, one_by_one=bool(options.checkpoints))

    # What will happen.
    height, width = (side or min(512, base.native_size) for side in (options.height, options.width))
    count = len(prompts) * options.num_images_per_prompt
    print(f"images     {count}: {len(prompts)} prompts x {options.num_images_per_prompt}, {width}x{height}, "
          f"{options.num_inference_steps} steps, guidance {options.guidance_scale:g}, seed {options.seed}"
          + (", each beside the base's" if options.compare else "")
          + (f", each {len(ways)} times: {len(ways) // len(scales)} LoRAs x {len(scales)} strengths"
             if len(ways) > 1 else ""))  # fmt: skip
    for config, (path, strength) in zip(configs, loras, strict=True):
        print(f"LoRA       rank {config.r}, alpha {config.lora_alpha:g}"
              + (f", strength {strength:g}: {path}" if len(loras) > 1 or strength != 1 else ""))  # fmt: skip
    print(f"device     {placement.device}: {placement.why}")
    if unused_nvidia_card():
        print(f"           {UNUSED_CARD}")
    if cut := cache.count_cut(base.tokenizer, prompts):
        print(
            f"           {cut} prompts are longer than {base.tokenizer.model_max_length - 2} tokens and are cut there"
        )

    # Images, batch by batch, each written as it comes.
    texts = [*prompts, options.negative_prompt]
    with lora.switched_off(base.text_encoder):
        base_states = cache.encode_captions(base.text_encoder, base.tokenizer, texts) if options.compare else {}
    sampler = sample.make_sampler(base.scheduler)
    jobs = [(i, j) for i in range(len(prompts)) for j in range(options.num_images_per_prompt)]
    at_once = sample.images_at_once(height, width)
    batches = [jobs[start : start + at_once] for start in range(0, len(jobs), at_once)]
    passes = len(batches) * options.num_inference_steps * (2 if options.compare else len(ways))
    bar = tqdm(total=passes, desc="drawing", unit="step")
    output_dir.mkdir(parents=True, exist_ok=True)

    def draw(batch: list[tuple[int, int]], states: dict[str, torch.Tensor]) -> list:
        text = torch.stack([states[prompts[i]] for i, _ in batch])
        return sample.draw_images(
            base.unet, base.vae, sampler, text, states[options.negative_prompt].expand_as(text),
            [options.seed + j for _, j in batch], height, width, options.num_inference_steps, options.guidance_scale,
            on_step=bar.update,
        )  # fmt: skip

    rows: dict[tuple[int, int], list[Path]] = {job: [] for job in jobs}
    for way, batch in product(ways, batches):
        if batch is batches[0]:
            lora.set_strengths([base.unet, base.text_encoder], way.strengths)
            states = cache.encode_captions(base.text_encoder, base.tokenizer, texts)
        images, base_images = draw(batch, states), None
        if options.compare:
            with lora.switched_off(base.unet):
                base_images = draw(batch, base_states)
        for place_in_batch, (i, j) in enumerate(batch):
            file = "_".join([f"megaman_{first + i:03d}_{j:02d}", *map(safe_name, way.label)]) + ".png"
            shared = {"Steps": options.num_inference_steps, "Sampler": sample.SAMPLER_NAME,
                      "CFG scale": f"{options.guidance_scale:g}", "Seed": options.seed + j,
                      "Size": f"{width}x{height}", "Model": Path(base_name).name.removesuffix(".safetensors"),
                      "RNG": "CPU"}  # fmt: skip
            tags = [f"<lora:{lora_files.short_name(path)}:{strength:g}>" for path, strength in way.loras if strength]
            tag = " ".join([prompts[i], *tags])
            png.save_png(output_dir / file, images[place_in_batch],
                         png.parameters_text(tag, options.negative_prompt, shared))  # fmt: skip
            png.save_thumbnail(output_dir / thumbnail_of(file), images[place_in_batch])
            base_file = None
            if base_images:
                base_file = file.replace(".png", "_base.png")
                png.save_png(output_dir / base_file, base_images[place_in_batch],
                             png.parameters_text(prompts[i], options.negative_prompt, shared))  # fmt: skip
                png.save_thumbnail(output_dir / thumbnail_of(base_file), base_images[place_in_batch])
            settings = {"steps": options.num_inference_steps, "guidance": options.guidance_scale,
                        "sampler": sample.SAMPLER_NAME, "LoRA": way.name, "strength": f"{way.strength:g}",
                        "base": base_name}  # fmt: skip
            gallery.append(GalleryImage(file, prompts[i], options.negative_prompt, options.seed + j, width, height,
                                        settings, base_file))  # fmt: skip
            rows[i, j].append(output_dir / file)
        page = write_gallery(output_dir, gallery, "Mega Man LoRA")
    bar.close()
    if len(ways) > 1:
        labels = dict(zip((image.file for image in gallery), variant_labels(gallery), strict=True))
        sheet = output_dir / f"grid_{first:03d}.png"
        grid.save_grid(sheet, [labels[path.name] for path in rows[0, 0]],
                       [(f"{first + i:03d}, seed {options.seed + j}\n{prompts[i]}", files)
                        for (i, j), files in rows.items()])  # fmt: skip
        print(f"the comparison as one picture: {sheet}")
    print(f"{count * len(ways)} images; open {page.resolve().as_uri()} in a browser")
    return 0


class Way(NamedTuple):
    """One way to draw an image: the LoRAs at work with their strengths, how a page names them, a file name's part."""

    loras: list[tuple[Path, float]]
    strengths: dict[str, float]  # by the adapters' names
    name: str
    strength: float
    label: list[str]


def lora_ways(loras: list[tuple[Path, float]], scales: list[float], one_by_one: bool) -> list[Way]:
    """All the LoRAs together, or one by one, each time at every scale of their own strengths."""
    from megaman.lora import adapter_name

    numbered = [(adapter_name(number), *lora) for number, lora in enumerate(loras)]
    ways = []
    for group, scale in product([[lora] for lora in numbered] if one_by_one else [numbered], scales):
        scaled = [(path, strength * scale) for _, path, strength in group]
        name = ", ".join(str(path) if len(group) == 1 else f"{path}:{strength:g}" for _, path, strength in group)
        label = [path.name for path, _ in scaled] * one_by_one + [f"{scale:g}"] * (len(scales) > 1)
        strengths = {adapter: strength * scale for adapter, _, strength in group}
        ways.append(Way(scaled, strengths, name, scaled[0][1] if len(group) == 1 else scale, label))
    return ways


def trained(folder: Path) -> list[Path]:
    """The LoRAs that a training left in its output: the checkpoints, oldest first, then the finished one."""
    loras = [*find_all(folder), *(path for path in [folder / "lora_weights"] if path.is_dir())]
    if not loras:
        raise UserError(f"--checkpoints {folder} holds no checkpoint", "Name the --output_dir of a training")
    return loras


def first_free(output_dir: Path) -> int:
    """The first prompt number that no image in the folder has: what is there stays, new images come after it."""
    taken = [
        int(match[1]) for path in output_dir.glob("megaman_*.png") if (match := re.match(r"megaman_(\d+)_", path.name))
    ]
    return max(taken, default=-1) + 1


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:], saves_memory="a smaller --height and --width"))
