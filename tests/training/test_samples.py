"""Sample images follow the data: their prompts, their settings, and what a LoRA notes of both."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import FEW_TARGETS, ROOT
from huggingface_hub import ModelCard
from PIL import Image, ImageDraw

import generate_megaman
from megaman import runtime
from megaman.config.presets import DEFAULT_PROMPT
from megaman.lora.notes import LoraNotes, read_notes
from megaman.pages.gallery_images import read_images
from megaman.sampling.pixel_grid import lora_palette
from megaman.training.history import HISTORY

FEW_STEPS = ["--max_train_steps", 1, "--train_batch_size", 1, "--lora_rank", 2, *FEW_TARGETS]
POSES = ["sitting, hat", "sitting, tree", "running, hat", "running, tree", "sleeping, hat"]


@pytest.fixture(scope="module")
def another(train_here, embedded_base, tmp_path_factory):
    """The output of a run on another character, whose captions name it, on the embedded base, of
    which it is known what suits it; two sample images."""
    cwd = tmp_path_factory.mktemp("another")
    (cwd / "data").mkdir()
    for number, pose in enumerate([*POSES, "sleeping, tree"]):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((8, 8 + number, 50, 56), fill="green")
        image.save(cwd / "data" / f"{number}.png")
        (cwd / "data" / f"{number}.txt").write_text(f"pix, green cat, {pose}", encoding="utf-8")
    flags = ["--data_dir", "data", *FEW_STEPS, "--num_validation_images", 2]
    train_here(cwd, "out", *flags, "--pretrained_model_name", embedded_base)
    return cwd / "out"


def parameters_of(path) -> str:
    with Image.open(path) as image:
        return image.info["parameters"]


def test_the_default_prompt_is_the_sets_own(another):
    config = json.loads((another / "training_config.json").read_text(encoding="utf-8"))
    prompt = config["settings"]["validation_prompt"]
    assert re.fullmatch("pix, green cat, (sitting|running|sleeping|hat|tree)(, .*)?", prompt)
    for number in (0, 1):
        text = parameters_of(another / "samples-1" / f"0{number}.png")
        assert text.splitlines() == [
            prompt,
            f"Steps: 3, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: {number}, Size: 64x64, "
            "Model: base, RNG: CPU",
        ]
    assert parameters_of(another / "samples-0" / "00.png").startswith(f"{prompt}\n")


def test_the_card_shows_four_different_prompts_about_it(another):
    card = ModelCard.load(another / "lora_weights" / "README.md")
    widget = card.data.to_dict()["widget"]
    prompts = [entry["text"] for entry in widget]
    assert len(set(prompts)) == 4
    assert all(prompt.startswith("pix, green cat") for prompt in prompts)
    for entry in widget:
        file = another / "lora_weights" / entry["output"]["url"]
        assert parameters_of(file).startswith(f"{entry['text']}\n")
        assert f"`{entry['text']}`" in card.text and f"]({file.name})" in card.text


def layouts(out) -> list[Path]:
    """The finished LoRA in its three layouts, and a checkpoint."""
    names = ("adapter_model", "pytorch_lora_weights", "megaman_lora")
    files = [out / "lora_weights" / f"{name}.safetensors" for name in names]
    return [*files, out / "checkpoint-1"]


def test_all_three_layouts_and_checkpoints_note_prompts_and_what_suits_the_base(another):
    noted = [read_notes(path) for path in layouts(another)]
    assert len(noted[0].prompts) > 4
    for notes in noted:
        assert notes.prompts == noted[0].prompts
        assert notes.settings == {
            "guidance_scale": 5.0,
            "num_inference_steps": 20,
            "negative_prompt": "",
        }


def test_all_three_layouts_and_checkpoints_note_the_palette(another):
    for path in layouts(another):
        assert sorted(lora_palette([path])) == ["008000", "ffffff"]


def test_the_suggested_command_generates_a_gallery_about_it(another, monkeypatch):
    monkeypatch.chdir(another.parent)
    flags = ["--lora_path", "out/lora_weights", "--num_inference_steps", "2"]
    assert generate_megaman.main([*flags, "--output_dir", "gallery"]) == 0
    images = read_images(another.parent / "gallery")
    assert len(images) > 4
    for image in images:
        assert image.prompt.startswith("pix, green cat")
        assert (image.width, image.negative_prompt, image.settings["guidance"]) == (64, "", 5.0)


def test_a_file_of_prompts_is_read_as_for_generation(train_here, tmp_path, monkeypatch, caplog):
    """Seed, size, guidance, negative prompt, weights and length; what is too large is skipped."""
    caplog.set_level("INFO")
    long = ", ".join(f"tag {number}" for number in range(60))
    (tmp_path / "prompts.txt").write_text(
        f"# mine\na (red:1.3) robot --n blue --d 7 --l 3 --s 2\n{long}\na robot --wrong 1\n"
        "a wall --w 8192 --h 8192\n[a cat|a dog] --w 128 --h 64\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(runtime, "free_memory", lambda device: 2**33)
    data = ["--data_dir", ROOT / "demo" / "held_out", *FEW_STEPS]
    flags = ["--validation_prompts_file", "prompts.txt", "--validation_guidance_scale", 4]
    count = ["--num_validation_images", 1]
    train_here(tmp_path, "out", *data, *flags, *count)
    samples = tmp_path / "out" / "samples-1"
    assert sorted(path.name for path in samples.iterdir()) == ["00.png", "01.png", "03.png"]
    first, second, last = (parameters_of(path) for path in sorted(samples.iterdir()))
    assert first == (
        "a (red:1.3) robot\nNegative prompt: blue\nSteps: 2, Sampler: DPM++ 2M, CFG scale: 3, "
        "Seed: 7, Size: 64x64, Model: base, RNG: CPU"
    )
    assert second.startswith(f"{long}\nSteps: 3, ") and "CFG scale: 4, Seed: 0" in second
    assert "Size: 128x64" in last and Image.open(samples / "03.png").size == (128, 64)
    said = "\n".join(caplog.messages)
    assert "line 4: --wrong is not an option" in said
    assert "[a cat|a dog] in a prompt: alternating words is not supported" in said
    skipped = r"step 1: no sample image of 'a wall' at 8192x8192 \(.* memory .*; training continues"
    assert re.search(skipped, said)
    card = ModelCard.load(tmp_path / "out" / "lora_weights" / "README.md")
    texts = [entry["text"] for entry in card.data.to_dict()["widget"]]
    assert texts == ["a (red:1.3) robot", long, "[a cat|a dog]"]
    history = json.loads((tmp_path / "out" / "checkpoint-1" / HISTORY).read_text(encoding="utf-8"))
    recorded = dict(history["samples"])[1]
    assert [sample["file"] for sample in recorded] == [
        f"samples-1/{name}" for name in ("00.png", "01.png", "03.png")
    ]
    assert recorded[0]["negative_prompt"] == "blue" and recorded[0]["settings"]["guidance"] == 3


def test_mega_man_keeps_the_contracts_prompt(train_here, embedded_base, pictures, tmp_path):
    flags = ["--data_dir", pictures, *FEW_STEPS, "--num_validation_images", 1]
    flags += ["--pretrained_model_name", embedded_base, "--resolution", 32]
    train_here(tmp_path, "out", *flags)
    assert parameters_of(tmp_path / "out" / "samples-1" / "00.png").startswith(DEFAULT_PROMPT)
    notes = read_notes(tmp_path / "out" / "lora_weights")
    assert notes.prompts == LoraNotes().prompts and notes.settings["guidance_scale"] == 5
    card = ModelCard.load(tmp_path / "out" / "lora_weights" / "README.md")
    texts = {entry["text"] for entry in card.data.to_dict()["widget"]}
    assert len(texts) == 4 and all("mega man" in text or "robot master" in text for text in texts)


def test_each_sample_has_its_nearest_training_image_and_the_drift_is_noted(another):
    path = another / "checkpoint-1" / HISTORY
    history = json.loads(path.read_text(encoding="utf-8"))
    nearest = dict(history["nearest"])[1]
    assert [item["sample"] for item in nearest] == ["samples-1/00.png", "samples-1/01.png"]
    for item in nearest:
        assert item["image"].startswith("data/") and item["distance"] > 0
        assert not item["is_warning"]
    assert history["drift"][0] == [0, 0.0]
    (step, drift) = history["drift"][1]
    assert step == 1 and 0 < drift < 100


def test_the_gallery_shows_the_nearest_training_image(another, monkeypatch):
    """Its file is found by way of the run's settings; without them only its name is known."""
    monkeypatch.chdir(another.parent)
    flags = ["--num_inference_steps", "2", "--prompts", "pix"]
    assert generate_megaman.main(["--lora_path", "out/lora_weights", *flags]) == 0
    folder = another.parent / "generated_megaman"
    (image,) = read_images(folder)
    assert image.nearest is not None and re.fullmatch(r"\d\.png", image.nearest.name)
    assert Image.open(folder / str(image.nearest.preview)).format == "WEBP"
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert str(image.nearest.preview) in page and "Nearest training image" in page
    shutil.copytree(another / "lora_weights", another.parent / "alone")
    assert generate_megaman.main(["--lora_path", "alone", *flags, "--output_dir", "two"]) == 0
    (image,) = read_images(another.parent / "two")
    assert image.nearest is not None and image.nearest.preview is None


