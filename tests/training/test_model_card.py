"""README.md in lora_weights/: read by the hub's own parser, true to the run, and plain text
whatever the names are."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from megaman.config.train import parse_train_config
from megaman.data.captions import tidy
from megaman.training import model_card

SETTINGS = parse_train_config([]).settings()
CONFIG = {
    "settings": {**SETTINGS, "seed": 7},
    "base": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "total_steps": 12,
    "warmup_steps": 1,
    "buckets": None,
    "class_pictures": 0,
    "dtype": "float32",
    "versions": {"torch": "2", "peft": "0"},
}
CAPTIONS = ["volto, blue", "volto, red", "a cat"]


def card_of(samples, captions=CAPTIONS, found=2, **changes) -> ModelCard:
    files = model_card.write_card({**CONFIG, **changes}, captions, found, samples)
    return ModelCard(files["README.md"].decode())


def test_a_run_leaves_its_card(train_here, embedded_base, tmp_path):
    """On the embedded base, whose license it names."""
    data = ["--data_dir", ROOT / "demo" / "held_out", "--validation_prompt", "volto | `x`, robot"]
    train_here(
        tmp_path,
        "out",
        *data,
        "--pretrained_model_name",
        embedded_base,
        "--max_train_steps",
        1,
        "--num_validation_images",
        2,
        "--lora_dropout",
        0.25,
    )
    folder = tmp_path / "out" / "lora_weights"
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["license"] == "cc-by-4.0"
    assert card.data.to_dict()["instance_prompt"] == "volto"
    assert {"lora", "stable-diffusion"} <= set(card.data.to_dict()["tags"])
    assert [entry["text"] for entry in card.data.to_dict()["widget"]] == ["volto | `x`, robot"] * 2
    for number, file in enumerate(["sample_00.png", "sample_01.png"]):
        assert card.data.to_dict()["widget"][number]["output"]["url"] == file
        assert f"]({file})" in card.text
        assert (folder / file).read_bytes() == (
            tmp_path / "out" / "samples-1" / f"{number:02d}.png"
        ).read_bytes()
    assert "trained on 8 images" in card.text
    assert "8 captions were written, 0 made from names of files or folders" in card.text
    rows = dict(re.findall(r"^\| (\S+) \| `(.+)` \|$", card.text, flags=re.MULTILINE))
    assert (rows["lora_rank"], rows["lora_dropout"], rows["steps"], rows["seed"]) == (
        "4",
        "0.25",
        "1",
        "0",
    )
    assert str(tmp_path) not in card.content and str(ROOT) not in card.content
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
        *("megaman_lora.safetensors", "README.md", "sample_00.png", "sample_01.png"),
        "training_images.safetensors",
    }


def test_a_base_on_the_hub_is_linked_with_its_license(tmp_path):
    card = card_of(tmp_path / "none")
    assert card.data.to_dict()["base_model"] == CONFIG["base"]
    assert card.data.to_dict()["license"] == "creativeml-openrail-m"
    assert f"https://huggingface.co/{CONFIG['base']}" in card.text
    assert "widget" not in card.content and "## Samples" not in card.text
    other = card_of(tmp_path / "none", base="somebody/else")
    assert (other.data.to_dict()["base_model"], other.data.to_dict()["license"]) == (
        "somebody/else",
        "other",
    )
    assert "Look up the license of the base" in other.text


def test_a_local_base_is_named_without_its_path(tmp_path):
    card = card_of(tmp_path / "none", base=str(tmp_path / "secret place" / "my base"))
    assert "my base" in card.text and "secret" not in card.content
    assert "base_model" not in card.data.to_dict()


@pytest.mark.parametrize(
    ("base", "link", "source"),
    [
        (
            "demo/base",
            "the small one in the folder `demo/base` of the project",
            "PATH/TO/demo/base",
        ),
        ("/home/me/my base", "`my base`", "PATH/TO/my base"),
        ("/home/me/mine.safetensors", "`mine.safetensors`", "PATH/TO/mine.safetensors"),
        ("some/base", "[some/base](https://huggingface.co/some/base)", "some/base"),
    ],
)
def test_the_base_is_named_once_and_where_it_is(tmp_path, base, link, source):
    text = card_of(tmp_path / "none", base=base).text
    assert f"trained on 3 images. Its base is {link}" in text
    assert f"The base is {link}" in text and "the base the" not in text
    paths = re.findall(r'from_(?:pretrained|single_file)\("(.*?)"', text)
    assert paths == [source, source]
    assert ("in place of `PATH/TO`" in text) == source.startswith("PATH/TO")


def test_one_image_is_one_image(tmp_path):
    text = card_of(tmp_path / "none", ["a cat"], 1, class_pictures=1).text
    assert "trained on 1 image." in text and "1 image; 1 caption was written, 0 made" in text
    assert "1 regularization image, whose" in text


def test_it_says_how_to_load_in_each_program(tmp_path):
    text = card_of(tmp_path / "none").text
    sources = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(sources) == 2
    for source in sources:
        compile(source, "card", "exec")
    assert "<lora:megaman_lora:1>" in text
    for program in ("A1111", "ComfyUI", "diffusers", "PEFT", "generate_megaman.py"):
        assert program in text


@pytest.mark.parametrize(("captions", "named"), [(["a", "b"], False), (["a, x", "a"], True)])
def test_the_trigger_is_named_where_there_is_one(tmp_path, captions, named):
    card = card_of(tmp_path / "none", captions)
    assert (
        ("instance_prompt" in card.data.to_dict())
        == named
        == ("in the prompt: most of" in card.text)
    )


@given(st.text(min_size=1), st.text())
def test_whatever_the_texts_are_the_head_is_yaml_and_says_them(prompt, caption):
    files = model_card.write_card(
        {
            **CONFIG,
            "settings": {
                **CONFIG["settings"],
                "validation_prompt": prompt,
                "target_modules": [prompt],
            },
        },
        [caption.replace(",", " ")],
        0,
        ROOT / "megaman" / "nowhere",
    )
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict().get("instance_prompt", "") == tidy(caption.replace(",", " ").strip())


@given(st.text(alphabet="`|\\ \nab"))
def test_code_stays_code(text):
    """The fence is longer than any in the text, so nothing in it can close it."""
    shown = model_card.code(text)
    if not text.strip():
        assert shown == ""
        return
    pattern = "(`+) " if text.split()[0].startswith("`") else "(`+)"
    (fence,) = re.findall(f"^{pattern}", shown)
    inside = shown[len(fence) : -len(fence)]
    assert fence not in inside and shown.endswith(fence)
    assert "\n" not in shown
    assert inside.strip() == " ".join(text.split())
