"""generate_megaman.py as a user runs it: images that carry their settings, and their gallery."""

from __future__ import annotations

import json
import re
import shutil
import time
from typing import Any

import pytest
import torch
from conftest import ROOT, save_visible_lora
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageChops
from safetensors.torch import save_file

import generate_megaman
from megaman import runtime
from megaman.errors import UserError
from megaman.lora import adapter, saving
from megaman.lora import files as lora_files
from megaman.models.base import load_base
from megaman.pages.gallery_images import read_images
from megaman.sampling import denoise, record_reader
from megaman.sampling.denoise import PromptEmbeds, SamplingSettings
from megaman.sampling.generator import ImageGenerator


@pytest.fixture(scope="module")
def lora_path(base_folder, tmp_path_factory):
    """A LoRA that visibly changes the base; its folder says which base it belongs to."""
    folder = tmp_path_factory.mktemp("lora") / "lora_weights"
    return save_visible_lora(folder, base_folder, 4, 16, ["to_v", "conv1"])


GENERATE = ["--num_inference_steps", 3, "--prompts", "a blue robot"]


@pytest.fixture
def generate(lora_path, tmp_path, monkeypatch, capsys):
    """generate("--flag", value, …) draws with few steps into tmp_path/out and returns {name: RGB
    image}."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, output="out", prompts=tuple(GENERATE[2:]), lora=("--lora_path", lora_path)):
        words = [*(lora or ()), "--output_dir", output, *GENERATE[:2], *prompts]
        assert generate_megaman.main([str(word) for word in [*words, *flags]]) == 0
        run.said = capsys.readouterr().out
        return {
            path.name: Image.open(path).convert("RGB")
            for path in sorted((tmp_path / output).glob("[!d]*.png"))  # no damaged ones
        }

    return run


def equal(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def alike(one: Image.Image, other: Image.Image) -> bool:
    """Equal but for float noise: no channel off by more than two steps of 255."""
    extremes: Any = ImageChops.difference(one, other).getextrema()
    return one.size == other.size and max(high for _, high in extremes) <= 2


def test_a_run_as_a_process(lora_path, run_script, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "# comment\na red robot, white background\n\na green monster <b>\n", encoding="utf-8-sig"
    )
    flags = [
        "--num_images_per_prompt",
        2,
        "--num_inference_steps",
        3,
        "--compare",
        "base",
        "--seed",
        7,
    ]
    args = [
        "generate_megaman.py",
        "--lora_path",
        lora_path,
        "--prompts_file",
        prompts,
        "--output_dir",
        "g",
        *flags,
    ]
    done = run_script(args, tmp_path)
    assert done.returncode == 0, done.stderr
    names = [
        f"megaman_00{i}_0{j}{base}.png" for i in (0, 1) for j in (0, 1) for base in ("", "_base")
    ]
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == sorted(
        [*names, "index.html", "images.json"]
    )
    noise = [
        line
        for line in re.split(r"[\r\n]+", done.stderr)
        if line.strip() and not line.startswith("generating:")
    ]
    assert noise == [], "no library's warnings"
    assert "4: 2 prompts x 2, 64x64, 3 steps" in done.stdout
    assert (tmp_path / "g" / "index.html").resolve().as_uri() in done.stdout
    page = (tmp_path / "g" / "index.html").read_text(encoding="utf-8")
    assert "a green monster &lt;b&gt;" in page
    assert all(name in page for name in names)
    recorded = json.loads((tmp_path / "g" / "images.json").read_text(encoding="utf-8"))
    assert "megaman_001_01.png" in json.dumps(recorded)


def test_images_carry_their_settings(generate, tmp_path):
    generate(
        "--seed", 7, "--guidance_scale", 4, "--negative_prompt", "blurry, dark", "--compare", "base"
    )
    text = Image.open(tmp_path / "out" / "megaman_000_00.png").info["parameters"]
    first, negative, last = text.split("\n")
    assert first == "a blue robot <lora:megaman_lora:1>"
    assert negative == "Negative prompt: blurry, dark"
    values = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert (values["Steps"], values["Seed"], values["CFG scale"], values["Size"]) == (
        "3",
        "7",
        "4",
        "64x64",
    )
    base_text = Image.open(tmp_path / "out" / "megaman_000_00_base.png").info["parameters"]
    assert base_text.startswith("a blue robot\n")


def test_compare_draws_the_base_itself(generate, base_folder):
    """The left picture is what diffusers' own pipeline draws from the base, with the same noise."""
    flags = ["--seed", 3, "--guidance_scale", 5, "--negative_prompt", "blurry, low quality"]
    drawn = generate("--compare", "base", *flags)
    pipe = StableDiffusionPipeline.from_pretrained(base_folder, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    result: Any = pipe(
        "a blue robot",
        negative_prompt="blurry, low quality",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=3,
        guidance_scale=5.0,
    )
    wanted = result.images[0]
    assert alike(drawn["megaman_000_00_base.png"], wanted)
    assert not alike(drawn["megaman_000_00.png"], wanted)


def test_strengths(generate, tmp_path):
    """At 0 the base itself, at 1 the LoRA as trained, and one picture of all with its labels."""
    pair = generate("--compare", "base", "--seed", 3, output="pair")
    drawn = generate("--lora_scales", "0,0.5,1", "--seed", 3, "--num_images_per_prompt", 2)
    assert (
        "2: 1 prompt x 2, 64x64" in generate.said and "each 3 times: 3 strengths" in generate.said
    )
    names = [f"megaman_000_0{j}_{scale}.png" for j in (0, 1) for scale in ("0", "0.5", "1")]
    assert set(drawn) == {"grid_000.png", *names}
    base, half, full = (drawn[name] for name in names[:3])
    assert alike(base, pair["megaman_000_00_base.png"]) and alike(full, pair["megaman_000_00.png"])
    assert not alike(half, base) and not alike(half, full)
    texts = [
        Image.open(tmp_path / "out" / name).info["parameters"].split("\n")[0] for name in names[:3]
    ]
    assert texts == [
        "a blue robot",
        "a blue robot <lora:megaman_lora:0.5>",
        "a blue robot <lora:megaman_lora:1>",
    ]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<th scope="col" data-t>(.*?)</th>', page) == [
        "strength 0",
        "strength 0.5",
        "strength 1",
    ]
    grid = drawn["grid_000.png"]
    whole = (grid.width - 220) // 3 - 8
    assert whole == 256
    for line, j in enumerate((0, 1)):
        for place in range(3):
            at = (220 + place * 264, 42 + line * 264)
            cell = grid.crop((*at, at[0] + 256, at[1] + 256)).resize(
                (64, 64), Image.Resampling.NEAREST
            )
            assert equal(cell, drawn[names[3 * j + place]])
    again = generate("--lora_scales", "0,1", "--seed", 3)
    assert {"grid_000.png", "grid_001.png", "megaman_001_00_1.png", *names} <= set(again)


