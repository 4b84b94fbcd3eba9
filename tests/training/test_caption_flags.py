"""Captions in training: trigger words, prefix and suffix, shuffling and dropout; each changes the
loss as its formula says."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from conftest import FEW_TARGETS, ROOT, learned_alike
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTokenizer

from megaman.config.train import parse_train_config
from megaman.data import batches
from megaman.data.captions import CaptionAugmentation, add_affixes, contains
from megaman.data.dataset import MegaManDataset
from megaman.data.encoding import encode_dataset
from megaman.data.file_index import FileIndex
from megaman.data.latent_cache import LatentCache
from megaman.data.problems import MAX_TRUNCATED, write_problems
from megaman.data.vae_encoder import EncodingConfig
from megaman.errors import UserError
from megaman.models import text_encoding
from megaman.models.base import load_base
from megaman.training import loss as diffusion
from megaman.training.checkpoint import differences

HELD_OUT = ROOT / "demo" / "held_out"
DATA = [
    "--data_dir",
    HELD_OUT,
    "--train_batch_size",
    4,
    "--learning_rate",
    1e-3,
    "--center_crop",
    *FEW_TARGETS,
]
CAPTION = "volto, blue robot, running, white background"
TAGS = CAPTION.split(", ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, "a robot"),
        ({"trigger": "volto"}, "volto, a robot"),
        ({"trigger": "robot"}, "a robot"),
        ({"trigger": "A Robot"}, "a robot"),
        ({"trigger": "rob"}, "rob, a robot"),
        ({"prefix": "pixel art,"}, "pixel art, a robot"),
        ({"suffix": ", running"}, "a robot , running"),
        ({"trigger": "volto", "prefix": "volto, art,", "suffix": "x"}, "volto, art, a robot x"),
        ({"trigger": "volto", "prefix": "art,"}, "volto, art, a robot"),
    ],
)
def test_affixes(words, expected):
    assert add_affixes("a robot", **words) == expected


@given(st.text("ab, (.*洛", max_size=12), st.text("ab(.*洛", min_size=1, max_size=4))
def test_the_trigger_is_there_once_after_affixes(caption, trigger):
    once = add_affixes(caption, trigger)
    assert contains(once, trigger) or not trigger.strip()
    assert add_affixes(once, trigger) == once and once.endswith(caption)


CAPTIONS = st.lists(st.text("abc 洛", max_size=5), min_size=1, max_size=8).map(", ".join)
AUGMENTATIONS = st.builds(
    CaptionAugmentation, st.booleans(), st.integers(0, 9), st.floats(0, 1), st.floats(0, 1)
)


@given(CAPTIONS, AUGMENTATIONS, st.integers())
def test_any_variation_keeps_the_first_tags_and_makes_up_none(caption, augmentation, seed):
    said = augmentation.apply(caption, random.Random(seed))
    assert said == augmentation.apply(caption, random.Random(seed)), (
        "the same random numbers, the same caption"
    )
    if said == caption:
        return
    tags, left = [tag.strip() for tag in caption.split(",")], said.split(", ") if said else []
    assert all(left.count(tag) <= tags.count(tag) for tag in left if tag)
    if said and not augmentation.caption_dropout_rate:
        kept = tags[: augmentation.keep_tokens]
        assert left[: len(kept)] == kept


@given(st.integers())
def test_without_flags_nothing_changes_and_nothing_is_random(seed):
    rng = random.Random(seed)
    before = rng.getstate()
    assert CaptionAugmentation(keep_tokens=3).apply("b,a  ,", rng) == "b,a  ,"
    assert rng.getstate() == before


def test_the_rates_are_probabilities():
    rngs = [random.Random(number) for number in range(4000)]
    dropped = [CaptionAugmentation(caption_dropout_rate=0.3).apply(CAPTION, rng) for rng in rngs]
    assert set(dropped) == {"", CAPTION} and dropped.count("") / 4000 == pytest.approx(
        0.3, abs=0.03
    )
    thinned = [
        CaptionAugmentation(caption_tag_dropout_rate=0.3, keep_tokens=1)
        .apply(CAPTION, rng)
        .split(", ")
        for rng in rngs
    ]
    assert all(
        tags[0] == "volto" and tags == [tag for tag in TAGS if tag in tags] for tags in thinned
    ), "in order"
    assert sum(map(len, thinned)) / 4000 == pytest.approx(1 + 3 * 0.7, abs=0.06)
    shuffled = [CaptionAugmentation(shuffle_caption=True).apply(CAPTION, rng) for rng in rngs]
    assert (
        all(sorted(said.split(", ")) == sorted(TAGS) for said in shuffled)
        and len(set(shuffled)) == 24
    )


@pytest.mark.parametrize(("rate", "tags"), [(1.0, ["volto", "blue robot"]), (0.0, TAGS)])
def test_kept_tags_are_never_dropped(rate, tags):
    augmentation = CaptionAugmentation(caption_tag_dropout_rate=rate, keep_tokens=2)
    assert augmentation.apply(CAPTION, random.Random(0)) == ", ".join(tags)


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ([], 0),
        (["--trigger_word", "volto"], 1),
        (["--trigger_word", " volto,  blue robot "], 2),
        (["--trigger_word", "volto", "--keep_tokens", "0"], 0),
        (["--keep_tokens", "3"], 3),
    ],
)
def test_the_trigger_words_are_kept_unless_said_otherwise(flags, kept):
    options = parse_train_config(flags).captions
    assert options.keep_tokens == kept and options.trigger_word in (
        "",
        "volto",
        "volto, blue robot",
    )


@pytest.fixture(scope="module")
def encoded(embedded_base):
    """The embedded base, to whose loss captions matter, the dataset and its latents."""
    base = load_base(str(embedded_base), torch.float32)
    dataset = MegaManDataset(HELD_OUT, None, 64, center_crop=True)
    moments = encode_dataset(
        lambda: base.vae, dataset, EncodingConfig(), FileIndex(None), LatentCache(None)
    )
    return base, dataset, moments


def loss_by_hand(encoded, say) -> float:
    """The loss of a first step of four images with seed 0 and the captions say(caption, sample
    index)."""
    base, dataset, moments = encoded
    parts = []
    with torch.no_grad():
        for row in range(4):
            index, generator = (
                batches.position_at(row, len(dataset), 0),
                batches.generator_for(0, row),
            )
            torch.randint(1, (1,), generator=generator)  # which crop
            latents = diffusion.sample_posterior(
                moments[index][:1], base.vae.config.scaling_factor, generator
            )
            noise = diffusion.sample_noise(latents.shape, 0.0, generator)
            timesteps = diffusion.sample_timesteps(
                1, base.noise_scheduler.config.num_train_timesteps, generator
            )
            caption = say(dataset.captions[index], row)
            states = text_encoding.encode_captions(base.text_encoder, base.tokenizer, [caption])[
                caption
            ][None]
            noisy = base.noise_scheduler.add_noise(latents, noise, timesteps)
            noise_pred = base.unet(noisy, timesteps, encoder_hidden_states=states).sample
            parts.append(
                diffusion.loss(
                    noise_pred, diffusion.target(base.noise_scheduler, latents, noise, timesteps)
                )
            )
    return float(torch.stack(parts).mean())


@pytest.fixture(scope="module")
def plain_loss(encoded) -> float:
    """The loss of a first step with the captions as they are."""
    return loss_by_hand(encoded, lambda caption, row: caption)


def losses(cwd, name: str) -> list[float]:
    (folder,) = (cwd / f"logs-{name}").iterdir()
    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


VARIED = {
    "nothing": [],
    "all captions dropped": ["--caption_dropout_rate", 1],
    "some captions dropped": ["--caption_dropout_rate", 0.5],
    "all tags dropped": ["--caption_tag_dropout_rate", 1],
    "all but one tag dropped": ["--caption_tag_dropout_rate", 1, "--keep_tokens", 1],
    "shuffled and thinned": [
        "--shuffle_caption",
        "--caption_tag_dropout_rate",
        0.3,
        "--keep_tokens",
        1,
    ],
    "with affixes": [
        "--trigger_word",
        "zed",
        "--caption_prefix",
        "pixel art,",
        "--caption_suffix",
        "small",
    ],
}


@pytest.mark.parametrize("flags", VARIED.values(), ids=VARIED.keys())
def test_the_loss_of_a_step_is_that_of_its_captions(
    train_here, embedded_base, encoded, plain_loss, tmp_path, flags
):
    base = ["--pretrained_model_name", embedded_base]
    train_here(tmp_path, "out", *DATA, *base, "--max_train_steps", 1, *flags)
    options = parse_train_config([str(flag) for flag in flags]).captions
    augmentation = CaptionAugmentation(
        **{flag: getattr(options, flag) for flag in CaptionAugmentation._fields}
    )

    def say(caption: str, row: int) -> str:
        caption = add_affixes(
            caption, options.trigger_word, options.caption_prefix, options.caption_suffix
        )
        return augmentation.apply(caption, random.Random(f"caption 0 {row}"))

    (loss,) = losses(tmp_path, "out")
    assert loss == pytest.approx(loss_by_hand(encoded, say), rel=1e-4)
    assert not flags or loss != pytest.approx(plain_loss, rel=1e-4), "captions matter to the loss"


def test_with_every_caption_dropped_the_loss_is_that_of_the_empty_caption(
    train_here, embedded_base, encoded, tmp_path
):
    words = [*DATA, "--pretrained_model_name", embedded_base, "--max_train_steps", 1]
    train_here(tmp_path, "dropped", *words, "--caption_dropout_rate", 1)
    train_here(tmp_path, "tagless", *words, "--caption_tag_dropout_rate", 1)
    empty = loss_by_hand(encoded, lambda caption, row: "")
    assert (
        losses(tmp_path, "dropped")
        == losses(tmp_path, "tagless")
        == [pytest.approx(empty, rel=1e-4)]
    )


VARYING = [
    "--shuffle_caption",
    "--caption_tag_dropout_rate",
    0.3,
    "--caption_dropout_rate",
    0.2,
    "--keep_tokens",
    1,
]


@pytest.fixture
def repeated(tmp_path):
    """Six images: two in kohya's 3_volto, four next to that folder."""
    folder = tmp_path / "repeated"
    folder.mkdir()
    for image in sorted(HELD_OUT.glob("*.png"))[:6]:
        for file in (image, image.with_suffix(".txt")):
            shutil.copy(file, folder)
    (folder / "3_volto").mkdir()
    for image in sorted(folder.glob("*.png"))[:2]:
        for file in (image, image.with_suffix(".txt")):
            file.rename(folder / "3_volto" / file.name)
    return folder


