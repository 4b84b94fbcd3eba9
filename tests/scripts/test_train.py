"""megaman_lora.py as a user runs it, on the real embedded base; then what each flag changes."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from conftest import FEW_SAMPLING_STEPS, FEW_TARGETS, ROOT, SAMPLING_STEPS, learned_alike
from PIL import Image, ImageChops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaman.config.presets import DEFAULT_TARGETS
from megaman.errors import UserError
from megaman.models.base import load_base
from megaman.models.text_encoding import encode_captions
from megaman.sampling import denoise


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images of the demo and a tall one, two of them without a caption."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "more").mkdir()
    sources = sorted((ROOT / "demo" / "images").glob("volto_*.png"))[:4]
    for number, source in enumerate(sources):
        target = folder / ("more" if number == 3 else ".") / source.name
        shutil.copy(source, target)
        if number < 3:
            shutil.copy(source.with_suffix(".txt"), target.with_suffix(".txt"))
    tall = Image.new("RGB", (80, 200), "navy")
    tall.paste("orange", (0, 0, 80, 60))
    tall.save(folder / "tall_robot.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def finished(data, embedded_base, forked, tmp_path_factory):
    """One whole run as a process of its own, with validation images in SAMPLING_STEPS."""
    cwd = tmp_path_factory.mktemp("run")
    folders = [
        "--pretrained_model_name",
        embedded_base,
        "--data_dir",
        data,
        "--output_dir",
        "out",
        "--logging_dir",
        "logs",
    ]
    flags = """--resolution 64 --train_batch_size 2 --gradient_accumulation_steps 2
        --max_train_steps 6 --save_steps 2 --checkpoints_total_limit 2 --validation_steps 3
        --num_validation_images 2 --validation_prompt robot --lora_rank 4 --lora_alpha 16
        --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 2 --seed 0
        --mixed_precision fp16 --random_flip --snr_gamma 5 --noise_offset 0.05"""
    done = forked.run(["megaman_lora.py", *folders, *flags.split()], cwd, FEW_SAMPLING_STEPS)
    assert done.returncode == 0, done.stderr
    return done, cwd


def test_a_run_leaves_what_the_contract_says(finished):
    out = finished[1] / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-4",
        "checkpoint-6",
        "dataset_problems.json",
        "lora_weights",
        "samples-0",
        "samples-3",
        "samples-6",
        "training_config.json",
        "training_report",
        "training_report.html",
    ]
    assert sorted(path.name for path in (out / "samples-3").iterdir()) == ["00.png", "01.png"]
    assert Image.open(out / "samples-0" / "00.png").size == (64, 64)
    suffixes = {path.suffix for folder in out.glob("checkpoint-*") for path in folder.iterdir()}
    assert suffixes == {".json", ".safetensors"}


def test_it_says_what_will_happen(finished):
    said = finished[0].stdout
    assert "images     5 in" in said
    assert re.search(r"captions +3 from \.txt files, 2 made from file names", said)
    assert re.search(r"steps +6 of 4 images \(2 x 2 accumulated x 1 process\), 4\.8 epochs", said)
    assert re.search(r"rank 4, alpha 16, [\d,]+ trainable parameters", said)
    assert "fp16 needs an NVIDIA GPU" in said and "so cpu uses float32; channels_last; sdpa" in said
    assert "broken.png: not an image" in said
    assert "seed 0" in said


def test_the_output_is_ours_alone(finished):
    """No library's warnings, and no bars where nobody would see them move."""
    assert finished[0].stderr == ""
    assert re.search(r"step 6/6: loss=\d\.\d+, lr=.* images/s, .* GB", finished[0].stdout)
    for line in finished[0].stdout.splitlines():
        assert re.match(
            r"(loading|skipped|images|captions|encoded|steps|LoRA|device|disk|page|step \d+"
            r"|speed|samples|curves|done|next| +on the disk already"
            r"| +there is an NVIDIA GPU| +1 of 6| +not mirrored| +2 captions made from names)\b",
            line,
        ), line


def test_the_configuration_holds_every_setting_and_the_versions(finished):
    config = json.loads((finished[1] / "out" / "training_config.json").read_text(encoding="utf-8"))
    assert config["settings"]["noise_offset"] == 0.05
    assert config["settings"]["adam_beta2"] == 0.999
    # The package's version may lack the build that torch reports, as in 2.13.0+cu130.
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert config["dtype"] == "float32"
    assert config["total_steps"] == 6


