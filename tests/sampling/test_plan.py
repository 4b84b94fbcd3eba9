"""What a command line or an image's record decides before torch is loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from safetensors.numpy import save_file

from megaman.config.bases import suited_to
from megaman.config.generate import DEFAULT_NEGATIVE_PROMPT, parse_generate_config
from megaman.config.presets import DEMO
from megaman.errors import UserError
from megaman.files import split_strength
from megaman.hub import DEFAULT_BASE
from megaman.lora.notes import to_header
from megaman.models.configs import settings_name
from megaman.sampling import png
from megaman.sampling.jobs import Job, make_variants
from megaman.sampling.plan import GenerationPlan, summarize
from megaman.sampling.records import KEY, Recorder, RunSettings

BASE = str(DEMO / "base")


@pytest.fixture
def lora(tmp_path):
    """A LoRA's folder as training leaves it, for a base on the hub; its files are empty."""
    folder = tmp_path / "lora_weights"
    folder.mkdir()
    config = {"base_model_name_or_path": "some/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for name in ("megaman_lora", "pytorch_lora_weights", "other"):
        (folder / f"{name}.safetensors").touch()
    return folder


def plan_of(*words) -> GenerationPlan:
    config = parse_generate_config([str(word) for word in words])
    loras = [(Path(name), 1.0) for name, _ in map(split_strength, config.model.lora_path)]
    return GenerationPlan.from_config(config, loras)


@pytest.mark.parametrize(
    ("name", "flags", "base"),
    [
        ("", [], "some/base"),
        ("megaman_lora.safetensors", [], "some/base"),
        ("pytorch_lora_weights.safetensors", [], "some/base"),
        ("other.safetensors", [], DEFAULT_BASE),
        ("", ["--demo"], BASE),
        ("megaman_lora.safetensors", ["--demo"], BASE),
        ("other.safetensors", ["--demo"], BASE),
        ("other.safetensors", ["--demo", "--base_model", "a/b"], "a/b"),
        ("", ["--base_model", "a/b"], "a/b"),
    ],
)
def test_the_base_is_the_flags_or_the_demos_or_the_loras(lora, name, flags, base):
    assert plan_of("--lora_path", lora / name, *flags).base == base


def test_the_first_lora_that_names_a_base_decides(lora):
    assert plan_of("--lora_path", lora / "other.safetensors", f"{lora}:0.5").base == "some/base"


@pytest.mark.parametrize("flags", [[], ["--demo"], ["--base_model", "a/b"]], ids=" ".join)
def test_a_missing_lora_is_reported_before_a_base_is_loaded(lora, flags):
    with pytest.raises(UserError, match=r"no LoRA at .*nothing"):
        plan_of("--lora_path", lora, lora.parent / "nothing", *flags)


def test_prompts_with_their_own_settings_are_summed_up(lora, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog --w 96 --d 7 --l 3 --s 4\na fox --h 96 --d 8\n")
    words = ["--lora_path", str(lora), "--prompts_file", str(prompts), "--num_images_per_prompt=2"]
    config = parse_generate_config(words)
    plan = GenerationPlan.from_config(config, [(lora, 1.0)])
    assert summarize(plan, config, plan.make_jobs(64)) == (
        "images     6: 3 prompts x 2, 64x64 and 2 others, 4 to 25 steps of DPM++ 2M, "
        "guidance 3 to 7.5, seed 42 and 2 others"
    )


RUN = RunSettings("euler", 1, BASE, True, "cpu", "float32", {}, "contiguous", 1)
RECORDER = Recorder(RUN, {Path("mine"): "0123456789ab"})


def write_image(folder: Path, **values) -> Path:
    """An image with a relative path of its LoRA, as version 1.0.0 recorded it; values are set in
    its record."""
    (variant,) = make_variants([(Path("mine"), 1.0)], [1.0], one_by_one=False)
    job = Job(0, 0, "a robot", "", 1, 64, 64, 2, 5.0)
    record = asdict(RECORDER.record(job, [job], variant)) | values
    record["loras"][0][0] = "mine"
    folder.mkdir(parents=True, exist_ok=True)
    png.save_png(folder / "a.png", Image.new("RGB", (64, 64)), "", {KEY: json.dumps(record)})
    return folder / "a.png"


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "work" / "gallery")


@pytest.mark.parametrize(
    ("then", "tiles_now", "said"),
    [
        ({}, False, []),
        ({}, True, ["the VAE decodes in tiles"]),
        ({"vae_tiling": True, "vae_tile": 32}, True, []),
        ({"vae_tiling": True}, True, ["the VAE decodes in other tiles"]),
    ],
)
def test_tiles_that_an_image_did_not_have_are_said(tmp_path, then, tiles_now, said):
    """Earlier records have no side of a tile: it was the VAE's own."""
    plan = plan_from(write_image(tmp_path, **then))
    assert plan.warnings(RECORDER, 1, tiles_now) == said


@pytest.mark.parametrize("place", ["elsewhere", "work", "work/gallery"])
def test_a_relative_lora_is_looked_for_here_and_around_the_image(image, lora, place, monkeypatch):
    elsewhere = image.parents[2] / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    lora.rename(image.parents[2] / place / "mine")
    (path, _), *_ = plan_from(image).loras
    assert path.resolve() == image.parents[2] / place / "mine"


def test_a_relative_lora_that_is_nowhere_keeps_its_name(image):
    assert plan_from(image).lora_source == "mine"


def plan_from(image: Path) -> GenerationPlan:
    config = parse_generate_config(["--from_image", str(image)])
    return GenerationPlan.from_image(config, image)


def with_header(folder: Path, name: str, **header: str) -> None:
    save_file({"x": np.zeros(1, np.float32)}, folder / name, header)


NOTED = to_header(["pix, a cat"], {"guidance_scale": 3.0, "negative_prompt": "dogs"})


def settings_of(plan: GenerationPlan) -> tuple[object, ...]:
    job = plan.make_jobs(512)[0]
    return job.prompt, job.negative_prompt, job.guidance_scale, job.num_inference_steps


def test_what_the_lora_notes_holds_for_what_nobody_typed(lora):
    with_header(lora, "megaman_lora.safetensors", **NOTED)
    with_header(lora, "other.safetensors", ss_tag_frequency='{"x": {"zeb": 4, "tall": 3}}')
    assert settings_of(plan_of("--lora_path", lora)) == ("pix, a cat", "dogs", 3.0, 25)
    typed = ("--prompts", "x", "--guidance_scale", "9", "--negative_prompt", "")
    assert settings_of(plan_of("--lora_path", lora, *typed)) == ("x", "", 9.0, 25)
    both = plan_of("--lora_path", lora / "other.safetensors", lora)
    assert settings_of(both) == ("zeb, tall", "dogs", 3.0, 25)


def test_what_suits_one_base_is_not_taken_for_another(lora):
    with_header(lora, "megaman_lora.safetensors", **NOTED)
    elsewhere = settings_of(plan_of("--lora_path", lora, "--base_model", "a/b"))
    assert elsewhere == ("pix, a cat", DEFAULT_NEGATIVE_PROMPT, 7.5, 25)
    small = settings_of(plan_of("--lora_path", lora, "--base_model", BASE))
    assert small == ("pix, a cat", "", 5.0, 20)


def test_a_copy_of_the_embedded_base_is_known_wherever_it_is(tmp_path):
    for part in ("unet", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        shutil.copy(ROOT / "demo" / "base" / part / "config.json", tmp_path / part)
    assert suited_to(settings_name(str(tmp_path))) == suited_to("demo/base") != {}
    config = tmp_path / "unet" / "config.json"
    config.write_text(config.read_text("utf-8").replace("160", "192"), "utf-8")
    assert settings_name(str(tmp_path)) == str(tmp_path)
    config.unlink()
    assert settings_name(str(tmp_path)) == str(tmp_path)


def test_stable_diffusion_keeps_the_flags_defaults(lora):
    plan = plan_of("--lora_path", lora)
    assert settings_of(plan)[1:] == (DEFAULT_NEGATIVE_PROMPT, 7.5, 25)
    assert len(plan.make_jobs(512)) == 10 and "mega man" in plan.make_jobs(512)[0].prompt
