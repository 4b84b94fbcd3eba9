"""The dataset doctor: planted faults are found, good images pass, what people write stays text."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from conftest import Visit, needs_browser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageOps

ROOT = Path(__file__).resolve().parent.parent.parent

import doctor as benchmark

import megaman_lora
from megaman.data.dataset import MegaManDataset
from megaman.doctor import balance_checks
from megaman.doctor.caption_checks import estimate_tokens
from megaman.doctor.checks import Report, examine
from megaman.doctor.duplicates import near_duplicates
from megaman.doctor.findings import Finding
from megaman.doctor.image_checks import BLURRED, nearest_shape
from megaman.doctor.image_stats import (
    THUMBNAIL_SIDE,
    ImageStats,
    measure_image,
    measure_images,
    sharpness,
)
from megaman.doctor.page import NAMES
from megaman.doctor.report import DATA, MARK, PAGE, summary, write_report
from megaman.doctor.term_checks import duplicate_tags, likely_typos, split_terms
from megaman.errors import UserError

DEMO = ROOT / "demo" / "images"


def look_at(folder: Path, resolution: int = 64, trigger: str | None = None) -> Report:
    dataset = MegaManDataset(folder, None, resolution)
    dataset.check()
    return examine(dataset, resolution, trigger)


def kinds(report: Report) -> dict[str, Finding]:
    return {finding.kind: finding for finding in report.findings}


def write(folder: Path, name: str, image: Image.Image, caption: str | None = None, **how) -> None:
    image.save(folder / name, **how)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def scene(number: int, side: int = 256) -> Image.Image:
    """A drawing unlike that of any other number."""
    return benchmark.drawing(number, np.random.default_rng(number)).resize(
        (side, side), Image.Resampling.BOX
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six good pictures with captions that differ."""
    place = tmp_path / "pictures"
    place.mkdir()
    poses = [
        "standing, city",
        "running, snow",
        "jumping, sunset",
        "waving, hills",
        "kneeling, brick",
        "sitting, sea",
    ]
    for number, pose in enumerate(poses):
        write(place, f"hero_{number}.png", scene(number), f"volto, blue robot, {pose}")
    return place


# Blur.


def blurred(image: Image.Image, radius: float) -> np.ndarray:
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)).convert("L"))


def photo(rng: np.random.Generator, side: int = 512) -> Image.Image:
    """Noise whose amplitude falls as 1/f, as that of photographs does."""
    f = np.fft.fftfreq(side)
    radius = np.hypot(f[:, None], f[None])
    radius[0, 0] = 1
    waves = np.fft.ifft2(np.exp(2j * np.pi * rng.random((side, side))) / radius).real
    return Image.fromarray((128 + 50 * waves / waves.std()).clip(0, 255).astype(np.uint8)).convert(
        "RGB"
    )


SHARP = {
    **{path.stem: path for path in sorted(DEMO.glob("*.png"))[::7]},
    "drawing": scene(3, 512),
    "leaves": benchmark.leaves(0, np.random.default_rng(5)),
    "photo-like": photo(np.random.default_rng(1)),
    "text": ImageOps.invert(Image.new("RGB", (512, 512))),
}
ImageDraw.Draw(SHARP["text"]).text((100, 100), "hello", fill="black")


def sharpness_of(gray: np.ndarray) -> float:
    value = sharpness(gray)
    assert value is not None
    return value


@pytest.mark.parametrize("name", SHARP)
def test_blurred_copies_are_distinguished_from_the_sharp_original(name):
    source = SHARP[name]
    image = source if isinstance(source, Image.Image) else Image.open(source).convert("RGB")
    assert sharpness_of(np.asarray(image.convert("L"))) > 2 * BLURRED
    radius = 8 if name == "text" else 4  # thin strokes are sharper than edges at the same blur
    for size in (radius, 3 * radius):
        soft = sharpness(blurred(image, size))
        if name == "text" and size > 8:
            assert soft is None
        else:
            assert soft is not None and soft < BLURRED