def test_tensorboard_shows_the_run(finished):
    (folder,) = (finished[1] / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    loss = events.Scalars("train/loss")
    assert [event.step for event in loss] == [1, 2, 3, 4, 5, 6]
    assert all(0 < event.value < 3 for event in loss)
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[3] > rates[4] > rates[5] > 0
    assert [event.step for event in events.Images("validation/00")] == [0, 3, 6]
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"lora_alpha": 16' in text


def test_step_0_is_the_base_itself(finished, embedded_base):
    """samples-0 shows what the plain base generates for the prompt and the seeds; training changes
    it."""
    base = load_base(str(embedded_base), torch.float32)
    states = encode_captions(base.text_encoder, base.tokenizer, ["robot", ""])
    text, empty = (states[prompt].expand(2, -1, -1) for prompt in ("robot", ""))
    settings = denoise.SamplingSettings(64, 64, SAMPLING_STEPS, guidance_scale=7.5)
    images = denoise.generate_images(base, denoise.PromptEmbeds(text, empty), [0, 1], settings)
    for i, image in enumerate(images):
        first, last = (
            Image.open(finished[1] / "out" / f"samples-{step}" / f"{i:02d}.png").convert("RGB")
            for step in (0, 6)
        )
        assert np.array(ImageChops.difference(first, image)).max() <= 2
        assert ImageChops.difference(first, last).getbbox() is not None


def test_the_checkpoint_is_a_lora_folder(finished, embedded_base):
    from diffusers import UNet2DConditionModel

    from megaman.lora import files as lora_files

    unet = UNet2DConditionModel.from_pretrained(embedded_base / "unet", dtype=torch.float32)
    config = lora_files.load_lora(finished[1] / "out" / "checkpoint-6", unet)
    assert (config.r, config.lora_alpha) == (4, 16)


def test_an_earlier_run_is_not_overwritten(finished, data, run_script):
    cwd = finished[1]
    before = {path: path.stat().st_mtime_ns for path in (cwd / "out").rglob("*")}
    done = run_script(["megaman_lora.py", "--data_dir", data, "--output_dir", "out"], cwd)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "--overwrite_output" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (cwd / "out").rglob("*")} == before


# The rest runs in this process. Two steps show whether a flag matters.


@pytest.fixture
def train(train_here, data, tmp_path, capsys):
    """train("--flag", value, …) runs two steps and returns the LoRA's tensors; .said is what it
    printed."""

    def run(*flags) -> dict[str, torch.Tensor]:
        run.out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        state = train_here(
            tmp_path, run.out.name, "--data_dir", data, "--max_train_steps", 2, *FEW_TARGETS, *flags
        )
        run.said = capsys.readouterr().out
        return state

    return run


@pytest.fixture(scope="module")
def plain(train_here, data, tmp_path_factory):
    """The LoRA that train() without flags gives."""
    folder = tmp_path_factory.mktemp("plain")
    return train_here(folder, "out", "--data_dir", data, "--max_train_steps", 2, *FEW_TARGETS)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def largest(state: dict[str, torch.Tensor], side: str) -> float:
    return max(float(tensor.abs().max()) for key, tensor in state.items() if f"lora_{side}" in key)


def test_a_seed_repeats_bit_for_bit_and_another_differs(train, plain):
    assert same(plain, train())
    assert not same(plain, train("--seed", 1))


