"""The page of a training run, in a browser from the disk: what it shows, how it follows the run,
and that mouse, keyboard and screen readers reach everything."""

from __future__ import annotations

import json
import math
import os
import random
import time
from pathlib import Path

import pytest
from conftest import ROOT, Visit, needs_browser
from PIL import Image

from megaman.training.history import NearestImage, RunHistory, Sample
from megaman.training.report import StepReport, TrainingReport

IMAGES = sorted((ROOT / "demo" / "images").glob("*.png"))[:40]
TOTAL = 3000
MARKUP = "</script><img src=x onerror=alert(1)> 洛克人"
ABOUT = {
    "name": "robots",
    "base": "demo/base",
    "data_dir": "images",
    "epochs": 40.0,
    "device": "cpu, float32",
    "num_images": len(IMAGES),
    "settings": [{"heading": "LoRA", "rows": [["lora_rank", "16", False], ["x", "no", True]]}],
    "commands": {
        "resume": "python megaman_lora.py --resume_from_checkpoint latest",
        "generate": "python generate_megaman.py --lora_path robots/lora_weights",
        "checkpoint": "python generate_megaman.py --lora_path robots/checkpoint-0",
        "tensorboard": "tensorboard --logdir ./logs",
    },
}


def record(history: RunHistory, folder: Path, first: int, last: int) -> None:
    """The steps from first to last, with samples and evaluations every 300."""
    chance = random.Random(first)
    steps = range(first, last + 1)
    losses = [0.1 + 0.05 * math.exp(-step / 500) + chance.random() / 20 for step in steps]
    norms = [chance.random() for _ in steps]
    history.add_steps(losses, norms, [[1e-4 * (1 - step / TOTAL)] for step in steps])
    for step in range(first - 1, last + 1, 300):
        loss = 0.12 + 0.04 * math.exp(-step / 600) + max(0, step - 1500) ** 2 * 1e-8
        for name in ("held_out", "train", "ema"):
            history.add_evaluation(step, name, loss, [loss * (2 - i / 5) for i in range(8)])
        history.add_drift(step, step / 1e4)
        files = [f"samples-{step}/{i:02d}.png" for i in range(2)]
        (folder / files[0]).parent.mkdir(exist_ok=True)
        for i, file in enumerate(files):
            Image.new("RGB", (64, 64), (i * 100, 90, step % 256)).save(folder / file)
        history.add_samples(step, [Sample(file, MARKUP, i) for i, file in enumerate(files)])
        nearest = [NearestImage(file, str(IMAGES[i]), 0.3, i == 1) for i, file in enumerate(files)]
        history.add_similarity(step, nearest)


class Watched:
    """A run whose page is written, and whose steps come when a test says so."""

    def __init__(self, folder: Path):
        self.history = RunHistory()
        self.folder, self.report = folder, TrainingReport(folder, self.history, is_active=True)
        self.report.begin(self.about, StepReport(0, TOTAL, 0.0))
        self.page = self.report.page

    def about(self, thumbnails):
        sheet = [
            {"file": thumbnails.of(image), "name": image.name, "caption": MARKUP}
            for image in IMAGES
        ]
        return {**ABOUT, "sheet": sheet}

    def train(self, last: int) -> None:
        record(self.history, self.folder, self.history.last_step + 1, last)
        self.report._next_write = 0.0  # as if seconds had passed
        self.report.update(StepReport(last, TOTAL, last * 1.0, TOTAL - last, 1.0, 4.0, 2**31, last))


@pytest.fixture
def run(tmp_path) -> Watched:
    return Watched(tmp_path)


def opened(browser, run: Watched, **how) -> Visit:
    page = Visit(browser, run.page, **how)
    page.wait_for("document.documentElement.classList.contains('loaded')")
    return page


def text(page: Visit, selector: str) -> str:
    return page.do(f"document.querySelector({json.dumps(selector)}).innerText")


def wait_for_text(page: Visit, selector: str, wanted: str) -> None:
    page.wait_for(
        f"document.querySelector({json.dumps(selector)}).innerText.includes({json.dumps(wanted)})"
    )


