"""Both command lines: the contract's defaults, presets and their precedence, and one line for
whatever is wrong."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
from itertools import chain
from pathlib import Path
from typing import cast

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.config.cli import flags_of, groups_of
from megaman.config.foreign_flags import FLAG, REMEDIES
from megaman.config.generate import (
    DEMO_GENERATION,
    GenerateConfig,
    generate_parser,
    parse_generate_config,
)
from megaman.config.presets import DEMO_TRAINING
from megaman.config.settings import ORDER, TrainConfig
from megaman.config.train import parse_train_config, train_parser
from megaman.config.values import side
from megaman.version import VERSION

TRAINING_DEFAULTS = {
    "vram_limit": None,
    "config": None,
    "optimizer": "adamw",
    "network_weights": None,
    "save_every_n_epochs": None,
    "validation_epochs": None,
    "preset": None,
    "demo": False,
    "pretrained_model_name": "runwayml/stable-diffusion-v1-5",
    "data_dir": "./megaman_images",
    "caption_extension": None,  # .txt, where that is missing .caption
    "trigger_word": "",
    "caption_prefix": "",
    "caption_suffix": "",
    "shuffle_caption": False,
    "keep_tokens": 0,
    "caption_dropout_rate": 0,
    "caption_tag_dropout_rate": 0,
    "dataset_repeats": 1,
    "auto_caption": None,
    "class_data_dir": None,
    "prior_loss_weight": 1.0,
    "output_dir": "./megaman_lora_output",
    "overwrite_output": False,
    "logging_dir": "./logs",
    "log_format": "text",
    "open": False,
    "resolution": 512,
    "check_data": False,
    "plan": False,
    "system_info": False,
    "strict": False,
    "skip_bad_images": False,
    "center_crop": False,
    "crop_variants": 4,
    "cache_dir": None,
    "cache_limit": 10,
    "no_cache": False,
    "random_flip": False,
    "upscale": "auto",
    "background": "#ffffff",
    "alpha_mask": False,
    "enable_bucket": False,
    "min_bucket_reso": None,
    "max_bucket_reso": None,
    "bucket_reso_steps": None,
    "bucket_no_upscale": False,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 100,
    "max_train_steps": None,
    "learning_rate": 1e-4,
    "train_text_encoder": False,
    "text_encoder_lr": None,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lora_rank": 4,
    "lora_alpha": 32,
    "use_rslora": False,
    "lora_dropout": 0,
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "dataloader_num_workers": 0,
    "save_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "validation_steps": 100,
    "validation_prompts_file": None,
    "clip_model": None,
    "validation_guidance_scale": 7.5,
    "validation_prompt": "mega man, blue robot, helmet, game character, high quality",
    "num_validation_images": 4,
    "snr_gamma": None,
    "noise_offset": 0,
    "mixed_precision": "fp16",
    "save_precision": "float",
    "base_precision": "same",
    "memory_format": "auto",
    "enable_xformers_memory_efficient_attention": False,
    "compile": False,
    "gradient_checkpointing": False,
    "seed": None,
    "validation_split": None,
    "validation_data_dir": None,
    "eval_steps": None,
    "early_stopping_patience": None,
    "use_ema": False,
}
GENERATION_DEFAULTS = {
    "config": None,
    "demo": False,
    "base_model": None,
    "lora_path": ["./megaman_lora_output/lora_weights"],
    "output_dir": "./generated_megaman",
    "open": False,
    "prompts": None,
    "prompts_file": None,
    "negative_prompt": "blurry, low quality, distorted, deformed, ugly, bad anatomy",
    "num_images_per_prompt": 1,
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "height": None,  # 512, or the base's own size where that is smaller
    "width": None,
    "seed": 42,
    "scheduler": "dpm++_2m",
    "clip_skip": 1,
    "batch_size": None,  # what is fast and fits
    "device": None,  # the best there is
    "compare": None,
    "lora_scales": None,
    "checkpoints": None,
    "clip_model": None,
    "lora_scale": None,  # 1
    "resume": False,
    "from_image": None,
    "pixel_art": None,
}
RECIPES = {
    "starter": {"lora_rank": 4, "lora_alpha": 16, "learning_rate": 1e-4, "max_train_steps": 1000},
    "quality": {"lora_rank": 8, "lora_alpha": 32, "learning_rate": 5e-5, "max_train_steps": 2000},
    "professional": {
        "lora_rank": 16,
        "lora_alpha": 64,
        "learning_rate": 2e-5,
        "max_train_steps": 3000,
    },
}
PARSERS = {"megaman_lora.py": parse_train_config, "generate_megaman.py": parse_generate_config}


def settings(config: TrainConfig | GenerateConfig) -> dict:
    return config.settings()


def parse(options, argv: list[str]) -> tuple[TrainConfig | GenerateConfig | int, str, str]:
    """What parsing comes to, a config or an exit code, and what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = options(argv)
        except SystemExit as stop:
            result = cast(int, stop.code)
    return result, out.getvalue(), err.getvalue()


def refusals(options, argv: list[str]) -> list[str]:
    """The lines with which a command line is refused, one for each mistake."""
    code, out, err = parse(options, argv)
    assert code == 2, f"{argv} was not refused"
    assert out == ""
    assert_lines(err)
    return err.splitlines()


