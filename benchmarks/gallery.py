"""How long the gallery's page takes with many images, and what it costs: first paint, scrolling to
the end, memory.

    python benchmarks/gallery.py --images 5000

Draws that many different pictures into a temporary folder and opens their page in Chromium. Needs
/proc.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from browser import Browser, Visit, chromium

from megaman.pages.gallery import GalleryImage, thumbnail_of, write_gallery
from megaman.sampling.records import save_thumbnail

PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"


def draw(folder: Path, count: int, side: int, prompts: int) -> list[GalleryImage]:
    """Pictures with as much in them as a drawn one has: about 350 kB at 512 pixels."""
    chance = np.random.default_rng(0)
    images = []
    for number in range(count):
        coarse = Image.fromarray(chance.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = pixels + chance.integers(-3, 4, pixels.shape)
        file = f"megaman_{number:05d}_00.png"
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(folder / file, compress_level=1)
        save_thumbnail(folder / thumbnail_of(file), picture)
        settings = {
            "steps": 25,
            "guidance": 7.5,
            "sampler": "DPM++ 2M",
            "LoRA": "lora_weights",
            "base": "base",
        }
        prompt = (
            f"mega man, blue robot number {number % prompts}, helmet, game character, high quality"
        )
        images.append(
            GalleryImage(file, prompt, "blurry, low quality", number, side, side, settings)
        )
    return images


def renderer_memory(browser: Browser) -> tuple[float, float]:
    """Resident and own megabytes of the largest renderer."""
    processes = browser.send("SystemInfo.getProcessInfo")["processInfo"]
    sizes = []
    for process in processes:
        if process["type"] == "renderer":
            lines = (
                Path(f"/proc/{process['id']}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            )
            table = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines[1:]}
            sizes.append((table["Rss:"], table["Private_Clean:"] + table["Private_Dirty:"]))
    return max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = draw(folder, options.images, options.side, options.prompts)
        start = time.perf_counter()
        page = write_gallery(folder, images, "Many")
        print(
            f"page       {page.stat().st_size / 1e6:.1f} MB, written in {time.perf_counter() - start:.2f} s"
        )
        pictures = sum(path.stat().st_size for path in folder.glob("*.png"))
        print(
            f"pictures   {options.images} of {options.side} px, {pictures / options.images / 1e3:.0f} kB each"
        )
        with chromium() as browser:
            start = time.perf_counter()
            visit = Visit(browser, page)
            loaded = time.perf_counter() - start
            visit.wait_for(PAINTED)
            print(f"paint      {visit.do(PAINTED) / 1000:.2f} s, all loaded after {loaded:.2f} s")
            print("memory     %.0f MB resident, %.0f MB of its own" % renderer_memory(browser))
            for what, code in {
                "filter": "const i = document.querySelector('[type=search]'); i.value = 'number 7'; "
                "i.dispatchEvent(new Event('input'));",
                "no filter": "const i = document.querySelector('[type=search]'); i.value = ''; "
                "i.dispatchEvent(new Event('input'));",
                "by seed": "const s = document.querySelector('.tools select'); s.value = 'seed'; "
                "s.dispatchEvent(new Event('change'));",
                "by prompt": "const s = document.querySelector('.tools select'); s.value = 'prompt'; "
                "s.dispatchEvent(new Event('change'));",
            }.items():
                took = visit.do(
                    f"(() => {{ const start = performance.now(); {code} document.body.offsetHeight; "
                    "return performance.now() - start; })()"
                )
                print(f"{what:10} {took:.0f} ms")
            start, most, steps = time.perf_counter(), (0.0, 0.0), 0
            while not visit.do(
                "scrollBy({top: innerHeight * 0.8, behavior: 'instant'}), "
                "scrollY + innerHeight >= document.documentElement.scrollHeight - 2"
            ):
                visit.do("new Promise((done) => setTimeout(done, 30))")
                steps += 1
                if steps % 20 == 0:
                    most = max(most, renderer_memory(browser))
            most = max(most, renderer_memory(browser))
            print(f"scrolled   {steps} screens in {time.perf_counter() - start:.0f} s")
            print("memory     %.0f MB resident, %.0f MB of its own at most" % most)
            print(
                "           %.0f MB resident, %.0f MB of its own at the end"
                % renderer_memory(browser)
            )
            seen = visit.do(
                "[...document.images].filter((i) => i.dataset.src || i.naturalWidth).length"
            )
            print(f"           {seen} pictures were loaded, {len(visit.complaints())} complaints")


if __name__ == "__main__":
    main()
