"""Gallery and dataset report in Traditional Chinese: by a switch, and back to the same English."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, Visit, needs_browser
from PIL import Image

from megaman.doctor.balance_checks import KINDS, check_balance
from megaman.doctor.findings import CheckedImage
from megaman.doctor.page import NAMES
from megaman.pages.gallery import write_gallery
from megaman.pages.gallery_images import GalleryImage
from megaman.pages.html import TEMPLATES

MARKED = "[...document.querySelectorAll('[data-t]')].map((element) => element.textContent)"


@pytest.fixture
def gallery(tmp_path) -> Path:
    images = [
        GalleryImage(
            file=f"{i}.png",
            prompt="prompt",  # which is a fixed text elsewhere
            negative_prompt="",
            seed=i,
            width=64,
            height=64,
            settings={"steps": 25},
            base_file="base.png",
            loras=["out/robots/lora_weights:1"],
        )
        for i in range(3)
    ]
    for name in ("0", "1", "2", "base"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    return write_gallery(tmp_path, images, "Images of robots")


@needs_browser
def test_the_gallery_switches_to_chinese_and_back(the_browser, gallery):
    page = Visit(the_browser, gallery)
    english = page.do(MARKED)
    page.click("[lang='zh-TW']")
    assert page.do("document.documentElement.lang") == "zh-TW"
    # textContent, as innerText is empty until the browser has drawn what content-visibility skips
    assert page.do("document.querySelector('h1').textContent") == "robots 的圖片"
    assert page.do("document.querySelector('h2').textContent") == "prompt", "prompts stay"
    left = [text for text in page.do(MARKED) if text in english]
    assert not left
    page.click("[data-number='0'] .with-lora img")
    assert page.do("document.querySelector('.place').textContent") == "第 1 張，共 3 張，種子 0"
    page.key("Escape")
    page.click("[lang='en']")
    assert page.do(MARKED) == english
    assert not page.complaints() and not page.stopped_by_policy()
    page.close()


def translations(template: str) -> set[str]:
    """The English texts that a template has translations of."""
    source = (TEMPLATES / template).read_text(encoding="utf-8")
    block = re.search(r"texts: \{(.*?)\n  \},", source, re.DOTALL)
    assert block
    return {json.loads(f'"{text}"') for text in re.findall(r'"([^"]*)":', block.group(1))}


def test_every_name_of_a_finding_is_translated():
    assert set(NAMES.values()) <= translations("report.html")


@pytest.mark.parametrize("template", ["report.html", "gallery.html"])
def test_every_fixed_text_is_translated(template):
    """What a template marks and does not fill in."""
    source = (TEMPLATES / template).read_text(encoding="utf-8")
    fixed = re.findall(r"<[^<>]* data-t(?: [^<>]*)?>([^<{]+)<", source)
    assert len(fixed) >= 4
    assert set(map(str.strip, fixed)) - {""} <= translations(template)


def test_every_constant_text_of_a_finding_is_translated():
    texts = set()
    for module in (ROOT / "megaman" / "doctor").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                title, remedy = (getattr(each, "value", None) for each in node.args[2:4])
                texts |= {title, remedy and f"{remedy}."}
    texts = {text for text in texts if isinstance(text, str)}
    assert len(texts) > 15 and texts <= translations("report.html")


def test_what_the_captions_lack_is_told_in_chinese():
    """Titles with numbers and names in them, which patterns translate."""
    source = (TEMPLATES / "report.html").read_text(encoding="utf-8")
    patterns = re.findall(r"\[/(\^.*?\$)/s?,", source)
    views = ["front view, standing"] * 11 + ["side view, facing left, running, portrait"]
    one_sided = [f"there is a robot, {view}" for view in views]
    texts = []
    for captions in (one_sided, [*one_sided[1:], "x"], [f"volto {i}" for i in range(12)]):
        images = [
            CheckedImage(f"{i}.png", Path(f"{i}.png"), caption, caption_from_file=True)
            for i, caption in enumerate(captions)
        ]
        findings = list(check_balance(images, ""))
        texts += [finding.title for finding in findings]
        texts += [f"{finding.remedy}." for finding in findings]
    assert len(set(texts)) >= 7
    for text in set(texts) - translations("report.html"):
        assert any(re.search(pattern, text, re.DOTALL) for pattern in patterns), text
    values = {value for kind in KINDS.values() for value in kind}
    assert all(re.search(rf'[ "]{value}"?: "', source) for value in values)