@pytest.mark.parametrize("name", ["flat", "gradient", "radial", "soft shading", "dark"])
def test_flat_and_smooth_pictures_are_not_called_blurred(name):
    rows, columns = np.mgrid[:512, :512]
    inside = np.hypot(rows - 256, columns - 256) < 180
    gray = {
        "flat": np.full((512, 512), 90),
        "gradient": columns // 2,
        "radial": 255 - np.hypot(rows - 256, columns - 256).clip(0, 255),
        "soft shading": 128 + np.where(inside, 100 * np.sin(columns / 90), 0),
        "dark": np.asarray(scene(3, 512).convert("L")) // 8,
    }[name]
    value = sharpness(gray.astype(np.uint8))
    assert value is None or value > BLURRED


def test_a_sharp_figure_before_a_soft_background_is_sharp():
    leaves = benchmark.leaves(0, np.random.default_rng(5))
    mask = Image.new("L", leaves.size)
    ImageDraw.Draw(mask).ellipse((150, 150, 330, 330), fill=255)
    portrait = Image.composite(leaves, leaves.filter(ImageFilter.GaussianBlur(8)), mask)
    assert sharpness_of(np.asarray(portrait.convert("L"))) > BLURRED
    assert sharpness_of(blurred(leaves, 8)) < BLURRED


def test_a_large_picture_is_judged_at_the_training_size(tmp_path):
    write(tmp_path, "large.png", scene(2, 1024).filter(ImageFilter.GaussianBlur(6)))
    at_full_size, reduced = (
        measure_image(tmp_path / "large.png", resolution).sharpness for resolution in (1024, 128)
    )
    assert at_full_size is not None and at_full_size < BLURRED
    assert reduced is not None and reduced > BLURRED


# Near-duplicates.


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[dict, dict[str, str]]:
    """A small round of the benchmark: 120 pictures of its kinds, a third with a near-duplicate, two
    blurred."""
    folder = tmp_path_factory.mktemp("planted")
    made = {}
    for number in range(120):
        made |= benchmark.make(number, folder, num_copies=40, num_blurred=2)
    write_report(folder.parent / "out", look_at(folder, 512))
    return json.loads((folder.parent / "out" / DATA).read_text(encoding="utf-8")), made


def test_planted_near_duplicates_are_found_and_no_others(planted):
    result = benchmark.judge(*planted)
    assert Counter(planted[1].values()).keys() == {
        change.__name__ for change in benchmark.COPIES
    } | {"blurred"}
    assert (result["found_pairs"], result["missed_files"]) == (40, [])
    assert result["false_examples"] == []
    assert (result["blurred_found"], result["blurred_false"]) == (2, 0)


def test_the_report_says_how_two_differ(tmp_path):
    original = scene(7)
    write(tmp_path, "a.png", original)
    write(tmp_path, "b_mirrored.png", ImageOps.mirror(original))
    write(tmp_path, "c_cropped.png", original.crop((16, 12, 256, 248)))
    write(tmp_path, "d_resized.jpg", original.resize((170, 170)), quality=50)
    pairs = {
        tuple(sorted((a[0], b[0]))): how
        for a, b, how in kinds(look_at(tmp_path))["duplicates"].pairs
    }
    assert (pairs["a", "b"], pairs["a", "c"], pairs["a", "d"]) == ("mirrored", "cropped", "resized")
    (group,) = kinds(look_at(tmp_path))["duplicates"].groups()
    assert len(group) == 4


def test_one_background_with_other_figures_is_no_duplicate(tmp_path):
    for number in range(12):
        image = scene(1)
        ImageDraw.Draw(image).ellipse(
            (100, 60, 150, 110 + 3 * number), fill=benchmark.color(np.random.default_rng(number))
        )
        write(tmp_path, f"{number}.png", image)
    assert "duplicates" not in kinds(look_at(tmp_path))


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_equal_pictures_are_paired_however_many_and_flat(count):
    pairs = near_duplicates(np.full((count, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), 90, np.uint8))
    assert all(
        pair.first < pair.second and not pair.mirrored and not pair.cropped for pair in pairs
    )
    paired = set(chain.from_iterable((pair.first, pair.second) for pair in pairs))
    assert paired == (set(range(count)) if count > 1 else set())


def test_plain_backgrounds_of_other_colors_are_no_duplicates():
    flat = np.array([[90, 90, 90], [90, 110, 90], [110, 90, 90], [255, 255, 255]], np.uint8)
    assert (
        near_duplicates(np.tile(flat[:, None, None], (1, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 1))) == []
    )


# Pictures and sizes.


