"""Training in buckets on the embedded base: printed, stored, resumed, in several processes, out of
memory."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import FEW_TARGETS, ROOT
from diffusers import UNet2DConditionModel
from failing import fail_on
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaman.data import batches
from megaman.data.dataset import MegaManDataset
from megaman.errors import UserError
from megaman.models.base import load_base
from megaman.models.typed import encode_pixels, predict_noise, scheduler_config

FLAGS = [
    "--enable_bucket",
    "--train_batch_size",
    4,
    "--learning_rate",
    1e-3,
    "--adam_epsilon",
    1e-2,
    "--center_crop",
]
FLAGS += FEW_TARGETS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight images of the demo: four as they are, three tall, one wide."""
    folder = tmp_path_factory.mktemp("shapes")
    sources = sorted((ROOT / "demo" / "images").glob("volto_*.png"))[:8]
    for number, source in enumerate(sources):
        image = Image.open(source).convert("RGB")
        width, height = [(64, 64), (48, 120), (150, 64)][(number >= 4) + (number >= 7)]
        canvas = Image.new("RGB", (width, height), image.getpixel((0, 0)))
        canvas.paste(image.resize((width, width)) if number >= 4 and number < 7 else image, (0, 0))
        canvas.save(folder / source.name)
        shutil.copy(source.with_suffix(".txt"), folder)
    return folder


def losses(folder) -> list[float]:
    (run,) = folder.iterdir()
    return [event.value for event in EventAccumulator(str(run)).Reload().Scalars("train/loss")]


@pytest.fixture(scope="module")
def whole(data, train_here, tmp_path_factory):
    """The uninterrupted run: two epochs and a half of 3 batches, one per bucket; its folder and its
    LoRA."""
    cwd = tmp_path_factory.mktemp("whole")
    return cwd, train_here(
        cwd, "out", "--data_dir", data, "--max_train_steps", 8, "--save_steps", 4, *FLAGS
    )


def test_what_is_said_and_noted(data, train_here, tmp_path, capsys):
    flags = ["--num_train_epochs", 5, "--gradient_accumulation_steps", 2, "--bucket_no_upscale"]
    train_here(tmp_path, "out", "--data_dir", data, *FLAGS, *flags)
    said = capsys.readouterr().out
    assert "buckets    64x64: 4, 40x96: 3, 96x40: 1; 3 batches an epoch" in said
    assert "steps      8 of up to 8 images (4 x 2 accumulated x 1 process), 5.3 epochs" in said
    config = json.loads((tmp_path / "out" / "training_config.json").read_text(encoding="utf-8"))
    assert config["buckets"] == {
        "min_bucket_reso": 32,
        "max_bucket_reso": 128,
        "bucket_reso_steps": 8,
        "pictures": {"40x96": 3, "64x64": 4, "96x40": 1},
    }
    with safe_open(tmp_path / "out" / "lora_weights" / "megaman_lora.safetensors", "pt") as file:
        header = file.metadata()
    expected = {
        "ss_enable_bucket": "True",
        "ss_bucket_no_upscale": "True",
        "ss_min_bucket_reso": "32",
        "ss_max_bucket_reso": "128",
        "ss_epoch": "5",
    }
    assert {key: header[key] for key in expected} == expected
    assert json.loads(header["ss_bucket_info"])["buckets"] == {
        "0": {"resolution": [40, 96], "count": 3},
        "1": {"resolution": [64, 64], "count": 4},
        "2": {"resolution": [96, 40], "count": 1},
    }
    card = (tmp_path / "out" / "lora_weights" / "README.md").read_text(encoding="utf-8")
    assert "| buckets, images an epoch | `40x96: 3, 64x64: 4, 96x40: 1` |" in card