def assert_lines(err: str) -> None:
    lines = err.splitlines()
    assert lines and err.count("\n") == len(lines), err
    assert all(line.startswith("error: ") and len(line) < 500 for line in lines), err
    assert [bool(re.search(r"\. See \w+\.py --help$", line)) for line in lines] == [False] * (
        len(lines) - 1
    ) + [True], err


def refusal(options, argv: list[str]) -> str:
    """The same of a command line with a single mistake."""
    (line,) = refusals(options, argv)
    return line


FLAGS = {
    options: list(chain.from_iterable(action.option_strings for action in parser()._actions))
    for options, parser in (
        (parse_train_config, train_parser),
        (parse_generate_config, generate_parser),
    )
}
COMMON = {
    parse: [
        f"--{name}" for name, field in flags_of(config).items() if field.metadata["flag"].common
    ]
    for parse, config in (
        (parse_train_config, TrainConfig),
        (parse_generate_config, GenerateConfig),
    )
}


def takes_a_number(action: argparse.Action) -> bool:
    parse = getattr(action.type, "__wrapped__", None)
    return parse is side or "number" in getattr(parse, "__qualname__", "")


FLAGS_WITH_NUMBERS = [
    (action.option_strings[-1], parse_train_config)
    for action in train_parser()._actions
    if takes_a_number(action)
]
FLAGS_WITH_NUMBERS += [
    (action.option_strings[-1], parse_generate_config)
    for action in generate_parser()._actions
    if takes_a_number(action)
]


def test_training_defaults_are_the_contract():
    assert settings(parse_train_config([])) == TRAINING_DEFAULTS


def test_generation_defaults_are_the_contract():
    assert settings(parse_generate_config([])) == GENERATION_DEFAULTS


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_sets_its_recipe_and_nothing_else(name):
    assert settings(parse_train_config(["--preset", name])) == {
        **TRAINING_DEFAULTS,
        "preset": name,
        **RECIPES[name],
    }
    assert (
        settings(parse_train_config([f"--preset={name}"]))["lora_alpha"]
        == RECIPES[name]["lora_alpha"]
    )


@pytest.mark.parametrize(
    "flags", [["--lora_rank", "2", "--preset", "quality"], ["--preset=quality", "--lora_rank=2"]]
)
def test_a_flag_wins_over_a_preset_on_either_side_of_it(flags):
    options = parse_train_config(flags)
    assert options.lora.lora_rank == 2
    assert {**settings(options), "lora_rank": 8} == settings(
        parse_train_config(["--preset", "quality"])
    )


def test_a_flag_that_repeats_the_plain_default_still_wins_over_a_preset():
    assert (
        settings(parse_train_config(["--preset", "professional", "--lora_rank", "4"]))["lora_rank"]
        == 4
    )


def test_precedence_is_demo_then_preset_then_flags():
    demo = settings(parse_train_config(["--demo"]))
    assert demo == {**TRAINING_DEFAULTS, "demo": True, **DEMO_TRAINING}
    recipe = RECIPES["quality"]
    both = settings(parse_train_config(["--demo", "--preset", "quality"]))
    assert both == {**demo, "preset": "quality", **recipe}
    all_three = parse_train_config(
        ["--max_train_steps", "7", "--demo", "--preset", "quality", "--resolution", "128"]
    )
    assert settings(all_three) == {**both, "max_train_steps": 7, "resolution": 128}


def test_the_demos_settings_are_options_and_its_inputs_exist():
    assert DEMO_TRAINING.keys() <= TRAINING_DEFAULTS.keys()
    assert DEMO_GENERATION.keys() <= GENERATION_DEFAULTS.keys()
    assert settings(parse_generate_config(["--demo"])) == {
        **GENERATION_DEFAULTS,
        "demo": True,
        **DEMO_GENERATION,
    }
    assert (Path(DEMO_TRAINING["data_dir"])).is_dir()
    assert Path(DEMO_GENERATION["prompts_file"]).is_file()
    assert DEMO_GENERATION["base_model"] == DEMO_TRAINING["pretrained_model_name"]
    assert Path(*DEMO_GENERATION["lora_path"]) == Path(DEMO_TRAINING["output_dir"], "lora_weights")
    assert DEMO_GENERATION["compare"] == ["base"]


def test_prompts_on_the_line_take_the_place_of_the_demos_file():
    options = parse_generate_config(["--demo", "--prompts", "a robot", "two robots"])
    assert (
        settings(options)["prompts"] == ["a robot", "two robots"]
        and options.prompts.prompts_file is None
    )
    assert (
        settings(parse_generate_config(["--demo", "--prompts_file", "mine.txt"]))["prompts_file"]
        == "mine.txt"
    )


def test_given_names_what_stands_on_the_command_line():
    options = parse_train_config(
        ["--preset", "quality", "--data_dir=./x", "--center_crop", "--target_modules", "to_q"]
    )
    assert options.explicit == {"preset", "data_dir", "center_crop", "target_modules"}
    assert parse_train_config([]).explicit == set()


def test_lists_take_several_words():
    assert settings(parse_generate_config(["--lora_path", "a", "b.safetensors:-0.5"]))[
        "lora_path"
    ] == [
        "a",
        "b.safetensors:-0.5",
    ]
    assert settings(parse_train_config(["--target_modules", "to_q", "conv_in"]))[
        "target_modules"
    ] == [
        "to_q",
        "conv_in",
    ]
    assert settings(parse_generate_config(["--prompts", "one", "two, with a comma"]))[
        "prompts"
    ] == [
        "one",
        "two, with a comma",
    ]


