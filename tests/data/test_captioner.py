"""Captions that BLIP writes: a tiny one with random weights, whose captions depend on the picture
all the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

from megaman.data.caption_models import load_captioner
from megaman.data.captioner import caption_missing, without_caption_file, write_captions
from megaman.data.dataset import MegaManDataset
from megaman.data.folders import FolderConfig
from megaman.errors import UserError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "a",
    "red",
    "blue",
    "robot",
    "cat",
    "on",
    "white",
    "background",
    "with",
    "helmet",
]


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    """The folder of a BLIP in the files of today's transformers, its weights far enough from 0 to
    see the picture."""
    folder = tmp_path_factory.mktemp("blip")
    words = tmp_path_factory.mktemp("words") / "vocab.txt"
    words.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    common = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    text = {
        **common,
        "vocab_size": len(WORDS),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "sep_token_id": 3,
        "eos_token_id": 3,
        "bos_token_id": 5,
    }
    vision = {**common, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = BlipConfig(
        text_config=text, vision_config=vision, projection_dim=16, initializer_range=0.5
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    image_processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(image_processor, BertTokenizer(str(words))).save_pretrained(folder)
    return folder


@pytest.fixture
def own_blip(blip, tmp_path) -> Path:
    return shutil.copytree(blip, tmp_path / "own_blip")


@pytest.fixture
def bare(tmp_path) -> Path:
    """A folder with five pictures of which none has a caption."""
    folder = tmp_path / "bare"
    (folder / "more").mkdir(parents=True)
    for number, color in enumerate(["red", "blue", "white", "black", "orange"]):
        image = Image.new("RGB", (64 + 16 * number, 64), color)
        image.paste("green", (0, 0, 20, 10 * number + 1))
        image.save(folder / ("more" if number > 2 else ".") / f"{number}.png")
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))}


def caption(folder: Path, model: object) -> None:
    caption_missing(str(model), MegaManDataset(folder, None))


def test_each_picture_gets_what_the_model_says_of_it_alone(blip, bare, caplog):
    caplog.set_level("INFO", "megaman")
    caption(bare, blip)
    model = BlipForConditionalGeneration.from_pretrained(blip).eval()
    processor: Any = BlipProcessor(
        BlipImageProcessorPil.from_pretrained(blip), BertTokenizer.from_pretrained(blip)
    )
    wanted = {}
    for path in sorted(bare.rglob("*.png")):
        inputs = processor(images=Image.open(path), return_tensors="pt")
        ids = model.generate(**inputs, num_beams=3, max_length=20, min_length=5)[0]
        wanted[path.stem] = processor.decode(ids[1:], skip_special_tokens=True) + "\n"
    assert texts(bare) == wanted
    assert len(set(wanted.values())) == 5, "the captions depend on the images"
    assert caplog.messages == [
        f"captions   5 are missing: {blip} writes them",
        "           5 written as .txt next to the images, for you to read and edit",
    ]
    again = MegaManDataset(bare, None)
    assert again.num_written_captions == 5
    assert again.captions == [wanted[example.image.stem].strip() for example in again.examples]


def test_what_is_there_stays_as_it_is(blip, bare):
    (bare / "0.txt").write_bytes("un café".encode("cp1252"))
    (bare / "1.txt").write_bytes(b"")
    if os.name == "posix":
        (bare / "2.txt").symlink_to(bare / "nowhere")
    else:
        (bare / "2.txt").mkdir()

    def states() -> list[tuple]:
        files = [os.lstat(bare / name) for name in ("0.txt", "1.txt", "2.txt")]
        return [(file.st_ino, file.st_size, file.st_mtime_ns) for file in files]

    before = states()
    caption(bare, blip)
    assert states() == before
    assert not (bare / "nowhere").exists()
    assert set(texts(bare / "more")) == {"3", "4"}


def test_the_file_has_the_extension_that_is_read(blip, bare):
    (bare / "0.txt").write_text("not read", encoding="utf-8")
    (bare / "1.caption").touch()
    config = FolderConfig(caption_extension=".caption")
    caption_missing(str(blip), MegaManDataset(bare, None, config=config))
    again = MegaManDataset(bare, None, config=config)
    sources = [example.source for example in again.examples]
    assert sources.count("from .caption files") == len(again) - 1, "all but the empty one"
    assert [path.name for path in bare.rglob("*.txt")] == ["0.txt"]


def test_a_file_that_comes_while_it_works_stays_too(blip, bare):
    pictures = without_caption_file(sorted(bare.rglob("*.png")))

    def somebody_writes(paths):
        for path in paths:
            path.with_suffix(".txt").write_text("mine", encoding="utf-8")
            yield path

    assert write_captions(load_captioner(str(blip)), pictures, somebody_writes) == 0
    assert set(texts(bare).values()) == {"mine"}


def test_a_second_run_loads_no_model(blip, bare, caplog):
    caption(bare, blip)
    before = texts(bare)
    caplog.clear()
    caplog.set_level("INFO", "megaman")
    caption(bare, "no/such-model")
    assert caplog.messages == ["captions   none is missing: --auto_caption has nothing to do"]
    assert texts(bare) == before


def test_a_stopped_captioning_goes_on_where_it_was(blip, bare):
    captioner = load_captioner(str(blip))
    captioner.batch_size = 2

    def stopped(paths):
        yield from paths[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_captions(captioner, without_caption_file(sorted(bare.rglob("*.png"))), stopped)
    first = texts(bare)
    assert set(first) == {"0", "1"}
    left = without_caption_file(sorted(bare.rglob("*.png")))
    assert [path.stem for path in left] == ["2", "3", "4"]
    assert write_captions(captioner, left) == 3
    assert {name: texts(bare)[name] for name in first} == first and len(texts(bare)) == 5


def test_damaged_pictures_and_pictures_of_one_stem(blip, bare):
    (bare / "1.png").write_bytes((bare / "1.png").read_bytes()[:60])
    shutil.copy(bare / "2.png", bare / "2.bmp")
    caption(bare, blip)
    assert set(texts(bare)) == {"0", "2", "3", "4"}


@pytest.mark.slow
def test_too_little_memory_halves_the_batch(blip, bare, monkeypatch):
    captioner = load_captioner(str(blip))
    pixels = torch.stack(
        [captioner.pixel_values(Image.open(path)) for path in sorted(bare.rglob("*.png"))]
    )
    wanted, real, sizes = (
        captioner.generate_captions(pixels),
        BlipForConditionalGeneration.generate,
        [],
    )

    def small_gpu(self, pixel_values, **settings):
        sizes.append(len(pixel_values))
        if len(pixel_values) > most:
            raise torch.OutOfMemoryError("CUDA out of memory (on purpose)")
        return real(self, pixel_values, **settings)

    monkeypatch.setattr(BlipForConditionalGeneration, "generate", small_gpu)
    most = 2
    assert captioner.generate_captions(pixels) == wanted
    assert (captioner.batch_size, sizes) == (2, [5, 5, 4, 2, 2, 1])
    most = 0
    with pytest.raises(UserError, match="more memory than there is"):
        captioner.generate_captions(pixels)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has other rights")
def test_a_folder_that_cannot_be_written(blip):
    """Said before a model is loaded. Root may write everywhere, so it steps aside for this."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (20, 20)).save(folder / "a.png")
        folder.chmod(0o555)
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(UserError, match=re.escape(f"{folder} cannot be written")):
                caption(folder, "no/such-model")
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)
        assert not texts(folder)