@pytest.mark.parametrize(
    "flags",
    [
        ["--learning_rate", 3e-4],
        ["--adam_beta1", 0.5],
        ["--adam_beta2", 0.5],
        ["--adam_weight_decay", 0.5],
        ["--adam_epsilon", 1e-3],
        ["--max_grad_norm", 1e-6],
        ["--snr_gamma", 0.001],
        ["--noise_offset", 0.3],
        ["--random_flip"],
        ["--train_batch_size", 3],
        ["--gradient_accumulation_steps", 2],
        ["--lora_rank", 2],
        ["--lora_alpha", 8],
        ["--use_rslora"],
        ["--lora_dropout", 0.5],
        ["--target_modules", "to_q"],
        ["--resolution", 32],
        ["--mixed_precision", "bf16"],
        ["--max_train_steps", 3],
        ["--lr_scheduler", "linear"],
        ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 1],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_a_flag_changes_the_result(train, plain, flags):
    assert not same(plain, train(*flags))


def test_crops_of_an_image_that_is_not_square(train, data, tmp_path):
    """By default four crops that depend on the seed; another number and the center crop give other
    results."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(data / "tall_robot.png", alone)
    four = train("--data_dir", alone)
    assert "1 in" in train.said
    assert "4 crops" in train.said
    assert not same(four, train("--data_dir", alone, "--crop_variants", 1))
    assert "1 crops" in train.said
    assert not same(four, train("--data_dir", alone, "--center_crop"))
    assert same(four, train("--data_dir", alone))


@pytest.mark.parametrize("flags", [["--dataloader_num_workers", 2], ["--lr_warmup_steps", 3]])
def test_a_flag_that_must_not_change_the_result(train, plain, flags):
    """Workers only decode; constant has no warm-up, and says so if one is requested."""
    assert same(plain, train(*flags))
    assert ("constant has no warm-up" in train.said) == ("--lr_warmup_steps" in flags)


def test_gradient_checkpointing_changes_memory_only(train, plain, monkeypatch):
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k)
    )
    checkpointed = train("--gradient_checkpointing")
    assert calls
    assert all(torch.allclose(plain[key], checkpointed[key], atol=1e-6) for key in plain)


def test_the_split_into_micro_batches_changes_nothing_but_rounding(train):
    smooth = [
        "--adam_epsilon",
        1e-2,
    ]  # otherwise Adam makes whole steps of rounding errors
    whole = train("--train_batch_size", 4, *smooth)
    split = train("--train_batch_size", 2, "--gradient_accumulation_steps", 2, *smooth)
    assert learned_alike(whole, split)


def test_clipping_clips(train, plain):
    """With a norm far below Adam's epsilon the step vanishes; without clipping B moves by about the
    learning rate."""
    assert largest(train("--max_grad_norm", 1e-12), "B") < 1e-7
    assert largest(plain, "B") > 5e-5


def test_training_lowers_the_loss(train):
    flags = [
        "--learning_rate",
        3e-3,
        "--lora_alpha",
        8,
        "--train_batch_size",
        4,
        "--resolution",
        32,
    ]
    train("--max_train_steps", 60, "--target_modules", *DEFAULT_TARGETS, *flags)
    (folder,) = (train.out.parent / f"logs-{train.out.name}").iterdir()
    losses = [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_epochs_give_the_steps(train_here, train, data, tmp_path, capsys):
    train("--num_train_epochs", 3, "--train_batch_size", 2)
    assert "steps      2 of 2" in train.said, "--max_train_steps wins"
    train_here(
        tmp_path, "epochs", "--data_dir", data, "--num_train_epochs", 1, "--train_batch_size", 2
    )
    assert "steps      3 of 2 images" in capsys.readouterr().out


def test_without_a_seed_one_is_generated_and_stored(data, base_folder, forked, tmp_path):
    folders = ["--pretrained_model_name", base_folder, "--data_dir", data]
    flags = ["--resolution", 64, "--max_train_steps", 1, "--num_validation_images", 0]
    done = forked.run(["megaman_lora.py", *folders, *flags], tmp_path)
    seed = json.loads((tmp_path / "megaman_lora_output/training_config.json").read_text())[
        "settings"
    ]["seed"]
    assert seed > 0
    assert f"seed {seed}" in done.stdout
    assert "\nsamples " not in done.stdout, "there are none"


def test_overwriting_where_it_is_meant(train_here, data, tmp_path):
    flags = ["--data_dir", data, "--max_train_steps"]
    train_here(tmp_path, "out", *flags, 2)
    (tmp_path / "out" / "mine.txt").write_text("the user's")
    train_here(tmp_path, "out", *flags, 1, "--overwrite_output")
    assert (tmp_path / "out" / "mine.txt").read_text() == "the user's"
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_run_that_cannot_begin_leaves_the_earlier_one(train_here, data, tmp_path):
    """--overwrite_output deletes only once base, LoRA and images are there, and only what a run
    writes."""
    train_here(tmp_path, "out", "--data_dir", data, "--max_train_steps", 1)
    (tmp_path / "out" / "checkpoint-best").mkdir()
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(UserError):
        train_here(
            tmp_path, "out", "--data_dir", data, "--overwrite_output", "--target_modules", "nothing"
        )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    train_here(tmp_path, "out", "--data_dir", data, "--max_train_steps", 1, "--overwrite_output")
    assert (tmp_path / "out" / "checkpoint-best").is_dir()


def test_a_target_that_is_not_there(train):
    with pytest.raises(UserError, match="--target_modules to_x") as caught:
        train("--target_modules", "to_q", "to_x")
    assert caught.value.exit_code == 2


def test_no_data_yet(run_script, tmp_path):
    """The first command of a newcomer: instructions, exit 0; a second run says the same and changes
    nothing."""
    for _ in range(2):
        done = run_script(["megaman_lora.py"], tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "There are no images yet" in done.stdout
        guide = (tmp_path / "megaman_images" / "README.md").read_text(encoding="utf-8")
        assert "megaman_01.txt" in guide
        assert "請把圖片" in guide
        assert [path.name for path in tmp_path.iterdir()] == ["megaman_images"]


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_given_data_that_is_not_there(run_script, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    done = run_script(["megaman_lora.py", "--data_dir", folder], tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert folder in done.stderr