TOO_SMALL_COUNTS = ["0", "-1", "1.5", "nan", "many", ""]
NO_RATE = ["0", "-1", "nan", "inf", "fast"]
WRONG_TRAINING = {
    "--resolution": [
        "0",
        "-8",
        "4",
        "100",
        "511",
        "512.0",
        "nan",
        "big",
        "8200",
        "9000000000000000000000",
    ],
    "--crop_variants": ["0", "-1", "65"],
    "--train_batch_size": TOO_SMALL_COUNTS,
    "--gradient_accumulation_steps": TOO_SMALL_COUNTS,
    "--num_train_epochs": TOO_SMALL_COUNTS,
    "--max_train_steps": TOO_SMALL_COUNTS,
    "--learning_rate": [*NO_RATE, "1.5"],
    "--text_encoder_lr": [*NO_RATE, "1.5"],
    "--lr_scheduler": ["", "piecewise_constant", "cosin"],
    "--lr_warmup_steps": ["-1", "0.1", "nan"],
    "--lora_rank": ["0", "-4", "2.5", "1025"],
    "--lora_alpha": NO_RATE,
    "--lora_dropout": ["-0.1", "1", "nan"],
    "--adam_beta1": ["-0.1", "1", "nan"],
    "--adam_beta2": ["-0.1", "1", "nan"],
    "--adam_weight_decay": ["-0.1", "nan", "inf"],
    "--adam_epsilon": NO_RATE,
    "--max_grad_norm": NO_RATE,
    "--dataloader_num_workers": ["-1", "65", "two"],
    "--save_steps": TOO_SMALL_COUNTS,
    "--checkpoints_total_limit": TOO_SMALL_COUNTS,
    "--validation_steps": TOO_SMALL_COUNTS,
    "--num_validation_images": ["-1", "1.5"],
    "--snr_gamma": NO_RATE,
    "--noise_offset": ["-0.1", "1.1", "nan"],
    "--mixed_precision": ["fp8", "FP16", ""],
    "--base_precision": ["fp4", "FP8", ""],
    "--memory_format": ["channels-last", "NHWC", ""],
    "--save_precision": ["fp32", "half"],
    "--preset": ["best", ""],
    "--seed": ["-1", "1.5", "nan", str(2**63), "99999999999999999999"],
}
WRONG_GENERATION = {
    "--lora_path": ["", "a:11", "a:-10.5", " :1", "a:99999999999999999999999999"],
    "--num_images_per_prompt": TOO_SMALL_COUNTS,
    "--num_inference_steps": ["0", "-1", "1000", "nan"],
    "--guidance_scale": ["-1", "nan", "inf", "strong"],
    "--height": ["0", "500", "-512", "nan", "8200"],
    "--width": ["0", "500", "-512", "nan", "8200"],
    "--seed": ["-1", "1.5"],
    "--device": ["gpu", "cuda:0"],
    "--compare": ["", "a:11"],
    "--lora_scales": ["", "a", "0,,1", "0,nan", "11"],
}
WRONG = []
for options, wrong in (
    (parse_train_config, WRONG_TRAINING),
    (parse_generate_config, WRONG_GENERATION),
):
    for flag, values in wrong.items():
        WRONG += [(options, flag, value) for value in values]


def shown(part) -> str:
    """A parameter in the name of its test."""
    return " ".join(part) if isinstance(part, list) else getattr(part, "__name__", str(part))


@pytest.mark.parametrize(("options", "flag", "value"), WRONG, ids=shown)
def test_a_wrong_value_ends_in_one_line_that_names_the_flag(options, flag, value):
    line = refusal(options, [f"{flag}={value}"])
    assert flag in line
    assert "--help" in line


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["--resolution", "511"], "511 is not a multiple of 8: take 512"),
        (["--resolution", "9"], "take 8"),
        (["--resolution", "4"], "it must be at least 8, at most 8192"),
        (["--learning_rate", "nan"], "it must be above 0, at most 1"),
        (["--train_batch_size", "0"], "it must be at least 1"),
        (["--lora_rank", "eight"], "'eight' is not a whole number"),
        (["--lora_alpha", "x"], "'x' is not a number"),
        (["--lr_scheduler", "cosin"], "cosine_with_restarts"),
        (["--mixed_precision", "fp8"], "bf16"),
        (["--preset", "best"], "professional"),
        (["--data_dir"], "--data_dir: expected one argument"),
    ],
    ids=shown,
)
def test_the_line_tells_the_remedy(argv, remedy):
    assert remedy in refusal(parse_train_config, argv)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--resolution", "8"], "resolution", 8),
        (["--resolution", "8192"], "resolution", 8192),
        (["--seed", "0"], "seed", 0),
        (["--seed", str(2**63 - 1)], "seed", 2**63 - 1),
        (["--learning_rate", "1"], "learning_rate", 1.0),
        (["--lr_warmup_steps", "0"], "lr_warmup_steps", 0),
        (["--adam_beta1", "0"], "adam_beta1", 0.0),
        (["--adam_weight_decay", "0"], "adam_weight_decay", 0.0),
        (["--num_validation_images", "0"], "num_validation_images", 0),
        (["--noise_offset", "1"], "noise_offset", 1.0),
        (["--dataloader_num_workers", "0"], "dataloader_num_workers", 0),
        (["--lora_alpha", "0.5"], "lora_alpha", 0.5),
    ],
    ids=shown,
)
def test_the_limits_themselves_are_accepted(argv, name, value):
    assert settings(parse_train_config(argv))[name] == value


