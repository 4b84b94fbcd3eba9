"""Which images are held out: a fair share, never a near-duplicate, the same after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image, ImageDraw

from megaman.config.presets import DEFAULT_PROMPT
from megaman.config.train import parse_train_config
from megaman.errors import WRONG_USAGE, UserError
from megaman.training.datasets import Datasets, find_datasets
from megaman.training.held_out_split import hold_out_images


def make_images(folder: Path, count: int) -> Path:
    """So many different images, half of them in a subfolder."""
    for number in range(count):
        image = Image.new("RGB", (64, 64), (10 * number % 255, 90, 200 - 9 * number % 200))
        draw = ImageDraw.Draw(image)
        draw.ellipse((number, 5, 20 + 2 * number, 50), fill=(255 - 12 * number, 11 * number, 40))
        draw.rectangle((40 - number, 20, 60, 30 + number), fill=(number * 11, 255, 0))
        place = folder / "sub" if number % 2 else folder
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:02d}.png")
    return folder


def hold_out(folder: Path, *flags, checkpoint: Path | None = None) -> Datasets:
    words = ["--data_dir", folder, "--output_dir", folder.parent / "out", *flags]
    config = parse_train_config([str(word) for word in words])
    datasets = find_datasets(config)
    assert datasets is not None
    hold_out_images(config, datasets, checkpoint)
    return datasets


def test_a_share_of_every_folder_is_held_out(tmp_path):
    folder = make_images(tmp_path / "images", 20)
    datasets = hold_out(folder, "--validation_split", 0.2)
    names = datasets.held_out_names
    assert len(names) == 4 and len(datasets.images) == 16
    assert len([name for name in names if name.startswith("sub/")]) == 2
    learned = {datasets.images.name(index) for index in range(16)}
    assert not learned & set(names)
    assert hold_out(folder, "--validation_split", 0.2).held_out_names == names
    others = [
        hold_out(folder, "--validation_split", 0.2, "--seed", seed).held_out_names
        for seed in (1, 2, 3)
    ]
    assert any(other != names for other in others)
    assert [len(dataset) for dataset in datasets.evaluated] == [4, 4]


def test_what_has_a_near_duplicate_is_trained_on(tmp_path):
    folder = make_images(tmp_path / "images", 9)
    for number in range(7):
        place = folder / "sub" if number % 2 else folder
        with Image.open(place / f"{number:02d}.png") as image:
            image.resize((96, 96)).save(folder / f"copy_{number}.png")
    datasets = hold_out(folder, "--validation_split", 0.5)
    assert sorted(datasets.held_out_names) == ["08.png", "sub/07.png"]


def test_few_images_are_all_needed(tmp_path):
    folder = make_images(tmp_path / "images", 7)
    for flags in (["--validation_split", 0.5], ["--max_train_steps", "auto"]):
        with pytest.raises(UserError, match="7 images are too few") as refused:
            hold_out(folder, *flags)
        assert refused.value.exit_code == 2


def test_nothing_is_held_out_unasked_but_suggested(tmp_path, caplog):
    caplog.set_level("INFO")
    few = hold_out(make_images(tmp_path / "few", 19))
    assert few.held_out is None and not caplog.messages
    many = hold_out(make_images(tmp_path / "many", 20))
    assert many.held_out is None and many.evaluated == ()
    assert "--validation_split 0.1 would show overfitting" in caplog.text


def test_a_folder_with_an_image_to_learn_is_refused(tmp_path):
    folder = make_images(tmp_path / "images", 3)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="holds no image that can be used"):
        hold_out(folder, "--validation_data_dir", other)
    with pytest.raises(UserError, match="missing is not a folder") as missing:
        hold_out(folder, "--validation_data_dir", tmp_path / "missing")
    assert missing.value.exit_code == WRONG_USAGE
    shutil.copy(folder / "02.png", other / "same.png")
    with pytest.raises(UserError, match=r"same\.png is an image to learn, 02\.png"):
        hold_out(folder, "--validation_data_dir", other)


def test_a_near_duplicate_in_the_folder_is_not_used(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = make_images(tmp_path / "images", 3)
    other = tmp_path / "other"
    other.mkdir()
    with Image.open(folder / "02.png") as image:
        image.resize((96, 96)).save(other / "similar.png")
    shutil.copy(sorted((ROOT / "demo" / "held_out").glob("*.png"))[0], other / "new.png")
    assert hold_out(folder, "--validation_data_dir", other).held_out_names == ["new.png"]
    assert "similar.png" in caplog.text


def test_a_resumed_run_holds_out_the_same(tmp_path):
    folder = make_images(tmp_path / "images", 12)
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    state = {"held_out": ["02.png", "sub/03.png"]}
    (checkpoint / "training_state.json").write_text(json.dumps(state))
    make_images(folder, 14)  # images were added
    again = hold_out(folder, "--validation_split", 0.2, checkpoint=checkpoint)
    assert again.held_out_names == ["02.png", "sub/03.png"]
    (folder / "02.png").unlink()
    with pytest.raises(UserError, match=r"holds out 02\.png, which cannot be used now"):
        hold_out(folder, "--validation_split", 0.2, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--validation_split", "0"], "out of range"),
        (["--validation_split", "1"], "would leave no image to train on"),
        (["--validation_split", "1.5"], "out of range"),
        (["--validation_split", "10%"], "write 0.1"),
        (["--validation_data_dir", "images"], "share images"),
        (["--validation_data_dir", "images/inner"], "share images"),
        (["--validation_data_dir", "."], "share images"),
        (["--use_ema"], "add --validation_split"),
        (["--eval_steps", "5"], "add --validation_split"),
        (["--early_stopping_patience", "0"], "out of range"),
        (["--validation_split", "0.1", "--validation_data_dir", "other"], "use only one"),
        (["--max_train_steps", "automatic"], "not a whole number"),
    ],
)
def test_contradictions_are_one_line(flags, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        parse_train_config(["--data_dir", "images", "--output_dir", "../out", *flags])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert error in line


def test_what_stops_early_holds_out_a_tenth():
    for flags in (["--max_train_steps", "auto"], ["--early_stopping_patience", "4"]):
        assert parse_train_config(flags).evaluation.validation_split == 0.1
    assert parse_train_config(["--max_train_steps", "auto"]).evaluation.early_stopping_patience == 3


def test_the_demo_has_held_out_images_and_a_prompt_of_its_own():
    demo = parse_train_config(["--demo"])
    assert Path(demo.evaluation.validation_data_dir or "") == ROOT / "demo" / "held_out"
    assert demo.validation.validation_prompt.startswith("volto, ")
    others = parse_train_config(["--demo", "--data_dir", "mine"])
    assert not others.evaluation.is_on
    assert others.validation.validation_prompt == DEFAULT_PROMPT, "made of the captions"
