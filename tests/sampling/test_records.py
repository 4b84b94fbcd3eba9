"""An image's record: read back as it was, read by A1111 whatever stands in it, refused where it is
a trap."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_png import A1111_PAIR, read_pairs

from megaman.config import samplers
from megaman.errors import UserError
from megaman.sampling import png, record_reader, records
from megaman.sampling.jobs import Job, make_variants
from megaman.sampling.records import KEY, Record, Recorder, RunSettings

JOB = Job(3, 1, "a blue robot", "blurry", 43, 64, 128, 20, 7.5)
RUN = RunSettings(
    scheduler="euler_a",
    clip_skip=2,
    base="demo/base",
    fused=True,
    device="cpu",
    dtype="float32",
    versions={"torch": "2.13.0"},
    memory_format="contiguous",
    threads=0,
)
(VARIANT,) = make_variants([(Path("out/lora_weights"), 0.8)], [0.5], one_by_one=False)
HASHES = {Path("out/lora_weights"): "0123456789ab"}
RECORD = Recorder(RUN, HASHES).record(JOB, [replace(JOB, seed=42), JOB], VARIANT)


def test_it_is_read_back_with_the_picture(tmp_path):
    records.save(tmp_path / "a.png", Image.new("RGB", (64, 128), "red"), RECORD)
    assert record_reader.read_record(tmp_path / "a.png") == RECORD
    assert RECORD.place == 1 and [job.seed for job in RECORD.jobs()] == [42, 43]
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"] == records.parameters_text(RECORD)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_a1111_shows_loras_sampler_and_clip_skip():
    first, negative, last = records.parameters_text(RECORD).split("\n")
    assert first == "a blue robot <lora:megaman_lora:0.4>" and negative == "Negative prompt: blurry"
    pairs = read_pairs(last)
    assert pairs["Sampler"] == "Euler a" and pairs["Clip skip"] == "2" and pairs["Size"] == "64x128"
    assert pairs["Lora hashes"] == "megaman_lora: 0123456789ab"
    plain = Recorder(replace(RUN, clip_skip=1), HASHES).record(
        JOB, [JOB], VARIANT, without_lora=True
    )
    assert not {"Clip skip", "Lora hashes"} & read_pairs(records.parameters_text(plain)).keys()
    assert "<lora" not in records.parameters_text(plain)


odd_marks = st.sampled_from(list("abc ,:\"\\\n\r\t()[]<>{}洛克人🤖é'"))
odd = st.text(odd_marks | st.characters(blacklist_categories=["Cs"]), max_size=80)


@pytest.mark.slow
@settings(max_examples=1000)
@given(prompt=odd, negative=odd, name=odd.map(str.strip).filter(bool))
def test_a1111_reads_a_thousand_prompts(prompt, negative, name):
    """Commas, quotes, line breaks, Chinese, emoji: the last line stays the settings, the rest stays
    the prompts."""
    text = records.parameters_text(
        replace(
            RECORD,
            prompt=prompt,
            negative_prompt=negative,
            loras=[[f"{name}.safetensors", 0.8, "0123456789ab"]],
        )
    )
    *head, last = text.strip().split("\n")
    assert len(A1111_PAIR.findall(last)) >= 3, "A1111 takes the last line for settings only then"
    pairs = read_pairs(last)
    assert (pairs["Seed"], pairs["Steps"], pairs["Sampler"]) == ("43", "20", "Euler a")
    assert pairs["Lora hashes"].endswith(": 0123456789ab")
    lines = "\n".join(head)
    before, _, after = (
        lines.rpartition("\nNegative prompt: ") if negative.strip() else (lines, "", "")
    )
    assert after.strip() == negative.strip() and before.startswith(prompt.lstrip())


@given(st.data())
def test_any_record_is_read_or_refused_in_a_line(tmp_path_factory, data):
    """A stranger's image: each field replaced by anything."""
    folder = tmp_path_factory.getbasetemp() / "any_record"
    folder.mkdir(exist_ok=True)
    json_value = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
        ),
        max_leaves=4,
    )
    content = asdict(RECORD)
    name = data.draw(st.sampled_from(sorted(content)))
    content[name] = data.draw(json_value)
    png.save_png(folder / "a.png", Image.new("RGB", (8, 8)), "", {KEY: json.dumps(content)})
    try:
        record = record_reader.read_record(folder / "a.png")
    except UserError as error:
        assert "a.png" in str(error) and "\n" not in str(error)
        assert record_reader.find_record(folder / "a.png") is None
    else:
        assert isinstance(record, Record) and getattr(record, name) == content[name]
        assert samplers.find(record.scheduler) and record.jobs()[record.place].seed is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base": "//host/share"}, "base"),
        ({"base": "\\\\host\\share"}, "base"),
        ({"base": ""}, "base"),
        ({"loras": [["\\\\host\\share\\x.safetensors", 1.0, ""]]}, "loras"),
        ({"loras": [["//host/x.safetensors", 1, ""]]}, "loras"),
        ({"loras": [["a", 99, ""]]}, "loras"),
        ({"steps": 10**9}, "steps"),
        ({"width": 2**20}, "width"),
        ({"height": 65}, "height"),
        ({"scheduler": "torch"}, "scheduler"),
        ({"dtype": "int8"}, "dtype"),
        ({"memory_format": ["channels_last"]}, "memory_format"),
        ({"threads": -1}, "threads"),
        ({"threads": 10**6}, "threads"),
        ({"place": 2}, "place"),
        ({"batch": []}, "batch"),
        ({"seed": -1}, "seed"),
        ({"prompt": "\ud800"}, "prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_image_of_ours_can_say_is_refused(tmp_path, changes, named):
    png.save_png(
        tmp_path / "a.png",
        Image.new("RGB", (8, 8)),
        "",
        {KEY: json.dumps({**asdict(RECORD), **changes})},
    )
    with pytest.raises(UserError, match=rf"a\.png: {named} in its record"):
        record_reader.read_record(tmp_path / "a.png")


def test_other_files_are_refused_in_a_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png", format="JPEG")
    png.save_png(tmp_path / "half.png", Image.new("RGB", (8, 8)), "", {KEY: '{"prompt":'})
    png.save_png(tmp_path / "old.png", Image.new("RGB", (8, 8)), "", {KEY: '{"prompt": "a"}'})
    (tmp_path / "text.png").write_text("no picture")
    reasons = {
        "plain": "no record",
        "photo": "not a PNG",
        "half": "damaged",
        "old": "damaged",
        "text": "not a PNG",
        "none": "missing",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=rf"{name}\.png.*{reason}"):
            record_reader.read_record(tmp_path / f"{name}.png")


def test_an_earlier_record_tells_no_memory_format(tmp_path):
    later = ("memory_format", "threads", "vae_tile")
    earlier = {key: value for key, value in asdict(RECORD).items() if key not in later}
    png.save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), "", {KEY: json.dumps(earlier)})
    assert record_reader.read_record(tmp_path / "a.png").memory_format == "contiguous"
    assert record_reader.read_record(tmp_path / "a.png").threads == 0
    assert record_reader.read_record(tmp_path / "a.png").vae_tile == 0


def test_the_identity_is_what_the_user_chose():
    elsewhere = replace(
        RECORD, device="cuda", dtype="float16", fused=False, batch=[["x", "", 1]] * 3, place=2
    )
    assert elsewhere.identity == RECORD.identity
    for change in (
        {"seed": 1},
        {"prompt": "b"},
        {"loras": []},
        {"lora_scale": 1.0},
        {"clip_skip": 1},
        {"base": "x"},
    ):
        assert replace(RECORD, **change).identity != RECORD.identity


def test_the_page_tells_what_drew():
    image = records.gallery_image("a.png", RECORD)
    assert image.settings == {
        "steps": 20,
        "guidance": 7.5,
        "sampler": "Euler a",
        "clip skip": 2,
        "LoRA": Path("out/lora_weights").absolute().as_posix(),
        "strength": "0.4",
        "base": "demo/base",
    }
    assert image.loras == [Path("out/lora_weights").absolute().as_posix()]
    two = replace(RECORD, loras=[["a", 0.8, "x"], ["b", 1.0, "y"]])
    assert records.gallery_image("a.png", two).loras == ["a:0.8", "b:1"]
    assert records.gallery_image("a.png", two).settings["LoRA"] == "a:0.8, b:1"