@pytest.mark.parametrize("digits", [30, 400, 5000])
def test_an_enormous_number_is_no_crash(digits):
    for flag, action in FLAGS_WITH_NUMBERS:
        line = refusal(action, [flag, "9" * digits])
        assert re.search(r"9{30}[9.]*' is (out of range|not a whole number)", line) and flag in line


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "-inf", "-nan"])
def test_no_number_is_not_finite(value):
    assert len(FLAGS_WITH_NUMBERS) > 25
    for flag, action in FLAGS_WITH_NUMBERS:
        assert flag in refusal(action, [f"{flag}={value}"])


@pytest.mark.parametrize(
    ("options", "typed", "meant"),
    [
        (parse_train_config, ["--learning_rat", "1e-4"], "--learning_rate"),
        (parse_train_config, ["--lora-rank=8"], "--lora_rank"),
        (parse_train_config, ["--resoluton", "512"], "--resolution"),
        (parse_train_config, ["--max_training_steps", "10"], "--max_train_steps"),
        (parse_generate_config, ["--prompt", "a robot"], "--prompts"),
        (parse_generate_config, ["--num_images", "4"], "--num_images_per_prompt"),
    ],
    ids=shown,
)
def test_a_mistyped_flag_proposes_the_nearest(options, typed, meant):
    assert f"did you mean {meant}" in refusal(options, typed)


@pytest.mark.parametrize(
    ("options", "typed", "remedy"),
    [
        (parse_train_config, ["--network_dim", "8"], "write --lora_rank"),
        (parse_train_config, ["--train_data_dir=x"], "write --data_dir"),
        (parse_train_config, ["--sample_every_n_steps", "9"], "write --validation_steps"),
        (parse_train_config, ["--clip_skip", "2"], "generate_megaman.py has --clip_skip"),
        (parse_generate_config, ["--network_weights", "x"], "write --lora_path"),
        (parse_generate_config, ["--W", "512"], "write --width"),
    ],
    ids=shown,
)
def test_a_flag_of_another_trainer_is_answered_with_ours(options, typed, remedy):
    flag = typed[0].split("=")[0]
    assert f"{flag} is another program's flag" in refusal(options, typed)
    assert remedy in refusal(options, typed)


def test_what_replaces_another_trainers_flag_exists():
    train, generate = flags_of(TrainConfig), flags_of(GenerateConfig)
    for name, remedy in REMEDIES.items():
        assert name not in train.keys() & generate.keys(), name
        named = set(FLAG.findall(remedy))
        assert named <= train.keys() or named <= generate.keys(), name


def test_flags_are_not_abbreviated():
    assert "--lora is not a flag, did you mean --lora_rank" in refusal(
        parse_train_config, ["--lora", "8"]
    )


def test_nothing_is_proposed_where_nothing_is_near():
    for word in ("-x", "--nonsense", "--", "-"):
        assert "did you mean" not in refusal(parse_train_config, [word, "y"])


def test_every_wrong_flag_is_named_and_a_stray_word_too():
    lines = refusals(parse_train_config, ["--nonsense", "--lora_rnk", "8"])
    assert "--nonsense is not a flag" in lines[0]
    assert "--lora_rnk is not a flag, did you mean --lora_rank" in lines[1]
    assert "'pictures' belongs to no flag" in refusal(parse_train_config, ["pictures"])
    assert "quotes around" in refusal(parse_train_config, ["--data_dir", "my", "pictures"])
    assert "--center_crop: 'yes' is one value too many: it takes none" in refusal(
        parse_train_config, ["--center_crop", "yes"]
    )


def test_all_the_mistakes_of_a_command_line_come_together():
    """Of every kind: a flag, a value, a choice, a missing value, a stray word, contradictions."""
    argv = [
        "stray",
        "--resoluton",
        "512",
        "--learning_rate",
        "fast",
        "--seed",
        "--lr_scheduler",
        "cosin",
        "--data_dir=",
        "--lora_rank",
        "8",
        "16",
        "--resume_from_checkpoint",
        "latest",
        "--overwrite_output",
        "--strict",
    ]
    wanted = [
        "'stray' belongs",
        "did you mean --resolution",
        "--learning_rate: 'fast' is not a number",
        "--seed: expected one",
        "did you mean cosine",
        "--data_dir: the name is empty",
        "--lora_rank: '16' is",
        "--strict belongs to --check_data",
        "--resume_from_checkpoint and --overwrite_output",
    ]
    lines = refusals(parse_train_config, argv)
    assert [part in line for part, line in zip(wanted, lines, strict=True)] == [True] * len(
        wanted
    ), lines
    argv = ["--height", "5", "--device", "gpu", "--prompts", "a", "--prompts_file", "b"]
    assert len(refusals(parse_generate_config, argv)) == 3


def test_help_is_shown_beside_mistakes():
    code, out, err = parse(parse_train_config, ["--nonsense", "--help"])
    assert code == 0 and "usage:" in out and err == ""


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["--lr_scheduler", "cosin"], "did you mean cosine"),
        (["--mixed_precision", "FP16"], "did you mean fp16"),
        (["--preset", "profesional"], "did you mean professional"),
    ],
    ids=shown,
)
def test_a_mistyped_word_proposes_the_nearest(argv, meant):
    assert meant in refusal(parse_train_config, argv)
    assert "did you mean" not in refusal(parse_train_config, ["--preset", "xyz"])