@pytest.mark.parametrize("text", [[], ["--train_text_encoder"]], ids=["frozen", "trained"])
def test_a_varied_and_repeated_run_resumes_bit_for_bit(train_here, tmp_path, repeated, text):
    flags = [
        "--data_dir",
        repeated,
        "--train_batch_size",
        2,
        "--learning_rate",
        1e-3,
        "--num_train_epochs",
        1,
        "--save_steps",
        2,
        *FEW_TARGETS,
        *VARYING,
        *text,
    ]
    whole = train_here(tmp_path, "out", *flags)
    for place in ("lora_weights", "checkpoint-4", "checkpoint-5"):
        shutil.rmtree(tmp_path / "out" / place)
    resumed = train_here(tmp_path, "out", *flags, "--resume_from_checkpoint", "latest")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    shutil.rmtree(tmp_path / "out" / "lora_weights")
    with pytest.raises(UserError, match="shuffle_caption was True and is now False"):
        others = [flag for flag in flags if flag != "--shuffle_caption"]
        train_here(tmp_path, "out", *others, "--resume_from_checkpoint", "latest")


def test_repeats_count_for_epochs_and_are_in_the_header(train_here, tmp_path, repeated, capsys):
    train_here(
        tmp_path,
        "out",
        "--data_dir",
        repeated,
        "--train_batch_size",
        5,
        "--num_train_epochs",
        1,
        *FEW_TARGETS,
        "--dataset_repeats",
        2,
        "--trigger_word",
        "zed",
    )
    said = capsys.readouterr().out
    assert "6 in 2 folders of" in said and "3_volto x 6" in said and "20 images an epoch" in said
    assert len(losses(tmp_path, "out")) == 4, "4 x 2 and 2 x 6 pictures, 5 a step"
    with safe_open(tmp_path / "out" / "lora_weights" / "megaman_lora.safetensors", "pt") as file:
        header = file.metadata()
    assert json.loads(header["ss_dataset_dirs"]) == {
        "3_volto": {"n_repeats": 6, "img_count": 2},
        "repeated": {"n_repeats": 2, "img_count": 4},
    }
    assert header["ss_num_train_images"] == "20" and header["ss_epoch"] == "1"
    frequency = json.loads(header["ss_tag_frequency"])
    assert frequency["3_volto"]["zed"] == 2 and frequency["repeated"]["zed"] == 4
    assert header["modelspec.trigger_phrase"] == "zed" and header["ss_shuffle_caption"] == "False"


