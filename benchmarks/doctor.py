"""How long the dataset doctor takes over many pictures, what it needs, and which planted faults it
finds.

    python benchmarks/doctor.py --pictures 5000

Draws pictures that are unlike each other (variations of the demo's, sprites, drawings, mosaics,
photo-like ones) into a temporary folder, plants near-duplicates and blurred ones, and runs the
doctor as a person would. The last line is JSON.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from backgrounds import draw_background
from sprites import draw_sprite

SIDE = 512
DEMO = sorted((ROOT / "demo" / "images").glob("*.png"))
SCENES = ("starry night", "green hills", "city", "sunset", "snow", "brick wall")
WORDS = (
    "robot",
    "cat",
    "tower",
    "forest",
    "river",
    "lamp",
    "bridge",
    "engine",
    "garden",
    "mountain",
)


def variation(number: int, chance: np.random.Generator) -> Image.Image:
    """A demo picture, its upper or lower left cut out and its colours turned round the circle: 580
    in all."""
    which, rest = number % len(DEMO), number // len(DEMO)
    upper, turn = rest % 2, rest // 2 % 5 + 1
    with Image.open(DEMO[which]) as image:
        image = image.convert("RGB")
    cut = round(image.width * 0.25)
    image = image.crop((0, cut * upper, image.width - cut, image.height - cut + cut * upper))
    hue, saturation, value = image.convert("HSV").split()
    saturation = saturation.point(lambda level: max(level, 60))
    hue = hue.point(lambda level: (level + round(256 * turn / 6)) % 256)
    return (
        Image.merge("HSV", (hue, saturation, value))
        .convert("RGB")
        .resize((SIDE, SIDE), Image.Resampling.NEAREST)
    )


def sprite(number: int, chance: np.random.Generator) -> Image.Image:
    """A pixel-art figure somewhere on one of six scenes."""
    cells, _ = draw_sprite(chance)
    scene = Image.fromarray(
        draw_background(SCENES[number % len(SCENES)], chance)[..., :3].astype(np.uint8)
    )
    figure = Image.fromarray(cells.astype(np.uint8), "RGBA")
    scene = scene.resize((48, 48), Image.Resampling.NEAREST)
    place = tuple(int(shift) for shift in chance.integers(-2, 17, 2))
    scene.paste(figure, place, figure)
    return scene.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def drawing(number: int, chance: np.random.Generator) -> Image.Image:
    """Smooth shapes on a plain ground."""
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), colour(chance))
    draw = ImageDraw.Draw(canvas)
    for _ in range(chance.integers(3, 9)):
        (x, y), (w, h) = chance.integers(0, 2 * SIDE, 2), chance.integers(SIDE // 6, SIDE, 2)
        shape = (draw.ellipse, draw.rectangle)[chance.integers(2)]
        shape(
            (int(x - w), int(y - h), int(x + w), int(y + h)),
            fill=colour(chance),
            outline="black",
            width=6,
        )
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def leaves(number: int, chance: np.random.Generator) -> Image.Image:
    """Overlapping discs of all sizes, as in the dead-leaves model of photographs, with a camera's
    noise."""
    canvas = Image.new("RGB", (SIDE, SIDE + 160 * (number % 2)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(600):
        radius = min(180, 8 / (chance.random() + 0.02))
        x, y = chance.random() * canvas.width, chance.random() * canvas.height
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour(chance))
    noise = chance.integers(-4, 5, (canvas.height, canvas.width, 3))
    return Image.fromarray(
        (np.asarray(canvas).astype(np.int16) + noise).clip(0, 255).astype(np.uint8)
    )


def colour(chance: np.random.Generator) -> tuple[int, int, int]:
    hue, saturation, value = chance.random(), chance.random(), 0.15 + 0.85 * chance.random()
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))


KINDS = (sprite, drawing, leaves, sprite, drawing, leaves, sprite, variation)


def original(number: int, seed: int) -> Image.Image:
    chance = np.random.default_rng((seed, number))
    return KINDS[number % len(KINDS)](number // len(KINDS), chance)


def resized(image: Image.Image, chance: np.random.Generator) -> Image.Image:
    share = chance.uniform(0.5, 0.9)
    return image.resize(tuple(round(side * share) for side in image.size), Image.Resampling.LANCZOS)


def recompressed(image: Image.Image, chance: np.random.Generator) -> Image.Image:
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=int(chance.integers(25, 70)))
    return Image.open(packed).convert("RGB")


def mirrored(image: Image.Image, chance: np.random.Generator) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def cropped(image: Image.Image, chance: np.random.Generator) -> Image.Image:
    """Up to an eighth off each way, unevenly."""
    left, top, right, bottom = chance.uniform(0, 0.07, 4)
    width, height = image.size
    return image.crop(
        (
            round(left * width),
            round(top * height),
            width - round(right * width),
            height - round(bottom * height),
        )
    )


def all_together(image: Image.Image, chance: np.random.Generator) -> Image.Image:
    for change in (cropped, mirrored, resized, recompressed):
        image = change(image, chance)
    return image


COPIES = (resized, recompressed, mirrored, cropped, all_together)


def make(number: int, folder: Path, copies: int, blurred: int, seed: int = 0) -> dict[str, str]:
    """Draw one picture into the folder, perhaps blurred, and perhaps a near-duplicate of it;
    returns what was planted, file by file."""
    image, planted = original(number, seed), {}
    suffix = "jpg" if KINDS[number % len(KINDS)] is leaves or number % 7 == 0 else "png"
    name = f"{number:05d}.{suffix}"
    if copies <= number < copies + blurred:
        chance = np.random.default_rng((seed, 1, number))
        image, planted[name] = (
            image.filter(ImageFilter.GaussianBlur(chance.uniform(4, 9))),
            "blurred",
        )
    image.save(folder / name, **({"quality": 92} if suffix == "jpg" else {"compress_level": 1}))
    caption = f"hero, {WORDS[number % 10]}, {WORDS[number // 10 % 10]} number {number}"
    (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    if number < copies:
        change = COPIES[number // len(KINDS) % len(COPIES)]
        twin = f"{number:05d}_{change.__name__}.png"
        change(image, np.random.default_rng((seed, 2, number))).save(
            folder / twin, compress_level=1
        )
        (folder / twin).with_suffix(".txt").write_text(f"{caption} again", encoding="utf-8")
        planted[twin] = change.__name__
    return planted


def make_all(folder: Path, pictures: int, seed: int) -> dict[str, str]:
    """So many pictures, a tenth of them near-duplicates and a hundredth blurred; returns what was
    planted."""
    copies, blurred = pictures // 10, pictures // 100
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.map(
            partial(make, folder=folder, copies=copies, blurred=blurred, seed=seed),
            range(pictures - copies),
        )
    return {name: kind for part in parts for name, kind in part.items()}


def judge(report: dict, planted: dict[str, str]) -> dict[str, object]:
    """What of the planted was found, and what was found that was not planted."""
    findings = {finding["kind"]: finding for finding in report["findings"]}
    pairs = findings.get("duplicates", {"pairs": []})["pairs"]
    together = {frozenset(pair["pictures"]) for pair in pairs}
    kinds = [change.__name__ for change in COPIES]
    twins = {name: kind for name, kind in planted.items() if kind in kinds}
    sources = {
        name: next(n for n in report["pictures"] if n["path"].startswith(f"{name[:5]}."))
        for name in twins
    }
    hits = {
        name for name, source in sources.items() if frozenset((name, source["path"])) in together
    }
    false = [sorted(pair) for pair in together if len({name[:5] for name in pair}) > 1]
    soft = set(findings.get("blurred", {"files": []})["files"])
    blurred = {name for name, kind in planted.items() if kind == "blurred"}
    return {
        "planted_pairs": len(twins),
        "found_pairs": len(hits),
        "missed": {
            kind: sum(k == kind and name not in hits for name, k in twins.items()) for kind in kinds
        },
        "missed_files": sorted(set(twins) - hits)[:20],
        "false_pairs": len(false),
        "false_examples": false[:20],
        "blurred_planted": len(blurred),
        "blurred_found": len(soft & blurred),
        "blurred_false": len(
            {name for name in soft if name[:5] not in {hit[:5] for hit in blurred}}
        ),
    }


def memory_of_all(pid: int) -> float:
    """Megabytes of a process and its descendants; what they share is counted once. 0 where there is
    no /proc."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except (OSError, StopIteration):  # it has ended
        return 0.0
    return own + sum(memory_of_all(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="draw into this folder, and keep it (default: a temporary one)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "pictures"
        if not folder.exists():
            folder.mkdir(parents=True)
            start = time.perf_counter()
            planted = make_all(folder, options.pictures, options.seed)
            (folder / "planted.json").write_text(json.dumps(planted), encoding="utf-8")
            print(f"drawn      {options.pictures} pictures in {time.perf_counter() - start:.0f} s")
        planted = json.loads((folder / "planted.json").read_text(encoding="utf-8"))
        print(f"size       {sum(path.stat().st_size for path in folder.iterdir()) / 1e9:.2f} GB")
        command = [
            sys.executable,
            ROOT / "megaman_lora.py",
            "--check_data",
            "--data_dir",
            folder,
            "--output_dir",
            Path(temporary) / "out",
        ]
        start = time.perf_counter()
        done = subprocess.Popen(command)
        most = 0.0
        while done.poll() is None:
            most = max(most, memory_of_all(done.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads(
            (Path(temporary) / "out" / "dataset_report.json").read_text(encoding="utf-8")
        )
        page = (Path(temporary) / "out" / "dataset_report.html").stat().st_size
        result = {
            "pictures": options.pictures,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "cores": len(os.sched_getaffinity(0)),
            "peak_mb_largest_process": round(usage.ru_maxrss / 1024),
            "peak_mb_all_processes": round(most),
            "page_mb": round(page / 1e6, 1),
            **judge(report, planted),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
