"""Everything that can be wrong with pictures and captions, in one folder: the good is trained on,
the bad is named."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import rotten
import torch
from conftest import FEW_TARGETS
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from megaman.data.captions import JOINERS, caption_for, caption_from_name
from megaman.data.dataset import MegaManDataset
from megaman.data.encoding import encode_dataset
from megaman.data.file_index import FileIndex
from megaman.data.image_files import find_images
from megaman.data.images import open_image
from megaman.data.latent_cache import LatentCache
from megaman.data.problems import check_usable, printable, write_problems
from megaman.data.vae_encoder import EncodingConfig
from megaman.errors import UserError
from megaman.models.base import load_base

# As on Windows and macOS: workers start anew, and what is printed goes into an old code page.
SPAWNING = """
import multiprocessing, sys
import megaman_lora
from megaman.errors import run_script
multiprocessing.set_start_method("spawn", force=True)
sys.exit(run_script(megaman_lora.main, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    corpus = rotten.make(tmp_path_factory.mktemp("rotten") / "pictures")
    yield corpus
    for path, reason in corpus.bad.items():
        if reason == "Permission denied":
            path.chmod(0o700)


def plain(path: Path) -> str:
    """A path as a JSON file can hold it."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def listed(output_dir: Path) -> dict[str, dict[str, str]]:
    """dataset_problems.json as {kind: {path: text}}; no path may be there twice."""
    content = json.loads((output_dir / "dataset_problems.json").read_text(encoding="utf-8"))
    problems: dict[str, dict[str, str]] = {}
    for kind, entries in content.items():
        texts = {}
        for entry in entries:
            path = entry.pop("path")
            assert path not in texts
            (texts[path],) = entry.values()
        problems[kind] = texts
    return problems


def assert_reports(reported: dict[str, str], wanted: dict[Path, str]) -> None:
    assert reported.keys() == {plain(path) for path in wanted}
    for path, pattern in wanted.items():
        assert re.search(pattern, reported[plain(path)]), path


@pytest.mark.slow(weight=12)
def test_the_whole_corpus_trains_and_names_what_is_bad(
    corpus, base_folder, forked, train_here, tmp_path
):
    """As a process whose workers are spawned and whose console is Windows' old one."""
    assert len(corpus.bad) <= len(corpus.good)
    words = [
        "--pretrained_model_name",
        base_folder,
        "--data_dir",
        corpus.folder,
        "--output_dir",
        "out",
    ]
    flags = (
        "--resolution 64 --num_validation_images 0 --seed 0 --max_train_steps 2 "
        "--dataloader_num_workers 2 --target_modules to_q to_v"
    )
    console = {"PYTHONIOENCODING": "cp1252"}
    done = forked.run(["-c", SPAWNING, *words, *flags.split()], tmp_path, env=console)
    assert done.returncode == 0, done.stderr
    problems = listed(tmp_path / "out")
    assert_reports(problems["left_out"], corpus.bad)
    assert_reports(problems["captions"], corpus.warnings)
    assert f"images     {len(corpus.good)} in" in done.stdout
    named = re.findall(r"^skipped: (.*?): ", done.stdout, flags=re.MULTILINE)
    wanted = [
        printable(plain(path)).encode("cp1252", "backslashreplace").decode("cp1252")
        for path in corpus.bad
    ]
    assert sorted(named) == sorted(wanted), "each one once"
    assert f"{len(corpus.bad)} of {len(corpus.bad) + len(corpus.good)} files skipped" in done.stdout
    noise = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert [line for line in noise if not line.startswith(("encoding:", "training:"))] == []

    spawned = load_file(tmp_path / "out" / "lora_weights" / "adapter_model.safetensors")
    few = ["--max_train_steps", 2, *FEW_TARGETS]
    alone = train_here(tmp_path, "alone", "--data_dir", corpus.folder, *few)
    assert spawned.keys() == alone.keys()
    assert all(torch.equal(spawned[key], alone[key]) for key in alone), "workers only decode"


def test_every_good_picture_is_used_with_its_caption(corpus):
    dataset = MegaManDataset(corpus.folder, None, size=64)
    dataset.check()
    images = {example.image for example in dataset.examples}
    decoded = {image for image in images if corpus.bad.get(image) is None}
    assert decoded == set(corpus.good)
    for picture in corpus.good:
        assert open_image(picture).mode == "RGB"
    captions = {example.image: example.caption for example in dataset.examples}
    for picture, text in corpus.captions.items():
        assert captions[picture] == (caption_from_name(picture) if text is None else text)


def test_only_bad_files(forked, corpus, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, (content, _) in rotten.bad_contents().items():
        with contextlib.suppress(OSError, UnicodeError):
            (folder / name).write_bytes(content)
    for name in rotten.bad_contents():
        if name.startswith("cut.") or name == "garbled.png":
            (folder / name).unlink(missing_ok=True)  # their headers are good: see below
    done = forked.run(["megaman_lora.py", "--data_dir", folder, "--output_dir", "out"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "holds no image that can be used" in done.stderr
    assert listed(tmp_path / "out")["left_out"].keys() == {str(path) for path in folder.iterdir()}


@pytest.fixture
def mostly_bad(pictures):
    """Two good pictures, one whose header is bad and two that can be seen to be cut only when they
    are decoded."""
    (pictures / "megaman_01.png").write_bytes(b"")
    for name in ("megaman_02.png", "megaman_03.png"):
        whole = rotten.encoded(rotten.noise(1), "PNG")
        (pictures / name).write_bytes(whole[:4000])
    rotten.picture(1).save(pictures / "megaman_05.png")
    return pictures


def test_more_bad_than_good_asks_before_a_model_is_loaded(forked, pictures, tmp_path):
    for name in ("a.png", "b.gif", "c.jpg", "d.png", "e.png"):
        (pictures / name).write_bytes(b"")
    for flag, remedy in (
        ([], "--skip_bad_images"),
        (["--skip_bad_images"], "The base nowhere/nothing is not"),
    ):
        words = [
            "megaman_lora.py",
            "--data_dir",
            pictures,
            "--pretrained_model_name",
            "nowhere/nothing",
            *flag,
        ]
        done = forked.run([*words, "--output_dir", f"out{len(flag)}"], tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert remedy in done.stderr
    done = forked.run([*words[:-1], "--output_dir", "out0"], tmp_path)
    assert "5 of the 9 files" in done.stderr and "other 4" in done.stderr
    assert len(listed(tmp_path / "out0")["left_out"]) == 5, (
        "it is reported all the same, and can be tried again"
    )


def test_those_that_fail_only_when_decoded_count_as_well(train_here, mostly_bad, tmp_path, capsys):
    flags = ["--data_dir", mostly_bad, "--max_train_steps", 1]
    with pytest.raises(UserError, match=r"3 of the 5 files.*other 2 with --skip_bad_images"):
        train_here(tmp_path, "out", *flags)
    names = {str(mostly_bad / f"megaman_0{number}.png") for number in (1, 2, 3)}
    assert listed(tmp_path / "out")["left_out"].keys() == names
    output = capsys.readouterr().out
    assert all(output.count(name) == 1 for name in names), "in one summary"
    train_here(tmp_path, "out", *flags, "--skip_bad_images")
    assert "images     2 in" in capsys.readouterr().out


def test_a_file_of_an_earlier_run_goes_with_its_problems(train_here, pictures, tmp_path, capsys):
    (pictures / "broken.png").write_bytes(b"")
    flags = ["--data_dir", pictures, "--max_train_steps", 1, "--overwrite_output"]
    train_here(tmp_path, "out", *flags)
    assert len(listed(tmp_path / "out")["left_out"]) == 1
    (pictures / "broken.png").unlink()
    train_here(tmp_path, "out", *flags)
    assert not (tmp_path / "out" / "dataset_problems.json").exists()


def test_half_is_not_too_bad(pictures):
    for number in range(4):
        (pictures / f"bad_{number}.png").write_bytes(b"")
    dataset = MegaManDataset(pictures, None)
    dataset.check()
    check_usable([dataset], skip_bad=False)
    dataset.drop({pictures / "megaman_01.png": "gone"})
    with pytest.raises(UserError, match="--skip_bad_images"):
        check_usable([dataset], skip_bad=False)
    check_usable([dataset], skip_bad=True)
    dataset.drop({example.image: "gone" for example in dataset.examples})
    with pytest.raises(UserError, match="holds no image"):  # no flag trains on nothing
        check_usable([dataset], skip_bad=True)


def test_files_that_vanish_on_the_way(pictures, base_folder, tmp_path):
    """One after it was listed, one after its header was read."""
    dataset = MegaManDataset(pictures, None, size=32)
    (pictures / "megaman_01.png").unlink()
    dataset.check()
    (pictures / "megaman_04.png").unlink()
    vae = load_base(str(base_folder), torch.float32).vae
    moments = encode_dataset(
        lambda: vae, dataset, EncodingConfig(), FileIndex(None), LatentCache(None)
    )
    assert len(moments) == len(dataset) == 2
    write_problems(tmp_path / "dataset_problems.json", [dataset])
    wanted = {pictures / f"megaman_0{number}.png": "No such file" for number in (1, 4)}
    assert_reports(listed(tmp_path)["left_out"], wanted)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has other rights")
def test_what_may_not_be_read():
    """Root may read everything, so it steps aside for this."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for path in ("open/a.png", "open/b.png", "shut/c.png"):
            (folder / path).parent.mkdir(exist_ok=True)
            Image.new("RGB", (20, 20)).save(folder / path)
        (folder / "open" / "b.txt").write_text("robot")
        shut = [folder / path for path in ("open/a.png", "open/b.txt", "shut")]
        for path in shut:
            path.chmod(0)
        try:
            if root:
                os.seteuid(65534)
            dataset = MegaManDataset(folder, None)
            dataset.check()
            assert [example.image.name for example in dataset.examples] == ["b.png"]
            assert set(dataset.skipped) == {folder / "open" / "a.png", folder / "shut"}
            assert all("Permission denied" in reason for reason in dataset.skipped.values())
            warning = dataset.examples[0].caption_warning
            assert warning is not None and warning[0] == folder / "open" / "b.txt"
            assert "Permission denied" in warning[1]
        finally:
            if root:
                os.seteuid(0)
            for path in shut:
                path.chmod(0o700)


def test_a_caption_file_of_two_pictures_is_named_once(pictures, tmp_path):
    (pictures / "megaman_01.txt").write_bytes("café".encode("cp1252"))
    Image.open(pictures / "megaman_01.png").save(pictures / "megaman_01.jpg")
    dataset = MegaManDataset(pictures, None)
    lines = write_problems(tmp_path / "dataset_problems.json", [dataset])
    assert len([line for line in lines if "megaman_01.txt" in line]) == 1
    assert "0 of 5 files skipped, 1 captions with warnings" in lines[-1]
    assert listed(tmp_path)["captions"].keys() == {str(pictures / "megaman_01.txt")}


def test_a_caption_of_a_picture_that_is_skipped_does_not_matter(pictures, tmp_path):
    (pictures / "megaman_01.txt").write_bytes("café".encode("cp1252"))
    dataset = MegaManDataset(pictures, None)
    assert caption_for(pictures / "megaman_01.png").warning
    dataset.drop({pictures / "megaman_01.png": "gone"})
    write_problems(tmp_path / "dataset_problems.json", [dataset])
    assert listed(tmp_path) == {
        "left_out": {str(pictures / "megaman_01.png"): "gone"},
        "captions": {},
        "made_captions": {},
        "cut_captions": {},
    }


@given(st.text(max_size=40) | st.text("a\n\r\x1b\x9b\u202e\ud800\u200d🤖 ", max_size=20))
def test_a_printed_name_cannot_break_its_line(text):
    line = printable(text)
    assert len(line.splitlines()) <= 1 and all(
        mark.isprintable() or mark in JOINERS for mark in line
    )
    assert printable(line) == line
    if all(mark.isprintable() for mark in text):
        assert line == text


def test_the_corpus_is_found_as_it_was_made(corpus):
    pictures, others = find_images(corpus.folder)
    assert len(set(pictures)) == len(pictures), "no link leads to a picture twice"
    assert set(pictures) | set(others) == set(corpus.good) | set(corpus.bad)