def test_every_checkpoint_at_one_seed(generate, lora_path, base_folder, tmp_path):
    """Each LoRA of a training's output draws what it draws alone; unfinished checkpoints are left
    out."""
    training = tmp_path / "training"
    shutil.copytree(lora_path, training / "lora_weights")
    weaker = lora_files.read_tensors(lora_path / "adapter_model.safetensors")
    for step, state in ((5, "training_state.json"), (40, "training_state.json"), (60, None)):
        folder = training / f"checkpoint-{step}"
        shutil.copytree(lora_path, folder)
        save_file(
            {name: tensor * step / 100 for name, tensor in weaker.items()},
            folder / "adapter_model.safetensors",
        )
        if state:
            (folder / state).write_text("{}")
    drawn = generate("--checkpoints", training, lora=None)
    assert "each 3 times: 3 LoRAs\n" in generate.said
    names = [
        f"megaman_000_00_{name}.png" for name in ("checkpoint-40", "checkpoint-5", "lora_weights")
    ]
    assert set(drawn) == {"grid_000.png", *names}
    for name in ("checkpoint-5", "checkpoint-40", "lora_weights"):
        alone = generate("--lora_path", training / name, output=name)
        assert equal(drawn[f"megaman_000_00_{name}.png"], alone["megaman_000_00.png"])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<th scope="col">(.*?)</th>', page) == [
        "checkpoint-5",
        "checkpoint-40",
        "lora_weights",
    ]
    shutil.rmtree(training / "lora_weights")
    shutil.copytree(training / "checkpoint-40", training / "lora_weights")
    (training / "lora_weights" / "adapter_config.json").write_text(
        (training / "checkpoint-40" / "adapter_config.json").read_text().replace("demo", "other")
    )
    once = generate("--checkpoints", training, lora=None, output="once")
    assert set(once) == {"grid_000.png", *names[:2]}
    assert "equals checkpoint-40, which stands for it" in generate.said
    assert "each 2 times: 2 LoRAs\n" in generate.said
    with pytest.raises(UserError, match="has no checkpoint"):
        generate("--checkpoints", tmp_path / "nothing", lora=None)


