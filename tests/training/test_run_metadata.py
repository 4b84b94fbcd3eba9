"""The header of kohya's file: what A1111's LoRA list and ComfyUI's managers show about a run."""

from __future__ import annotations

import base64
import hashlib
import io
import json

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from megaman.data.captions import MAX_TAGS, count_tags, trigger_words
from megaman.training import run_metadata

FLAGS = [
    "--save_steps",
    2,
    "--lr_scheduler",
    "cosine",
    "--lr_warmup_steps",
    1,
    "--save_precision",
    "fp16",
]


@pytest.fixture(scope="module")
def folder(train_here, tmp_path_factory):
    """lora_weights/ of two steps on the demo's held-out images, with one sample image."""
    cwd = tmp_path_factory.mktemp("metadata")
    data = [
        "--data_dir",
        ROOT / "demo" / "held_out",
        "--max_train_steps",
        2,
        "--num_validation_images",
        1,
    ]
    train_here(cwd, "out", *data, *FLAGS)
    return cwd / "out" / "lora_weights"


@pytest.fixture(scope="module")
def header(folder):
    with safe_open(folder / "megaman_lora.safetensors", "pt") as file:
        return file.metadata()


def test_the_run_is_described(header):
    expected = {
        "ss_steps": "2",
        "ss_max_train_steps": "2",
        "ss_seed": "0",
        "ss_learning_rate": "0.0001",
        "ss_epoch": "1",
        "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "1",
        "ss_num_train_images": "8",
        "ss_resolution": "(64, 64)",
        "ss_mixed_precision": "no",
        "ss_network_dim": "4",
        "ss_network_alpha": "32",
        "ss_sd_model_name": "base",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_clip_skip": "None",
        "ss_output_name": "megaman_lora",
        "modelspec.title": "megaman_lora",
        "modelspec.resolution": "64x64",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.trigger_phrase": "volto",
    }
    assert {key: header[key] for key in expected} == expected
    assert int(header["ss_training_started_at"]) <= int(header["ss_training_finished_at"])
    assert header["modelspec.date"].endswith("+00:00")


def test_the_tables_are_json(header):
    captions = [
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "demo" / "held_out").glob("*.txt"))
    ]
    counted = json.loads(header["ss_tag_frequency"])["held_out"]
    assert counted["volto"] == len(captions) == 8
    assert set(counted) == {tag.strip() for caption in captions for tag in caption.split(",")}
    assert json.loads(header["ss_dataset_dirs"]) == {"held_out": {"n_repeats": 1, "img_count": 8}}
    assert json.loads(header["ss_bucket_info"])["buckets"]["0"] == {
        "resolution": [64, 64],
        "count": 8,
    }
    assert json.loads(header["ss_network_args"]) == {}


def test_the_hash_is_that_of_the_content(folder, header):
    content = (folder / "megaman_lora.safetensors").read_bytes()
    after = content[8 + int.from_bytes(content[:8], "little") :]
    assert header["sshs_model_hash"] == hashlib.sha256(after).hexdigest()
    assert header["modelspec.hash_sha256"] == "0x" + header["sshs_model_hash"]


def test_the_thumbnail_is_the_last_sample(folder, header):
    kind, _, data = header["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    sample = Image.open(folder.parent / "samples-2" / "00.png").convert("RGB")
    assert small.size == sample.size == (64, 64)
    means = [np.array(image).mean(axis=(0, 1)).sum() for image in (small, sample)]
    assert means[0] == pytest.approx(means[1], abs=9)


def test_the_precision_is_that_of_the_finished_files_alone(folder):
    """All three layouts have the requested precision, except alpha; what a resumed run needs stays
    in float32."""
    for name in ("adapter_model", "pytorch_lora_weights", "megaman_lora"):
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            kinds = {
                key.endswith(".alpha"): file.get_slice(key).get_dtype()
                for key in file.keys()  # noqa: SIM118
            }
        assert kinds == ({False: "F16", True: "F32"} if name == "megaman_lora" else {False: "F16"})
    with safe_open(folder.parent / "checkpoint-2" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F32"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        ([], ""),
        (["volto, blue", "volto, red", "a cat"], "volto"),
        (["volto, blue", "a cat"], ""),
        ([" mega man x ", "mega man x,"], "mega man x"),
    ],
)
def test_trigger_words_begin_most_captions(captions, words):
    assert trigger_words(captions) == words


@given(st.lists(st.text(), max_size=5))
def test_tags_are_what_stands_between_commas(captions):
    counted = count_tags(captions)
    assert all(tag == tag.strip() and tag and "," not in tag for tag in counted)
    assert sum(counted.values()) == sum(
        bool(tag.strip()) for caption in captions for tag in caption.split(",")
    )


def test_many_tags_keep_the_most_frequent():
    captions = ["volto, " + ", ".join(f"tag {i} {j}" for j in range(100)) for i in range(30)]
    counted = count_tags(captions)
    assert len(counted) == MAX_TAGS
    assert counted.most_common(1) == [("volto", 30)]


def test_a_missing_or_broken_image_costs_only_the_thumbnail(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    assert run_metadata.thumbnail(tmp_path / "none.png") is None
    assert run_metadata.thumbnail(tmp_path / "broken.png") is None
    Image.new("RGBA", (1024, 512)).save(tmp_path / "wide.png")
    data = str(run_metadata.thumbnail(tmp_path / "wide.png")).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 128)