def test_processes_see_what_one_sees(folder):
    files = sorted(folder.glob("*.png"))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    files.append(folder / "broken.jpg")
    one, several = (list(measure_images(files, 64, processes)) for processes in (1, 2))
    assert [look.problem for look in several] == [None] * 6 + [one[-1].problem]
    for a, b in zip(one[:-1], several[:-1], strict=True):
        assert (
            a._replace(thumbnail=None) == b._replace(thumbnail=None)
            and (a.thumbnail == b.thumbnail).all()
        )


def test_a_jpeg_is_decoded_no_larger_than_needed(tmp_path):
    write(tmp_path, "a.jpg", scene(1, 2048), quality=90)
    look = measure_image(tmp_path / "a.jpg", 128)
    assert (look.width, look.height) == (2048, 2048)
    assert isinstance(look, ImageStats) and Image.open(io.BytesIO(look.preview)).size == (144, 144)


def test_every_kind_of_bad_picture_is_named_once(folder):
    (folder / "broken.png").write_bytes((folder / "hero_0.png").read_bytes()[:500])
    (folder / "text.jpg").write_text("hello")
    (folder / "photo.heic").write_bytes(b"x")
    write(folder, "icon.png", scene(20, 24), "volto, icon")
    write(folder, "smaller.png", scene(21, 200), "volto, smaller")
    write(folder, "banner.png", scene(22, 512).crop((0, 0, 512, 280)), "volto, banner")
    write(folder, "soft.png", scene(23).filter(ImageFilter.GaussianBlur(6)), "volto, soft")
    findings = kinds(look_at(folder, 256))
    assert set(findings["unreadable"].files) == {"broken.png", "text.jpg", "photo.heic"}
    assert "damaged" in findings["unreadable"].details["broken.png"]
    assert (findings["tiny"].files, findings["small"].files) == (["icon.png"], ["smaller.png"])
    assert (findings["long"].files, findings["blurred"].files) == (["banner.png"], ["soft.png"])
    assert (
        findings["tiny"].is_wrong
        and not findings["small"].is_wrong
        and not findings["long"].is_wrong
    )
    for finding in findings.values():
        assert finding.remedy and not finding.title.endswith(".")


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((512, 512), "1:1"),
        ((512, 768), "2:3"),
        ((1920, 1080), "16:9"),
        ((100, 400), "1:3"),
        ((1000, 990), "1:1"),
    ],
)
def test_shapes_are_the_usual_ratios(size, name):
    assert nearest_shape(*size) == name


def test_buckets_are_counted_and_far_from_square_is_then_no_matter(
    folder, tmp_path, monkeypatch, capsys
):
    """As training would put them; without them, pictures far from square are named."""
    for number in (1, 2, 3):
        scene(number, 128).crop((32, 0, 96, 128)).save(folder / f"tall_{number}.png")
        (folder / f"tall_{number}.txt").write_text(
            f"volto, tall, number {number}", encoding="utf-8"
        )
    words = [
        "--check_data",
        "--data_dir",
        str(folder),
        "--resolution",
        "64",
        "--output_dir",
        "out",
    ]
    monkeypatch.chdir(tmp_path)
    for flags, sizes in (([], {}), (["--enable_bucket"], {"40x88": 3, "64x64": 6})):
        megaman_lora.main([*words, *flags])
        said = capsys.readouterr().out
        assert ("far from square" in said, "buckets " in said) == (not flags, bool(flags))
        data = json.loads((tmp_path / "out" / DATA).read_text(encoding="utf-8"))
        assert sum(data["buckets"].values()) == sum(sizes.values()) and len(data["buckets"]) == len(
            sizes
        )
        page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
        assert bool(re.search("<h3[^>]*>Buckets, in pixels</h3>", page)) is bool(flags)


def test_a_repeated_picture_is_no_duplicate_of_itself(folder):
    dataset = MegaManDataset(folder, None, 64)
    dataset.examples += dataset.examples
    report = examine(dataset, 64)
    assert len(report.images) == 6 and not report.is_wrong


# Captions.


def test_good_data_has_nothing_wrong(folder):
    report = look_at(folder)
    assert not report.is_wrong and report.trigger == "volto"
    assert set(kinds(report)) <= {"in_every", "in_one"}
    assert "nothing wrong" in summary(report)[-1]