def test_image_j_is_seed_plus_j_alone(generate):
    together = generate("--num_images_per_prompt", 3, "--seed", 10, output="together")
    alone = generate("--seed", 12, output="alone")
    assert alike(together["megaman_000_02.png"], alone["megaman_000_00.png"])
    assert not alike(together["megaman_000_00.png"], together["megaman_000_01.png"])


def test_a_seed_repeats_bit_for_bit(generate):
    one, other = generate(output="one"), generate(output="other")
    assert equal(one["megaman_000_00.png"], other["megaman_000_00.png"])


@pytest.fixture(scope="module")
def plain(lora_path, tmp_path_factory) -> Image.Image:
    """What generate() draws without flags."""
    folder = tmp_path_factory.mktemp("plain")
    words = ["--lora_path", lora_path, "--output_dir", folder, *GENERATE]
    assert generate_megaman.main([str(word) for word in words]) == 0
    return Image.open(folder / "megaman_000_00.png").convert("RGB")


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", 43],
        ["--guidance_scale", 1],
        ["--guidance_scale", 3],
        ["--num_inference_steps", 4],
        ["--negative_prompt", "a blue robot"],
        ["--prompts", "a red cat"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_a_flag_changes_the_image(generate, plain, flags):
    assert not equal(plain, generate(*flags, output="b")["megaman_000_00.png"])


def test_height_and_width(generate):
    (image,) = generate("--height", 96, "--width", 128).values()
    assert image.size == (128, 96)


def test_large_images_have_thumbnails(generate, tmp_path):
    generate("--height", 64, "--width", 400, "--compare", "base", "--num_inference_steps", 1)
    names = [f"megaman_000_00{base}.png" for base in ("", "_base")]
    for name in names:
        assert Image.open(tmp_path / "out" / "thumbnails" / f"{name}.webp").size == (256, 41)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert all(
        f'src="./thumbnails/{name}.webp"' in page and f'href="./{name}"' in page for name in names
    )


def test_device(generate):
    generate("--device", "cpu")
    assert "device     cpu" in generate.said
    with pytest.raises(UserError, match="--device mps"):
        generate("--device", "mps")


def test_existing_images_stay_and_the_page_grows(generate, tmp_path):
    first = generate()
    kept = (tmp_path / "out" / "megaman_000_00.png").read_bytes()
    both = generate("--prompts", "a red robot")
    assert list(both) == ["megaman_000_00.png", "megaman_001_00.png"]
    assert (tmp_path / "out" / "megaman_000_00.png").read_bytes() == kept
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert all(text in page for text in (*both, "a blue robot", "a red robot"))
    assert len(first) == 1


def test_counts_are_those_of_the_run(generate):
    generate("--num_inference_steps", 1, "--lora_scales", "0,1")
    assert "images     1: 1 prompt x 1, 64x64, 1 step of" in generate.said
    assert "each 2 times: 2 strengths\n" in generate.said and " 1 at once" in generate.said
    assert "\n2 images; open" in generate.said
    generate("--num_images_per_prompt", 5, "--batch_size", 2, output="two")
    assert "1 prompt x 5, " in generate.said and " 2 at once" in generate.said
    generate(output="one")
    assert "3 steps of" in generate.said and "\n1 image; open" in generate.said


def test_ten_built_in_prompts(generate):
    generate("--num_inference_steps", 1, prompts=())
    assert "10: 10 prompts x 1" in generate.said
    assert "megaman_009_00.png" in generate(
        "--prompts_file", ROOT / "prompts.txt", "--num_inference_steps", 1, prompts=()
    )


def test_a_page_of_somebody_else_stays(generate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("mine")
    with pytest.raises(UserError, match="has an index"):
        generate()
    assert (tmp_path / "out" / "index.html").read_text() == "mine"


def test_the_base_comes_from_the_lora_or_the_flag(generate, base_folder, tmp_path):
    generate("--base_model", base_folder)
    with pytest.raises(UserError, match="nowhere"):
        generate("--base_model", str(tmp_path / "nowhere"))


def test_a_checkpoint_a_file_and_several_loras(generate, plain, lora_path, base_folder, tmp_path):
    """A checkpoint's folder works as it is; each layout alone draws what the folder draws;
    strengths add up."""
    own = plain
    checkpoint = tmp_path / "run" / "checkpoint-500"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(lora_path / name, checkpoint)
    assert equal(
        generate("--lora_path", checkpoint, output="checkpoint")["megaman_000_00.png"], own
    )
    kohya = lora_path / "megaman_lora.safetensors"
    base = ["--base_model", base_folder]
    assert alike(generate("--lora_path", kohya, *base, output="kohya")["megaman_000_00.png"], own)
    halves = generate("--lora_path", f"{lora_path}:0.5", f"{kohya}:.5", output="halves")
    assert "strength 0.5" in generate.said
    assert alike(halves["megaman_000_00.png"], own)
    text = Image.open(tmp_path / "halves" / "megaman_000_00.png").info["parameters"]
    assert text.startswith("a blue robot <lora:megaman_lora:0.5> <lora:megaman_lora:0.5>\n")
    none = generate("--lora_path", f"{lora_path}:0", "--compare", "base", output="none")
    assert equal(none["megaman_000_00.png"], none["megaman_000_00_base.png"])
    assert not alike(none["megaman_000_00.png"], own)


def test_the_text_encoders_part_counts_and_compare_leaves_it_out(generate, base_folder, tmp_path):
    """A kohya file for the text encoder alone changes the image, but not the base's next to it."""
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    text_encoder: Any = load_base(str(base_folder), torch.float32).text_encoder
    width, inner = text_encoder.encoder.layers[0].mlp.fc1.weight.T.shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{layer}.lora_down.weight": torch.randn(2, width, generator=generator),
        f"{layer}.lora_up.weight": torch.randn(inner, 2, generator=generator),
        f"{layer}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "words.safetensors")
    flags = ["--base_model", base_folder, "--compare", "base"]
    drawn = generate("--lora_path", "words.safetensors", *flags, output="words")
    none = generate("--lora_path", "words.safetensors:0", *flags, output="none")
    assert not alike(drawn["megaman_000_00.png"], drawn["megaman_000_00_base.png"])
    assert equal(drawn["megaman_000_00_base.png"], none["megaman_000_00.png"])
    with Image.open(tmp_path / "words" / "megaman_000_00.png") as image:
        assert image.info["parameters"].startswith("a blue robot <lora:words:1>")


def test_a_long_prompt_is_used_whole_and_weights_count(generate):
    """What stands beyond the text encoder's length changes the image, and so does a weight."""
    long = "robot " * 100
    prompts = [
        long + "blue",
        long + "red",
        "a (blue:1.5) robot",
        "a (blue:0.5) robot",
        "a blue robot",
    ]
    drawn = [
        generate("--prompts", prompt, output=str(n))["megaman_000_00.png"]
        for n, prompt in enumerate(prompts)
    ]
    assert not any(equal(one, other) for n, one in enumerate(drawn) for other in drawn[n + 1 :])


def test_a_prompt_draws_the_same_whatever_stands_beside_it(generate, plain, tmp_path):
    """A long prompt or another size in the same run changes nothing but rounding in the batch."""
    (tmp_path / "mixed.txt").write_text(
        "a blue robot\n" + "robot, " * 100 + "red\na red robot --w 96 --h 64 --s 2\n"
    )
    mixed = generate("--prompts_file", "mixed.txt", prompts=(), output="mixed")
    assert mixed["megaman_002_00.png"].size == (96, 64)
    assert equal(mixed["megaman_000_00.png"], plain)


def test_prompts_with_settings_of_their_own(generate, tmp_path):
    """Each line's settings are those of the flags; a bad line is named and the rest is drawn."""
    lines = [
        "a blue robot --n dark, red --w 72 --h 80 --d 9 --l 3 --s 2",
        "a blue robot --w 513",
        '--prompt "a blue robot" --negative_prompt "dark, red" --width 72 --height 80'
        " --seed 9 --cfg_scale 3 --steps 2",
        "a blue robot",
    ]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    drawn = generate("--prompts_file", "lines.txt", prompts=(), output="lines")
    assert "lines.txt line 2" in generate.said and "--w" in generate.said and "513" in generate.said
    flags = [
        "--negative_prompt",
        "dark, red",
        "--width",
        72,
        "--height",
        80,
        "--seed",
        9,
        "--guidance_scale",
        3,
    ]
    alone = generate(*flags, "--num_inference_steps", 2, output="flags")["megaman_000_00.png"]
    assert len(drawn) == 3 and drawn["megaman_002_00.png"].size == (64, 64)
    assert alike(drawn["megaman_000_00.png"], alone) and alike(drawn["megaman_001_00.png"], alone)
    page = (tmp_path / "lines" / "index.html").read_text(encoding="utf-8")
    assert "dark, red" in page and "72x80" in page


def test_strength_sampler_and_clip_skip(generate, plain, lora_path, tmp_path):
    half = generate("--lora_scale", 0.5, output="half")["megaman_000_00.png"]
    behind_colon = generate("--lora_path", f"{lora_path}:0.5", output="colon")["megaman_000_00.png"]
    assert equal(half, behind_colon) and not alike(half, plain)
    euler = generate("--scheduler", "Euler a", "--clip_skip", 2, output="euler")[
        "megaman_000_00.png"
    ]
    text = Image.open(tmp_path / "euler" / "megaman_000_00.png").info["parameters"]
    assert "Sampler: Euler a" in text and "Clip skip: 2" in text
    assert not alike(
        euler, generate("--scheduler", "k_euler_a", output="last")["megaman_000_00.png"]
    )
    with pytest.raises(UserError, match="--clip_skip"):
        generate("--clip_skip", 30, output="deep")


def test_the_fused_lora_draws_what_the_unfused_draws(generate, tmp_path):
    """With --compare base it is not fused, otherwise it is; the pixels agree."""
    fused = generate(output="fused")["megaman_000_00.png"]
    unfused = generate("--compare", "base", output="unfused")["megaman_000_00.png"]
    assert alike(fused, unfused)
    saved = [
        json.loads(Image.open(tmp_path / name / "megaman_000_00.png").info["megaman"])
        for name in ("fused", "unfused")
    ]
    assert [record["fused"] for record in saved] == [True, False]


@pytest.fixture
def again(generate, tmp_path):
    """again(png) draws an image by its own record and returns it."""

    def run(image, *flags, output="again"):
        shutil.rmtree(tmp_path / output, ignore_errors=True)
        assert (
            generate_megaman.main(
                ["--from_image", str(image), "--output_dir", output, *map(str, flags)]
            )
            == 0
        )
        (path,) = (tmp_path / output).glob("megaman_*.png")
        return Image.open(path).convert("RGB")

    return run


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_images_per_prompt", 3, "--batch_size", 2],
        ["--compare", "base", "--clip_skip", 2, "--guidance_scale", 3],
        ["--lora_scales", "0,0.5", "--scheduler", "dpm++_2m_sde"],
        [
            "--prompts",
            "(a:1.2) robot, " * 60,
            "--negative_prompt",
            '洛克人 🤖, "dark"',
            "--lora_scale",
            0.7,
        ],
    ],
    ids=lambda flags: " ".join(map(str, flags))[:60],
)
def test_from_image_gives_equal_pixels(generate, again, tmp_path, flags, capsys):
    """Every image of a run, the base's too, out of a batch, fused or not."""
    drawn = {name: image for name, image in generate(*flags).items() if not name.startswith("grid")}
    for name, image in drawn.items():
        assert equal(again(tmp_path / "out" / name), image), name
    assert "may differ" not in capsys.readouterr().out