def test_the_split_of_a_step_changes_no_caption(train_here, tmp_path):
    smooth = ["--adam_epsilon", 1e-2]
    at_once = train_here(tmp_path, "one", *DATA, "--max_train_steps", 2, *VARYING, *smooth)
    flags = [*smooth, "--train_batch_size", 2, "--gradient_accumulation_steps", 2]
    in_parts = train_here(tmp_path, "two", *DATA, "--max_train_steps", 2, *VARYING, *flags)
    assert learned_alike(at_once, in_parts)


def test_an_earlier_checkpoint_varied_nothing():
    assert differences({"seed": 1}, {"seed": 1, **CaptionAugmentation()._asdict()}) == []
    (said,) = differences(
        {"seed": 1}, {"seed": 1, **CaptionAugmentation(caption_dropout_rate=0.1)._asdict()}
    )
    assert said == "caption_dropout_rate was 0.0 and is now 0.1"


def test_what_is_truncated_comes_after_75_tokens(base_folder):
    tokenizer = CLIPTokenizer.from_pretrained(base_folder / "tokenizer")
    fits = ", ".join(["robot"] * 37) + " robot"
    assert len(tokenizer(fits, add_special_tokens=False).input_ids) == 74
    captions = [
        "",
        "short",
        fits,
        fits + ", Étoile bleue, x",
        fits + " a, Étoile  bleue",
        "洛克人" * 30,
    ]
    cut = text_encoding.truncated_text(tokenizer, captions)
    assert cut[:3] == ["", "", ""] and cut[3] == "Étoile bleue, x" and cut[4] == "Étoile  bleue"
    assert cut[5] and captions[5].endswith(cut[5])
    assert text_encoding.truncated_text(tokenizer, []) == []