def test_the_demo_has_few_findings_and_nothing_wrong():
    report = look_at(DEMO)
    assert (report.is_wrong, set(kinds(report))) == (False, {"no_trigger", "in_one"})
    assert len(summary(report)) < 12


def test_every_fault_of_a_caption_is_found(folder):
    spoil_captions(folder)
    findings = kinds(look_at(folder))
    assert findings["no_caption"].files == ["hero_0.png"]
    assert (
        findings["empty_caption"].files == ["hero_1.png"]
        and "no text" in findings["empty_caption"].details["hero_1.png"]
    )
    assert findings["doubled_caption"].files == ["hero_2.png", "hero_3.png"]
    assert findings["long_caption"].files == ["hero_4.png"]
    assert findings["encoding"].files == findings["tag_twice"].files == ["hero_5.png"]
    assert findings["tag_twice"].details == {"hero_5.png": "café"}


def spoil_captions(folder: Path) -> None:
    def caption(number: int, text: str | bytes) -> None:
        (folder / f"hero_{number}.txt").write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )

    (folder / "hero_0.txt").unlink()
    caption(1, " \n")
    caption(2, "volto, blue robot, waving, hills")  # as the next one
    caption(4, "volto, blue robot, " + ", ".join(f"tag number {i}" for i in range(30)))
    caption(5, "volto, café, café, blue robot".encode("cp1252"))


def test_one_caption_for_all_may_be_meant(folder):
    for path in folder.glob("*.txt"):
        path.write_text("photo of sks dog")
    findings = kinds(look_at(folder))
    assert not findings["doubled_caption"].is_wrong and len(findings["doubled_caption"].files) == 6


def test_a_forgotten_trigger_word_is_wrong_and_many_without_it_may_be_meant(folder):
    for number in range(6, 20):
        write(folder, f"hero_{number}.png", scene(number), f"volto, blue robot, pose {number}")
    (folder / "hero_2.txt").write_text("blue robot, jumping")
    assert kinds(look_at(folder))["no_trigger"].files == ["hero_2.png"]
    assert kinds(look_at(folder))["no_trigger"].is_wrong
    for number in range(6):
        (folder / f"hero_{number}.txt").write_text(f"red robot, pose {number}")
    assert not kinds(look_at(folder))["no_trigger"].is_wrong
    assert kinds(look_at(folder, trigger="Volto"))["no_trigger"].is_wrong
    assert len(kinds(look_at(folder, trigger="nemo"))["no_trigger"].files) == 20


def test_no_agreement_is_said(folder):
    for number, path in enumerate(sorted(folder.glob("*.txt"))):
        path.write_text(f"{'abcdef'[number]} thing, robot")
    assert "no_agreement" in kinds(look_at(folder))


def test_words_are_counted_where_captions_are_sentences():
    captions = [
        "a blue robot stands before the gates of a large city",
        "the blue robot runs over a hill in the rain",
    ]
    term, words = split_terms(captions)
    assert term == "words" and set(words[0]) & set(words[1]) == {"blue", "robot"}
    assert split_terms(["volto, blue robot", "volto, red robot, snow"])[0] == "tags"


def test_likely_typos_are_letters_too_many_too_few_or_swapped():
    often = ["antenna, portrait, tower, robot"] * 5
    assert likely_typos([*often, "antena, protrait", "robots, power, towel"]) == {
        "antena": "antenna",
        "protrait": "portrait",
    }


@given(st.text(max_size=200))
def test_any_caption_can_be_measured(text):
    assert estimate_tokens(text) >= 0
    duplicate_tags(split_terms([text])[1][0])
    likely_typos([text])


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("pixel art, yellow robot, shooting, arm cannon, facing right, green hills background", 17),
        (
            "mega man, blue robot, helmet, game character, detailed armor, arm cannon, "
            "full body, 2d, pixel art, capcom, 1987, nes, 8-bit, white background",
            41,
        ),
        ("洛克人, 藍色機器人, 頭盔, 遊戲角色", 41),
        ("photo of sks dog in a bucket", 7),
    ],
)
def test_estimates_are_near_clips_own_count(caption, tokens):
    assert abs(estimate_tokens(caption) - tokens) <= 0.2 * tokens


# The report.


