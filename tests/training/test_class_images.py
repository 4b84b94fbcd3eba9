"""Class images and the prior loss: the loss by hand, resuming, output and refusals."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from conftest import FEW_TARGETS, ROOT
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaman.config.train import parse_train_config
from megaman.data import batches
from megaman.data.dataset import MegaManDataset
from megaman.errors import UserError
from megaman.models.base import load_base

FIXED = ["--center_crop", "--train_batch_size", 2, "--learning_rate", 1e-3, *FEW_TARGETS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three images of the hero, and three of other robots."""
    folder = tmp_path_factory.mktemp("folders")
    for name, pattern in (("hero", "volto_*.png"), ("others", "kept_*.png")):
        (folder / name).mkdir()
        for source in sorted((ROOT / "demo" / "images").glob(pattern))[:3]:
            shutil.copy(source, folder / name)
            shutil.copy(source.with_suffix(".txt"), folder / name)
    return folder


@pytest.fixture
def train(train_here, folders, tmp_path):
    """train("name", "--flag", ...) with the images of the hero; returns the LoRA's tensors and the
    losses."""

    def run(name: str, *flags):
        state = train_here(tmp_path, name, "--data_dir", folders / "hero", *FIXED, *flags)
        (events,) = (tmp_path / f"logs-{name}").iterdir()
        return state, [
            event.value for event in EventAccumulator(str(events)).Reload().Scalars("train/loss")
        ]

    return run


@torch.no_grad()
def loss_by_hand(base, folder, numbers, seed: int) -> float:
    """The base's mean loss over the images with these sample indices, each with the noise that
    depends on seed and index."""
    dataset, errors = MegaManDataset(folder, None, 64), []
    for number in numbers:
        index, generator = (
            batches.position_at(number, len(dataset), seed),
            batches.generator_for(seed, number),
        )
        torch.randint(1, (1,), generator=generator)  # there is one crop
        posterior = base.vae.encode(dataset[index]["pixel_values"][None]).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(
            posterior.mean.shape, generator=generator
        )
        latents = latents * base.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(0, 1000, (1,), generator=generator)
        words = base.tokenizer(
            dataset.captions[index], padding="max_length", truncation=True, return_tensors="pt"
        )
        noisy = base.noise_scheduler.add_noise(latents, noise, timestep)
        states = base.text_encoder(words.input_ids)[0]
        predicted = base.unet(noisy, timestep, encoder_hidden_states=states).sample
        velocity = base.noise_scheduler.config.prediction_type == "v_prediction"
        expected = (
            base.noise_scheduler.get_velocity(latents, noise, timestep) if velocity else noise
        )
        errors.append((predicted - expected).pow(2).mean())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("split", [(4, 1), (2, 2)], ids=["at once", "accumulated"])
@pytest.mark.parametrize("weight", [0, 1, 0.25])
def test_the_loss_is_that_of_the_images_and_weight_times_that_of_the_class(
    train, folders, base_folder, weight, split
):
    """In the first step, when the LoRA changes nothing yet: as many class images as images, four of
    each."""
    sizes = [
        "--train_batch_size",
        split[0],
        "--gradient_accumulation_steps",
        split[1],
        "--max_train_steps",
        1,
    ]
    _, (loss,) = train(
        "with", "--class_data_dir", folders / "others", "--prior_loss_weight", weight, *sizes
    )
    base = load_base(str(base_folder), torch.float32)
    hero = loss_by_hand(base, folders / "hero", range(4), 0)
    others = loss_by_hand(base, folders / "others", range(4), batches.class_seed(0))
    assert loss == pytest.approx(hero + weight * others, rel=1e-4)
    assert others > 0.1 * hero, "the weights can be distinguished"


def test_weight_0_trains_as_without_class_images_and_1_does_not(train, folders):
    alone, first = train("alone", "--max_train_steps", 3)
    nothing, second = train(
        "nothing",
        "--max_train_steps",
        3,
        "--class_data_dir",
        folders / "others",
        "--prior_loss_weight",
        0,
    )
    whole, _ = train("whole", "--max_train_steps", 3, "--class_data_dir", folders / "others")
    assert second == pytest.approx(first, rel=1e-5)
    assert all(torch.allclose(alone[key], nothing[key], atol=1e-6) for key in alone)
    assert not all(torch.allclose(alone[key], whole[key], atol=1e-5) for key in alone)