@pytest.mark.skipif(os.name != "posix", reason="another longest name")
def test_a_file_that_cannot_be_written(blip, tmp_path):
    """Only the writing shows it here: the name is too long for the file that is written aside."""
    long = tmp_path / f"{'a' * 250}.png"
    Image.new("RGB", (20, 20)).save(long)
    with pytest.raises(UserError, match=r"cannot be written .*name too long"):
        caption(tmp_path, blip)


def without_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("vision_model.embeddings.class_embedding")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}),
            encoding="utf-8",
        )

    return change


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def a_pickle_in_disguise(folder: Path) -> None:
    torch.save({}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (
            lambda folder: (folder / "config.json").write_text("[1]"),
            "no BLIP or Florence-2 that writes captions",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (
            change_config(model_type="blip-2"),
            "no BLIP or Florence-2 that writes captions but a blip-2",
        ),
        (
            change_config(architectures=["BlipForQuestionAnswering"]),
            "no BLIP or Florence-2 that writes captions",
        ),
        (
            change_config(auto_map={"AutoModel": "x--y.Z"}),
            "asks for code or weights from elsewhere",
        ),
        (change_config(vision_config={"hidden_size": "many"}), "cannot be loaded"),
        (only_pickles, "only pickles"),
        (a_pickle_in_disguise, "is a pickle whatever its name says"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\1" * 99), "cannot be loaded"),
        (without_weights, "it lacks vision_model.embeddings.class_embedding"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        (
            lambda folder: (folder / "processor_config.json").unlink(),
            "preprocessor_config.json is missing",
        ),
        (lambda folder: (folder / "processor_config.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_used_ends_in_one_line(own_blip, spoil, message):
    spoil(own_blip)
    with pytest.raises(UserError) as caught:
        load_captioner(str(own_blip))
    line = str(caught.value)
    assert message in line and "\n" not in line and str(own_blip) in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "is neither a folder on this machine nor a name on the hub"),
        ("/no/such/folder", "is neither a folder on this machine nor a name on the hub"),
        ("someone/blip", "cannot be downloaded"),
        ("model.bin", "is a pickle, which can run code"),
        (__file__, "is a file, not a model's folder"),
    ],
)
def test_a_name_that_is_no_model_ends_in_one_line(name, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_captioner(name)
    assert "--auto_caption" in str(caught.value)


def test_the_vocabulary_alone_is_enough(own_blip, bare):
    """The authors' own files: vocab.txt and preprocessor_config.json, as the hub has them."""
    before = load_captioner(str(own_blip))
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (own_blip / name).unlink()
    (own_blip / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    BlipImageProcessorPil().save_pretrained(own_blip)
    after = load_captioner(str(own_blip))
    pixels = torch.stack(
        [before.pixel_values(Image.open(path)) for path in sorted(bare.rglob("*.png"))]
    )
    assert torch.equal(pixels[0], after.pixel_values(Image.open(bare / "0.png")))
    strip = re.compile(r" ?\[DEC\]")  # not a special token unless a file says so
    assert [strip.sub("", text) for text in after.generate_captions(pixels)] == [
        strip.sub("", text) for text in before.generate_captions(pixels)
    ]


def test_the_script_captions_before_it_trains(blip, bare, base_folder, forked, tmp_path):
    (bare / "0.txt").write_text("a person wrote this", encoding="utf-8")
    flags = "--resolution 64 --max_train_steps 1 --num_validation_images 0 --seed 0"
    words = [
        "--pretrained_model_name",
        base_folder,
        "--data_dir",
        bare,
        "--auto_caption",
        blip,
        *flags.split(),
    ]
    done = forked.run(["megaman_lora.py", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "captions   4 are missing" in done.stdout and "captions   5 from .txt files" in done.stdout
    )
    bars = {line.split(":")[0] for line in re.split(r"[\r\n]+", done.stderr) if line.strip()}
    assert bars == {"captioning"}, "nothing but its bar, and no library's word"
    tags = (tmp_path / "megaman_lora_output" / "lora_weights" / "README.md").read_text(
        encoding="utf-8"
    )
    assert "5 captions were written" in tags
    assert texts(bare)["0"] == "a person wrote this"


def test_with_check_data_it_captions_reports_and_trains_nothing(blip, bare, forked, tmp_path):
    flags = [
        "--data_dir",
        bare,
        "--auto_caption",
        blip,
        "--check_data",
        "--caption_extension",
        ".cap",
    ]
    done = forked.run(["megaman_lora.py", *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 written as .cap next to the images" in done.stdout
    assert len(list(bare.rglob("*.cap"))) == 5 and not texts(bare)
    left = sorted(path.name for path in (tmp_path / "megaman_lora_output").iterdir())
    assert left == ["dataset_report.html", "dataset_report.json"]
    report = (tmp_path / "megaman_lora_output" / "dataset_report.json").read_text(encoding="utf-8")
    assert "without a caption" not in report, "the report is of the folder as it is now"


def test_images_that_are_not_trained_on_get_no_caption_and_are_named(blip, bare, caplog):
    images = sorted(bare.rglob("*.png"))
    named = images[0].relative_to(bare).as_posix()
    (bare / "metadata.jsonl").write_text(json.dumps({"file_name": named, "text": " "}))
    (bare / "0_away").mkdir()
    shutil.copy(images[0], bare / "0_away" / "x.png")
    before = texts(bare)
    dataset = MegaManDataset(bare, None)
    away = {path.relative_to(bare).as_posix() for path in dataset.sorted_out}
    assert "0_away/x.png" in away and len(away) > 1
    with caplog.at_level("INFO"):
        caption_missing(str(blip), dataset)
    (line,) = [text for text in caplog.messages if "not trained on" in text]
    assert all(name in line for name in away)
    written = {path for path in bare.rglob("*.txt") if path.stem not in before}
    assert all((bare / name).with_suffix(".txt") not in written for name in away)