def test_the_first_long_captions_are_shown_and_the_rest_counted(
    train_here, pictures, tmp_path, capsys
):
    for number in range(5):
        shutil.copy(pictures / "megaman_01.png", pictures / f"more_{number}.png")
        (pictures / f"more_{number}.txt").write_text(
            "robot, " * 40 + f"tail {number}", encoding="utf-8"
        )
    train_here(tmp_path, "out", "--data_dir", pictures, "--max_train_steps", 1)
    said = capsys.readouterr().out
    assert said.count("has more than 75 tokens; cut off: ") == MAX_TRUNCATED and "tail 0\n" in said
    assert f"{5 - MAX_TRUNCATED} more have over 75 tokens" in said
    content = json.loads((tmp_path / "out" / "dataset_problems.json").read_text(encoding="utf-8"))
    assert [
        entry["cut"].endswith(f"tail {number}")
        for number, entry in enumerate(content["cut_captions"])
    ] == [True] * 5


def test_truncated_captions_stay_with_their_images(pictures, tmp_path):
    dataset = MegaManDataset(pictures, None)
    dataset.set_truncated(["", "", "the end", ""])
    dataset.drop({dataset.examples[0].image: "gone"})
    lines = write_problems(tmp_path / "out.json", [dataset])
    assert any("megaman_03.png has more than 75 tokens; cut off: the end" in line for line in lines)