def test_resumed_equals_undisturbed(whole, data, train_here, tmp_path):
    """From the middle of an epoch, bit for bit."""
    shutil.copytree(whole[0] / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    flags = ["--data_dir", data, "--max_train_steps", 8, "--resume_from_checkpoint", "latest"]
    resumed = train_here(tmp_path, "out", *flags, *FLAGS)
    assert all(torch.equal(whole[1][key], resumed[key]) for key in resumed)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--bucket_reso_steps", 16], "bucket_reso_steps was None and is now 16"),
        (["--bucket_no_upscale"], "bucket_no_upscale was False and is now True"),
        (
            ["--train_batch_size", 2, "--gradient_accumulation_steps", 2],
            "pictures of one bucket was 4 and is now 2",
        ),
    ],
)
def test_other_buckets_are_not_resumed(whole, data, train_here, tmp_path, flags, difference):
    shutil.copytree(whole[0] / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    with pytest.raises(UserError, match=difference):
        train_here(
            tmp_path,
            "out",
            "--data_dir",
            data,
            "--resume_from_checkpoint",
            "latest",
            *FLAGS,
            *flags,
        )


def test_squares_are_not_resumed_in_buckets(data, train_here, tmp_path):
    train_here(
        tmp_path,
        "out",
        "--data_dir",
        data,
        "--max_train_steps",
        1,
        "--train_batch_size",
        4,
        *FEW_TARGETS,
    )
    with pytest.raises(UserError, match="enable_bucket was False and is now True"):
        train_here(
            tmp_path, "out", "--data_dir", data, "--resume_from_checkpoint", "latest", *FLAGS
        )


def test_too_little_memory_changes_no_batch(whole, data, train_here, tmp_path, monkeypatch, capsys):
    """Micro-batches of two and then of one make the same steps as those of four."""
    fail_on(monkeypatch, UNet2DConditionModel, "forward", {2, 3, 6})
    train_here(tmp_path, "out", "--data_dir", data, "--max_train_steps", 8, *FLAGS)
    said = capsys.readouterr().out
    assert "2 micro-batches of 2" in said and "4 micro-batches of 1" in said
    assert losses(tmp_path / "logs-out") == pytest.approx(losses(whole[0] / "logs-out"), rel=1e-4)


def test_flips_change_the_loss_as_their_formula_says(base_folder, train_here, tmp_path, capsys):
    """The loss of the first step, when the LoRA changes nothing yet, computed by hand: each visit
    sees an image or its mirror image; an image whose caption says left has no mirror image."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, source in enumerate(sorted((ROOT / "demo" / "images").glob("volto_*.png"))[:4]):
        shutil.copy(source, folder)
        (folder / f"{source.stem}.txt").write_text(
            f"volto, pose {number}{', looking left' if number == 0 else ''}"
        )
    flags = [
        "--data_dir",
        folder,
        "--max_train_steps",
        1,
        "--train_batch_size",
        8,
        "--center_crop",
        *FEW_TARGETS,
    ]
    train_here(tmp_path, "plain", *flags)
    train_here(tmp_path, "flipped", *flags, "--random_flip")
    assert "not mirrored: 1, whose captions say left or right" in capsys.readouterr().out

    base = load_base(str(base_folder), torch.float32)
    dataset = MegaManDataset(folder, None, 64)
    images = [item["pixel_values"] for item in dataset]

    @torch.no_grad()
    def loss(crops: list[list[torch.Tensor]]) -> float:
        errors = []
        for number in range(8):
            index, generator = batches.position_at(number, 4, 0), batches.generator_for(0, number)
            crop = int(torch.randint(len(crops[index]), (1,), generator=generator))
            posterior = encode_pixels(base.vae, crops[index][crop][None])
            latents = posterior.mean + posterior.std * torch.randn(
                posterior.mean.shape, generator=generator
            )
            latents = latents * base.scaling_factor
            noise = torch.randn(latents.shape, generator=generator)
            timestep = torch.randint(0, 1000, (1,), generator=generator)
            signal = base.noise_scheduler.alphas_cumprod[timestep]
            words = base.tokenizer(
                dataset.captions[index], padding="max_length", truncation=True, return_tensors="pt"
            )
            states = base.text_encoder(words.input_ids)[0]
            noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
            noise_pred = predict_noise(base.unet, noisy, timestep, states)
            target = noise
            if scheduler_config(base.noise_scheduler).prediction_type == "v_prediction":
                target = signal.sqrt() * noise - (1 - signal).sqrt() * latents
            errors.append((noise_pred - target).pow(2).mean())
        return float(torch.stack(errors).mean())

    mirrored = [[image, image.flip(-1)] for image in images]
    del mirrored[0][1]
    assert losses(tmp_path / "logs-plain") == pytest.approx(
        [loss([[image] for image in images])], rel=1e-4
    )
    assert losses(tmp_path / "logs-flipped") == pytest.approx([loss(mirrored)], rel=1e-4)
    assert losses(tmp_path / "logs-flipped") != pytest.approx(
        losses(tmp_path / "logs-plain"), rel=1e-3
    )
