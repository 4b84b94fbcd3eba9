"""Both command lines: flags, defaults, presets. Contradictions fail here, before anything heavy is imported."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megaman.errors import WRONG_USAGE

DEFAULT_BASE = "runwayml/stable-diffusion-v1-5"
DEFAULT_PROMPT = "mega man, blue robot, helmet, game character, high quality"
DEFAULT_NEGATIVE_PROMPT = "blurry, low quality, distorted, deformed, ugly, bad anatomy"
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
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
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "lora_rank": 16,
    "lora_alpha": 16,
    "snr_gamma": 5.0,
    "target_modules": [*DEFAULT_TARGETS, "conv1", "conv2", "conv_in"],
    "max_train_steps": 560,
    "save_steps": 280,
    "validation_steps": 140,
    "validation_prompt": "volto, blue robot hero, pixel art, standing, front view, white background",
    "mixed_precision": "no",
    "seed": 0,
}
DEMO_GENERATION: dict[str, Any] = {
    "lora_path": "./megaman_demo_output/lora_weights",
    "output_dir": "./generated_demo",
    "prompts_file": str(DEMO / "prompts.txt"),
    "negative_prompt": "",  # the small base never saw the words of the usual one
    "guidance_scale": 5.0,
    "num_inference_steps": 20,
    "compare": "base",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest flag proposed for a mistyped one."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = "; ".join(self._explain(word) for word in unknown.split() if word.startswith("-")) or message
        print(f"error: {' '.join(message.split())}. See {self.prog} --help", file=sys.stderr)
        raise SystemExit(WRONG_USAGE)

    def _explain(self, word: str) -> str:
        flag = word.split("=")[0]
        name, names = flag.strip("-"), [known[2:] for known in self._option_string_actions if known.startswith("--")]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        near += [known for known in names if len(name) > 2 and known.startswith(name)]
        return f"{flag} is not a flag" + (f", did you mean --{near[0]}" if near else "")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults, but not where there is none to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:  # 0 is worth telling
            return action.help
        return super()._get_help_string(action)


def number(
    kind: Callable[[str], Any], low: float = -math.inf, high: float = math.inf, exclusive: bool = False
) -> Callable[[str], Any]:
    """Make an argparse type: an int or float from low (itself excluded where exclusive) to high, never NaN."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not (low < value if exclusive else low <= value) or not value <= high or value == math.inf:
            limits = f"{'above' if exclusive else 'at least'} {low:g}" + (
                f", at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
        return value

    return parse


def _text(text: str) -> str:
    """A prompt; bytes that are no text arrive from the command line as lone surrogates, which no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not valid UTF-8: save or type it anew") from None
    return text


def _side(text: str) -> int:
    value = number(int, 8, 8192)(text)
    if value % 8:
        near = max(8, round(value / 8) * 8)
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 8: take {near}")
    return value


COUNT = number(int, 1)
COUNT_OR_ZERO = number(int, 0)
SHARE = number(float, 0, 0.999999)
SEED = number(int, 0, 2**63 - 1)


def training_parser() -> Parser:
    parser = Parser(prog="megaman_lora.py", description="Train a LoRA for Stable Diffusion on a folder of pictures.")
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), help="a recipe; flags given beside it win")
    add("--demo", action="store_true", help="the embedded base and pictures: a whole run on a CPU in minutes")
    add("--pretrained_model_name", default=DEFAULT_BASE, help="the base: a name on the hub or a local folder")
    add("--data_dir", default="./megaman_images", help="the pictures, each with an optional caption in NAME.txt")
    add("--output_dir", default="./megaman_lora_output", help="checkpoints, samples and the LoRA go here")
    add("--overwrite_output", action="store_true", help="delete what an earlier run left in --output_dir")
    add("--logging_dir", default="./logs", help="TensorBoard's folder")
    add("--resolution", type=_side, default=512, help="side of the square pictures in pixels, a multiple of 8")
    add("--skip_bad_images", action="store_true", help="train even where most of the pictures cannot be used")
    add("--center_crop", action="store_true", help="crop the middle; otherwise at random")
    add("--crop_variants", type=number(int, 1, 64), default=4, help="random crops kept of a picture that is not square")
    add("--random_flip", action="store_true", help="mirror pictures at random")
    add("--train_batch_size", type=COUNT, default=1, help="pictures a forward pass and device")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="forward passes an optimizer step")
    add("--num_train_epochs", type=COUNT, default=100, help="times every picture is seen")
    add("--max_train_steps", type=COUNT, help="optimizer steps; wins over --num_train_epochs")
    add("--learning_rate", type=number(float, 0, 1, exclusive=True), default=1e-4, help="peak learning rate")
    add("--lr_scheduler", choices=SCHEDULERS, default="constant", help="how the rate changes")
    add("--lr_warmup_steps", type=COUNT_OR_ZERO, default=500, help="steps over which the rate rises")
    add("--lora_rank", type=number(int, 1, 1024), default=4, help="rank of the LoRA's matrices")
    add("--lora_alpha", type=number(float, 0, 65536, exclusive=True), default=32, help="strength: scale = alpha / rank")
    add("--target_modules", nargs="+", default=DEFAULT_TARGETS, metavar="NAME", help="UNet layers that get a LoRA")
    add("--adam_beta1", type=SHARE, default=0.9, help="AdamW's first decay")
    add("--adam_beta2", type=SHARE, default=0.999, help="AdamW's second decay")
    add("--adam_weight_decay", type=number(float, 0), default=1e-2, help="AdamW's weight decay")
    add("--adam_epsilon", type=number(float, 0, exclusive=True), default=1e-8, help="AdamW's epsilon")
    add(
        "--max_grad_norm", type=number(float, 0, exclusive=True), default=1.0, help="gradients are clipped to this norm"
    )
    add("--dataloader_num_workers", type=number(int, 0, 64), default=0, help="processes that decode pictures")
    add("--save_steps", type=COUNT, default=500, help="steps between checkpoints")
    add("--checkpoints_total_limit", type=COUNT, help="checkpoints kept; older ones are deleted")
    add("--resume_from_checkpoint", metavar="latest|FOLDER", help="go on from a checkpoint")
    add("--validation_steps", type=COUNT, default=100, help="steps between sample images")
    add("--validation_prompt", type=_text, default=DEFAULT_PROMPT, help="what the sample images show")
    add("--num_validation_images", type=COUNT_OR_ZERO, default=4, help="sample images each time; 0 for none")
    add("--snr_gamma", type=number(float, 0, exclusive=True), help="min-SNR loss weighting; 5 is usual")
    add("--noise_offset", type=number(float, 0, 1), default=0.0, help="strength of an offset noise; 0.05 is usual")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="fp16", help="what the frozen base computes in")
    add("--gradient_checkpointing", action="store_true", help="less memory, slower steps")
    add("--seed", type=SEED, help="makes a run repeatable; drawn and noted where none is given")
    return parser


def generation_parser() -> Parser:
    parser = Parser(prog="generate_megaman.py", description="Draw pictures with a trained LoRA and put them on a page.")
    add = parser.add_argument
    add("--demo", action="store_true", help="the embedded base with the LoRA that megaman_lora.py --demo trained")
    add("--base_model", help="the base: a name on the hub or a local folder (default: what the LoRA was trained on)")
    add("--lora_path", default="./megaman_lora_output/lora_weights", help="the folder with the LoRA")
    add("--output_dir", default="./generated_megaman", help="images and index.html go here; existing ones stay")
    add("--prompts", type=_text, nargs="+", metavar="PROMPT", help="one or more prompts (default: ten about Mega Man)")
    add("--prompts_file", help="a file with one prompt a line; # begins a comment")
    add("--negative_prompt", type=_text, default=DEFAULT_NEGATIVE_PROMPT, help="what the images should not show")
    add("--num_images_per_prompt", type=COUNT, default=1, help="images of each prompt")
    add("--num_inference_steps", type=number(int, 1, 999), default=25, help="sampling steps")
    add("--guidance_scale", type=number(float, 0, 100), default=7.5, help="how closely the prompt is followed")
    add("--height", type=_side, help="image height in pixels (default: 512; the base's own size where it is smaller)")
    add("--width", type=_side, help="image width in pixels (default: as for --height)")
    add("--seed", type=SEED, default=42, help="image j of a prompt uses seed + j")
    add("--device", choices=["cuda", "mps", "cpu"], help="where to compute (default: the best there is)")
    add("--compare", choices=["base"], help="draw each image without the LoRA too and show both side by side")
    return parser


def training_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse megaman_lora.py's command line: plain defaults, then --demo's, then --preset's, then the flags given."""
    parser = training_parser()
    first = _peek(argv)
    if first.demo:
        parser.set_defaults(**DEMO_TRAINING)
    parser.set_defaults(**PRESETS.get(first.preset, {}))
    options = parser.parse_args(argv)
    options.given = given_flags(parser, argv)
    if options.resume_from_checkpoint and options.overwrite_output:
        parser.error("--resume_from_checkpoint and --overwrite_output contradict each other: leave one out")
    if options.lr_scheduler == "polynomial" and options.learning_rate <= POLYNOMIAL_END:
        parser.error(f"--lr_scheduler polynomial falls to {POLYNOMIAL_END:g}: give a higher --learning_rate")
    return options


def generation_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse generate_megaman.py's command line: plain defaults, then --demo's, then the flags given."""
    parser = generation_parser()
    first = _peek(argv)
    if first.demo:
        parser.set_defaults(**DEMO_GENERATION)
        if "prompts" in given_flags(parser, argv):
            parser.set_defaults(prompts_file=None)
    options = parser.parse_args(argv)
    if options.prompts and options.prompts_file:
        parser.error("--prompts and --prompts_file contradict each other: leave one out")
    return options


def given_flags(parser: Parser, argv: Sequence[str]) -> set[str]:
    """The names of the options that stand on the command line, as against those that came from a default."""
    words = {word.split("=")[0] for word in argv}
    return {action.dest for action in parser._actions if words & set(action.option_strings)}


def _peek(argv: Sequence[str]) -> argparse.Namespace:
    """The flags that change defaults; mistakes in them and --help are left to the real pass."""
    peeker = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peeker.add_argument("--demo", action="store_true")
    peeker.add_argument("--preset", nargs="?")
    try:
        return peeker.parse_known_args(argv)[0]
    except argparse.ArgumentError:
        return argparse.Namespace(demo=False, preset=None)