def test_from_image_says_what_is_not_as_it_was(generate, again, lora_path, tmp_path, capsys):
    """A LoRA that moved is named by the flag; one that was trained again is reported."""
    shutil.copytree(lora_path, tmp_path / "mine")
    drawn = generate("--lora_path", "mine:0.5")["megaman_000_00.png"]
    (tmp_path / "mine").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="mine"):
        again(tmp_path / "out" / "megaman_000_00.png")
    assert equal(again(tmp_path / "out" / "megaman_000_00.png", "--lora_path", "moved"), drawn)
    capsys.readouterr()
    for name in ("adapter_model.safetensors", "megaman_lora.safetensors"):
        tensors = lora_files.read_tensors(tmp_path / "moved" / name)
        saving.write_tensors(
            tmp_path / "moved" / name, {key: tensor * 2 for key, tensor in tensors.items()}
        )
    assert not equal(again(tmp_path / "out" / "megaman_000_00.png", "--lora_path", "moved"), drawn)
    assert "LoRA moved was" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"generated with 1 LoRA\."):
        again(tmp_path / "out" / "megaman_000_00.png", "--lora_path", "moved", "moved")


def test_from_image_and_resume_from_another_folder(
    generate, again, lora_path, tmp_path, monkeypatch
):
    """A LoRA named by a relative path is found from anywhere, and is the same under any name."""
    shutil.copytree(lora_path, tmp_path / "mine")
    drawn = generate("--lora_path", "mine")["megaman_000_00.png"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert equal(
        again(tmp_path / "out" / "megaman_000_00.png", output=str(tmp_path / "again")), drawn
    )
    generate("--resume", "--lora_path", "../elsewhere/../mine", output=tmp_path / "out")
    assert "1 of 1 are there" in generate.said
    (image,) = read_images(tmp_path / "out")
    assert image.loras == [(tmp_path / "mine").as_posix()]


def test_from_image_when_the_base_moved(generate, again, base_folder, tmp_path):
    """The record still says which base it was; the flag says where it lies now."""
    shutil.copytree(base_folder, tmp_path / "mine")
    drawn = generate("--base_model", "mine")["megaman_000_00.png"]
    (tmp_path / "mine").rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"its base .*mine is neither on this machine nor on the hub"
    ) as raised:
        again(tmp_path / "out" / "megaman_000_00.png")
    assert "--base_model" in str(raised.value)
    assert equal(again(tmp_path / "out" / "megaman_000_00.png", "--base_model", "moved"), drawn)


