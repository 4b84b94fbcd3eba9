"""generate_megaman.py's command line: flags and defaults. Contradictions fail here, before a heavy import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megaman.config import samplers
from megaman.config.cli import (
    GUIDANCE,
    SEED,
    STEPS,
    Namespace,
    Parser,
    choice,
    folder,
    lora,
    name,
    number,
    sampler,
    side,
    strengths,
    text,
)
from megaman.config.train import DEMO

DEFAULT_NEGATIVE_PROMPT = "blurry, low quality, distorted, deformed, ugly, bad anatomy"
DEMO_GENERATION: dict[str, Any] = {
    "lora_path": ["./megaman_demo_output/lora_weights"],
    "output_dir": "./generated_demo",
    "prompts_file": str(DEMO / "prompts.txt"),
    "negative_prompt": "",  # the small base never saw the words of the usual one
    "guidance_scale": 5.0,
    "num_inference_steps": 20,
    "compare": "base",
}
MAY_DIFFER = {"from_image", "output_dir", "device", "lora_path", "base_model"}  # what an image's record need not settle


def generation_parser() -> Parser:
    parser = Parser(prog="generate_megaman.py", description="Draw pictures with a trained LoRA and put them on a page.")
    add = parser.add_argument
    add("--demo", action="store_true", help="the embedded base with the LoRA that megaman_lora.py --demo trained")
    add(
        "--base_model",
        type=name,
        help="the base: a name on the hub, a local folder or a .safetensors file (default: the LoRA's)",
    )
    add(
        "--lora_path",
        type=lora,
        nargs="+",
        default=["./megaman_lora_output/lora_weights"],
        metavar="NAME[:STRENGTH]",
        help="LoRAs, folders or .safetensors files, each with a strength behind a colon if not 1",
    )
    add(
        "--output_dir",
        type=folder,
        default="./generated_megaman",
        help="images and index.html go here; existing ones stay",
    )
    add("--prompts", type=text, nargs="+", metavar="PROMPT", help="one or more prompts (default: ten about Mega Man)")
    add("--prompts_file", type=name, help="a file with one prompt a line; # begins a comment")
    add("--negative_prompt", type=text, default=DEFAULT_NEGATIVE_PROMPT, help="what the images should not show")
    add("--num_images_per_prompt", type=number(int, 1, 10000), default=1, help="images of each prompt")
    add("--num_inference_steps", type=STEPS, default=25, help="sampling steps")
    add("--guidance_scale", type=GUIDANCE, default=7.5, help="how closely the prompt is followed")
    add("--height", type=side, help="image height in pixels (default: 512; the base's own size where it is smaller)")
    add("--width", type=side, help="image width in pixels (default: as for --height)")
    add("--seed", type=SEED, default=42, help="image j of a prompt uses seed + j")
    add(
        "--scheduler",
        type=sampler,
        default=samplers.DEFAULT.name,
        metavar="NAME",
        help="the sampler, by A1111's name, kohya's or diffusers'",
    )
    add("--clip_skip", type=number(int, 1, 64), default=1, help="2 takes the text states one layer earlier, as A1111")
    add("--batch_size", type=number(int, 1, 1024), help="images drawn at once (default: what is fast and fits)")
    add("--device", **choice("cuda", "mps", "cpu"), help="where to compute (default: the best there is)")
    add("--compare", **choice("base"), help="draw each image without the LoRA too and show both side by side")
    add("--lora_scale", type=number(float, -10, 10), help="a factor on the strength of all LoRAs (default: 1)")
    add("--lora_scales", type=strengths, metavar="S,S,...", help="draw at each of these strengths; 0 is the base alone")
    add("--checkpoints", type=name, metavar="FOLDER", help="draw with every checkpoint of this training output")
    add("--resume", action="store_true", help="go on with the stopped run of the same flags; nothing is drawn twice")
    add("--from_image", type=name, metavar="PNG", help="draw an image again, with all the settings that it carries")
    return parser


def generation_options(argv: Sequence[str]) -> Namespace:
    """Parse generate_megaman.py's command line: plain defaults, then --demo's, then the flags given.

    The names of the flags given are in options.given. All mistakes are told together, with exit code 2.
    """
    parser = generation_parser()
    given, mistakes = parser.read(argv)
    demo = DEMO_GENERATION if given.get("demo") else {}
    if "prompts" in given:
        demo = {**demo, "prompts_file": None}
    if {"lora_scales", "checkpoints"} & set(given):
        demo = {**demo, "compare": None}
    options = Namespace(**{**vars(parser.parse_args([])), **demo, **given}, given=set(given))
    if options.prompts and options.prompts_file:
        mistakes.append("--prompts and --prompts_file contradict each other: leave one out")
    if options.compare and (options.lora_scales or options.checkpoints):
        mistakes.append("--compare base is for one LoRA at one strength: write --lora_scales 0,1 instead")
    if options.lora_scale is not None and options.lora_scales:
        mistakes.append("--lora_scale and --lora_scales contradict each other: leave one out")
    if options.from_image:
        settled = options.given - MAY_DIFFER
        mistakes += [f"--{flag} and --from_image contradict each other: leave one out" for flag in sorted(settled)]
    if options.checkpoints and "lora_path" in options.given:
        mistakes.append("--checkpoints and --lora_path contradict each other: leave one out")
    if mistakes:
        parser.refuse(mistakes)
    return options
