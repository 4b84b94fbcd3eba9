"""Florence-2 as a captioner: a tiny one with random weights, whose captions depend on the image all
the same. BLIP's tests are in test_captioner.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    BartTokenizer,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
)

from megaman.data.caption_models import (
    FLORENCE_GENERATION,
    FLORENCE_OPENING,
    FLORENCE_PROMPT,
    load_captioner,
)
from megaman.data.captioner import caption_missing
from megaman.data.dataset import MegaManDataset
from megaman.errors import UserError

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = ["\u0120a", "\u0120red", "\u0120blue", "\u0120robot", "\u0120cat", "\u0120on"]
# Byte-level BPE writes a space so.
LETTERS = sorted(set((FLORENCE_PROMPT + FLORENCE_OPENING).replace(" ", "\u0120")))


@pytest.fixture(scope="module")
def florence(tmp_path_factory) -> Path:
    """The folder of a Florence-2 as transformers saves it, its weights far enough from 0 to see the
    image."""
    folder = tmp_path_factory.mktemp("florence")
    vocabulary = {token: index for index, token in enumerate(SPECIAL + LETTERS + WORDS)}
    tokenizer: Any = BartTokenizer(
        vocab=vocabulary, merges=[], extra_special_tokens={"image_token": "<image>"}
    )
    common = {"num_heads": [1] * 4, "num_groups": [1] * 4, "window_size": 2}
    vision = {**common, "depths": [1] * 4, "embed_dim": [8] * 4, "projection_dim": 16}
    text = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.5}
    for half in ("encoder", "decoder"):
        text |= {f"{half}_layers": 1, f"{half}_attention_heads": 2}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = Florence2Config(
        text_config={**text, **sizes},
        vision_config={**vision, "initializer_range": 0.5},
        image_token_id=tokenizer.image_token_id,
    )
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    image_processor: Any = CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False
    )
    image_processor.image_seq_length = 5  # 2 x 2 parts of an image, and their mean
    Florence2Processor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def own_florence(florence, tmp_path) -> Path:
    return shutil.copytree(florence, tmp_path / "own_florence")


def test_each_image_gets_what_the_authors_detailed_caption_is(florence, tmp_path, monkeypatch):
    monkeypatch.setitem(FLORENCE_GENERATION, "max_length", 12)
    colors = ["red", "blue", "white"]
    for color in colors:
        Image.new("RGB", (80, 60), color).save(tmp_path / f"{color}.png")
    caption_missing(str(florence), MegaManDataset(tmp_path, None))
    model: Any = Florence2ForConditionalGeneration.from_pretrained(florence)
    processor: Any = Florence2Processor(
        CLIPImageProcessorPil.from_pretrained(florence), BartTokenizer.from_pretrained(florence)
    )
    wanted = {}
    for color in colors:
        image = Image.open(tmp_path / f"{color}.png")
        inputs = processor(images=image, text="<DETAILED_CAPTION>", return_tensors="pt")
        ids = model.eval().generate(**inputs, **FLORENCE_GENERATION)
        caption = processor.batch_decode(ids, skip_special_tokens=True)[0]
        wanted[color] = " ".join(caption.split())
    written = {color: (tmp_path / f"{color}.txt").read_text("utf-8").strip() for color in colors}
    assert written == wanted
    assert len(set(written.values())) == 3, "the captions depend on the images"
    assert "<" not in "".join(written.values()), "no special token is left"


def test_a_caption_has_neither_special_tokens_nor_an_empty_opening(florence, monkeypatch):
    captioner = load_captioner(str(florence))
    texts = ["</s><s>The image shows a robot</s><pad>", "</s><s>a robot on the stairs</s><pad>"]
    answers = [captioner.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    vocabulary = captioner.tokenizer.get_vocab()
    assert all(vocabulary["<unk>"] not in answer for answer in answers)
    for answer in answers:
        monkeypatch.setattr(
            captioner.model, "generate", lambda answer=answer, **_: torch.tensor([answer])
        )
        (caption,) = captioner.generate_captions(torch.zeros(1, 3, 64, 64))
        assert caption in ("a robot", "a robot on the stairs")


def change(name: str, **changes: Any):
    def apply(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({**content, **changes}), "utf-8")

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            change("config.json", auto_map={"AutoModel": "x--y.Z"}),
            "needs its authors' code.* florence-community/Florence-2-base$",
        ),
        (change("config.json", architectures=["Other"]), "no BLIP or Florence-2 that writes"),
        (change("config.json", model_type="git"), r"no BLIP or Florence-2 .* but a git"),
        (change("config.json", model_type=["git"]), r"no BLIP or Florence-2 .* but a \['git'\]"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "processor_config.json").unlink(), "_config.json is missing"),
        (
            change(
                "processor_config.json",
                image_processor={"size": {"shortest_edge": 64}, "do_center_crop": False},
            ),
            "cannot be loaded",
        ),
    ],
)
def test_a_model_that_cannot_be_used_ends_in_one_line(own_florence, spoil, message):
    spoil(own_florence)
    with pytest.raises(UserError, match=message) as caught:
        load_captioner(str(own_florence))
    line = str(caught.value)
    assert "\n" not in line and f"--auto_caption {own_florence}" in line