def test_from_image_with_less_memory_than_then(generate, again, monkeypatch, tmp_path, capsys):
    """The batch is generated in parts and in tiles, of which the wanted image is written alone, and
    lines say so."""
    drawn = generate("--num_images_per_prompt", 2, "--batch_size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "free_memory", lambda device: 0)
        for name, image in drawn.items():
            assert again(tmp_path / "out" / name).size == image.size
        output = capsys.readouterr().out
        for reason in ("memory for a smaller batch only", "the VAE decodes in tiles"):
            assert output.count(f"{reason}: the pixels may differ") == 2
        tiled = generate(output="tiled")["megaman_000_00.png"]
    capsys.readouterr()
    assert equal(again(tmp_path / "tiled" / "megaman_000_00.png"), tiled)
    assert "may differ" not in capsys.readouterr().out
    assert not equal(generate(output="whole")["megaman_000_00.png"], tiled)


def test_an_image_that_was_deleted_is_on_the_page_once(generate, tmp_path):
    """Drawn again by --resume, or its name taken by another run: the page tells of what is there
    now."""
    generate("--num_images_per_prompt", 2)
    (tmp_path / "out" / "megaman_000_00.png").unlink()
    generate("--num_images_per_prompt", 2, "--resume")
    named = [image.file for image in read_images(tmp_path / "out")]
    assert sorted(named) == ["megaman_000_00.png", "megaman_000_01.png"]
    for path in (tmp_path / "out").glob("*.png"):
        path.unlink()
    generate("--prompts", "a red cat")
    shown = {image.file: image.prompt for image in read_images(tmp_path / "out")}
    assert shown["megaman_000_00.png"] == "a red cat"


@pytest.mark.parametrize("flags", [[], ["--compare", "base"]], ids=" ".join)
def test_two_runs_into_one_folder_lose_nothing(generate, monkeypatch, tmp_path, flags):
    """Whoever comes second is refused in a line, and the first generates its images."""
    generate_images = ImageGenerator.generate
    refused = []

    def generate_next_to_another(generator, batches, *rest, **without_lora):
        monkeypatch.setattr(ImageGenerator, "generate", generate_images)
        with pytest.raises(UserError, match="in use by another run") as raised:
            generate("--prompts", "a red cat", *flags)
        refused.append(raised.value)
        return generate_images(generator, batches, *rest, **without_lora)

    monkeypatch.setattr(ImageGenerator, "generate", generate_next_to_another)
    generate(*flags)
    pngs = list((tmp_path / "out").glob("*.png"))
    assert len(refused) == 1 and len(pngs) == 1 + bool(flags)
    assert all(
        json.loads(Image.open(path).info["megaman"])["prompt"] == "a blue robot" for path in pngs
    )


MANY = [
    "--num_inference_steps",
    1,
    "--guidance_scale",
    1,
    "--num_images_per_prompt",
    10,
    "--batch_size",
    2,
]


def many(lora_path, *flags):
    prompts = ["--prompts", "a blue robot", "a red cat"]
    return [
        "generate_megaman.py",
        "--lora_path",
        lora_path,
        "--output_dir",
        "g",
        *prompts,
        *MANY,
        *flags,
    ]


def test_a_killed_batch_of_twenty_goes_on(lora_path, forked, tmp_path):
    """SIGKILL in the middle, an image without a place on the page, half a pair: then 20 images,
    none made twice."""
    process = forked.start(many(lora_path, "--compare", "base"), tmp_path)
    folder = tmp_path / "g"
    while len(list(folder.glob("*[0-9].png"))) < 5:
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    pngs = sorted(folder.glob("megaman_*.png"))
    assert 5 <= len([path for path in pngs if "_base" not in path.name]) < 20
    kept = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in pngs}
    done = forked.run(many(lora_path, "--compare", "base", "--resume"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming +(\d+) of 20 are there", done.stdout)
    images = sorted(path.name for path in folder.glob("*.png") if "_base" not in path.name)
    assert images == [f"megaman_{i:03d}_{j:02d}.png" for i in (0, 1) for j in range(10)]
    assert len(list(folder.glob("*_base.png"))) == 20
    for path, (written, content) in kept.items():
        assert (path.stat().st_mtime_ns, path.read_bytes()) == (
            written,
            content,
        ) or path.name.endswith("_base.png")
    recorded = json.loads((folder / "images.json").read_text(encoding="utf-8"))["images"]
    assert sorted(image["file"] for image in recorded) == images
    assert all(
        image["base_file"] == image["file"].replace(".png", "_base.png") for image in recorded
    )
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert all(name in page for name in images)


def test_resume_draws_what_the_undisturbed_run_draws(generate, tmp_path):
    """Also where it stopped within a batch; a finished run has nothing left, another run's names
    are kept."""
    flags = ["--num_images_per_prompt", 6, "--batch_size", 4]
    whole = generate(*flags, output="whole")
    generate(*flags, output="part")
    for j in (1, 4):
        (tmp_path / "part" / f"megaman_000_0{j}.png").unlink()
    again = generate(*flags, "--resume", output="part")
    assert "4 of 6 are there" in generate.said
    assert set(again) == set(whole) and all(equal(again[name], whole[name]) for name in whole)
    generate(*flags, "--resume", output="part")
    assert "6 of 6 are there" in generate.said
    generate("--prompts", "a red cat", "--resume", output="part")
    assert "nothing of this run is there" in generate.said
    assert len(list((tmp_path / "part").glob("*.png"))) == 7
    with pytest.raises(UserError, match="not an image that this command generates"):
        (tmp_path / "part" / "megaman_000_03.png").write_bytes(
            (tmp_path / "part" / "megaman_001_00.png").read_bytes()
        )
        generate(*flags, "--resume", output="part")


def names_on_page(folder):
    images = read_images(folder)
    return sorted(
        filter(None, [file for image in images for file in (image.file, image.base_file)])
    )


def test_resume_generates_whatever_a_pair_lacks(generate, tmp_path, monkeypatch):
    """The base's images of a run without them, half a pair, both halves, damaged halves; what is
    whole stays as it is, and each header is read once."""
    flags = ["--num_images_per_prompt", 3, "--batch_size", 2]
    whole = generate(*flags, "--compare", "base", output="whole")
    generate(*flags)
    folder = tmp_path / "out"
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("megaman_*.png")}
    drawn = generate(*flags, "--compare", "base", "--resume")
    assert "0 of 3 are there" in generate.said
    assert drawn.keys() == whole.keys()
    assert all(alike(drawn[name], whole[name]) for name in whole)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert names_on_page(folder) == sorted(whole)

    (folder / "megaman_000_00_base.png").unlink()
    (folder / "megaman_000_01.png").unlink()
    for name in ("megaman_000_01_base.png", "megaman_000_02.png"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-100])
    read = []
    find_record = record_reader.find_record
    monkeypatch.setattr(
        record_reader, "find_record", lambda path: read.append(path) or find_record(path)
    )
    drawn = generate(*flags, "--compare", "base", "--resume")
    assert "0 of 3 are there" in generate.said
    assert len(set(read)) == len(read)
    damaged = ["damaged_megaman_000_01_base.png", "damaged_megaman_000_02.png"]
    assert sorted(path.name for path in folder.glob("damaged*")) == damaged
    assert all(alike(drawn[name], whole[name]) for name in whole)
    assert names_on_page(folder) == sorted(whole)
    assert "damaged" in generate.said

    generate(*flags, "--compare", "base", "--resume")
    assert "3 of 3 are there" in generate.said
    generate(*flags, "--resume")
    assert "3 of 3 are there" in generate.said
    assert names_on_page(folder) == sorted(whole)
    (folder / "megaman_000_01_base.png").unlink()
    generate("--prompts", "a red cat")
    assert names_on_page(folder) == sorted(
        {*whole, "megaman_001_00.png"} - {"megaman_000_01_base.png"}
    )
    (folder / "megaman_000_01_base.png").write_bytes((folder / "megaman_000_02.png").read_bytes())
    with pytest.raises(UserError, match=r"01_base\.png is not an image that this"):
        generate(*flags, "--compare", "base", "--resume")


