"""The quality of a base, and of a LoRA on it: colors, backgrounds, kinds, poses, expressions, the
hero, memorization.

    python benchmarks/base_quality.py --work_dir demo/.work                        # the base alone
    python benchmarks/base_quality.py --work_dir demo/.work --lora_path LORA

--work_dir is where demo/make_base.py keeps the art's packages, which are downloaded if they are
missing. The judges are a rule for colors and small classifiers trained here on the art; each is
first tested on unseen art, and on real images in random order, which shows the level of chance.
Both figures are printed next to its verdict. Prints a table for people and a last JSON line for
programs.
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import paths
import torch
import torch.nn.functional as F
from art import SIZE, compose_images, fetch
from backgrounds import NAMES, PLAIN, draw_background
from make_base import HELD_OUT, to_tensor, vae_psnr
from make_images import ARMOR, PALETTE, HeroImage, draw_image
from PIL import Image
from rig import EXPRESSIONS, FRONT_POSES, POSES, SIDE_POSES
from sprites import COLORS, draw_sprite

from megaman.config.generate import DEMO_GENERATION
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
KIND_PROMPTS = {
    "robot": "a {} robot",
    "robot head": "a {} robot head",
    "monster": "a {} monster",
    "cat": "a {} cat",
    "person": "a pixel art person, {} shirt",
}
KINDS = list(KIND_PROMPTS)
ROBOT_PROMPT = "pixel art, {} robot, {}, {} background"
HERO_PROMPT = "volto, blue robot hero, pixel art, {}, {} background"
HERO_WORDS = [
    "standing, front view",
    "running, facing right",
    "jumping, facing left",
    "portrait, calm",
]
OTHER_PROMPTS = ["a blue robot, {} background", "pixel art, {} robot, standing, white background"]
CANNON_POSES = ("shooting", "aiming up")
STEPS, GUIDANCE, BATCH_SIZE = 20, float(DEMO_GENERATION["guidance_scale"]), 32

GenerateImages = Callable[[Sequence[str], Sequence[int]], np.ndarray]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base_model", default="demo/base")
    parser.add_argument("--lora_path", type=Path)
    parser.add_argument("--work_dir", type=Path, default=paths.ROOT / "demo" / ".work")
    parser.add_argument("--guidance_scale", type=float, default=GUIDANCE)
    parser.add_argument("--images", type=int, default=6000, help="art that the judges learn from")
    parser.add_argument(
        "--samples", type=int, default=64, help="images for each pose and each expression"
    )
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    base = load_base(options.base_model, torch.float32)
    generate = generator(base, options.guidance_scale)
    fetch(options.work_dir / "art")
    # Another seed than make_base.py's: art of the same kinds that the base was not trained on.
    images, captions, kinds = compose_images(options.work_dir / "art", options.images, seed=999)

    results: dict[str, float] = {}
    results["VAE PSNR on unseen art, dB"] = vae_psnr(base.vae, images[-512:])
    results["VAE PSNR on the hero, dB"] = vae_psnr(base.vae, hero_files())
    judge_colors(results, generate, images, captions, kinds)
    judge_kinds(results, base, generate, images, kinds)
    judges = load_judges(base, images, options.work_dir)
    for judge in (judges.poses, judges.expressions):
        results |= judge.checks
        results |= judge.shares("base", generate, ROBOT_PROMPT, options.samples)
    judge_copies(results, generate, options.work_dir)
    if options.lora_path:
        lora_files.load_lora(options.lora_path, base.unet)
        judge_hero(results, generate, judges, options.samples)
        results |= judges.expressions.shares("hero", generate, HERO_PROMPT, options.samples)
        results["named color without the trigger, with the LoRA"] = color_share(generate, seeds=8)
    for name, value in results.items():
        unitless = "dB" in name or "distance" in name or "number" in name
        print(f"| {name} | {value:.2f} |" if unitless else f"| {name} | {value:.1%} |")
    print(json.dumps(results))
    return 0


def generator(base: Base, guidance_scale: float = GUIDANCE) -> GenerateImages:
    """A function that generates images of prompts with seeds: uint8 [N, 64, 64, 3]."""
    settings = denoise.SamplingSettings(base.native_size, base.native_size, STEPS, guidance_scale)

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        states = text_encoding.encode_captions(base.text_encoder, base.tokenizer, [*prompts, ""])
        images = []
        for start in range(0, len(prompts), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            text = torch.stack([states[prompt] for prompt in prompts[part]])
            embeds = denoise.PromptEmbeds(text, states[""].expand_as(text))
            images += denoise.generate_images(base, embeds, seeds[part], settings)
        return np.stack([np.asarray(image) for image in images])

    return generate


@torch.no_grad()
def through_vae(base: Base, images: np.ndarray) -> torch.Tensor:
    """Encoded and decoded, in -1 to 1, so that a judge does not learn the VAE's artifacts."""
    parts = [to_tensor(part) for part in np.array_split(images, max(len(images) // 64, 1))]
    return torch.cat(
        [
            decode_latents(base.vae, encode_pixels(base.vae, part).mode()).clamp(-1, 1)
            for part in parts
        ]
    )


def hero_files() -> np.ndarray:
    """The hero's images, trained and held out, at 64 px."""
    demo = paths.ROOT / "demo"
    files = sorted(demo.glob("images/volto_*.png")) + sorted(demo.glob("held_out/*.png"))
    return np.stack(
        [np.asarray(Image.open(file).resize((SIZE, SIZE), Image.Resampling.BOX)) for file in files]
    )


# ---------------------------------------------------------------- colors and backgrounds, by rule


def color_names(pixels: np.ndarray) -> np.ndarray:
    """A color name for each pixel, uint8 [N, 3], by hue, saturation and value."""
    hsv = np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels]).reshape(-1, 3)
    hue, saturation, value = hsv[:, 0] * 360, hsv[:, 1], hsv[:, 2]
    # Teal ends and pink begins midway between the art's own hues: the backgrounds' teal 177 and the
    # robots' blue 198, purple 301, and pink 331.
    edges = [18, 45, 70, 165, 187, 255, 316, 345]
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


def figure_mask(image: np.ndarray) -> np.ndarray:
    """The pixels that differ from the background, whose color is that of the two upper corners."""
    corners = np.concatenate([image[:6, :6].reshape(-1, 3), image[:6, -6:].reshape(-1, 3)])
    return np.abs(image.astype(int) - np.median(corners, axis=0)).max(axis=-1) > 36


def figure_color(image: np.ndarray) -> str:
    """The most common color of the figure; dark outlines do not count."""
    names = color_names(image[figure_mask(image)])
    return most_common(names[(names != "black") & (names != "navy")])


def background_color(image: np.ndarray) -> str:
    return most_common(
        color_names(np.concatenate([image[:8].reshape(-1, 3), image[8:20, :5].reshape(-1, 3)]))
    )


def color_share(generate: GenerateImages, seeds: int) -> float:
    """Share of robots, in ten colors with each seed, that have the color in the prompt."""
    pairs = list(product(ROBOT_COLORS, range(seeds)))
    prompts = [f"{article(color)} robot, teal background" for color, _ in pairs]
    images = generate(prompts, [seed for _, seed in pairs])
    hits = [figure_color(image) == color for image, (color, _) in zip(images, pairs, strict=True)]
    return float(np.mean(hits))


def judge_colors(
    results: dict[str, float],
    generate: GenerateImages,
    images: np.ndarray,
    captions: list[str],
    kinds: list[str],
) -> None:
    plain = [
        i
        for i, kind in enumerate(kinds)
        if kind == "robot" and captions[i].endswith("teal background")
    ]
    own = [figure_color(images[i]) == captions[i].split()[1] for i in plain]
    results["color rule on real robots"] = float(np.mean(own))
    results["named color, 10 colors x 16 seeds"] = color_share(generate, seeds=16)

    named = [
        i
        for i, caption in enumerate(captions)
        if background_of(caption) in PLAIN and kinds[i] == "robot"
    ]
    own = [background_color(images[i]) == background_of(captions[i]) for i in named]
    results["background rule on real robots"] = float(np.mean(own))
    pairs = list(product(PLAIN, range(16)))
    prompts = [f"a gray robot, {name} background" for name, _ in pairs]
    generated = generate(prompts, [seed for _, seed in pairs])
    hits = [
        background_color(image) == name for image, (name, _) in zip(generated, pairs, strict=True)
    ]
    results["named background, 13 colors x 16 seeds"] = float(np.mean(hits))


def article(color: str) -> str:
    return f"an {color}" if color[0] in "aeiou" else f"a {color}"


def background_of(caption: str) -> str:
    return caption.rsplit(", ", 1)[-1].removesuffix(" background")


# ---------------------------------------------------- kinds, poses, expressions, by classifier


def new_classifier(classes: int) -> torch.nn.Module:
    """A small convolutional classifier of images [N, 3, 64, 64]."""

    def block(inside: int, outside: int) -> torch.nn.Sequential:
        layers = [
            torch.nn.Conv2d(inside, outside, 3, 2, 1),
            torch.nn.GroupNorm(8, outside),
            torch.nn.SiLU(),
        ]
        return torch.nn.Sequential(*layers)

    blocks = [block(3, 32), block(32, 64), block(64, 96), block(96, 128)]
    return torch.nn.Sequential(*blocks, torch.nn.Flatten(), torch.nn.Linear(128 * 16, classes))


def train_judge(
    images: torch.Tensor, labels: torch.Tensor, classes: int, epochs: int = 6
) -> torch.nn.Module:
    judge = new_classifier(classes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=1e-2)
    weight = 1 / torch.bincount(labels, minlength=classes).clamp(min=1).float()
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(64):
            shift = tuple(int(s) for s in torch.randint(-3, 4, (2,)))
            loss = F.cross_entropy(
                judge(images[part].roll(shift, (2, 3))), labels[part], weight=weight
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return judge.eval()


@torch.no_grad()
def verdicts(judge: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([judge(part).argmax(dim=1) for part in images.split(128)])


def judge_kinds(
    results: dict[str, float],
    base: Base,
    generate: GenerateImages,
    images: np.ndarray,
    kinds: list[str],
) -> None:
    chosen = [i for i, kind in enumerate(kinds) if kind in KINDS]
    pixels = through_vae(base, images[chosen])
    labels = torch.tensor([KINDS.index(kinds[i]) for i in chosen])
    held = len(chosen) // 6
    judge = train_judge(pixels[held:], labels[held:], len(KINDS))
    results["kind judge on held-out art"] = share_right(judge, pixels[:held], labels[:held])
    prompts = [
        KIND_PROMPTS[kind].format(color)
        for kind, color, _ in product(KINDS, ROBOT_COLORS[:8], range(4))
    ]
    asked = torch.arange(len(KINDS)).repeat_interleave(32)
    generated = generate(
        [prompt.replace("a orange", "an orange") for prompt in prompts], list(range(len(prompts)))
    )
    results["named kind, 5 kinds x 32"] = share_right(judge, to_tensor(generated), asked)


def share_right(judge: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((verdicts(judge, images) == labels).float().mean())


@dataclass(frozen=True)
class WordJudge:
    """A classifier for words of the caption: for each class the texts that name it, and how the
    judge did on art."""

    what: str
    texts: dict[str, list[str]]
    classifier: torch.nn.Module
    checks: dict[str, float]

    @property
    def classes(self) -> list[str]:
        return list(self.texts)

    def prompts(self, template: str, samples: int) -> list[tuple[str, int]]:
        """Each class equally often, with its label; texts, colors and backgrounds take turns."""
        grounds, pairs = list(PLAIN), []
        for label, name in enumerate(self.classes):
            for i in range(samples):
                text = self.texts[name][i % len(self.texts[name])]
                ground = grounds[(i + label) % len(grounds)]
                color = ROBOT_COLORS[(i + 3 * label) % len(ROBOT_COLORS)]
                words = (color, text, ground) if template.count("{}") == 3 else (text, ground)
                pairs.append((template.format(*words), label))
        return pairs

    def obeyed(self, images: np.ndarray, labels: Sequence[int]) -> np.ndarray:
        """Whether each image shows what its prompt names."""
        return (verdicts(self.classifier, to_tensor(images)) == torch.tensor(labels)).numpy()

    def summary(self, who: str, obeyed: np.ndarray, labels: Sequence[int]) -> dict[str, float]:
        shares = [
            float(obeyed[np.array(labels) == label].mean()) for label in range(len(self.classes))
        ]
        worst = int(np.argmin(shares))
        return {
            f"{who}: named {self.what}, mean of {len(shares)}": float(np.mean(shares)),
            f"{who}: named {self.what}, worst ({self.classes[worst]})": shares[worst],
            **{f"{who}: {name}": share for name, share in zip(self.classes, shares, strict=True)},
        }

    def shares(
        self, who: str, generate: GenerateImages, template: str, samples: int
    ) -> dict[str, float]:
        prompts, labels = zip(*self.prompts(template, samples), strict=True)
        return self.summary(
            who, self.obeyed(generate(prompts, range(len(prompts))), labels), labels
        )


def texts_of_pose(pose: str) -> list[str]:
    """How captions name a pose, in each of its views."""
    named = f"{pose}, arm cannon" if pose in CANNON_POSES else pose
    views = []
    if pose in FRONT_POSES:
        views.append("front view")
    if pose in SIDE_POSES:
        views += ["facing right", "facing left"]
    return [f"{named}, {view}" for view in views]


POSE_TEXTS = {pose: texts_of_pose(pose) for pose in POSES}
EXPRESSION_TEXTS = {name: [f"portrait, {name}"] for name in EXPRESSIONS}


def make_word_judge(base: Base, what: str, texts: dict[str, list[str]], count: int) -> WordJudge:
    """Train a judge on sprites and on the hero on any background; test it on a sixth of each."""
    rng, classes = np.random.default_rng(997), list(texts)
    sprites = list(sprites_of(classes, count, rng))
    heroes = list(heroes_of(texts, count // 5, rng))
    checks = {}
    examples, held_out = [], []
    for group, name in ((sprites, "held-out art"), (heroes, "the hero held out")):
        held = len(group) // 6
        images = through_vae(base, np.stack([image for image, _ in group]))
        labels = torch.tensor([classes.index(word) for _, word in group])
        held_out.append((name, images[:held], labels[:held]))
        examples.append((images[held:], labels[held:]))
    pixels, labels = (torch.cat(parts) for parts in zip(*examples, strict=True))
    classifier = train_judge(pixels, labels, len(classes), epochs=8)
    for name, images, labels in held_out:
        checks[f"{what} judge on {name}"] = share_right(classifier, images, labels)
    _, images, labels = held_out[0]
    shuffled = labels[torch.randperm(len(labels))]
    checks[f"{what} judge on held-out art in random order"] = share_right(
        classifier, images, shuffled
    )
    return WordJudge(what, texts, classifier, checks)


def sprites_of(
    classes: list[str], count: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, str]]:
    """Sprites whose captions name one of the classes: image and class."""
    found = []
    while len(found) < count:
        sprite, caption = draw_sprite(rng, str(rng.choice(list(COLORS))))
        words = [word for word in caption.split(", ") if word in classes]
        if words:
            ground = draw_background(str(rng.choice(NAMES)), rng)
            image = np.where(sprite[..., 3:] > 0, sprite[..., :3], ground).astype(np.uint8)
            found.append((image, words[0]))
    return found


def heroes_of(
    texts: dict[str, list[str]], count: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, str]]:
    """The hero drawn, not generated, in every class equally often, on any background, in any
    armor."""
    found = []
    names = list(texts)
    for i in range(count):
        name = names[i % len(names)]
        text = str(rng.choice(texts[name]))
        cells = draw_image(HeroImage(text, str(rng.choice(NAMES)), str(rng.choice(list(ARMOR)))))
        found.append((cells.repeat(2, axis=0).repeat(2, axis=1), name))
    return found


# ---------------------------------------------------------------- copying, the hero


def judge_copies(results: dict[str, float], generate: GenerateImages, work_dir: Path) -> None:
    """Share of 64 samples nearer to a training image than the 5th percentile of held-out images."""
    if not (work_dir / "images.npy").is_file():
        print(
            "--work_dir has not the base's training images: nearest neighbors are skipped",
            file=sys.stderr,
        )
        return
    everything = np.load(work_dir / "images.npy", mmap_mode="r")
    captions = json.loads((work_dir / "captions.json").read_text(encoding="utf-8"))["captions"]
    training, held_out = everything[:-HELD_OUT], everything[-256:]
    threshold = np.percentile(nearest(held_out, training), 5)
    near = nearest(generate(captions[-64:], range(64)), training) < threshold
    results["samples nearer to a training image than held-out ones"] = float(np.mean(near))


def nearest(images: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Mean squared difference to the nearest training image, at a quarter of the size."""
    small = F.avg_pool2d(to_tensor(images), 4).flatten(1)
    best = torch.full((len(small),), torch.inf)
    for start in range(0, len(training), 2048):
        others = F.avg_pool2d(to_tensor(training[start : start + 2048]), 4).flatten(1)
        best = torch.minimum(best, torch.cdist(small, others).min(dim=1).values)
    return (best**2 / small.shape[1]).numpy()


@dataclass(frozen=True)
class HeroJudge:
    """The hero against all the rest."""

    classifier: torch.nn.Module
    check: float

    def is_hero(self, images: np.ndarray) -> np.ndarray:
        return (verdicts(self.classifier, to_tensor(images)) == 1).numpy()


def make_hero_judge(base: Base, images: np.ndarray) -> HeroJudge:
    rng = np.random.default_rng(996)
    texts = POSE_TEXTS | {"portrait": [f"portrait, {name}" for name in EXPRESSIONS]}
    hero = through_vae(base, np.stack([image for image, _ in heroes_of(texts, 800, rng)]))
    own = through_vae(base, hero_files()[-8:])
    rest = through_vae(base, images[:3000])
    pixels = torch.cat([hero, rest[500:]])
    labels = torch.cat([torch.ones(len(hero)), torch.zeros(len(rest) - 500)]).long()
    classifier = train_judge(pixels, labels, 2)
    right = torch.cat([verdicts(classifier, own) == 1, verdicts(classifier, rest[:500]) == 0])
    return HeroJudge(classifier, float(right.float().mean()))


@dataclass(frozen=True)
class Judges:
    poses: WordJudge
    expressions: WordJudge
    hero: HeroJudge


def load_judges(base: Base, images: np.ndarray, work_dir: Path) -> Judges:
    """Trained once for a VAE and a state of the art, and kept in work_dir."""
    digest = hashlib.sha256()
    for name, value in sorted(base.vae.state_dict().items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    for file in (
        Path(__file__),
        *(paths.ROOT / "demo" / f"{name}.py" for name in ("rig", "sprites", "make_images")),
    ):
        digest.update(file.read_bytes())
    path = work_dir / f"judges-{digest.hexdigest()[:12]}.pt"
    if not path.is_file():
        trained = {
            "poses": make_word_judge(base, "pose", POSE_TEXTS, count=3000),
            "expressions": make_word_judge(base, "expression", EXPRESSION_TEXTS, count=1500),
        }
        hero = make_hero_judge(base, images)
        state = {
            name: (judge.classifier.state_dict(), judge.checks) for name, judge in trained.items()
        }
        torch.save(state | {"hero": (hero.classifier.state_dict(), hero.check)}, path)
    state = torch.load(path, weights_only=True)

    def restored(name: str, classes: int) -> torch.nn.Module:
        classifier = new_classifier(classes).eval()
        classifier.load_state_dict(state[name][0])
        return classifier

    poses = WordJudge("pose", POSE_TEXTS, restored("poses", len(POSE_TEXTS)), state["poses"][1])
    expressions = restored("expressions", len(EXPRESSION_TEXTS))
    expressions = WordJudge("expression", EXPRESSION_TEXTS, expressions, state["expressions"][1])
    return Judges(poses, expressions, HeroJudge(restored("hero", 2), state["hero"][1]))


def palette_distance(image: np.ndarray) -> float:
    """Mean distance of the figure's pixels to the nearest of the hero's colors, in RGB, 0 to
    255."""
    pixels = image[figure_mask(image)].astype(float)
    if not len(pixels):
        return float("nan")
    return float(np.linalg.norm(pixels[:, None] - np.array(PALETTE), axis=-1).min(axis=1).mean())


def judge_hero(
    results: dict[str, float], generate: GenerateImages, judges: Judges, samples: int
) -> None:
    """Whether the trigger word, and only it, gives the hero, in the pose and colors of the
    prompt."""
    judge = judges.hero
    results["hero judge on held-out images"] = judge.check
    grounds = list(PLAIN)
    prompts = [HERO_PROMPT.format(HERO_WORDS[i % 4], grounds[i % 13]) for i in range(64)]
    results["hero with its trigger word, 64"] = float(
        judge.is_hero(generate(prompts, range(64))).mean()
    )
    names = [color for color in ROBOT_COLORS if color not in ("gray", "white")]
    without = [
        OTHER_PROMPTS[i % 2].format(names[i % 8] if i % 2 else grounds[i % 13]) for i in range(64)
    ]
    results["hero without it, 64"] = float(judge.is_hero(generate(without, range(64))).mean())
    results |= hero_in_pose(generate, judges, samples)


def hero_in_pose(generate: GenerateImages, judges: Judges, samples: int) -> dict[str, float]:
    """Poses of the hero, and the palette distance of those images that show the hero in the pose
    asked for."""
    poses = judges.poses
    prompts, labels = zip(*poses.prompts(HERO_PROMPT, samples), strict=True)
    images = generate(prompts, range(len(prompts)))
    obeyed = poses.obeyed(images, labels)
    right = obeyed & judges.hero.is_hero(images)
    return {
        **poses.summary("hero", obeyed, labels),
        "hero in the pose asked for": float(right.mean()),
        "palette distance of those": float(
            np.nanmean([palette_distance(image) for image in images[right]])
        ),
    }


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
