"""The gallery with many images: first paint, scrolling to the end, memory.

    python benchmarks/gallery.py --images 5000

Writes that many different images into a temporary folder and opens the gallery in Chromium. Needs
/proc.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import paths  # noqa: F401  # the package's modules become importable
from browser import Browser, Visit, chromium
from PIL import Image

from megaman.pages.gallery import thumbnail_of, write_gallery
from megaman.pages.gallery_images import GalleryImage
from megaman.sampling.png import save_thumbnail

PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"


def draw(folder: Path, count: int, side: int, prompts: int) -> list[GalleryImage]:
    """Images with as much detail as generated ones: about 350 kB at 512 pixels."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = pixels + rng.integers(-3, 4, pixels.shape)
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
    """Resident and private megabytes of the largest renderer process."""
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


SEARCH = """const input = document.querySelector('[type=search]'); input.value = '{value}';
input.dispatchEvent(new Event('input'));"""
SELECT = """const select = document.querySelector('.tools select'); select.value = '{value}';
select.dispatchEvent(new Event('change'));"""
ACTIONS = {
    "filter": SEARCH.format(value="number 7"),
    "no filter": SEARCH.format(value=""),
    "by seed": SELECT.format(value="seed"),
    "by prompt": SELECT.format(value="prompt"),
}
TIMED = """(() => {{ const start = performance.now(); {code} document.body.offsetHeight;
return performance.now() - start; }})()"""
SCROLL = """scrollBy({top: innerHeight * 0.8, behavior: 'instant'}),
scrollY + innerHeight >= document.documentElement.scrollHeight - 2"""
LOADED = "[...document.images].filter((i) => i.dataset.src || i.naturalWidth).length"


def report_memory(sizes: tuple[float, float], when: str = "") -> None:
    resident, private = sizes
    print(f"memory     {resident:.0f} MB resident, {private:.0f} MB private{when}")


def open_page(browser: Browser, page: Path) -> Visit:
    """Report the first paint and the memory of the opened page."""
    start = time.perf_counter()
    visit = Visit(browser, page)
    loaded = time.perf_counter() - start
    visit.wait_for(PAINTED)
    print(f"paint      {visit.do(PAINTED) / 1000:.2f} s, loaded after {loaded:.2f} s")
    report_memory(renderer_memory(browser))
    return visit


def scroll(browser: Browser, visit: Visit) -> None:
    """Scroll to the end and report the time and the peak memory."""
    start, peak, steps = time.perf_counter(), (0.0, 0.0), 0
    while not visit.do(SCROLL):
        visit.do("new Promise((done) => setTimeout(done, 30))")
        steps += 1
        if steps % 20 == 0:
            peak = max(peak, renderer_memory(browser))
    peak = max(peak, renderer_memory(browser))
    print(f"scrolled   {steps} screens in {time.perf_counter() - start:.0f} s")
    report_memory(peak, " at the peak")
    report_memory(renderer_memory(browser), " at the end")


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
        seconds = time.perf_counter() - start
        print(f"page       {page.stat().st_size / 1e6:.1f} MB, written in {seconds:.2f} s")
        size = sum(path.stat().st_size for path in folder.glob("*.png")) / options.images / 1e3
        print(f"images     {options.images} of {options.side} px, {size:.0f} kB each")
        with chromium() as browser:
            visit = open_page(browser, page)
            for action, code in ACTIONS.items():
                print(f"{action:10} {visit.do(TIMED.format(code=code)):.0f} ms")
            scroll(browser, visit)
            print(f"loaded     {visit.do(LOADED)} images, {len(visit.complaints())} complaints")


if __name__ == "__main__":
    main()