def test_resume_finds_a_run_of_which_the_base_images_are_left(generate, tmp_path):
    flags = ["--num_images_per_prompt", 2, "--compare", "base"]
    whole = generate(*flags)
    for path in (tmp_path / "out").glob("megaman_000_0?.png"):
        path.unlink()
    assert generate(*flags, "--resume").keys() == whole.keys()


def test_too_little_memory_while_drawing(generate, again, monkeypatch, tmp_path):
    """Fewer at once, then the VAE in tiles: the run continues, and each image's record says how it
    was generated."""
    from failing import fail_on

    fail_on(monkeypatch, UNet2DConditionModel, "forward", {2, 3})
    drawn = generate("--num_images_per_prompt", 4, "--batch_size", 4)
    record = json.loads(Image.open(tmp_path / "out" / "megaman_000_03.png").info["megaman"])
    assert len(drawn) == 4 and len(record["batch"]) == 1 and not record["vae_tiling"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert equal(again(tmp_path / "out" / "megaman_000_03.png"), drawn["megaman_000_03.png"])


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--lora_path", "nothing"], 1, "nothing"),
        (["--prompts_file", "none.txt"], 1, "none.txt"),
        (["--prompts_file", "empty.txt"], 1, "empty.txt"),
        (["--height", "100"], 2, "--height"),
        (["--prompts", "a", "--prompts_file", "empty.txt"], 2, "--prompts"),
        (["--checkpoints", "a", "--lora_path", "b"], 2, "--checkpoints"),
        (["--compare", "base", "--lora_scales", "0,1"], 2, "--lora_scales"),
        (["--lora_scale", "1", "--lora_scales", "0,1"], 2, "--lora_scale"),
        (["--from_image", "a.png", "--seed", "1"], 2, "--seed"),
        (["--from_image", "none.png"], 1, "none.png"),
        (["--from_image", "empty.txt"], 1, "empty.txt"),
        (["--scheduler", "eulr"], 2, "did you mean euler"),
        (["--demo", "--checkpoints", "nothing"], 1, "nothing"),
        (["--prompts", "a", "—seed", "5"], 2, "—seed begins with a long dash"),
        (["--lora_path", "a", "–seed=5"], 2, "–seed=5 begins with a long dash"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(forked, tmp_path, flags, code, named):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    done = forked.run(["generate_megaman.py", *flags], tmp_path)
    assert done.returncode == code
    assert done.stderr.count("\n") == 1, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_validation_and_generation_sample_alike(generate, base_folder, lora_path):
    """One sampling loop serves both scripts: called directly it gives the gallery's picture."""
    drawn = generate("--seed", 5, "--guidance_scale", 6, "--negative_prompt", "blurry")
    from megaman.models.text_encoding import encode_captions
    from megaman.runtime import choose_compute

    layout = choose_compute(
        "no", torch.device("cpu"), 0
    ).torch_memory_format  # it shows in the last bits
    base = load_base(str(base_folder), torch.float32, memory_format=layout)
    lora_files.load_loras([(lora_path, 1.0)], base.unet, base.text_encoder)
    adapter.FusedLoras([base.unet, base.text_encoder], reversible=False).set_scales({0: 1.0})

    text, negative = (
        encode_captions(base.text_encoder, base.tokenizer, [prompt])[prompt][None]
        for prompt in ("a blue robot", "blurry")
    )
    (image,) = denoise.generate_images(
        base, PromptEmbeds(text, negative), [5], SamplingSettings(64, 64, 3, 6.0)
    )
    assert equal(image, drawn["megaman_000_00.png"])


def test_loras_are_compared_with_the_base_and_each_other(generate, lora_path, tmp_path):
    """One for another model is named, and the others are generated."""
    key = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 640)}
    tensors[f"{key}.lora_up.weight"] = torch.ones(640, 2)
    save_file(tensors, tmp_path / "xl.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    loras = [lora_path, "xl.safetensors", f"{lora_path}:0"]
    drawn = generate("--compare", *loras, "--num_inference_steps", 1, lora=None, output="compared")
    drawn.pop("grid_000.png")
    full, none, base = (drawn[name] for name in sorted(drawn))
    assert sorted(drawn)[-1] == "megaman_000_00_without_lora.png"
    assert "skipped    xl.safetensors is a LoRA for SDXL" in generate.said
    assert equal(none, base) and not equal(full, base)
