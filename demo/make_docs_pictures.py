"""The images of the pages in docs/, made from nothing but the demo.

    python demo/make_docs_pictures.py --work_dir readme_work

- dataset_good.png is a part of the demo's set.
- dataset_report.png is the report on the same set with typical faults added, in Chromium.
- results.png compares the base, a LoRA trained for too few steps, one trained well, and one trained
  for too long on too few images: the demo's settings on four of its images.
- training_report.png is the page of the demo's training, gallery.png that of generate_megaman.py,
  both in Chromium.

Trains in --work_dir, which may be that of make_readme_picture.py, unless that was done before;
minutes on a CPU. --only makes some of them. Chromium shows the pages at the width of a page on
GitHub, so that their text keeps its size there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from make_readme_picture import GAP, LINE, SIDE, run, stack, strip, train

GOOD = (
    "volto_standing_front_view_white", "volto_running_right_green_hills",
    "volto_sitting_left_white", "volto_flying_right_city", "volto_portrait_happy_orange",
    "volto_shooting_arm_cannon_left_black", "volto_standing_back_view_green_hills",
    "volto_red_standing_front_view_gray", "other_robot_01", "other_robot_05",
)  # fmt: skip
FOUR = (
    "volto_standing_front_view_white", "volto_running_right_white", "volto_portrait_calm_green",
    "volto_waving_front_view_yellow",
)  # fmt: skip
# Two prompts that no image has, and a color that the four images do not have.
PROMPTS = {
    "volto, blue robot hero, pixel art, shooting, arm cannon, facing right, orange background": 42,
    "volto, blue robot hero, pixel art, portrait, angry, navy background": 42,
    "volto, red robot hero, pixel art, standing, front view, green hills background": 42,
}
UNDERTRAINED = "checkpoint-150"
HERO = "volto, blue robot hero, pixel art"
GALLERY_PROMPTS = (
    f"{HERO}, waving, front view, pink background",
    f"{HERO}, portrait, happy, yellow background",
)
PICTURES = ("dataset_good", "dataset_report", "training_report", "results", "gallery")
WIDTH = 830  # pixels: of an image on GitHub


def train_on_four(work_dir: Path) -> Path:
    """The demo's settings on four of its images: each is seen 900 times."""
    output_dir, data_dir = work_dir / "overtrained", work_dir / "four"
    if not (output_dir / "lora_weights").is_dir():
        data_dir.mkdir(parents=True, exist_ok=True)
        for name in FOUR:
            for extension in (".png", ".txt"):
                shutil.copy(ROOT / "demo" / "images" / f"{name}{extension}", data_dir)
        folders = ["--data_dir", data_dir, "--output_dir", output_dir]
        folders += ["--logging_dir", work_dir / "logs"]
        run("megaman_lora.py", *folders, "--num_validation_images", 0, "--overwrite_output")
    return output_dir


def images_of(work_dir: Path, name: str, lora: Path, scale: int) -> list[Path]:
    """One image of each prompt with a LoRA at a strength; earlier ones are used again."""
    folder = work_dir / "results" / name
    prompts = work_dir / "results_prompts.txt"
    lines = [f"{prompt} --d {seed}" for prompt, seed in PROMPTS.items()]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    if not (folder / "images.json").is_file():
        arguments = ["--prompts_file", prompts, "--lora_path", lora, "--lora_scales", scale]
        run("generate_megaman.py", *arguments, "--output_dir", folder)
    records = json.loads((folder / "images.json").read_text(encoding="utf-8"))["images"]
    return [folder / record["file"] for record in records]


def results_sheet(work_dir: Path) -> Image.Image:
    """A strip for each prompt: base, undertrained, well trained, overtrained."""
    well, over = train(work_dir), train_on_four(work_dir) / "lora_weights"
    columns = {
        "base": images_of(work_dir, "base", well / "lora_weights", 0),
        "undertrained: 150 steps": images_of(work_dir, "under", well / UNDERTRAINED, 1),
        "well trained: 900 steps": images_of(work_dir, "well", well / "lora_weights", 1),
        "overtrained: four images": images_of(work_dir, "over", over, 1),
    }
    strips = []
    for place, prompt in enumerate(PROMPTS):
        row = [(paths[place], label) for label, paths in columns.items()]
        strips.append(strip(row, prompt))
    four = [(work_dir / "four" / f"{name}.png", "") for name in FOUR]
    return stack([*strips, strip(four, "The four images that the overtrained LoRA has seen")])