def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_stopped(train, folders, tmp_path):
    flags = [
        "--class_data_dir",
        folders / "others",
        "--lora_dropout",
        0.2,
        "--max_train_steps",
        4,
        "--save_steps",
        2,
    ]
    whole, losses = train("whole", *flags)
    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    resumed, later = train("half", *flags, "--resume_from_checkpoint", "latest")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert later == losses[2:]


def test_other_class_images_are_refused_by_name(train, folders, tmp_path):
    others = shutil.copytree(folders / "others", tmp_path / "others")
    train("out", "--class_data_dir", others, "--max_train_steps", 2, "--save_steps", 1)
    shutil.rmtree(tmp_path / "out" / "lora_weights")
    again = ["--max_train_steps", 3, "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match=r"class data was 3 pictures .* and is now none"):
        train("out", *again)
    next(others.glob("*.txt")).write_text("another caption", encoding="utf-8")
    with pytest.raises(UserError, match=r"class data was 3 pictures .* and is now 3 pictures"):
        train("out", *again, "--class_data_dir", others)


def test_what_is_said_and_recorded(train, folders, tmp_path, capsys):
    """The class images get no trigger word and are counted apart from the images to learn."""
    others = shutil.copytree(folders / "others", tmp_path / "others")
    (others / "broken.png").write_bytes(b"not a picture")
    train(
        "out",
        "--class_data_dir",
        others,
        "--prior_loss_weight",
        0.5,
        "--max_train_steps",
        1,
        "--trigger_word",
        "zxq",
    )
    said = capsys.readouterr().out
    assert f"class      3 in {others}, loss times 0.5" in said
    assert f"skipped: {others / 'broken.png'}: not an image" in said
    assert "1 of 7 files skipped" in said
    problems = json.loads((tmp_path / "out" / "dataset_problems.json").read_text(encoding="utf-8"))
    assert [entry["path"] for entry in problems["left_out"]] == [str(others / "broken.png")]
    with safe_open(tmp_path / "out" / "lora_weights" / "megaman_lora.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_num_train_images"] == "3" and header["ss_num_reg_images"] == "3"
    assert header["ss_prior_loss_weight"] == "0.5"
    assert json.loads(header["ss_reg_dataset_dirs"]) == {"others": {"n_repeats": 1, "img_count": 3}}
    assert "zxq" in header["ss_tag_frequency"] and "antenna" not in header["ss_tag_frequency"]
    card = (tmp_path / "out" / "lora_weights" / "README.md").read_text(encoding="utf-8")
    assert "In addition 3 regularization images, whose loss has the weight 0.5." in card


def test_an_unusable_folder_is_named_with_its_flag(train, tmp_path):
    with pytest.raises(UserError, match=re.escape("--class_data_dir")):
        train("out", "--class_data_dir", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=re.escape(f"--class_data_dir {tmp_path / 'empty'} holds no image")
    ):
        train("out", "--class_data_dir", tmp_path / "empty")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--prior_loss_weight", "0.5"],
            "--prior_loss_weight has no effect without --class_data_dir",
        ),
        (["--data_dir", "x", "--class_data_dir", "x"], "share images"),
        (["--data_dir", "x", "--class_data_dir", "x/class"], "share images"),
        (["--data_dir", "x/hero", "--class_data_dir", "x"], "share images"),
        (
            ["--class_data_dir", "x", "--output_dir", "x/out"],
            "--output_dir x/out is within --class_data_dir",
        ),
        (
            ["--class_data_dir", "out/samples-3", "--output_dir", "out"],
            "--class_data_dir out/samples-3 is where",
        ),
        (["--class_data_dir", "x", "--prior_loss_weight", "-1"], "--prior_loss_weight"),
    ],
)
def test_contradictions(flags, said, capsys):
    with pytest.raises(SystemExit):
        parse_train_config(flags)
    assert said in capsys.readouterr().err


def test_repeats_of_class_folders_are_recorded(train, folders, tmp_path):
    others = tmp_path / "class"
    shutil.copytree(folders / "others", others / "5_robot")
    first = next((others / "5_robot").glob("*.png"))
    shutil.copy(first, others / "plain.png")
    train("out", "--class_data_dir", others, "--max_train_steps", 1)
    with safe_open(tmp_path / "out" / "lora_weights" / "megaman_lora.safetensors", "pt") as file:
        header = file.metadata()
    assert json.loads(header["ss_reg_dataset_dirs"]) == {
        "5_robot": {"n_repeats": 5, "img_count": 3},
        "class": {"n_repeats": 1, "img_count": 1},
    }
    assert (header["ss_num_train_images"], header["ss_num_reg_images"]) == ("3", "16")
