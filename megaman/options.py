"""Both command lines: flags, defaults, presets. Contradictions fail here, before anything heavy is imported."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megaman.commandline import Parser, choice, folder, lora, name, number, side, strengths, text
from megaman.names import below

DEFAULT_BASE = "runwayml/stable-diffusion-v1-5"
DEFAULT_PROMPT = "mega man, blue robot, helmet, game character, high quality"
DEFAULT_NEGATIVE_PROMPT = "blurry, low quality, distorted, deformed, ugly, bad anatomy"
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
REPLACED = r"((checkpoint|samples)-\d+|lora_weights)(?![^/\\])"  # the folders in --output_dir that a run replaces
POLYNOMIAL_END = 1e-7  # where diffusers' polynomial schedule ends

DEMO = Path(__file__).resolve().parent.parent / "demo"

PRESETS: dict[str, dict[str, Any]] = {
    "starter": {"lora_rank": 4, "lora_alpha": 16, "learning_rate": 1e-4, "max_train_steps": 1000},
    "quality": {"lora_rank": 8, "lora_alpha": 32, "learning_rate": 5e-5, "max_train_steps": 2000},
    "professional": {"lora_rank": 16, "lora_alpha": 64, "learning_rate": 2e-5, "max_train_steps": 3000},
}

# What makes the embedded base and pictures a success on two cores in about two minutes. Convolutions are among the
# targets because a small UNet keeps most of its shapes in them.
DEMO_TRAINING: dict[str, Any] = {
    "pretrained_model_name": str(DEMO / "base"),
    "data_dir": str(DEMO / "images"),
    "output_dir": "./megaman_demo_output",
    "resolution": 64,
    "center_crop": True,
    "train_batch_size": 4,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "lora_rank": 16,
    "lora_alpha": 16,
    "snr_gamma": 5.0,
    "target_modules": [*DEFAULT_TARGETS, "conv1", "conv2", "conv_in"],
    "max_train_steps": 900,
    "save_steps": 300,
    "validation_steps": 300,
    "validation_prompt": "volto, blue robot hero, pixel art, standing, front view, white background",
    "mixed_precision": "no",
    "seed": 0,
}
DEMO_GENERATION: dict[str, Any] = {
    "lora_path": ["./megaman_demo_output/lora_weights"],
    "output_dir": "./generated_demo",
    "prompts_file": str(DEMO / "prompts.txt"),
    "negative_prompt": "",  # the small base never saw the words of the usual one
    "guidance_scale": 5.0,
    "num_inference_steps": 20,
    "compare": "base",
}


MANY = 10**9  # more steps than any run has; "never" for what happens every so many steps
COUNT = number(int, 1, MANY)
COUNT_OR_ZERO = number(int, 0, MANY)
SHARE = number(float, 0, 0.999999)
SEED = number(int, 0, 2**63 - 1)


def training_parser() -> Parser:
    parser = Parser(prog="megaman_lora.py", description="Train a LoRA for Stable Diffusion on a folder of pictures.")
    add = parser.add_argument
    add("--preset", **choice(*PRESETS), help="a recipe; flags given beside it win")
    add("--demo", action="store_true", help="the embedded base and pictures: a whole run on a CPU in minutes")
    add(
        "--pretrained_model_name", type=name, default=DEFAULT_BASE, help="the base: a name on the hub or a local folder"
    )
    add(
        "--data_dir",
        type=name,
        default="./megaman_images",
        help="the pictures, each with an optional caption in NAME.txt",
    )
    add("--output_dir", type=folder, default="./megaman_lora_output", help="checkpoints, samples and the LoRA go here")
    add("--overwrite_output", action="store_true", help="delete what an earlier run left in --output_dir")
    add("--logging_dir", type=folder, default="./logs", help="TensorBoard's folder")
    add("--resolution", type=side, default=512, help="side of the square pictures in pixels, a multiple of 8")
    add("--check_data", action="store_true", help="look at the pictures and captions, write a report, train nothing")
    add("--strict", action="store_true", help="with --check_data: exit 1 where something is wrong")
    add("--skip_bad_images", action="store_true", help="train even where most of the pictures cannot be used")
    add("--center_crop", action="store_true", help="crop the middle; otherwise at random")
    add("--crop_variants", type=number(int, 1, 64), default=4, help="random crops kept of a picture that is not square")
    add("--random_flip", action="store_true", help="mirror pictures at random")
    add("--train_batch_size", type=number(int, 1, 4096), default=1, help="pictures a forward pass and device")
    add("--gradient_accumulation_steps", type=number(int, 1, 65536), default=1, help="forward passes an optimizer step")
    add("--num_train_epochs", type=number(int, 1, 10**6), default=100, help="times every picture is seen")
    add("--max_train_steps", type=COUNT, help="optimizer steps; wins over --num_train_epochs")
    add("--learning_rate", type=number(float, 0, 1, exclusive=True), default=1e-4, help="peak learning rate")
    add("--lr_scheduler", **choice(*SCHEDULERS), default="constant", help="how the rate changes")
    add("--lr_warmup_steps", type=COUNT_OR_ZERO, default=500, help="steps over which the rate rises")
    add("--lora_rank", type=number(int, 1, 1024), default=4, help="rank of the LoRA's matrices")
    add("--lora_alpha", type=number(float, 0, 65536, exclusive=True), default=32, help="strength: scale = alpha / rank")
    add("--use_rslora", action="store_true", help="scale by alpha / sqrt(rank), so that high ranks learn as fast")
    add("--lora_dropout", type=SHARE, default=0.0, help="share of each layer's inputs that the LoRA misses at a step")
    add(
        "--target_modules",
        type=name,
        nargs="+",
        default=DEFAULT_TARGETS,
        metavar="NAME",
        help="UNet layers that get a LoRA",
    )
    add("--adam_beta1", type=SHARE, default=0.9, help="AdamW's first decay")
    add("--adam_beta2", type=SHARE, default=0.999, help="AdamW's second decay")
    add("--adam_weight_decay", type=number(float, 0, 100), default=1e-2, help="AdamW's weight decay")
    add("--adam_epsilon", type=number(float, 0, 1, exclusive=True), default=1e-8, help="AdamW's epsilon")
    add(
        "--max_grad_norm",
        type=number(float, 0, MANY, exclusive=True),
        default=1.0,
        help="gradients are clipped to this norm",
    )
    add("--dataloader_num_workers", type=number(int, 0, 64), default=0, help="processes that decode pictures")
    add("--save_steps", type=COUNT, default=500, help="steps between checkpoints")
    add("--checkpoints_total_limit", type=COUNT, help="checkpoints kept; older ones are deleted")
    add("--resume_from_checkpoint", type=name, metavar="latest|FOLDER", help="go on from a checkpoint")
    add("--validation_steps", type=COUNT, default=100, help="steps between sample images")
    add("--validation_prompt", type=text, default=DEFAULT_PROMPT, help="what the sample images show")
    add("--num_validation_images", type=number(int, 0, 1000), default=4, help="sample images each time; 0 for none")
    add("--snr_gamma", type=number(float, 0, 1000, exclusive=True), help="min-SNR loss weighting; 5 is usual")
    add("--noise_offset", type=number(float, 0, 1), default=0.0, help="strength of an offset noise; 0.05 is usual")
    add("--mixed_precision", **choice("no", "fp16", "bf16"), default="fp16", help="what the frozen base computes in")
    add("--save_precision", **choice("float", "fp16", "bf16"), default="float", help="what lora_weights/ is written in")
    add("--gradient_checkpointing", action="store_true", help="less memory, slower steps")
    add("--seed", type=SEED, help="makes a run repeatable; drawn and noted where none is given")
    return parser


def generation_parser() -> Parser:
    parser = Parser(prog="generate_megaman.py", description="Draw pictures with a trained LoRA and put them on a page.")
    add = parser.add_argument
    add("--demo", action="store_true", help="the embedded base with the LoRA that megaman_lora.py --demo trained")
    add(
        "--base_model",
        type=name,
        help="the base: a name on the hub or a local folder (default: what the LoRA was trained on)",
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
    add("--num_inference_steps", type=number(int, 1, 999), default=25, help="sampling steps")
    add("--guidance_scale", type=number(float, 0, 100), default=7.5, help="how closely the prompt is followed")
    add("--height", type=side, help="image height in pixels (default: 512; the base's own size where it is smaller)")
    add("--width", type=side, help="image width in pixels (default: as for --height)")
    add("--seed", type=SEED, default=42, help="image j of a prompt uses seed + j")
    add("--device", **choice("cuda", "mps", "cpu"), help="where to compute (default: the best there is)")
    add("--compare", **choice("base"), help="draw each image without the LoRA too and show both side by side")
    add("--lora_scales", type=strengths, metavar="S,S,...", help="draw at each of these strengths; 0 is the base alone")
    add("--checkpoints", type=name, metavar="FOLDER", help="draw with every checkpoint of this training output")
    return parser


def training_options(argv: Sequence[str]) -> Namespace:
    """Parse megaman_lora.py's command line: plain defaults, then --demo's, then --preset's, then the flags given.

    The names of the flags given are in options.given. All mistakes are told together, with exit code 2.
    """
    parser = training_parser()
    given, mistakes = parser.read(argv)
    demo = DEMO_TRAINING if given.get("demo") else {}
    if "crop_variants" in given and "center_crop" not in given:  # the demo's own centre would leave it without effect
        demo = {**demo, "center_crop": False}
    preset = PRESETS.get(given.get("preset"), {})
    options = Namespace(**{**vars(parser.parse_args([])), **demo, **preset, **given}, given=set(given))
    if mistakes := [*mistakes, *training_contradictions(options)]:
        parser.refuse(mistakes)
    return options


def training_contradictions(options: Namespace) -> Iterator[str]:
    """What cannot be meant together. What is merely without effect, such as more steps than epochs, is no mistake."""
    if options.strict and not options.check_data:
        yield "--strict belongs to --check_data: add that or leave it out"
    if options.resume_from_checkpoint and options.overwrite_output:
        yield "--resume_from_checkpoint and --overwrite_output contradict each other: leave one out"
    if options.lr_scheduler == "polynomial" and options.learning_rate <= POLYNOMIAL_END:
        yield f"--lr_scheduler polynomial falls to {POLYNOMIAL_END:g}: give a higher --learning_rate"
    if (
        "lr_warmup_steps" in options.given
        and options.lr_scheduler != "constant"
        and options.lr_warmup_steps >= (options.max_train_steps or MANY + 1)
    ):
        yield (
            f"--lr_warmup_steps {options.lr_warmup_steps} is not below --max_train_steps {options.max_train_steps}: "
            "the rate would never be reached; lower the one or raise the other"
        )
    if options.center_crop and options.crop_variants > 1 and "crop_variants" in options.given:
        yield "--center_crop and --crop_variants contradict each other: leave one out"
    if options.num_validation_images == 0:
        for flag in sorted({"validation_steps", "validation_prompt"} & options.given):
            yield f"--{flag} and --num_validation_images 0 contradict each other: leave one out"
    if below(options.output_dir, options.data_dir):
        yield f"--output_dir {options.output_dir} is within --data_dir: its samples would be trained on; name another"
    for flag in ("data_dir", "logging_dir"):
        place = getattr(options, flag)
        if re.match(REPLACED, below(place, options.output_dir) or ""):
            yield f"--{flag} {place} is where the run in --output_dir puts its own: name another"


def generation_options(argv: Sequence[str]) -> Namespace:
    """Parse generate_megaman.py's command line: plain defaults, then --demo's, then the flags given.

    All mistakes are told together, with exit code 2.
    """
    parser = generation_parser()
    given, mistakes = parser.read(argv)
    demo = DEMO_GENERATION if given.get("demo") else {}
    if "prompts" in given:
        demo = {**demo, "prompts_file": None}
    if {"lora_scales", "checkpoints"} & set(given):
        demo = {**demo, "compare": None}
    options = Namespace(**{**vars(parser.parse_args([])), **demo, **given})
    if options.prompts and options.prompts_file:
        mistakes.append("--prompts and --prompts_file contradict each other: leave one out")
    if options.compare and (options.lora_scales or options.checkpoints):
        mistakes.append("--compare base is for one LoRA at one strength: write --lora_scales 0,1 instead")
    if options.checkpoints and "lora_path" in given:
        mistakes.append("--checkpoints and --lora_path contradict each other: leave one out")
    if mistakes:
        parser.refuse(mistakes)
    return options


def resuming(argv: list[str]) -> list[str]:
    """The command line that goes on where this one was stopped."""
    words = [word for word in argv if word != "--overwrite_output" and not word.startswith("--resume_from_checkpoint=")]
    if "--resume_from_checkpoint" in words:
        place = words.index("--resume_from_checkpoint")
        del words[place : place + 2]
    return [*words, "--resume_from_checkpoint", "latest"]