@pytest.mark.parametrize("value", ["", " ", "a\0b", "\udcff"])
@pytest.mark.parametrize(
    ("options", "flag"),
    [
        *[
            (parse_train_config, f"--{name}")
            for name in (
                "pretrained_model_name",
                "data_dir",
                "output_dir",
                "logging_dir",
                "auto_caption",
                "resume_from_checkpoint",
                "target_modules",
            )
        ],
        *[
            (parse_generate_config, f"--{name}")
            for name in ("base_model", "lora_path", "output_dir", "prompts_file")
        ],
    ],
    ids=shown,
)
def test_a_name_that_says_nothing_is_refused(options, flag, value):
    assert flag in refusal(options, [flag, value])


def test_prompts_may_be_empty_but_have_to_be_text():
    assert settings(parse_generate_config(["--prompts", "", "--negative_prompt", ""]))[
        "prompts"
    ] == [""]
    assert "not valid UTF-8" in refusal(parse_generate_config, ["--prompts", "\udcff"])


def test_the_last_of_a_repeated_flag_wins():
    assert settings(parse_train_config(["--seed", "1", "--seed=2"]))["seed"] == 2
    assert settings(parse_generate_config(["--prompts", "a", "b", "--prompts", "c"]))[
        "prompts"
    ] == ["c"]


@pytest.mark.parametrize(
    "flag",
    ["--seed", "--data_dir", "--target_modules", "--lr_scheduler", "--demo", "--learning_rate"],
)
def test_two_dashes_are_no_value(flag):
    assert f"{flag}=--: '--' is no value" in refusal(parse_train_config, [f"{flag}=--"])


def test_words_after_a_list():
    """A prompt may begin with dashes if it has a space; a single word would look like a flag."""
    assert settings(parse_generate_config(["--prompts", "--ar 16:9 robot", "- b"]))["prompts"] == [
        "--ar 16:9 robot",
        "- b",
    ]
    assert settings(parse_generate_config(["--prompts=--robot"]))["prompts"] == ["--robot"]
    assert len(refusals(parse_generate_config, ["--prompts", "--robot"])) == 2


@pytest.mark.parametrize(
    "name",
    [
        "con",
        "out/NUL.txt",
        "ab:c",
        "out/..x./y",
        "ends /out",
        "ends.",
        "lpt¹",
        "what?",
        "CONIN$",
        "C:/aux",
    ],
)
def test_windows_refuses_some_folders(monkeypatch, name):
    assert settings(parse_train_config(["--output_dir", name]))["output_dir"] == name
    monkeypatch.setattr("megaman.config.values.WINDOWS", True)
    assert "--output_dir: Windows takes no folder" in refusal(
        parse_train_config, ["--output_dir", name]
    )
    assert "--logging_dir" in refusal(parse_train_config, ["--logging_dir", name])
    for good in ("../out", "C:/x y/console", ".", "./com10", r"C:\bilder\ü"):
        assert settings(parse_train_config(["--output_dir", good]))["output_dir"] == good


def test_a_polynomial_rate_has_to_begin_above_its_end():
    line = refusal(parse_train_config, ["--lr_scheduler", "polynomial", "--learning_rate", "1e-7"])
    assert "--lr_scheduler polynomial" in line and "--learning_rate" in line
    assert (
        settings(parse_train_config(["--lr_scheduler", "polynomial", "--learning_rate", "1.1e-7"]))[
            "learning_rate"
        ]
        == 1.1e-7
    )
    assert settings(parse_train_config(["--learning_rate", "1e-8"]))["learning_rate"] == 1e-8
    text = ["--train_text_encoder", "--text_encoder_lr", "1e-7"]
    assert "give a higher --text_encoder_lr" in refusal(
        parse_train_config, ["--lr_scheduler", "polynomial", *text]
    )


def test_the_text_encoders_rate_is_the_other_one_unless_it_is_given():
    assert settings(parse_train_config(["--learning_rate", "3e-5"]))["text_encoder_lr"] is None
    assert (
        settings(parse_train_config(["--train_text_encoder", "--learning_rate", "3e-5"]))[
            "text_encoder_lr"
        ]
        == 3e-5
    )
    assert (
        settings(parse_train_config(["--train_text_encoder", "--preset", "quality"]))[
            "text_encoder_lr"
        ]
        == 5e-5
    )
    assert (
        settings(parse_train_config(["--train_text_encoder", "--text_encoder_lr", "1e-6"]))[
            "text_encoder_lr"
        ]
        == 1e-6
    )
    assert "without --train_text_encoder" in refusal(
        parse_train_config, ["--text_encoder_lr", "1e-6"]
    )


@pytest.mark.parametrize(
    ("options", "argv", "flags"),
    [
        (
            parse_generate_config,
            ["--prompts", "a", "--prompts_file", "b.txt"],
            ["--prompts", "--prompts_file"],
        ),
        (
            parse_generate_config,
            ["--demo", "--prompts", "a", "--prompts_file", "b"],
            ["--prompts", "--prompts_file"],
        ),
        (
            parse_train_config,
            ["--resume_from_checkpoint", "latest", "--overwrite_output"],
            ["--resume_from_checkpoint", "--overwrite_output"],
        ),
    ],
    ids=["prompts", "prompts with demo", "resume"],
)
def test_contradictions_fail_at_the_door(options, argv, flags):
    line = refusal(options, argv)
    assert all(flag in line for flag in flags) and "use only one" in line