@pytest.mark.slow
@needs_browser
def test_the_page_follows_the_run_and_keeps_what_the_visitor_chose(the_browser, run):
    run.train(900)
    page = opened(the_browser, run, height=600)
    assert "Step 900 of 3,000" in text(page, ".done")
    assert "35 min left" in text(page, ".left")
    assert text(page, ".state") == "Running"
    assert page.do("document.querySelectorAll('.strip button').length") == 4
    assert text(page, ".strip button") == "0", "step 0 is at the left"
    assert text(page, ".slide output") == "Step 900", "the newest samples are shown"
    page.do("document.querySelector('.slide input').focus()")
    page.key("ArrowLeft")
    assert text(page, ".slide output") == "Step 600"
    page.do("scrollTo(0, 500)")
    strip_top = "Math.round(document.querySelector('.strip').getBoundingClientRect().top)"
    before = page.do(strip_top)
    run.train(1800)
    wait_for_text(page, ".done", "Step 1,800")
    assert page.do("document.querySelectorAll('.strip button').length") == 7
    assert text(page, ".slide output") == "Step 600", "the slider stays"
    assert page.do(strip_top) == before, "the page does not jump, whatever grows above"
    assert page.do("document.activeElement.type") == "range", "the focus stays"
    page.click(".strip button:nth-child(1)")
    assert text(page, ".slide output") == "Step 0 · before training"
    run.train(TOTAL)
    assert "tensorboard --logdir" in text(page, ".commands")
    command = "python generate_megaman.py --lora_path x"
    run.report.end("finished", lora="x", generate=command, tensorboard="")
    wait_for_text(page, ".state", "Finished")
    assert "--lora_path x" in text(page, ".commands")
    assert "tensorboard" not in text(page, ".commands"), "no curve could be written"
    assert "Overfitting" in text(page, ".verdict")
    assert "1 of the newest samples is suspiciously close" in text(page, ".verdict")
    assert page.requests() == {"file"}
    assert not page.complaints() and not page.stopped_by_policy()
    page.close()


@needs_browser
def test_curves_are_read_by_mouse_and_by_keyboard(the_browser, run):
    run.train(TOTAL)
    page = opened(the_browser, run)
    assert page.do("document.querySelectorAll('.chart:not([hidden])').length") == 5
    page.click(".plot > svg", across=0.5)
    assert text(page, ".readout b").startswith("Step 1,")
    assert "training, smoothed" in text(page, ".readout")
    page.do("document.querySelector('.plot > svg').focus()")
    page.key("ArrowLeft")
    before = text(page, "#spoken")
    page.key("ArrowRight")
    assert before.startswith("Step 1,") and text(page, "#spoken") != before
    raw = "document.querySelector('.legend button')"
    lines = "document.querySelectorAll('.wide .plot polyline').length"
    count = page.do(lines)
    page.do(f"{raw}.click()")
    assert page.do(f"{raw}.getAttribute('aria-pressed')") == "false"
    assert page.do(lines) == count - 1
    page.close()


@needs_browser
def test_both_languages_and_texts_that_look_like_markup(the_browser, run):
    run.train(600)
    page = opened(the_browser, run)
    page.click("[lang='zh-TW']")
    assert page.do("document.documentElement.lang") == "zh-TW"
    assert text(page, ".state") == "訓練中"
    assert "第 600 步" in text(page, ".done")
    missing = "Object.keys(WORDS.en).filter((key) => !(key in WORDS['zh-TW']))"
    assert page.do(missing) == []
    page.load()
    wait_for_text(page, ".state", "訓練中")
    page.click("[lang='en']")
    assert text(page, ".samples .prompt") == MARKUP
    assert page.do("document.querySelectorAll('img[src=x]').length") == 0
    page.close()


@needs_browser
def test_a_run_that_was_killed_or_failed_is_not_shown_as_running(the_browser, run):
    run.train(600)
    script = run.folder / "training_report" / "live.js"
    head, _, rest = script.read_text().partition('"updated":')
    ago = time.time() - 3600
    script.write_text(f'{head}"updated":{ago},{rest.partition(",")[2]}')
    page = opened(the_browser, run)
    wait_for_text(page, ".state", "No news")
    assert "--resume_from_checkpoint latest" in text(page, ".commands")
    run.report.end("failed", reason="the disk burned")
    wait_for_text(page, ".state", "Failed")
    assert "the disk burned" in text(page, ".verdict")
    page.close()


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_accessibility(the_browser, run, axe, dark):
    run.train(TOTAL)
    page = opened(the_browser, run, dark=dark)
    page.click("details summary")
    page.do(axe + "; 0")
    assert page.do("axe.run().then(({passes}) => passes.length)") > 20, "something was looked at"
    found = """axe.run().then(({violations}) => violations.map(({id, nodes}) =>
        [id, nodes.map((node) => node.html.slice(0, 200) + node.failureSummary)]))"""
    assert page.do(found) == []
    page.close()


@needs_browser
def test_no_width_scrolls_sideways_and_a_long_run_opens_fast(the_browser, run):
    run.train(TOTAL)
    for width in (390, 1440, 1920):
        page = opened(the_browser, run, width=width)
        assert page.do("document.documentElement.scrollWidth") <= width
        page.close()
    scripts = (run.folder / "training_report").glob("*.js")
    size = os.path.getsize(run.page) + sum(map(os.path.getsize, scripts))
    assert size < 2e6, "bytes without images"
