"""Pictures are encoded once, over all runs; what has changed is noticed; without the cache the
losses are the same."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import FEW_TARGETS
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaman.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def train(train_here, pictures, tmp_path, capsys):
    """Train two steps with a cache of the test's own: train(name, *flags) gives the LoRA's tensors,
    and how many crops were encoded and how many were there."""

    def run(name: str, *flags):
        cache = [] if "--no_cache" in flags else ["--cache_dir", "cache"]
        words = [
            "--data_dir",
            pictures,
            *cache,
            "--max_train_steps",
            2,
            "--train_batch_size",
            2,
            *FEW_TARGETS,
            *flags,
        ]
        lora = train_here(tmp_path, name, *words)
        output = capsys.readouterr().out
        counts = re.search(r"encoded +(\d+) now, (\d+) were", output)
        return lora, tuple(map(int, counts.groups())) if counts else output

    return run


def losses(folder: Path) -> list[float]:
    (run,) = folder.iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def forge(path: Path, content: bytes) -> None:
    """Change a file's bytes, but neither its size nor its modification time."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_second_run_encodes_nothing_and_does_not_read_the_vae(train, base_folder, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    first, counts = train("first", "--pretrained_model_name", base)
    assert counts == (7, 0), "three squares, and four crops of the picture that is not square"
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    forge(
        weights, weights.read_bytes()[:header] + b"\xff" * (weights.stat().st_size - header)
    )  # all not-a-number
    second, counts = train("second", "--pretrained_model_name", base)
    assert counts == (0, 7) and same(first, second)
    (vae_id,) = {path.parent.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(vae_id) == 32
    with pytest.raises(UserError, match=r"vae.*not finite"):
        train("third", "--pretrained_model_name", base, "--resolution", 32)


def test_a_changed_picture_is_noticed_and_a_moved_one_known(train, pictures, tmp_path):
    train("first")
    os.utime(pictures / "megaman_01.png", (10**9, 10**9))
    (pictures / "megaman_04.png").rename(pictures / "megaman_05.png")
    (pictures / "megaman_04.txt").rename(pictures / "megaman_05.txt")
    before, counts = train("touched")
    assert counts == (0, 7), "the bytes are the same"
    Image.new("RGB", (64, 64), "purple").save(pictures / "megaman_01.png")
    after, counts = train("changed")
    assert counts == (1, 6) and not same(before, after)


def test_a_changed_caption_needs_no_encoding_but_counts(train, pictures):
    before, _ = train("first")
    (pictures / "megaman_01.txt").write_text("something else altogether")
    after, counts = train("second")
    assert counts == (0, 7) and not same(before, after)


def test_another_resolution_and_other_crops_are_noticed(train):
    train("first")
    assert train("smaller", "--resolution", 32)[1] == (7, 0)
    assert train("mirrored", "--random_flip")[1] == (7, 7), "only the mirror images are new"
    assert train("middle", "--center_crop")[1] == (1, 3), "the square ones are whole either way"
    assert train("more", "--crop_variants", 6)[1] == (2, 7)
    assert train("again")[1] == (0, 7)


def test_another_vae_is_noticed(train, base_folder, tmp_path):
    before, _ = train("first")
    base = shutil.copytree(base_folder, tmp_path / "base")
    assert train("moved", "--pretrained_model_name", base)[1] == (0, 7), (
        "the same VAE in another place"
    )
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.weight"] *= 1.01
    save_file(tensors, weights)
    after, counts = train("other", "--pretrained_model_name", base)
    assert counts == (7, 0) and not same(before, after)


@pytest.mark.parametrize("flags", [[], ["--random_flip"], ["--dataloader_num_workers", 2]])
def test_without_the_cache_the_losses_are_the_same(train, tmp_path, flags):
    """With the middle crop; a random one is another at every visit."""
    cached, _ = train("cached", "--center_crop", *flags)
    online, output = train("fresh", "--center_crop", "--no_cache", *flags)
    for key in cached:
        torch.testing.assert_close(online[key], cached[key], rtol=0, atol=1e-5)
    assert losses(tmp_path / "logs-fresh") == pytest.approx(
        losses(tmp_path / "logs-cached"), abs=1e-5
    )
    assert "encoded    " not in output and "encoded anew at every visit" in output


def test_without_the_cache_every_visit_has_a_crop_of_its_own(train, pictures, tmp_path):
    for number in (1, 2, 4):
        (pictures / f"megaman_0{number}.png").unlink()
    one, _ = train("one", "--no_cache")
    again, _ = train("again", "--no_cache")
    assert same(one, again), "the seed repeats it"
    train("stopped", "--no_cache", "--max_train_steps", 1)
    resumed, _ = train("stopped", "--no_cache", "--resume_from_checkpoint", "latest")
    assert same(one, resumed)
    with pytest.raises(UserError, match="no_cache was True and is now False"):
        train("stopped", "--resume_from_checkpoint", "latest", "--max_train_steps", 3)


def test_without_the_cache_a_damaged_picture_is_found_before_the_first_step(train, pictures):
    whole = (pictures / "megaman_01.png").read_bytes()
    (pictures / "megaman_01.png").write_bytes(whole[:-40])
    _, output = train("out", "--no_cache")
    assert "skipped: " in output and "images     3 in" in output


def test_where_the_cache_cannot_be_written_the_run_goes_on(train, tmp_path):
    (tmp_path / "cache").touch()
    _, output = train("out")
    assert re.search(r"encoded +7, kept in memory: cache cannot be written", output)


def test_the_cache_keeps_to_its_limit(train, tmp_path):
    def shards():
        return sorted((tmp_path / "cache").rglob("*.safetensors"))

    train("first")
    first = shards()
    train("second", "--resolution", 32, "--cache_limit", 0)
    assert shards() and not set(shards()) & set(first), "this run's own stay"


def command(pictures, *flags) -> list:
    words = [
        "--pretrained_model_name",
        ROOT / "demo" / "base",
        "--data_dir",
        pictures,
        "--cache_dir",
        "cache",
    ]
    return [
        "megaman_lora.py",
        *words,
        "--seed",
        0,
        "--num_validation_images",
        0,
        "--max_train_steps",
        1,
        *FEW_TARGETS,
        *flags,
    ]


def test_two_processes_that_fill_one_cache_at_once(forked, train, pictures, tmp_path):
    both = [
        forked.start(command(pictures, "--resolution", 64, "--output_dir", name), tmp_path)
        for name in ("one", "two")
    ]
    for process in both:
        assert process.communicate()[1].count("Traceback") == process.returncode == 0
    assert train("third")[1] == (0, 7)
    one, two = (
        load_file(tmp_path / name / "lora_weights" / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-6)


def test_a_kill_while_encoding_loses_one_batch_at_most(forked, pictures, tmp_path):
    """Where a picture is a batch of its own."""
    for number in range(5, 13):
        Image.new("RGB", (256, 256), (number * 9, 80, 120)).save(
            pictures / f"megaman_{number:02d}.png"
        )
    one_by_one = {"megaman.data.vae_encoder.MAX_PIXELS_OTHERS": 256 * 256}
    words = command(pictures, "--resolution", 256, "--center_crop", "--output_dir")
    process = forked.start([*words, "out"], tmp_path, one_by_one)
    deadline = time.monotonic() + 200
    while (
        len(list(tmp_path.glob("cache/moments/*/*.safetensors"))) < 2
        and time.monotonic() < deadline
    ):
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    stored = len(list(tmp_path.glob("cache/moments/*/*.safetensors")))
    assert 2 <= stored < 12, "it was killed on the way"
    done = forked.run([*words, "out2"], tmp_path, one_by_one)
    assert done.returncode == 0, done.stderr
    assert f"encoded    {12 - stored} now, {stored} were" in done.stdout