@pytest.mark.parametrize(
    "flags", [["--cache_dir", "c"], ["--cache_limit", "5"], ["--crop_variants", "4"]]
)
def test_without_a_cache_its_flags_mean_nothing(flags):
    assert f"--no_cache and {flags[0]} contradict" in refusal(
        parse_train_config, ["--no_cache", *flags]
    )


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert parse_train_config([]).cache.path() == tmp_path / "megaman_lora"
    assert parse_train_config(["--cache_dir", "here"]).cache.path() == Path("here")
    assert parse_train_config(["--no_cache"]).cache.path() is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert parse_train_config([]).cache.path() == Path.home() / ".cache" / "megaman_lora"


def test_more_contradictions():
    warmup = ["--lr_scheduler", "cosine", "--lr_warmup_steps", "10"]
    assert "--lr_warmup_steps 10 is not below" in refusal(
        parse_train_config, [*warmup, "--max_train_steps", "10"]
    )
    assert "--lr_warmup_steps 1000" in refusal(
        parse_train_config, ["--demo", "--lr_warmup_steps", "1000"]
    )
    assert "--center_crop and" in refusal(
        parse_train_config, ["--center_crop", "--crop_variants", "4"]
    )
    for flags in (["--min_bucket_reso", "256"], ["--bucket_no_upscale"]):
        assert "without --enable_bucket" in refusal(parse_train_config, flags)
    for flags in (
        ["--min_bucket_reso", "520"],
        ["--max_bucket_reso", "504"],
        ["--bucket_reso_steps", "520"],
    ):
        assert f"{flags[0]} {flags[1]} is " in refusal(
            parse_train_config, ["--enable_bucket", *flags]
        )
    assert "not a multiple of 8" in refusal(
        parse_train_config, ["--enable_bucket", "--bucket_reso_steps", "20"]
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr_warmup_steps", "10", "--max_train_steps", "10"],  # constant has none, and says so
        ["--lr_scheduler", "cosine", "--max_train_steps", "10"],  # the default is cut
        ["--lr_scheduler", "cosine", "--lr_warmup_steps", "9", "--max_train_steps", "10"],
        ["--demo", "--max_train_steps", "10"],
        ["--demo", "--num_validation_images", "0"],
        ["--num_validation_images", "0", "--validation_steps", "5"],
        ["--validation_prompt", "robot", "--num_validation_images", "0"],
        ["--demo", "--validation_steps=1", "--validation_prompt=x", "--num_validation_images=0"],
        [
            "--demo",
            "--enable_bucket",
            "--min_bucket_reso",
            "32",
            "--max_bucket_reso",
            "64",
            "--bucket_reso_steps",
            "24",
        ],
        ["--demo", "--preset", "starter", "--data_dir", "x", "--pretrained_model_name", "y"],
        ["--center_crop", "--crop_variants", "1"],
        ["--save_steps", "1000", "--validation_steps", "999", "--max_train_steps", "10"],
        ["--num_train_epochs", "3", "--max_train_steps", "10"],
        ["--resume_from_checkpoint", "latest", "--checkpoints_total_limit", "1"],
        ["--output_dir", ".", "--data_dir", "pictures", "--logging_dir", "."],
        ["--output_dir", "out", "--logging_dir", "out/logs", "--data_dir", "out-pictures"],
        ["--output_dir", "out", "--logging_dir", "out", "--data_dir", "samples-3"],
        ["--logging_dir", "pictures/logs", "--data_dir", "pictures"],
    ],
    ids=shown,
)
def test_harmless_combinations_are_not_refused(argv):
    parse_train_config(argv)


def test_crop_variants_take_the_place_of_the_demos_centre():
    assert settings(parse_train_config(["--demo"]))["center_crop"]
    assert not settings(parse_train_config(["--demo", "--crop_variants", "2"]))["center_crop"]


@pytest.mark.parametrize(
    "recipe",
    [
        ["--preset", "starter"],
        ["--preset", "quality"],
        ["--demo"],
        ["--demo", "--preset", "professional"],
    ],
    ids=shown,
)
def test_epochs_that_are_typed_take_the_place_of_a_recipes_steps(recipe):
    steps = settings(parse_train_config(recipe))["max_train_steps"]
    assert steps
    values = settings(parse_train_config([*recipe, "--num_train_epochs", "1"]))
    assert (values["num_train_epochs"], values["max_train_steps"]) == (1, None)
    values = settings(parse_train_config(["--num_train_epochs=100", *recipe]))
    assert values["max_train_steps"] is None, "typed, even if it is the default"
    both = [*recipe, "--num_train_epochs", "1", "--max_train_steps", "7"]
    assert settings(parse_train_config(both))["max_train_steps"] == 7
    other = settings(parse_train_config([*recipe, "--lora_rank", "3"]))
    assert (other["max_train_steps"], other["lora_rank"]) == (steps, 3)


