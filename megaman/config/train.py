"""megaman_lora.py's command line: flags, defaults, presets. Contradictions fail here, before a heavy import."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megaman.config.cli import SEED, Namespace, Parser, choice, extension, folder, name, number, side, text
from megaman.files import below
from megaman.hub import DEFAULT_BASE

DEFAULT_PROMPT = "mega man, blue robot, helmet, game character, high quality"
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
REPLACED = r"((checkpoint|samples)-\d+|lora_weights)(?![^/\\])"  # the folders in --output_dir that a run replaces
BUCKET_FLAGS = ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
POLYNOMIAL_END = 1e-7  # where diffusers' polynomial schedule ends

DEMO = Path(__file__).resolve().parent.parent.parent / "demo"

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

MANY = 10**9  # more steps than any run has; "never" for what happens every so many steps
COUNT = number(int, 1, MANY)
COUNT_OR_ZERO = number(int, 0, MANY)
SHARE = number(float, 0, 0.999999)
PROBABILITY = number(float, 0, 1)
RATE = number(float, 0, 1, exclusive=True)
# What a resumed run has to share, beside base, seed, pictures and their number a step.
MUST_MATCH = (
    "lora_rank", "lora_alpha", "use_rslora", "target_modules", "train_text_encoder", "resolution", "center_crop",
    "crop_variants", "random_flip", "no_cache", *BUCKET_FLAGS, "shuffle_caption", "keep_tokens", "caption_dropout_rate",
    "caption_tag_dropout_rate",
)  # fmt: skip


def contradictions(options: Namespace) -> Iterator[str]:
    """What cannot be meant together. What is merely without effect, such as more steps than epochs, is no mistake."""
    if options.strict and not options.check_data:
        yield "--strict belongs to --check_data: add that or leave it out"
    if options.plan and options.check_data:
        yield "--plan and --check_data are two questions: ask one at a time"
    if options.resume_from_checkpoint and options.overwrite_output:
        yield "--resume_from_checkpoint and --overwrite_output contradict each other: leave one out"
    if options.text_encoder_lr is not None and not options.train_text_encoder:
        yield "--text_encoder_lr has no effect without --train_text_encoder: add that, or leave this out"
    for flag in ("learning_rate", "text_encoder_lr"):
        if options.lr_scheduler == "polynomial" and (getattr(options, flag) or 1) <= POLYNOMIAL_END:
            yield f"--lr_scheduler polynomial falls to {POLYNOMIAL_END:g}: give a higher --{flag}"
    if (
        "lr_warmup_steps" in options.given
        and options.lr_scheduler != "constant"
        and options.max_train_steps
        and options.lr_warmup_steps >= options.max_train_steps
    ):
        yield (
            f"--lr_warmup_steps {options.lr_warmup_steps} is not below --max_train_steps {options.max_train_steps}: "
            "the rate would never be reached; lower the one or raise the other"
        )
    if options.center_crop and options.crop_variants > 1 and "crop_variants" in options.given:
        yield "--center_crop and --crop_variants contradict each other: leave one out"
    for flag in ("cache_dir", "cache_limit", "crop_variants"):
        if options.no_cache and flag in options.given:
            yield f"--no_cache and --{flag} contradict each other: leave one out"
    for flag in BUCKET_FLAGS:
        if getattr(options, flag) and not options.enable_bucket:
            yield f"--{flag} has no effect without --enable_bucket: add that, or leave this out"
    limits = options.resolution, options.min_bucket_reso, options.max_bucket_reso, options.bucket_reso_steps
    if options.enable_bucket and (mistake := contradiction(*limits)):
        yield ": ".join(mistake)
    if options.num_validation_images == 0:
        for flag in sorted({"validation_steps", "validation_prompt"} & options.given):
            yield f"--{flag} and --num_validation_images 0 contradict each other: leave one out"
    if "prior_loss_weight" in options.given and not options.class_data_dir:
        yield "--prior_loss_weight has no effect without --class_data_dir: add that, or leave this out"
    for flag in ("data_dir", "class_data_dir"):
        if (place := getattr(options, flag)) and below(options.output_dir, place):
            yield f"--output_dir {options.output_dir} is within --{flag}: its samples would be trained on; name another"
    if (own := options.class_data_dir) and (below(own, options.data_dir) or below(options.data_dir, own)):
        yield f"--class_data_dir {own} and --data_dir share pictures, which would be learnt and held back: part them"
    for flag in ("data_dir", "class_data_dir", "logging_dir"):
        place = getattr(options, flag)
        if place and re.match(REPLACED, below(place, options.output_dir) or ""):
            yield f"--{flag} {place} is where the run in --output_dir puts its own: name another"


def training_parser() -> Parser:
    parser = Parser(prog="megaman_lora.py", description="Train a LoRA for Stable Diffusion on a folder of pictures.")
    add = parser.add_argument
    add("--preset", **choice(*PRESETS), help="a recipe; flags given beside it win")
    add("--demo", action="store_true", help="the embedded base and pictures: a whole run on a CPU in minutes")
    add(
        "--pretrained_model_name",
        type=name,
        default=DEFAULT_BASE,
        help="the base: a name on the hub, a local folder or a .safetensors file",
    )
    add(
        "--data_dir",
        type=name,
        default="./megaman_images",
        help="the pictures, each with an optional caption in NAME.txt",
    )
    add("--caption_extension", type=extension, help="of the caption files (default: .txt, where missing .caption)")
    add("--trigger_word", type=text, help="put in front of every caption that does not contain it")
    add("--caption_prefix", type=text, help="put in front of every caption, with a space")
    add("--caption_suffix", type=text, help="put behind every caption, with a space")
    add("--shuffle_caption", action="store_true", help="the tags between commas in another order at every visit")
    add("--keep_tokens", type=number(int, 0, 1000), help="first tags that stay (default: the trigger word's, or 0)")
    add("--caption_dropout_rate", type=PROBABILITY, default=0.0, help="probability that a caption is left out")
    add("--caption_tag_dropout_rate", type=PROBABILITY, default=0.0, help="probability that a tag is left out")
    add("--dataset_repeats", type=number(int, 1, 10**5), default=1, help="times that an epoch sees every picture")
    add(
        "--auto_caption",
        type=name,
        metavar="MODEL",
        help="BLIP (a name on the hub or a folder) writes missing captions",
    )
    add("--class_data_dir", type=name, help="regularisation pictures: what the base should go on drawing as it does")
    add("--prior_loss_weight", type=number(float, 0, 1000), default=1.0, help="what their loss counts")
    add("--output_dir", type=folder, default="./megaman_lora_output", help="checkpoints, samples and the LoRA go here")
    add("--overwrite_output", action="store_true", help="delete what an earlier run left in --output_dir")
    add("--logging_dir", type=folder, default="./logs", help="TensorBoard's folder")
    add("--resolution", type=side, default=512, help="side of the square pictures in pixels, a multiple of 8")
    add("--check_data", action="store_true", help="look at the pictures and captions, write a report, train nothing")
    add("--plan", action="store_true", help="tell what memory training would need; load, download and train nothing")
    add("--strict", action="store_true", help="with --check_data: exit 1 where something is wrong")
    add("--skip_bad_images", action="store_true", help="train even where most of the pictures cannot be used")
    add("--center_crop", action="store_true", help="crop the middle; otherwise at random")
    add("--crop_variants", type=number(int, 1, 64), default=4, help="random crops kept of a picture that is not square")
    add("--random_flip", action="store_true", help="mirror pictures at random, unless the caption says left or right")
    add("--enable_bucket", action="store_true", help="train on pictures in their own shape, in aspect-ratio buckets")
    add("--min_bucket_reso", type=side, help="shortest side of a bucket (default: half of the base's size)")
    add("--max_bucket_reso", type=side, help="longest side of a bucket (default: twice the base's size)")
    add(
        "--bucket_reso_steps", type=side, help="what the sides are multiples of (default: an eighth of the base's size)"
    )
    add("--bucket_no_upscale", action="store_true", help="small pictures get buckets of their own instead of enlarging")
    add(
        "--cache_dir",
        type=folder,
        help="where the encoded pictures are kept for later runs (default: ~/.cache/megaman_lora)",
    )
    add("--cache_limit", type=number(float, 0, MANY), default=10.0, metavar="GB", help="how large it may grow")
    add(
        "--no_cache", action="store_true", help="encode a picture anew at every visit, with a new random crop each time"
    )
    add("--train_batch_size", type=number(int, 1, 4096), default=1, help="pictures a forward pass and device")
    add("--gradient_accumulation_steps", type=number(int, 1, 65536), default=1, help="forward passes an optimizer step")
    add("--num_train_epochs", type=number(int, 1, 10**6), default=100, help="times every picture is seen")
    add("--max_train_steps", type=COUNT, help="optimizer steps; wins over --num_train_epochs")
    add("--learning_rate", type=RATE, default=1e-4, help="peak learning rate")
    add("--train_text_encoder", action="store_true", help="a LoRA for the text encoder too")
    add("--text_encoder_lr", type=RATE, help="the text encoder's peak learning rate (default: as --learning_rate)")
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
    add("--memory_format", **choice("auto", "contiguous", "channels_last"), default="auto", help="of the convolutions")
    add(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="xformers' attention instead of torch's own (sdpa); for NVIDIA cards",
    )
    add("--compile", action="store_true", help="compile the UNet's repeated blocks; for NVIDIA cards")
    add("--gradient_checkpointing", action="store_true", help="less memory, slower steps")
    add(
        "--vram_limit",
        type=number(float, 0, 1024, exclusive=True),
        metavar="GB",
        help="keep to so much of the card's memory (default: what is free)",
    )
    add("--seed", type=SEED, help="makes a run repeatable; drawn and noted where none is given")
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
    if mistakes := [*mistakes, *contradictions(options)]:
        parser.refuse(mistakes)
    if options.train_text_encoder and options.text_encoder_lr is None:
        options.text_encoder_lr = options.learning_rate
    options.trigger_word, options.caption_prefix, options.caption_suffix = (
        " ".join((words or "").split())
        for words in (options.trigger_word, options.caption_prefix, options.caption_suffix)
    )
    if options.keep_tokens is None:  # what calls the character must not be lost by accident
        options.keep_tokens = options.trigger_word.count(",") + 1 if options.trigger_word else 0
    return options


def bucket_settings(options: Namespace) -> dict[str, Any]:
    """What is given for the buckets, under the names of make_buckets."""
    return {"resolution": options.resolution, "smallest": options.min_bucket_reso, "largest": options.max_bucket_reso,
            "step": options.bucket_reso_steps, "upscale": not options.bucket_no_upscale}  # fmt: skip


def cache_place(options: Namespace) -> Path | None:
    """The folder of the cache; None without one, as where the system knows no home."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    place = os.path.expanduser(options.cache_dir or os.path.join(home, "megaman_lora"))
    return None if options.no_cache or place.startswith("~") else Path(place)


def plan_request(options: Namespace) -> dict[str, object]:
    """What the memory of a run hangs on, under the names of memory_estimate.Plan, and the base's name."""
    return {"name": options.pretrained_model_name, "size": options.resolution, "rank": options.lora_rank,
            "targets": options.target_modules, "dropout": options.lora_dropout,
            "reads": options.shuffle_caption or options.caption_tag_dropout_rate > 0,
            "trains_text_encoder": options.train_text_encoder, "encodes": options.no_cache,
            "images": options.num_validation_images}  # fmt: skip


def contradiction(
    resolution: int, smallest: int | None, largest: int | None, step: int | None
) -> tuple[str, str] | None:
    """What is wrong with these limits, and the remedy; None where nothing is, or not as far as they are known."""
    if smallest and smallest > resolution:
        return f"--min_bucket_reso {smallest} is above --resolution {resolution}", "lower it"
    if largest and largest < resolution:
        return f"--max_bucket_reso {largest} is below --resolution {resolution}", "raise it"
    if step and step > resolution:
        return f"--bucket_reso_steps {step} is above --resolution {resolution}: no side would fit", "lower it"
    return None