def test_an_image_is_on_the_page_once_with_all_its_findings(folder, tmp_path):
    """Next to its duplicate if it has one; other findings name it and lead to it."""
    write(folder, "twin.png", ImageOps.mirror(scene(1)))
    (folder / "bad.png").write_bytes(b"no")
    report = look_at(folder, 300)
    write_report(tmp_path, report)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert Counter(re.findall(r'<img [^>]*alt="([^"]*)"', page)) == Counter(
        image.path for image in report.readable
    )
    twin = page.split('class="name" dir="auto">twin.png')[1].split("</figure>")[0]
    assert re.findall(r'href="#(\w+)"', twin) == ["no_caption", "small"]
    anchors = set(re.findall(r'href="#([\w-]+)"', page))
    assert anchors <= set(re.findall(r'id="([\w-]+)"', page))
    assert re.search(r"<li[^>]*>bad.png: not an image", page)
    assert ">The other images<" not in page, "all are small"


def test_what_there_is_nothing_about_is_not_on_the_page(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    write_report(tmp_path / "bad", look_at(tmp_path))
    page = (tmp_path / "bad" / PAGE).read_text(encoding="utf-8")
    assert "a.png" in page and page.count("<h2") == 1 and "<meter" not in page
    (tmp_path / "a.png").unlink()
    write(tmp_path, "b.png", scene(1))
    write_report(tmp_path / "named", look_at(tmp_path))
    page = (tmp_path / "named" / PAGE).read_text(encoding="utf-8")
    headings = re.findall("<h3[^>]*>(.*?)</h3>", page)
    assert headings == [
        "1 image without a caption",
        "Shapes, width to height",
        "Shorter side, of 64 pixels",
    ]


def test_the_console_says_what_is_wrong_with_a_few_files(folder):
    (folder / "bad.png").write_bytes(b"no")
    (folder / "hero_1.txt").write_bytes("volto, mañana".encode("cp1252"))
    lines = "\n".join(summary(look_at(folder)))
    assert re.search(r"1 image cannot be used\n +bad\.png: not an image", lines)
    assert re.search(r"1 caption with a warning\n +hero_1\.png: hero_1\.txt .*1252", lines)
    for number in range(3):
        (folder / f"also{number}.png").write_bytes(b"no")
    lines = "\n".join(summary(look_at(folder)))
    assert "4 images cannot be used, 1 of them in the report only" in lines


def test_the_console_page_stays_short_with_every_finding_there_is(folder):
    test_every_kind_of_bad_picture_is_named_once(folder)
    spoil_captions(folder)
    report = look_at(folder, 256)
    assert len(report.findings) >= 12
    lines = summary(report)
    assert len(lines) <= 39 and max(map(len, lines)) <= 128


def test_a_strangers_file_is_never_overwritten(folder, tmp_path):
    report, out = look_at(folder), tmp_path / "out"
    for name in (PAGE, DATA):
        out.mkdir(exist_ok=True)
        (out / name).write_text("mine", encoding="utf-8")
        with pytest.raises(UserError, match=name):
            write_report(out, report)
        assert (out / name).read_text(encoding="utf-8") == "mine" and len(list(out.iterdir())) == 1
        (out / name).unlink()
    write_report(out, report)
    write_report(out, report)  # its own is replaced
    assert {path.name for path in out.iterdir()} == {PAGE, DATA}
    assert MARK in (out / PAGE).read_text(encoding="utf-8")


NASTY = "<img src=x onerror=alert(1)>\"'&amp;{{ 7 * 7 }}</style><script>parent.x = 1"


@pytest.fixture
def nasty(folder) -> Path:
    """Markup wherever a person can put it: in a name, a caption, the trigger word, a tag."""
    name = NASTY.replace("/", "") if os.name == "posix" else "a & b"
    write(folder, f"{name}.png", scene(30), f"{NASTY}, robot, {NASTY}")
    write(folder, "#1 100% 洛克人.png", scene(31), f"volto, {NASTY}")
    write(folder, "soft.png", scene(32).filter(ImageFilter.GaussianBlur(6)))
    write(folder, "twin.png", ImageOps.mirror(scene(1)))
    (folder / "bad <b>.png").write_text("no picture") if os.name == "posix" else None
    return folder


def test_names_and_captions_are_text_and_never_markup(nasty, tmp_path):
    write_report(tmp_path / "out", look_at(nasty, trigger=NASTY))
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert (
        page.count("<script") == 1
        and "<img src=x" not in page
        and page.count("<style>") == page.count("</style>") == 1
    )
    body = page.split("</style>")[1].replace(str(nasty), "")  # the folder's path may hold a 49
    assert "49" not in body.split("{{")[0][:2000] and "{{ 7 * 7 }}" in page
    data = json.loads((tmp_path / "out" / DATA).read_text(encoding="utf-8"))
    assert data["trigger_word"] == NASTY and data["wrong"]


def test_every_kind_has_a_short_name():
    kinds = set()
    for name in ("image_checks", "caption_checks", "term_checks", "balance_checks"):
        source = (ROOT / "megaman" / "doctor" / f"{name}.py").read_text(encoding="utf-8")
        kinds.update(re.findall(r'Finding\(\s*"(\w+)"', source))
    kinds.update(f"balance_{kind.split()[-1]}" for kind in balance_checks.KINDS)
    assert kinds == set(NAMES)


def test_json_holds_it_all(nasty, tmp_path):
    report = look_at(nasty)
    write_report(tmp_path / "out", report)
    data = json.loads((tmp_path / "out" / DATA).read_text(encoding="utf-8"))
    assert [finding["kind"] for finding in data["findings"]] == [
        finding.kind for finding in report.findings
    ]
    assert len(data["pictures"]) == len(report.images)
    by_path = {picture["path"]: picture for picture in data["pictures"]}
    for finding in data["findings"]:
        assert all(finding["kind"] in by_path[path]["findings"] for path in finding["files"])
    readable = [picture for picture in data["pictures"] if picture["width"] > 0]
    assert sum(data["shapes"].values()) == len(readable)


# The script.


def test_check_data_needs_no_torch_and_says_by_its_exit_code_what_it_found(
    run_script, folder, tmp_path
):
    code = (
        "import json, sys, megaman_lora; code = megaman_lora.main(sys.argv[1:]); "
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules); "
        "print(json.dumps([code, sorted(heavy)]))"
    )

    def check(*flags: str) -> list:
        done = run_script(
            ["-c", code, "--check_data", "--data_dir", folder, "--resolution", 64, *flags], tmp_path
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert check() == check("--strict") == [0, []]
    (folder / "broken.png").write_bytes(b"no")
    assert check() == [0, []]
    assert check("--strict", "--output_dir", "elsewhere") == [1, []]
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {PAGE, DATA}
    assert {path.name for path in (tmp_path / "megaman_lora_output").iterdir()} == {PAGE, DATA}


def test_a_folder_of_nothing_but_bad_files_is_reported(run_script, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no")
    done = run_script(
        ["megaman_lora.py", "--check_data", "--strict", "--data_dir", "bad"], tmp_path
    )
    assert (done.returncode, done.stderr) == (1, "") and "a.png" in done.stdout


def test_strict_without_pictures_is_no_success(run_script, tmp_path):
    done = run_script(["megaman_lora.py", "--check_data", "--strict"], tmp_path)
    assert done.returncode == 1 and "no images yet" in done.stdout


def test_a_report_does_not_stand_in_the_way_of_a_training(folder, tmp_path):
    from megaman.training.output import inspect

    write_report(tmp_path / "out", look_at(folder))
    assert inspect(tmp_path / "out", None, False) == (None, [])


# In a real browser, from the disk.


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(360, True), (1280, False)])
def test_a_browser_shows_the_page_from_the_disk(the_browser, nasty, tmp_path, width, dark):
    report = look_at(nasty, 256)
    write_report(tmp_path / "out", report)
    assert Visit is not None
    visit = Visit(the_browser, tmp_path / "out" / PAGE, width, dark=dark)
    visit.do("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
    visit.wait_for("[...document.images].every((image) => image.naturalWidth > 0)")
    assert visit.do("document.documentElement.scrollWidth") <= width
    shown = visit.do("[...document.querySelectorAll('.name')].map((name) => name.textContent)")
    assert sorted(shown) == sorted(image.path for image in report.readable), "each once"
    assert visit.do("[...document.querySelectorAll('.finding')].map((finding) => finding.id)") == [
        finding.kind for finding in report.findings
    ]
    links: Any = visit.do("[...document.querySelectorAll('a.picture')].map((a) => a.href)")
    files = {Path(unquote(urlsplit(str(link)).path)) for link in links}
    assert files == {image.file for image in report.readable}
    assert visit.complaints() == [] and visit.requests() <= {"file", "data"}
    visit.close()


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_accessibility(the_browser, nasty, tmp_path, axe, dark):
    write_report(tmp_path / "out", look_at(nasty, 256))
    assert Visit is not None
    visit = Visit(the_browser, tmp_path / "out" / PAGE, dark=dark)
    visit.do(
        "for (const figure of document.querySelectorAll('.sheet figure')) "
        "figure.style.contentVisibility = 'visible'"
    )
    visit.do(axe + "; 0")
    assert visit.do("axe.run().then(({passes}) => passes.length)") > 20, "something was looked at"
    violations = visit.do("""axe.run().then(({violations}) => violations
        .filter(({impact}) => ["serious", "critical"].includes(impact))
        .map(({id, nodes}) => [
            id, nodes.map((node) => node.html.slice(0, 200) + node.failureSummary)]))""")
    assert violations == []
    visit.close()


def test_a_shared_policy_allows_the_page_its_own_script_alone(folder, tmp_path):
    write_report(tmp_path / "out", look_at(folder))
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert (
        "default-src &#39;none&#39;" in page
        and page.count("script-src &#39;sha256-") == 1
        and "/* page.css */" not in page
    )


def test_the_folder_itself_is_left_as_it_was(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    shutil.copytree(folder, tmp_path / "copy")
    write_report(tmp_path / "out", look_at(folder))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_writing_without_spaces_has_its_trigger_word_and_no_typos(folder):
    captions = ["青いロボットが走る"] * 5 + ["青いロボットがが走る"]
    for path, caption in zip(sorted(folder.glob("*.txt")), captions, strict=True):
        path.write_text(caption, encoding="utf-8")
    found = kinds(look_at(folder, trigger="ロボット"))
    assert not found.keys() & {"no_trigger", "slips"}


@pytest.fixture
def class_folder(tmp_path) -> Path:
    """Three images of other robots with the same caption."""
    place = tmp_path / "class"
    place.mkdir()
    for number in range(10, 13):
        write(place, f"other_{number}.png", scene(number), "a robot")
    return place


def check_data(folder: Path, class_folder: Path, out: Path, *flags: str) -> int:
    words = ["--check_data", "--data_dir", str(folder), "--class_data_dir", str(class_folder)]
    return megaman_lora.main([*words, "--output_dir", str(out), "--resolution", "64", *flags])


def class_findings(out: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((out / "class_report.json").read_text(encoding="utf-8"))
    return {finding["kind"]: finding for finding in content["findings"]}


def test_the_class_images_are_checked_too(folder, class_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert check_data(folder, class_folder, out, "--strict") == 0
    printed = capsys.readouterr().out
    assert f"6 images in {folder}" in printed and f"3 images in {class_folder}" in printed
    about_trigger = {"class_trigger", "no_trigger", "no_agreement", "in_every"}
    assert not about_trigger & class_findings(out).keys()
    assert (out / "class_report.html").is_file() and (out / "dataset_report.html").is_file()
    (class_folder / "broken.png").write_bytes(b"no image")
    (class_folder / "soft.png").write_bytes(b"")
    assert check_data(folder, class_folder, out, "--strict") == 1
    assert class_findings(out)["unreadable"]["files"] == ["broken.png", "soft.png"]
    assert check_data(folder, class_folder, out) == 0


@pytest.mark.parametrize("flags", [(), ("--trigger_word", "volto")])
def test_class_captions_must_not_hold_the_trigger_word(folder, class_folder, tmp_path, flags):
    """The one that is given, or the one that the captions of the images to learn agree on."""
    (class_folder / "other_11.txt").write_text("a red volto", encoding="utf-8")
    write(class_folder, "volto_2.png", scene(20))  # its caption is made from its name
    assert check_data(folder, class_folder, tmp_path / "out", "--strict", *flags) == 1
    finding = class_findings(tmp_path / "out")["class_trigger"]
    assert finding["wrong"] and finding["files"] == ["other_11.png", "volto_2.png"]


def test_check_data_refuses_a_class_folder_that_is_missing_or_empty(folder, tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        check_data(folder, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--class_data_dir .*empty holds no image"):
        check_data(folder, tmp_path / "empty", tmp_path / "out")