@pytest.mark.parametrize(
    "output_dir", ["pictures", "pictures/out", "./x/../pictures", "pictures/.", "link/out"]
)
def test_no_output_into_the_pictures(tmp_path, monkeypatch, output_dir):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    if "link" in output_dir:
        Path("link").symlink_to("pictures")
    line = refusal(parse_train_config, ["--data_dir", "pictures", "--output_dir", output_dir])
    assert "--output_dir" in line and "--data_dir" in line


@pytest.mark.parametrize(
    "part", ["samples-0", "checkpoint-100/x", "lora_weights", "./lora_weights/logs"]
)
def test_nothing_is_kept_where_a_run_replaces_its_folders(part):
    for flag in ("--data_dir", "--logging_dir"):
        assert flag in refusal(parse_train_config, ["--output_dir", "out", flag, f"out/{part}"])


@pytest.mark.parametrize(
    "argv",
    [["--demo=yes"], ["--demo", "--demo=1"], ["--preset"], ["--preset", "--demo"]],
    ids=shown,
)
def test_mistakes_in_the_flags_that_change_defaults_are_usage_errors_too(argv):
    refusal(parse_train_config, argv)


def test_a_line_break_in_an_argument_does_not_make_two_lines():
    refusal(parse_train_config, ["two\nlines"])
    refusal(parse_train_config, ["--data_dir", "a", "b\n--nonsense\nc"])


def test_help_tells_defaults_that_are_zero_but_none_that_are_missing():
    text = " ".join(train_parser().format_help_all().split())
    assert "processes that decode images (default: 0)" in text
    assert "an offset noise; 0.05 is usual (default: 0.0)" in text
    assert "default: None" not in text and "default: False" not in text
    assert "default: None" not in generate_parser().format_help_all()


CONFIGS = [(train_parser, TrainConfig), (generate_parser, GenerateConfig)]


@pytest.mark.parametrize("parser", [train_parser, generate_parser])
def test_help_is_short_and_names_the_whole_help(monkeypatch, parser):
    monkeypatch.setenv("COLUMNS", "80")
    lines = parser().format_help().splitlines()
    assert len(lines) <= 84
    assert lines[0].startswith("usage:") and lines[1] == "", "a usage line, not a block"
    assert sum("--help_all" in line for line in lines) == 2
    examples = lines[lines.index("examples:") + 1 :]
    assert len(examples) == 3 and all(line.startswith("  python ") for line in examples)


@pytest.mark.parametrize(("parser", "config"), CONFIGS)
def test_help_shows_the_common_flags_by_group(parser, config):
    flags = re.findall(r"^  (--\w+)", parser().format_help(), flags=re.MULTILINE)
    common = {
        f"--{name}" for name, field in flags_of(config).items() if field.metadata["flag"].common
    }
    assert sorted(flags) == sorted({*common, "--help_all", "--version"}) and len(common) < 35


@pytest.mark.parametrize(("parser", "config"), CONFIGS)
def test_the_whole_help_names_every_flag_once_under_its_heading(parser, config):
    sections = re.split(r"^(\S.*):$", parser().format_help_all(), flags=re.MULTILINE)
    shown = {
        heading: re.findall(r"^  (--\w+)", content, flags=re.MULTILINE)
        for heading, content in zip(sections[1::2], sections[2::2], strict=True)
    }
    assert shown.pop("options") == ["--help_all", "--version"] and shown.pop("examples") == []
    assert list(shown) == [group.__doc__ for group in groups_of(config).values()]
    for group in groups_of(config).values():
        assert sorted(shown[group.__doc__]) == sorted(
            f"--{field.name}" for field in dataclasses.fields(group)
        )


@pytest.mark.parametrize("config", [TrainConfig, GenerateConfig])
def test_every_field_has_a_help_text(config):
    assert all(field.metadata["flag"].help for field in flags_of(config).values())
    assert len(flags_of(config)) == sum(
        len(dataclasses.fields(group)) for group in groups_of(config).values()
    )


def test_the_order_of_the_settings_names_every_flag_once():
    assert sorted(ORDER) == sorted(flags_of(TrainConfig))


@pytest.mark.parametrize("config", [parse_train_config([]), parse_generate_config([])])
def test_nobody_changes_a_config(config):
    for name in groups_of(type(config)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, None)
        for field in dataclasses.fields(getattr(config, name)):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(getattr(config, name), field.name, None)
    assert hash(config) == hash(dataclasses.replace(config)), "nothing in it can be changed either"


def test_what_a_resumed_run_has_to_share():
    settings = parse_train_config(
        ["--lora_rank", "3", "--target_modules", "to_q", "to_k"]
    ).resume_settings()
    assert settings["lora_rank"] == 3 and settings["target_modules"] == ["to_q", "to_k"]
    assert settings.keys() == {
        "optimizer",
        "base_precision",
        "lora_rank",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "train_text_encoder",
        "resolution",
        "center_crop",
        "crop_variants",
        "random_flip",
        "upscale",
        "background",
        "alpha_mask",
        "no_cache",
        "enable_bucket",
        "min_bucket_reso",
        "max_bucket_reso",
        "bucket_reso_steps",
        "bucket_no_upscale",
        "shuffle_caption",
        "keep_tokens",
        "caption_dropout_rate",
        "caption_tag_dropout_rate",
        "use_ema",
    }


