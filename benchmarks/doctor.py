"""How long the dataset doctor takes for many images, how much memory it needs, and which planted
faults it finds.

    python benchmarks/doctor.py --pictures 5000

Draws images that are unlike each other (variations of the demo's, sprites, drawings, mosaics,
photo-like ones) into a temporary folder, plants near-duplicates and blurred ones, and runs the
doctor as a user would. The last line is JSON.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

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
MAX_LISTED = 20  # files and pairs in the result
POLL_SECONDS = 0.2  # between two looks at the memory


def variation(number: int, rng: np.random.Generator) -> Image.Image:
    """A demo image with its upper or lower left cut out and its hues rotated: 580 in all."""
    which, rest = number % len(DEMO), number // len(DEMO)
    upper, turn = rest % 2, rest // 2 % 5 + 1
    with Image.open(DEMO[which]) as file:
        image = file.convert("RGB")
    cut = round(image.width * 0.25)
    image = image.crop((0, cut * upper, image.width - cut, image.height - cut + cut * upper))
    hue, saturation, value = image.convert("HSV").split()
    saturation = saturation.point([max(level, 60) for level in range(256)])
    hue = hue.point([(level + round(256 * turn / 6)) % 256 for level in range(256)])
    turned = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return turned.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def sprite(number: int, rng: np.random.Generator) -> Image.Image:
    """A pixel-art figure somewhere on one of six scenes."""
    cells, _ = draw_sprite(rng)
    background = draw_background(SCENES[number % len(SCENES)], rng)[..., :3]
    scene = Image.fromarray(background.astype(np.uint8))
    figure = Image.fromarray(cells.astype(np.uint8), "RGBA")
    scene = scene.resize((48, 48), Image.Resampling.NEAREST)
    left, top = (int(shift) for shift in rng.integers(-2, 17, 2))
    scene.paste(figure, (left, top), figure)
    return scene.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def drawing(number: int, rng: np.random.Generator) -> Image.Image:
    """Smooth shapes on a plain background."""
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), color(rng))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 9)):
        x, y = rng.integers(0, 2 * SIDE, 2)
        w, h = rng.integers(SIDE // 6, SIDE, 2)
        shape = (draw.ellipse, draw.rectangle)[rng.integers(2)]
        box = (int(x - w), int(y - h), int(x + w), int(y + h))
        shape(box, fill=color(rng), outline="black", width=6)
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def leaves(number: int, rng: np.random.Generator) -> Image.Image:
    """Overlapping discs of all sizes, as in the dead-leaves model of photographs, with a camera's
    noise."""
    canvas = Image.new("RGB", (SIDE, SIDE + 160 * (number % 2)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(600):
        radius = min(180, 8 / (rng.random() + 0.02))
        x, y = rng.random() * canvas.width, rng.random() * canvas.height
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color(rng))
    noise = rng.integers(-4, 5, (canvas.height, canvas.width, 3))
    noisy = np.asarray(canvas).astype(np.int16) + noise
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def color(rng: np.random.Generator) -> tuple[int, int, int]:
    hue, saturation, value = rng.random(), rng.random(), 0.15 + 0.85 * rng.random()
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


KINDS = (sprite, drawing, leaves, sprite, drawing, leaves, sprite, variation)


def original(number: int, seed: int) -> Image.Image:
    """The image with this number, before any fault is planted."""
    rng = np.random.default_rng((seed, number))
    return KINDS[number % len(KINDS)](number // len(KINDS), rng)


def resized(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    share = rng.uniform(0.5, 0.9)
    size = round(image.width * share), round(image.height * share)
    return image.resize(size, Image.Resampling.LANCZOS)


def recompressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(25, 70)))
    return Image.open(buffer).convert("RGB")


def mirrored(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Up to an eighth off each way, unevenly."""
    left, top, right, bottom = rng.uniform(0, 0.07, 4)
    width, height = image.size
    return image.crop(
        (
            round(left * width),
            round(top * height),
            width - round(right * width),
            height - round(bottom * height),
        )
    )


