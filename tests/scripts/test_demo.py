"""The embedded base is a Stable Diffusion 1.x in the layout that diffusers reads, and --demo runs
on it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from conftest import FEW_SAMPLING_STEPS, ROOT
from PIL import Image
from safetensors import safe_open

DEMO = ROOT / "demo"


def config(part: str) -> dict:
    return json.loads((DEMO / "base" / part / "config.json").read_text(encoding="utf-8"))


def test_the_base_is_small_and_in_half_precision():
    files = [path for path in (DEMO / "base").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    assert not [path for path in files if path.suffix in (".bin", ".ckpt", ".pt")]
    for path in weights:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if "position_ids" not in name]  # noqa: SIM118
            dtypes = {file.get_slice(name).get_dtype() for name in names}
        assert dtypes == {"F16"}, path


def test_the_base_has_stable_diffusions_parts():
    unet, vae, text = config("unet"), config("vae"), config("text_encoder")
    assert set(unet["down_block_types"]) == {"CrossAttnDownBlock2D", "DownBlock2D"}
    assert set(unet["up_block_types"]) == {"UpBlock2D", "CrossAttnUpBlock2D"}
    assert (unet["in_channels"], vae["latent_channels"], vae["scaling_factor"]) == (8, 8, 0.18215)
    assert text["max_position_embeddings"] == 77
    scheduler = json.loads(
        (DEMO / "base" / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    )
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
    assert (scheduler["beta_schedule"], scheduler["prediction_type"]) == (
        "scaled_linear",
        "epsilon",
    )


def test_diffusers_own_pipeline_generates_with_it():
    from diffusers import StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline.from_pretrained(DEMO / "base")
    assert pipe.tokenizer.model_max_length == 77
    pipe.set_progress_bar_config(disable=True)
    output: Any = pipe("a red robot, white background", num_inference_steps=8, guidance_scale=5.0)
    (image,) = output.images
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 20


def test_the_trigger_is_one_token():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "base" / "tokenizer")
    assert len(tokenizer("volto").input_ids) == 3
    text = "volto, blue robot hero, pixel art, facing right"
    assert (
        tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ,", ",")
        == text
    )


@pytest.mark.parametrize(("folder", "heroes"), [("images", 49), ("held_out", 8)])
def test_the_images(folder, heroes):
    paths = sorted((DEMO / folder).glob("*.png"))
    captions = {
        path: path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths
    }
    named = [caption for caption in captions.values() if caption.startswith("volto, ")]
    assert len(named) >= heroes
    assert all(caption.endswith(" background") for caption in captions.values())
    assert len({Image.open(path).tobytes() for path in paths}) == len(paths)


def test_no_held_out_caption_is_trained_on():
    trained, held_out = (
        {path.read_text(encoding="utf-8").strip() for path in (DEMO / folder).glob("*.txt")}
        for folder in ("images", "held_out")
    )
    assert not trained & held_out


def test_the_script_draws_the_committed_images(run_script, tmp_path):
    done = run_script([DEMO / "make_images.py", "--output_dir", tmp_path], ROOT)
    assert done.returncode == 0, done.stderr
    for folder in ("images", "held_out"):
        drawn = {path.name for path in (tmp_path / folder).iterdir()}
        # kept_* are the base's own images, which make_kept.py generates: other machines have other
        # rounding errors.
        assert drawn == {
            path.name for path in (DEMO / folder).iterdir() if not path.name.startswith("kept_")
        }
        for path in (tmp_path / folder).glob("*.png"):
            assert Image.open(path).tobytes() == Image.open(DEMO / folder / path.name).tobytes(), (
                path.name
            )
        for path in (tmp_path / folder).glob("*.txt"):
            assert path.read_text(encoding="utf-8") == (DEMO / folder / path.name).read_text(
                encoding="utf-8"
            )


@pytest.mark.slow(weight=12)
def test_the_demo_runs_as_the_readme_says(forked, tmp_path):
    """The README's two commands, shortened; each script finds the other's files without a flag."""
    words = ["megaman_lora.py", "--demo", "--max_train_steps", 2, "--num_validation_images", 1]
    few = {f"megaman.training.{name}.NUM_TIMESTEPS": 2 for name in ("held_out", "judge")}
    done = forked.run(words, tmp_path, FEW_SAMPLING_STEPS | few)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("next: python generate_megaman.py --demo")
    done = forked.run(["generate_megaman.py", "--demo", "--num_inference_steps", 1], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "each next to the base's" in done.stdout
    page = (tmp_path / "generated_demo" / "index.html").read_text(encoding="utf-8")
    assert page.count("_base.png") >= 10
    config = json.loads(
        (tmp_path / "megaman_demo_output" / "training_config.json").read_text(encoding="utf-8")
    )
    assert config["base"] == "demo/base"