HEAVY = ["torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "tensorboard"]
RUN_AND_TELL = f"""
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    code = stop.code
print(json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]), file=sys.stderr)
"""


VALUES = [
    "0",
    "1",
    "8",
    "512",
    "-1",
    "1e-4",
    "-1e-4",
    "nan",
    "inf",
    "",
    " ",
    "quality",
    "cosine",
    "latest",
    "fp16",
    "base",
    "cpu",
    "9" * 5000,
    "1e999",
    "a\nb",
    "a\0b",
    "\udcff",
    "con",
    "cosin",
    "out/samples-1",
    "~",
    "..",
    "\x1b[2J",
    "9" * 400,
    "a robot",
    "--",
    "-",
    "-x",
    "--=",
    "=",
    "%s",
    "%(default)s",
    "{}",
]


def command_lines(options) -> st.SearchStrategy[list[str]]:
    flag = st.sampled_from(FLAGS[options])
    value = (
        st.sampled_from(VALUES)
        | st.integers().map(str)
        | st.floats().map(str)
        | st.text(max_size=8)
    )
    near = st.tuples(flag, st.integers(1, 9)).map(lambda pair: pair[0][: -pair[1]])
    word = flag | value | near | st.tuples(flag, value).map("=".join)
    parts = st.lists(st.tuples(flag, value) | st.tuples(word), max_size=6)
    return parts.map(lambda parts: list(chain.from_iterable(parts)))


def check_any_command_line(options, argv: list[str]) -> None:
    result, out, err = parse(options, argv)
    hypothesis.event(
        "refused" if result == 2 else "taken"
    )  # counted by --hypothesis-show-statistics
    if isinstance(result, TrainConfig | GenerateConfig):
        assert out == err == ""
        values = settings(result)
        json.dumps(values, allow_nan=False)
        assert all((values.get(side) or 8) % 8 == 0 for side in ("resolution", "height", "width"))
        assert values.get("learning_rate", 1) > 0 and (
            values["seed"] is None or values["seed"] >= 0
        )
    elif result == 0:
        assert "usage:" in out or out == f"Mega Man LoRA {VERSION}\n"
        assert err == ""
    else:
        assert result == 2 and out == ""
        assert_lines(err)


many = hypothesis.settings(max_examples=max(250, hypothesis.settings().max_examples))


@pytest.mark.slow
@many
@given(command_lines(parse_train_config))
def test_any_training_command_line_is_options_help_or_lines(argv):
    check_any_command_line(parse_train_config, argv)


@many
@given(command_lines(parse_generate_config))
def test_any_generation_command_line_is_options_help_or_lines(argv):
    check_any_command_line(parse_generate_config, argv)


@pytest.mark.parametrize(
    ("script", "argv", "code"),
    [
        ("megaman_lora.py", ["--help"], 0),
        ("generate_megaman.py", ["--help"], 0),
        ("megaman_lora.py", ["--help_all"], 0),
        ("generate_megaman.py", ["--help_all"], 0),
        ("megaman_lora.py", ["--version"], 0),
        ("generate_megaman.py", ["--version"], 0),
        ("megaman_lora.py", ["--nonsense"], 2),
        ("generate_megaman.py", ["--prompts", "a", "--prompts_file", "b"], 2),
    ],
    ids=[
        "train help",
        "generate help",
        "train whole help",
        "generate whole help",
        "train version",
        "generate version",
        "train wrong",
        "generate wrong",
    ],
)
def test_help_and_usage_errors_come_before_the_heavy_imports(
    run_script, tmp_path, script, argv, code
):
    path = Path(__file__).resolve().parent.parent.parent / script
    done = run_script(["-c", RUN_AND_TELL, str(path), *argv], tmp_path)
    *lines, last = done.stderr.splitlines()
    assert json.loads(last) == [code, []]
    assert len(lines) == (1 if code else 0)
    assert list(tmp_path.iterdir()) == [], "a question about usage leaves nothing behind"
    if argv == ["--version"]:
        assert done.stdout == f"Mega Man LoRA {VERSION}\n"
    elif not code:
        shown = FLAGS[PARSERS[script]] if argv == ["--help_all"] else COMMON[PARSERS[script]]
        assert all(flag in done.stdout for flag in shown)


@pytest.mark.parametrize("script", PARSERS)
def test_nonsense_as_a_process_is_exit_code_2_and_one_line(run_script, tmp_path, script):
    done = run_script([script, "--nonsense"], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: --nonsense is not a flag. See {script} --help\n"


@pytest.mark.parametrize("script", PARSERS)
def test_bad_command_lines_as_processes(run_script, tmp_path, script):
    """A few of the generated ones; HYPOTHESIS_PROFILE=searching runs a hundred."""
    options = PARSERS[script]
    path = Path(__file__).resolve().parent.parent.parent / script

    @hypothesis.settings(max_examples=50 if SEARCHING else 3, phases=[hypothesis.Phase.generate])
    @given(command_lines(options).filter(lambda argv: bad_and_typable(options, argv)))
    def run(argv):
        done = run_script(["-c", RUN_AND_TELL, str(path), *argv], tmp_path)
        *lines, last = done.stderr.splitlines()
        assert json.loads(last) == [2, []] and done.stdout == ""
        assert_lines("\n".join([*lines, ""]))

    run()
    assert list(tmp_path.iterdir()) == []


SEARCHING = hypothesis.settings().max_examples > 1000


def bad_and_typable(options, argv: list[str]) -> bool:
    return not any("\0" in word for word in argv) and parse(options, argv)[0] == 2