def test_four_images_trained_for_far_too_long_are_memorized(
    train_here, embedded_base, tmp_path, caplog
):
    """Flat images, so that few steps suffice; the warning comes once, and is in the history."""
    caplog.set_level("INFO")
    (tmp_path / "data").mkdir()
    for color in ("red", "green", "blue", "orange"):
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).rectangle((0, 0, 32, 15), fill=color)
        image.save(tmp_path / "data" / f"{color}.png")
        caption = f"a {color} robot"
        (tmp_path / "data" / f"{color}.txt").write_text(caption, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a red robot --s 8 --l 2\n", encoding="utf-8")
    flags = [
        *("--pretrained_model_name", embedded_base),
        *("--data_dir", "data", "--resolution", 32, "--train_batch_size", 4),
        *("--max_train_steps", 24, "--validation_steps", 12, "--learning_rate", 5e-3),
        *("--lora_rank", 32, "--lora_alpha", 32),
        *("--target_modules", "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_out"),
        *("--validation_prompts_file", "prompts.txt", "--num_validation_images", 1),
    ]
    train_here(tmp_path, "out", *flags)
    said = [text for text in caplog.messages if "may have memorized it" in text]
    assert len(said) == 1 and "nearer to data/" in said[0]
    history = json.loads((tmp_path / "out" / "checkpoint-24" / HISTORY).read_text())
    (last,) = dict(history["nearest"])[24]
    assert last["is_warning"] and last["image"] == "data/red.png"
    assert [f"step 12: {warning['text']}" for warning in history["warnings"]] == said