def make_faults(folder: Path) -> None:
    """The demo's set with what --check_data finds added."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "demo" / "images", folder)
    hero = Image.open(folder / "volto_jumping_left_pink.png").convert("RGB")
    portrait = Image.open(folder / "volto_portrait_happy_orange.png").convert("RGB")
    hero.crop((8, 8, 248, 248)).resize((300, 300)).save(folder / "twin_cropped.jpg", quality=90)
    hero.resize((180, 180)).save(folder / "twin_small.png")
    ImageOps.mirror(portrait).save(folder / "twin_mirrored.png")
    portrait.resize((24, 24)).save(folder / "icon.png")
    portrait.resize((32, 32)).resize((256, 256), Image.Resampling.BICUBIC).save(
        folder / "enlarged_icon.png"
    )
    hero.filter(ImageFilter.GaussianBlur(8)).save(folder / "out_of_focus.png")
    (folder / "text.jpg").write_text("not an image", encoding="utf-8")
    (folder / "broken.png").write_bytes((folder / "twin_small.png").read_bytes()[:900])
    names = ["twin_cropped", "twin_small", "twin_mirrored", "enlarged_icon", "out_of_focus"]
    for name in names[:4]:
        caption = f"volto, blue robot hero, pixel art, antena, {name.replace('_', ' ')}"
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    (folder / "icon.txt").write_text("", encoding="utf-8")


def screenshot(page: Path, output: Path, height: int, top: int = 0) -> None:
    """A page in headless Chromium from a top on, as wide as GitHub shows an image."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        print(f"{output} is as it was: no Chromium is installed")
        return
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [
        "--virtual-time-budget=3000",
        f"--window-size={WIDTH},{height}",
        f"--screenshot={output.resolve()}",
    ]
    subprocess.run([chromium, *flags, page.resolve().as_uri()], check=True, capture_output=True)
    save(Image.open(output).convert("RGB").crop((0, top, WIDTH, height)), output)


def dataset_report(work_dir: Path, output: Path) -> None:
    make_faults(work_dir / "megaman_images")
    script, flags = ROOT / "megaman_lora.py", ["--check_data", "--resolution", "256"]
    words = [sys.executable, str(script), *flags, "--output_dir", "report"]
    subprocess.run(words, check=True, cwd=work_dir)
    screenshot(work_dir / "report" / "dataset_report.html", output, 1000)


def gallery(work_dir: Path, output: Path) -> None:
    """Made in work_dir, so that the page shows short paths."""
    train(work_dir)
    folder = work_dir / "gallery"
    if not (folder / "images.json").is_file():
        words = [sys.executable, str(ROOT / "generate_megaman.py"), "--demo"]
        words += ["--lora_path", "training/lora_weights", "--output_dir", folder.name]
        subprocess.run([*words, "--prompts", *GALLERY_PROMPTS], check=True, cwd=work_dir)
    screenshot(folder / "index.html", output, 1180, top=225)  # from the filter on


def contact_sheet(paths: list[Path], columns: int) -> Image.Image:
    """Training images in rows, each with its caption's last two tags below."""
    rows = -(-len(paths) // columns)
    size = (columns * (SIDE + GAP) + GAP, rows * (SIDE + LINE + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, path in enumerate(paths):
        row, column = divmod(place, columns)
        left, top = GAP + column * (SIDE + GAP), GAP + row * (SIDE + LINE + GAP)
        image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
        sheet.paste(image, (left, top))
        tags = path.with_suffix(".txt").read_text(encoding="utf-8").strip().split(", ")
        label = ", ".join(tags[-2:]).removesuffix(" background")
        pen.text((left, top + SIDE + 3), label, "black", font)
    return sheet


def save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(192).save(path, optimize=True)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work_dir", type=Path, default=Path("readme_work"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=PICTURES)
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    good = [ROOT / "demo" / "images" / f"{name}.png" for name in GOOD]
    for name in options.only:
        output = options.docs / f"{name}.png"
        if name == "dataset_good":
            save(contact_sheet(good, 5), output)
        elif name == "results":
            save(results_sheet(options.work_dir), output)
        elif name == "training_report":
            page = train(options.work_dir) / "training_report.html"
            screenshot(page, output, 1440, top=520)  # from the samples on
        elif name == "dataset_report":
            dataset_report(options.work_dir, output)
        else:
            gallery(options.work_dir, output)


if __name__ == "__main__":
    main()
