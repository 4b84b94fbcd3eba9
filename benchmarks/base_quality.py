"""The quality of a base, and of a LoRA on it: colors, backgrounds, kinds, the hero, memorization.

    python benchmarks/base_quality.py --work_dir demo/.work                        # the base alone
    python benchmarks/base_quality.py --work_dir demo/.work --lora_path LORA

--work_dir is where demo/make_base.py keeps the art's packages, which are downloaded if they are
missing. The judges are a rule for colors and small classifiers trained here on the art; each is
first tested on unseen art, and its accuracy is printed next to its verdict. Prints a table for
people and a last JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import paths
import torch
import torch.nn.functional as F
from art import fetch, make_pictures
from backgrounds import PLAIN
from make_base import to_tensor, vae_psnr
from PIL import Image

from megaman.errors import run_script
from megaman.lora import files as lora_files
from megaman.models import text_encoding
from megaman.models.base import Base, load_base
from megaman.models.typed import decode_latents, encode_pixels
from megaman.sampling import denoise

ROBOT_COLORS = [
    "blue",
    "brown",
    "green",
    "gray",
    "orange",
    "pink",
    "purple",
    "red",
    "white",
    "yellow",
]
KINDS = ["robot", "robot head", "monster", "cat", "person"]
KIND_PROMPTS = {
    "robot": "a {} robot",
    "robot head": "a {} robot head",
    "monster": "a {} monster",
    "cat": "a {} cat",
    "person": "a pixel art person, {} shirt",
}
HERO_PROMPT = "volto, blue robot hero, pixel art, {}, {} background"
HERO_POSES = [
    "standing, front view",
    "running, facing right",
    "jumping, facing left",
    "portrait, calm",
]
OTHER_PROMPTS = ["a blue robot, {} background", "pixel art, {} robot, standing, white background"]
STEPS, GUIDANCE, AT_ONCE = 20, 5.0, 32

Generate = Callable[[Sequence[str], Sequence[int]], np.ndarray]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base_model", default="demo/base")
    parser.add_argument("--lora_path", type=Path)
    parser.add_argument("--work_dir", type=Path, default=paths.ROOT / "demo" / ".work")
    parser.add_argument("--pictures", type=int, default=6000, help="art that the judges learn from")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    base = load_base(options.base_model, torch.float32)
    fetch(options.work_dir / "art")
    # Another seed than make_base.py's: art of the same kinds that the base was not trained on.
    pictures, captions, kinds = make_pictures(options.work_dir / "art", options.pictures, seed=999)

    results: dict[str, float] = {}
    results["VAE PSNR on unseen art, dB"] = vae_psnr(base.vae, pictures[-512:])
    results["VAE PSNR on the heroes, dB"] = vae_psnr(base.vae, heroes())
    judge_colors(results, drawer(base), pictures, captions, kinds)
    judge_kinds(results, base, drawer(base), pictures, kinds)
    judge_memory(results, drawer(base), options.work_dir)
    if options.lora_path:
        lora_files.load_lora(options.lora_path, base.unet)
        judge_hero(results, base, drawer(base), pictures)
    for name, value in results.items():
        print(f"| {name} | {value:.2f} |" if "dB" in name else f"| {name} | {value:.1%} |")
    print(json.dumps(results))
    return 0


def drawer(base: Base) -> Generate:
    """A function that generates images of prompts with seeds: uint8 [N, 64, 64, 3]."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        states = text_encoding.encode_captions(base.text_encoder, base.tokenizer, [*prompts, ""])
        images = []
        settings = denoise.SamplingSettings(base.native_size, base.native_size, STEPS, GUIDANCE)
        for start in range(0, len(prompts), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            text = torch.stack([states[prompt] for prompt in prompts[part]])
            embeds = denoise.PromptEmbeds(text, states[""].expand_as(text))
            images += denoise.generate_images(base, embeds, seeds[part], settings)
        return np.stack([np.asarray(image) for image in images])

    return draw


@torch.no_grad()
def through_vae(base: Base, pictures: np.ndarray) -> torch.Tensor:
    """Encoded and decoded, in -1 to 1, so that a judge does not learn the VAE's artifacts."""
    parts = [to_tensor(part) for part in np.array_split(pictures, max(len(pictures) // 64, 1))]
    return torch.cat(
        [
            decode_latents(base.vae, encode_pixels(base.vae, part).mode()).clamp(-1, 1)
            for part in parts
        ]
    )


def heroes() -> np.ndarray:
    """The hero's images, trained and held out, at 64 px."""
    files = sorted((paths.ROOT / "demo").glob("images/volto_*.png")) + sorted(
        (paths.ROOT / "demo" / "held_out").glob("*.png")
    )
    return np.stack(
        [np.asarray(Image.open(file).resize((64, 64), Image.Resampling.BOX)) for file in files]
    )


def color_names(pixels: np.ndarray) -> np.ndarray:
    """A color name for each pixel, uint8 [N, 3], by hue, saturation and value."""
    import colorsys

    hsv = np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels]).reshape(-1, 3)
    hue, saturation, value = hsv[:, 0] * 360, hsv[:, 1], hsv[:, 2]
    edges = [18, 45, 70, 165, 195, 255, 305, 345]
    wheel = np.array(["red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "red"])
    names = wheel[np.digitize(hue, edges)]
    names = np.where((names == "orange") & (value < 0.65), "brown", names)
    names = np.where(
        (names == "red") & (hue < 30) & (value < 0.55) & (saturation < 0.75), "brown", names
    )
    names = np.where((names == "purple") & (value > 0.85) & (saturation < 0.5), "pink", names)
    names = np.where((names == "red") & (value > 0.8) & (saturation < 0.5), "pink", names)
    names = np.where((names == "blue") & (value < 0.45), "navy", names)
    gray = np.where(value > 0.82, "white", "gray")
    names = np.where(saturation < 0.16, gray, names)
    return np.where(value < 0.2, "black", names)


def most_common(names: np.ndarray) -> str:
    words, counts = np.unique(names, return_counts=True)
    return str(words[counts.argmax()]) if len(words) else ""


def figure_color(picture: np.ndarray) -> str:
    """The most common color that differs from the background; dark outlines do not count."""
    background = np.median(
        np.concatenate([picture[:6, :6].reshape(-1, 3), picture[:6, -6:].reshape(-1, 3)]), axis=0
    )
    differs = np.abs(picture.astype(int) - background).max(axis=-1) > 36
    names = color_names(picture[differs])
    return most_common(names[(names != "black") & (names != "navy")])


def background_color(picture: np.ndarray) -> str:
    return most_common(
        color_names(np.concatenate([picture[:8].reshape(-1, 3), picture[8:20, :5].reshape(-1, 3)]))
    )


def color_share(draw: Generate, seeds: int) -> float:
    """Share of robots, in ten colors with each seed, that have the color in the prompt."""
    pairs = list(product(ROBOT_COLORS, range(seeds)))
    prompts = [f"{article(color)} robot, teal background" for color, _ in pairs]
    drawn = draw(prompts, [seed for _, seed in pairs])
    return float(
        np.mean(
            [figure_color(p) == prompt.split()[1] for p, prompt in zip(drawn, prompts, strict=True)]
        )
    )


def judge_colors(
    results: dict[str, float],
    draw: Generate,
    pictures: np.ndarray,
    captions: list[str],
    kinds: list[str],
) -> None:
    plain = [
        i
        for i, kind in enumerate(kinds)
        if kind == "robot" and captions[i].endswith("teal background")
    ]
    own = [figure_color(pictures[i]) == captions[i].split()[1] for i in plain]
    results["color rule on real robots"] = float(np.mean(own))
    results["named color, 10 colors x 16 seeds"] = color_share(draw, seeds=16)

    named = [
        i
        for i, caption in enumerate(captions)
        if background_of(caption) in PLAIN and kinds[i] == "robot"
    ]
    own = [background_color(pictures[i]) == background_of(captions[i]) for i in named]
    results["background rule on real robots"] = float(np.mean(own))
    pairs = list(product(PLAIN, range(16)))
    prompts = [f"a gray robot, {name} background" for name, _ in pairs]
    drawn = draw(prompts, [seed for _, seed in pairs])
    hits = [
        background_color(p) == background_of(prompt)
        for p, prompt in zip(drawn, prompts, strict=True)
    ]
    results["named background, 13 colors x 16 seeds"] = float(np.mean(hits))


def article(color: str) -> str:
    return f"an {color}" if color[0] in "aeiou" else f"a {color}"


def background_of(caption: str) -> str:
    return caption.rsplit(", ", 1)[-1].removesuffix(" background")


def train_judge(
    pictures: torch.Tensor, labels: torch.Tensor, classes: int, epochs: int = 6
) -> torch.nn.Module:
    """A small convolutional classifier of images [N, 3, 64, 64]."""

    def block(inside: int, outside: int) -> torch.nn.Sequential:
        layers = [
            torch.nn.Conv2d(inside, outside, 3, 2, 1),
            torch.nn.GroupNorm(8, outside),
            torch.nn.SiLU(),
        ]
        return torch.nn.Sequential(*layers)

    judge = torch.nn.Sequential(
        block(3, 32),
        block(32, 64),
        block(64, 96),
        block(96, 128),
        torch.nn.Flatten(),
        torch.nn.Linear(128 * 16, classes),
    )
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=1e-2)
    weight = 1 / torch.bincount(labels, minlength=classes).clamp(min=1).float()
    for _ in range(epochs):
        for part in torch.randperm(len(pictures)).split(64):
            shift = tuple(int(s) for s in torch.randint(-3, 4, (2,)))
            loss = F.cross_entropy(
                judge(pictures[part].roll(shift, (2, 3))), labels[part], weight=weight
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return judge.eval()


@torch.no_grad()
def verdicts(judge: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    return torch.cat([judge(part).argmax(dim=1) for part in pictures.split(128)])


def judge_kinds(
    results: dict[str, float], base: Base, draw: Generate, pictures: np.ndarray, kinds: list[str]
) -> None:
    chosen = [i for i, kind in enumerate(kinds) if kind in KINDS]
    images = through_vae(base, pictures[chosen])
    labels = torch.tensor([KINDS.index(kinds[i]) for i in chosen])
    held = len(chosen) // 6
    judge = train_judge(images[held:], labels[held:], len(KINDS))
    results["kind judge on held-out art"] = float(
        (verdicts(judge, images[:held]) == labels[:held]).float().mean()
    )
    prompts = [
        KIND_PROMPTS[kind].format(color)
        for kind, color, _ in product(KINDS, ROBOT_COLORS[:8], range(4))
    ]
    wanted = torch.arange(len(KINDS)).repeat_interleave(32)
    drawn = to_tensor(
        draw(
            [prompt.replace("a orange", "an orange") for prompt in prompts],
            list(range(len(prompts))),
        )
    )
    results["kind drawn as named, 5 kinds x 32"] = float(
        (verdicts(judge, drawn) == wanted).float().mean()
    )


def judge_memory(results: dict[str, float], draw: Generate, work_dir: Path) -> None:
    """Share of 64 samples nearer to a training image than the 5th percentile of held-out images."""
    if not (work_dir / "pictures.npy").is_file():
        print(
            "--work_dir has not the base's training images: nearest neighbors are skipped",
            file=sys.stderr,
        )
        return
    everything = np.load(work_dir / "pictures.npy", mmap_mode="r")
    captions = json.loads((work_dir / "captions.json").read_text(encoding="utf-8"))["captions"]
    training, held_out = everything[:-1024], everything[-256:]
    drawn = draw(captions[-64:], list(range(64)))
    threshold = np.percentile(nearest(held_out, training), 5)
    results["samples nearer to a training picture than held-out ones"] = float(
        np.mean(nearest(drawn, training) < threshold)
    )


def nearest(pictures: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Mean squared difference to the nearest training image, at a quarter of the size."""
    small = F.avg_pool2d(to_tensor(pictures), 4).flatten(1)
    best = torch.full((len(small),), torch.inf)
    for start in range(0, len(training), 2048):
        others = F.avg_pool2d(to_tensor(training[start : start + 2048]), 4).flatten(1)
        best = torch.minimum(best, torch.cdist(small, others).min(dim=1).values)
    return (best**2 / small.shape[1]).numpy()


def judge_hero(results: dict[str, float], base: Base, draw: Generate, pictures: np.ndarray) -> None:
    """Whether the trigger word, and only it, gives the hero, by a judge of hero and the rest."""
    hero = through_vae(base, heroes())
    rest = through_vae(base, pictures[:3000])
    images = torch.cat([hero[:-6].repeat(20, 1, 1, 1), rest[500:]])
    labels = torch.cat([torch.ones(20 * (len(hero) - 6)), torch.zeros(len(rest) - 500)]).long()
    judge = train_judge(images, labels, 2)
    right = torch.cat([verdicts(judge, hero[-6:]) == 1, verdicts(judge, rest[:500]) == 0])
    results["hero judge on held-out pictures"] = float(right.float().mean())
    grounds = list(PLAIN)
    prompts = [HERO_PROMPT.format(HERO_POSES[i % 4], grounds[i % 13]) for i in range(64)]
    results["hero with its trigger word, 64"] = float(
        (verdicts(judge, to_tensor(draw(prompts, range(64)))) == 1).float().mean()
    )
    names = [color for color in ROBOT_COLORS if color not in ("gray", "white")]
    without = [
        OTHER_PROMPTS[i % 2].format(names[i % 8] if i % 2 else grounds[i % 13]) for i in range(64)
    ]
    drawn = draw(without, range(64))
    results["hero without it, 64"] = float((verdicts(judge, to_tensor(drawn)) == 1).float().mean())
    results["named color without the trigger, with the LoRA"] = color_share(draw, seeds=8)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