def all_together(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    for change in (cropped, mirrored, resized, recompressed):
        image = change(image, rng)
    return image


COPIES = (resized, recompressed, mirrored, cropped, all_together)


def make(
    number: int, folder: Path, num_copies: int, num_blurred: int, seed: int = 0
) -> dict[str, str]:
    """Draw one image into the folder, perhaps blurred, and perhaps a near-duplicate of it; returns
    what was planted by file name."""
    image, planted = original(number, seed), {}
    is_jpeg = KINDS[number % len(KINDS)] is leaves or number % 7 == 0
    path = folder / f"{number:05d}.{'jpg' if is_jpeg else 'png'}"
    if num_copies <= number < num_copies + num_blurred:
        rng = np.random.default_rng((seed, 1, number))
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(4, 9)))
        planted[path.name] = "blurred"
    if is_jpeg:
        image.save(path, quality=92)
    else:
        image.save(path, compress_level=1)
    caption = f"hero, {WORDS[number % 10]}, {WORDS[number // 10 % 10]} number {number}"
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    if number < num_copies:
        change = COPIES[number // len(KINDS) % len(COPIES)]
        twin = folder / f"{number:05d}_{change.__name__}.png"
        change(image, np.random.default_rng((seed, 2, number))).save(twin, compress_level=1)
        twin.with_suffix(".txt").write_text(f"{caption} again", encoding="utf-8")
        planted[twin.name] = change.__name__
    return planted


def make_all(folder: Path, num_images: int, seed: int) -> dict[str, str]:
    """So many images, a tenth of them near-duplicates and a hundredth blurred; returns what was
    planted by file name."""
    num_copies = num_images // 10
    make_one = partial(
        make, folder=folder, num_copies=num_copies, num_blurred=num_images // 100, seed=seed
    )
    all_planted: dict[str, str] = {}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for planted in pool.map(make_one, range(num_images - num_copies)):
            all_planted |= planted
    return all_planted


def judge(report: dict[str, Any], planted: dict[str, str]) -> dict[str, Any]:
    """How many of the planted faults were found, and how many findings were not planted."""
    findings = {finding["kind"]: finding for finding in report["findings"]}
    blurry = {name for name, kind in planted.items() if kind == "blurred"}
    blurry_numbers = {number_of(name) for name in blurry}
    reported = set(findings.get("blurred", {"files": []})["files"])
    false = [name for name in reported if number_of(name) not in blurry_numbers]
    return {
        **judge_pairs(report, findings.get("duplicates", {"pairs": []})["pairs"], planted),
        "blurred_planted": len(blurry),
        "blurred_found": len(reported & blurry),
        "blurred_false": len(false),
    }


def judge_pairs(
    report: dict[str, Any], pairs: list[dict[str, Any]], planted: dict[str, str]
) -> dict[str, Any]:
    """The same for the near-duplicates."""
    together = {frozenset(pair["pictures"]) for pair in pairs}
    kinds = [change.__name__ for change in COPIES]
    twins = {name: kind for name, kind in planted.items() if kind in kinds}
    paths = [image["path"] for image in report["pictures"]]
    sources = {
        name: next(path for path in paths if path.startswith(f"{number_of(name)}."))
        for name in twins
    }
    missed = [name for name in twins if frozenset((name, sources[name])) not in together]
    false = [sorted(pair) for pair in together if len({number_of(name) for name in pair}) > 1]
    return {
        "planted_pairs": len(twins),
        "found_pairs": len(twins) - len(missed),
        "missed": {kind: len([name for name in missed if twins[name] == kind]) for kind in kinds},
        "missed_files": sorted(missed)[:MAX_LISTED],
        "false_pairs": len(false),
        "false_examples": false[:MAX_LISTED],
    }


def number_of(name: str) -> str:
    """The five digits with which the name of an image and those of its copies begin."""
    return name[:5]


def memory_of_all(pid: int) -> float:
    """Megabytes of a process and its descendants, shared memory counted once; 0 without /proc."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except (OSError, StopIteration):  # it has ended
        return 0.0
    return own + sum(memory_of_all(int(child)) for child in children)


def prepare(folder: Path, num_images: int, seed: int) -> dict[str, str]:
    """Draw the images unless the folder exists already; returns what was planted by file name."""
    record = folder / "planted.json"
    if not folder.exists():
        folder.mkdir(parents=True)
        start = time.perf_counter()
        planted = make_all(folder, num_images, seed)
        record.write_text(json.dumps(planted), encoding="utf-8")
        print(f"drawn      {num_images} images in {time.perf_counter() - start:.0f} s")
    print(f"size       {sum(path.stat().st_size for path in folder.iterdir()) / 1e9:.2f} GB")
    return json.loads(record.read_text(encoding="utf-8"))


def run_doctor(folder: Path, out: Path) -> dict[str, Any]:
    """Run the doctor over the folder into out; returns its time and memory."""
    script = ROOT / "megaman_lora.py"
    words = [script, "--check_data", "--data_dir", folder, "--output_dir", out]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, words)])
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, memory_of_all(process.pid))
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - start
    import resource  # Unix

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "cores": len(os.sched_getaffinity(0)),
        "peak_mb_largest_process": round(usage.ru_maxrss / 1024),
        "peak_mb_all_processes": round(peak),
        "page_mb": round((out / "dataset_report.html").stat().st_size / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="draw into this folder and keep it (default: a temporary one)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "pictures"
        out = Path(temporary) / "out"
        planted = prepare(folder, options.pictures, options.seed)
        figures = run_doctor(folder, out)
        report = json.loads((out / "dataset_report.json").read_text(encoding="utf-8"))
    print(json.dumps({"pictures": options.pictures, **figures, **judge(report, planted)}))


if __name__ == "__main__":
    main()
