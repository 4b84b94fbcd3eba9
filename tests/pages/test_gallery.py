"""The gallery: what is written comes back whole, prompts stay text, a browser opens the page from
disk."""

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import tempfile
import time
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import product
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pytest
from conftest import Visit, needs_browser
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megaman.config.generate import parse_generate_config
from megaman.errors import UserError
from megaman.pages.gallery import thumbnail_of, title_of, variant_labels, write_gallery
from megaman.pages.gallery_command import command
from megaman.pages.gallery_images import GalleryImage, read_images

PLAIN = GalleryImage(
    file="megaman_000_00.png",
    prompt="blue robot",
    negative_prompt="blurry",
    seed=42,
    width=64,
    height=64,
    settings={"steps": 25, "guidance": 7.5, "sampler": "DPM++ 2M"},
)
MARKUP = [
    "<script>alert(1)</script>",
    "</script>",
    "</title>",
    "<!--",
    "]]>",
    "<img src=x onerror=alert(1)>",
    "<b>",
    "&amp;",
    "&#60;",
    '"',
    "'",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "洛克人",
    "🤖",
    "\u202e",
    "\n",
    " ",
    "javascript:",
    "//",
    "..",
    "?",
    "#",
    "%41",
    "\\",
]
odd_text = st.text(max_size=20) | st.lists(st.sampled_from(MARKUP), min_size=1, max_size=6).map(
    "".join
)


class Page(HTMLParser):
    """A page's tags with their attributes in order, and the text of every element by its tag."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(path.read_bytes().decode())  # read_text would change line ends within prompts
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [
            attributes[name] for each, attributes in self.tags if each == tag and name in attributes
        ]

    def shape(self) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes in self.tags]


def pictures(folder: Path, images: list[GalleryImage]) -> list[GalleryImage]:
    """Write the files that the images name."""
    for image in images:
        for file in filter(None, (image.file, image.base_file)):
            Image.new("RGB", (image.width, image.height), (30, 90, image.seed % 256)).save(
                folder / file
            )
    return images


any_image = st.builds(
    GalleryImage,
    file=odd_text,
    prompt=odd_text,
    negative_prompt=odd_text,
    seed=st.integers(0, 2**63),
    width=st.integers(8, 2048),
    height=st.integers(8, 2048),
    base_file=st.none() | odd_text,
    settings=st.dictionaries(
        odd_text, odd_text | st.integers() | st.floats(allow_nan=False), max_size=4
    ),
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(any_image, max_size=4))
def test_images_json_gives_back_what_was_written(images):
    with tempfile.TemporaryDirectory() as folder:
        write_gallery(Path(folder), images, "A title")
        assert read_images(Path(folder)) == images


@cache
def shape_of_a_plain_page() -> list:
    with tempfile.TemporaryDirectory() as folder:
        return Page(
            write_gallery(Path(folder), [replace(PLAIN, settings={"lora": "mine"})], "Plain")
        ).shape()


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(odd_text, odd_text, odd_text, odd_text.filter(bool))
def test_what_people_write_is_text_and_never_markup(prompt, value, title, file):
    with tempfile.TemporaryDirectory() as folder:
        odd = replace(
            PLAIN, file=file, prompt=prompt, negative_prompt=value + "x", settings={"lora": value}
        )
        page = Page(write_gallery(Path(folder), [odd], title))
    assert page.shape() == shape_of_a_plain_page()
    assert page.texts["h2"] == [prompt, ""]  # the full view has one, too
    assert page.texts["title"] == page.texts["h1"] == [title]
    assert {value, value + "x"} <= set(page.texts["dd"])
    assert page.attributes("img", "alt") == [f"{prompt}, seed 42"]
    data = json.loads(page.texts["script"][0])
    (image,) = data["images"]
    assert data["prompts"] == [prompt] and image["name"] == file
    assert image["settings"] == {"size": "64x64", "lora": value, "negative prompt": value + "x"}
    for address in page.attributes("img", "src") + page.attributes("a", "href"):
        assert address and re.fullmatch(r"\./[\w./~%-]*", address, flags=re.ASCII)
        assert unquote(address) == "./" + file


def test_a_section_per_prompt_with_everything_that_makes_the_image_again(tmp_path):
    images = [
        PLAIN,
        replace(PLAIN, file="b.png", prompt="red robot"),
        replace(PLAIN, file="c.png", seed=43),
    ]
    path = write_gallery(tmp_path, images, "Robots")
    page = Page(path)
    assert path == tmp_path / "index.html"
    assert page.texts["h2"] == ["blue robot", "red robot", ""]
    assert page.attributes("img", "src") == ["./megaman_000_00.png", "./c.png", "./b.png"]
    text = path.read_text(encoding="utf-8")
    assert text.count("Seed 42") == 2 and text.count("Seed 43") == 1
    data = json.loads(page.texts["script"][0])
    assert [image["settings"] for image in data["images"]] == [
        {
            "size": "64x64",
            "steps": "25",
            "guidance": "7.5",
            "sampler": "DPM++ 2M",
            "negative prompt": "blurry",
        }
    ] * 3


def test_only_what_every_image_shares_stands_at_the_top(tmp_path):
    other = replace(PLAIN, settings={"steps": 50, "guidance": 7.5, "lora": "mine"})
    text = write_gallery(tmp_path, [PLAIN, other], "Robots").read_text(encoding="utf-8")
    top = text[text.index("<header>") : text.index("</header>")]
    assert "guidance" in top and "64x64" in top
    assert not {"steps", "sampler", "lora"} & set(re.findall(r"<dt>(\w+)</dt>", top))


def test_a_pair_has_the_base_on_the_left_and_the_lora_on_the_right(tmp_path):
    page = Page(write_gallery(tmp_path, [replace(PLAIN, base_file="base.png")], "Robots"))
    assert [text for text in page.texts["figcaption"] if text.strip()] == ["Base", "With LoRA"]
    assert page.attributes("img", "src") == ["./base.png", "./megaman_000_00.png"]
    assert page.attributes("img", "alt") == [
        "Base: blue robot, seed 42",
        "With LoRA: blue robot, seed 42",
    ]


def test_thumbnails_stand_for_the_images_that_have_one(tmp_path):
    (tmp_path / thumbnail_of("a #.png")).parent.mkdir()
    (tmp_path / thumbnail_of("a #.png")).write_bytes(b"")
    page = Page(
        write_gallery(
            tmp_path, [replace(PLAIN, file="a #.png"), replace(PLAIN, file="b.png")], "Robots"
        )
    )
    assert page.attributes("img", "src") == ["./thumbnails/a%20%23.png.webp", "./b.png"]
    assert page.attributes("a", "href") == ["./a%20%23.png", "./b.png"]


def test_the_policy_allows_the_pages_own_style_and_script_alone(tmp_path):
    page = Page(write_gallery(tmp_path, [PLAIN], "Robots"))
    (policy,) = (
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    for tag in ("style", "script"):
        block = page.texts[tag][-1]  # the first script is data, which no browser runs
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert rules == {"img-src": "'self' file: data:", "base-uri": "'none'", "form-action": "'none'"}


any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
any_record = st.fixed_dictionaries(
    {
        "file": odd_text | any_json,
        "prompt": odd_text | any_json,
        "negative_prompt": odd_text | st.just("\udcff"),
        "seed": st.integers() | any_json,
        "width": st.integers() | any_json,
        "height": st.integers(),
        "settings": st.dictionaries(odd_text, any_json, max_size=2) | any_json,
    },
    optional={"base_file": any_json, "x": any_json},
)


any_list = st.lists(any_record | any_json, max_size=2)


@given(
    any_list
    | any_json
    | st.fixed_dictionaries({"gallery": any_json | st.just("0123456789abcdef"), "images": any_list})
)
def test_any_list_of_images_is_a_page_or_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any_gallery"
    folder.mkdir(exist_ok=True)
    (folder / "images.json").write_text(json.dumps(content), encoding="utf-8")
    try:
        images = read_images(folder)
    except UserError as error:
        assert "images.json" in str(error) and len(str(error).splitlines()) == 1
    else:
        write_gallery(folder, images, "Robots")
        assert {path.name for path in folder.iterdir()} == {"images.json", "index.html"}


def test_a_folder_without_a_gallery_has_no_images(tmp_path):
    assert read_images(tmp_path) == []
    assert "No images yet" in write_gallery(tmp_path, [], "Robots").read_text(encoding="utf-8")


GOOD = {
    "file": "a.png",
    "prompt": "p",
    "negative_prompt": "",
    "seed": 1,
    "width": 8,
    "height": 8,
    "settings": {},
}


@pytest.mark.parametrize(
    "content",
    [
        b"[{",
        b"\xff\xfe[",
        b"{}",
        b"null",
        b"[1]",
        b'[{"file": "a.png"}]',
        b'{"gallery": "x", "images": []}',
        b'{"gallery": "0123456789abcdef", "images": {}}',
        b'{"gallery": "0123456789abcdef"}',
        *(
            json.dumps([{**GOOD, **change}]).encode()
            for change in (
                {"seed": "1"},
                {"prompt": None},
                {"settings": []},
                {"base_file": 3},
                {"strength": 1},
            )
        ),
    ],
)
def test_a_broken_images_json_is_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "images.json").write_bytes(json.dumps([GOOD]).encode())
    assert len(read_images(tmp_path)) == 1
    (tmp_path / "images.json").write_bytes(content)
    with pytest.raises(UserError, match=r"images\.json") as caught:
        read_images(tmp_path)
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_a_gallery_keeps_its_id_and_a_bare_list_gets_one(tmp_path):
    (tmp_path / "images.json").write_text(json.dumps([GOOD]))
    ids = []
    for _ in range(2):
        page = Page(write_gallery(tmp_path, [*read_images(tmp_path), PLAIN], "Robots"))
        ids.append(json.loads((tmp_path / "images.json").read_text())["gallery"])
        assert json.loads(page.texts["script"][0])["gallery"] == ids[-1]
    write_gallery(tmp_path / "other", [PLAIN], "Robots")
    assert (
        ids[0] == ids[1] != json.loads((tmp_path / "other" / "images.json").read_text())["gallery"]
    )
    assert len(read_images(tmp_path)) == 3


def compared(*variants: tuple[str, float], **changes) -> list[GalleryImage]:
    """One image for each LoRA and strength."""
    return [
        replace(
            PLAIN,
            file=f"{PurePosixPath(lora).name}_{strength}.png",
            settings={"LoRA": lora, "strength": strength},
            **changes,
        )
        for lora, strength in variants
    ]


def test_one_seed_drawn_several_ways_is_a_table(tmp_path):
    images = compared(("out/lora_weights", 0), ("out/lora_weights", 0.5), ("out/lora_weights", 1))
    images += [replace(image, seed=43, file="b" + image.file) for image in images[1:]]
    page = Page(write_gallery(tmp_path, images, "Robots"))
    assert page.texts["th"] == ["strength 0", "strength 0.5", "strength 1", "Seed 42", "Seed 43"]
    assert len(page.texts["td"]) == 1 + 6  # the corner; one cell stays empty
    assert page.attributes("img", "alt")[1] == "strength 0.5: blue robot, seed 42"


@pytest.mark.parametrize(
    ("loras", "labels"),
    [
        (["out/checkpoint-5", "out\\lora_weights"], ["checkpoint-5", "lora_weights"]),
        (["a/lora_weights", "b/lora_weights/"], ["a/lora_weights", "b/lora_weights"]),
        (
            [f"/home/me/projects/robots/of/many/years/{run}/lora.safetensors" for run in "ab"],
            ["a/lora.safetensors", "b/lora.safetensors"],  # all that fits above a column
        ),
        (["a", "a"], ["", ""]),
    ],
)
def test_labels_tell_what_varies(loras, labels):
    assert variant_labels(compared(*((lora, 1) for lora in loras))) == labels
    both = variant_labels(compared((loras[0], 1), (loras[1], 0.5)))
    assert both == [
        ", ".join(filter(None, [label, f"strength {s}"]))
        for label, s in zip(labels, ("1", "0.5"), strict=True)
    ]


def test_an_image_without_a_lora_is_the_bases():
    images = compared(("a", 1), ("a", 0.5), ("b", 1))
    images.append(replace(images[0], settings={}))
    assert variant_labels(images) == ["a, strength 1", "a, strength 0.5", "b, strength 1", "base"]
    assert variant_labels([images[1], images[3]]) == ["a", "base"]
    assert variant_labels([images[3], images[3]]) == ["", ""]


@pytest.mark.skipif(os.name == "nt", reason="command not run: the shell here is not sh")
@settings(max_examples=30, deadline=None)
@given(odd_text, odd_text)
def test_a_command_is_what_its_words_are_or_none(prompt, value):
    line = command(
        replace(
            PLAIN, prompt=prompt, negative_prompt=value, settings={"LoRA": value, "guidance": 7.5}
        )
    )
    if line is None:
        assert any(
            mark < " " or "\x7f" <= mark < "\xa0" or mark in "\u2028\u2029"
            for mark in prompt + value
        )
        return
    words = shlex.split(line)
    assert subprocess.check_output(["sh", "-c", "printf '%s\\0' " + line]).decode() == "".join(
        f"{w}\0" for w in words
    )
    assert words[:3] == ["python", "generate_megaman.py", f"--prompts={prompt}"]
    assert {
        f"--negative_prompt={value}",
        f"--lora_path={value}",
        "--guidance_scale=7.5",
        "--seed=42",
    } <= set(words)


def test_a_command_draws_that_image():
    settings = {
        "LoRA": "a b",
        "base": "c",
        "steps": 20,
        "guidance": 5.0,
        "sampler": "Euler a",
        "clip skip": 2,
    }
    line = command(replace(PLAIN, settings=settings))
    options = parse_generate_config(shlex.split(line)[2:]).settings()
    assert (options["prompts"], options["lora_path"], options["base_model"]) == (
        ["blue robot"],
        ["a b"],
        "c",
    )
    assert (options["seed"], options["num_inference_steps"], options["guidance_scale"]) == (
        42,
        20,
        5.0,
    )
    assert (options["height"], options["width"], options["negative_prompt"]) == (64, 64, "blurry")
    assert (options["scheduler"], options["clip_skip"]) == ("euler_a", 2)


def test_a_command_names_loras_that_drew_together():
    together = {"LoRA": "my loras/a:0.8, b:-0.5", "strength": "0.5"}
    options = parse_generate_config(
        shlex.split(command(replace(PLAIN, settings=together, loras=["my loras/a:0.8", "b:-0.5"])))[
            2:
        ]
    ).settings()
    assert (options["lora_path"], options["lora_scale"]) == (["my loras/a:0.8", "b:-0.5"], 0.5)


@pytest.mark.parametrize(
    ("loras", "title"),
    [
        (["/w/volto_out/lora_weights"], "Images of volto_out"),
        (["/w/volto_out/checkpoint-40", "/w/volto_out/lora_weights"], "Images of volto_out"),
        (["volto/lora_weights/megaman_lora.safetensors:0.5"], "Images of volto"),
        (["C:\\loras\\zero.safetensors", "./x/lora_weights"], "Images of zero, x"),
        (["lora_weights"], "Images of lora_weights"),
        ([], "Generated images"),
    ],
)
def test_the_title_names_the_loras(loras, title):
    assert title_of([replace(PLAIN, settings={}, loras=[lora]) for lora in loras]) == title


# In a real browser, from the disk.


@pytest.fixture
def visit(the_browser, tmp_path):
    """visit(images, width) writes images and their gallery and opens it; nothing else is loaded."""
    visits = []

    def open_page(images: list[GalleryImage], width: int = 1280, page: Path | None = None) -> Visit:
        page = page or write_gallery(tmp_path, pictures(tmp_path, images), "Robots")
        visits.append(Visit(the_browser, page, width))
        return visits[-1]

    yield open_page
    for each in visits:
        assert each.requests() <= {"file", "data", "blob"}
        each.close()


ROBOTS = [
    replace(PLAIN, file=f"{i} #1 100%.png", base_file=f"base_{i}.png", prompt=prompt, seed=42 + i)
    for i, prompt in enumerate(
        [
            "blue robot",
            'a "quoted" <b>robot</b> </script><script>parent.x = 1</script>',
            "洛克人 🤖",
            "Blue monster, walking",
        ]
    )
]


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_every_image(visit, width):
    page = visit(ROBOTS, width)
    assert page.do(
        "[...document.images].every((i) => i.loading === 'lazy' && i.decoding === 'async')"
    )
    page.do("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
    page.wait_for("[...document.images].every((image) => image.naturalWidth === 64)")
    assert page.do("[...document.querySelectorAll('main h2')].map((h) => h.textContent)") == [
        r.prompt for r in ROBOTS
    ]
    left = page.do("[...document.images].map((image) => image.getBoundingClientRect().left)")
    assert all(base < lora for base, lora in zip(left[::2], left[1::2], strict=True))
    assert page.do("document.documentElement.scrollWidth") <= width
    assert page.complaints() == []


@needs_browser
def test_tiny_images_are_drawn_large_and_large_ones_fit(visit):
    drawn = "[...document.images].map((image) => image.getBoundingClientRect().width)"
    assert visit([PLAIN, replace(PLAIN, file="b.png", seed=43)]).do(drawn) == [512, 512]
    page = visit([replace(PLAIN, width=1024, height=768)])
    assert 220 <= page.do(drawn)[0] <= 1024
    assert page.do("document.documentElement.scrollWidth") <= 1280


SHOWN = "document.querySelector('#shown').textContent"
STAGE = "[...document.querySelectorAll('.stage img')].map((image) => image.getAttribute('src'))"
OPEN = "document.querySelector('dialog').open"


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_the_full_view_and_its_keys(visit, width):
    images = [
        replace(PLAIN, file=f"{i}{j}.png", prompt=prompt, seed=42 + j)
        for (i, prompt), j in product(enumerate(["one", "two", "three"]), (0, 1))
    ]
    page = visit(images, width)
    page.click("[data-number='1'] img")
    assert page.do(OPEN) and page.do(STAGE) == ["./01.png"]
    seen = []
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowLeft"):
        page.key(key)
        seen += page.do(STAGE)
    assert seen == ["./10.png", "./20.png", "./00.png", "./20.png", "./11.png"]
    assert page.do(SHOWN) == "two"
    assert page.do("document.querySelector('dialog').scrollWidth <= innerWidth")
    page.key("Escape")
    assert not page.do(OPEN)
    page.wait_for("document.activeElement.closest('.card')?.dataset.number === '3'")
    page.key("Enter")  # by keyboard alone, from where one was
    assert page.do(OPEN) and page.do(STAGE) == ["./11.png"]
    page.click(".close")
    assert not page.do(OPEN) and page.complaints() == []


@needs_browser
def test_the_slider_compares_with_the_base(visit):
    page = visit(ROBOTS)
    page.click("[data-number='1'] img")
    assert page.do(STAGE) == ["./base_1.png", "./1%20%231%20100%25.png"]
    cut = "getComputedStyle(document.querySelectorAll('.stage img')[1]).clipPath"
    assert "50%" in page.do(cut)
    page.click(".stage input", across=0.25)
    assert re.search(r"\b2[3-7]%", page.do(cut))
    before = page.do("document.querySelector('.stage input').value")
    page.key("ArrowRight")  # the slider has the focus now
    assert int(page.do("document.querySelector('.stage input').value")) == int(before) + 1
    assert page.do(SHOWN) == ROBOTS[1].prompt
    page.do(
        "(() => { const s = document.querySelector('dialog select'); s.value = ''; "
        "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    assert page.do(STAGE) == ["./1%20%231%20100%25.png"]
    page.click(".on")
    assert page.do(STAGE) == ["./2%20%231%20100%25.png"], "what was chosen stays chosen"
    assert page.complaints() == []


@needs_browser
def test_the_slider_compares_strengths_and_the_grid_has_its_labels(visit):
    images = compared(("out/lora", 0), ("out/lora", 0.5), ("out/lora", 1))
    page = visit(images)
    heads = page.do(
        "[...document.querySelectorAll('thead th')].map((h) => h.getBoundingClientRect().left)"
    )
    drawn = page.do("[...document.images].map((i) => i.getBoundingClientRect().left)")
    assert heads == sorted(heads) and all(a <= b for a, b in zip(heads, drawn, strict=True))
    page.click("[data-number='2'] img")
    options = "[...document.querySelectorAll('dialog option')].map((option) => option.textContent)"
    assert page.do(options) == ["nothing", "strength 0", "strength 0.5"]
    page.do(
        "(() => { const s = document.querySelector('dialog select'); s.value = 'strength 0'; "
        "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    assert page.do(STAGE) == ["./lora_0.png", "./lora_1.png"]
    assert page.complaints() == []


VISIBLE = """[...document.querySelectorAll('.card')].filter((card) => card.checkVisibility())
    .map((card) => card.dataset.number)"""


def type_words(page: Visit, words: str) -> None:
    page.click("[type=search]")
    page.do("document.querySelector('[type=search]').select()")
    page.send("Input.insertText", text=words)


@needs_browser
@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("blue", "03"),
        ("WALKING  blue", "3"),
        ("洛克", "2"),
        ("</script>", "1"),
        ("nothing such", ""),
    ],
)
def test_the_filter_by_words(visit, words, numbers):
    page = visit(ROBOTS)
    type_words(page, words)
    assert page.do(VISIBLE) == list(numbers)
    assert page.do("document.querySelector('.count').textContent") == f"{len(numbers)} of 4 images"
    page.do("document.querySelector('[type=search]').value = ''")
    page.do("document.querySelector('[type=search]').dispatchEvent(new Event('input'))")
    assert page.do(VISIBLE) == list("0123") and page.complaints() == []


@needs_browser
def test_groups(visit):
    images = [
        replace(image, prompt=prompt, seed=seed, file=f"{seed}{image.file}")
        for (prompt, seed), image in product(
            (("one", 10), ("two", 9), ("one", 9)), compared(("out/a", 0.5), ("out/b", 1))
        )
    ]
    page = visit(images)
    groups = """[...document.querySelectorAll('main section')].map((section) =>
        [section.querySelector('h2').textContent,
         [...section.querySelectorAll('.card')].map((c) => c.dataset.number).join('')])"""
    by_prompt = [["one", "0145"], ["two", "23"]]
    assert page.do(groups) == by_prompt
    expected = {
        "seed": [["seed 9", "4523"], ["seed 10", "01"]],
        "LoRA": [["LoRA out/a", "042"], ["LoRA out/b", "153"]],
        "strength": [["strength 0.5", "042"], ["strength 1", "153"]],
        "prompt": by_prompt,
    }
    for by, wanted in expected.items():
        page.do(
            f"(() => {{ const s = document.querySelector('.tools select'); s.value = '{by}'; "
            "s.dispatchEvent(new Event('change')); })()"
        )
        assert page.do(groups) == wanted
    assert page.do("document.querySelectorAll('td .card').length") == 6, "back in the tables"
    assert page.complaints() == []


UNLOADED = "((n) => !document.querySelector(`[data-number='${n}'] img`).hasAttribute('src'))"
WHOLE = "((n) => document.querySelector(`[data-number='${n}'] img`).naturalWidth === 64)"


@needs_browser
@pytest.mark.parametrize(
    "each", [1, 4, 400]
)  # images of a prompt: in rows, in sections, card by card
def test_pictures_far_away_are_let_go_and_come_back(visit, each):
    images = [
        replace(PLAIN, file=f"{i}.png", prompt=f"robot {i // each}", seed=i) for i in range(400)
    ]
    page = visit(images)
    to = """((n) => document.querySelector(`[data-number='${n}']`)
        .scrollIntoView({behavior: 'instant'}))"""
    page.do(f"{to}(100)")
    page.wait_for(f"{WHOLE}(100)")
    page.do(f"{to}(399)")
    page.wait_for(f"{WHOLE}(399) && {UNLOADED}(100)")
    assert page.do("[...document.images].filter((i) => i.naturalWidth).length") < 200
    page.do(f"{to}(0)")
    page.wait_for(f"{WHOLE}(0)")  # and heights that were guesses are settled
    page.click("[data-number='0'] img")
    assert page.do(STAGE) == ["./0.png"]
    page.key("ArrowLeft")
    assert page.do(STAGE) == ["./399.png"]
    page.key("Escape")
    page.wait_for("document.activeElement.closest('.card')?.dataset.number === '399'")
    page.wait_for(f"{WHOLE}(394)")
    page.do("scrollTo({top: 0, behavior: 'instant'})")
    page.wait_for(f"{WHOLE}(0) && {UNLOADED}(394)")  # the last one has the focus and is kept
    type_words(page, "robot 0" if each > 1 else "robot 399")
    page.wait_for(f"{WHOLE}({0 if each > 1 else 399})")
    page.do("dispatchEvent(new Event('beforeprint'))")
    assert (
        page.do("[...document.images].every((i) => i.hasAttribute('src'))")
        and page.complaints() == []
    )


@needs_browser
def test_rows_have_no_gaps_when_filtered(visit):
    """200 prompts of one image stand in several rows of the page; what fits stands side by side all
    the same."""
    page = visit(
        [replace(PLAIN, file=f"{i}.png", prompt=f"robot {i:03}", seed=i) for i in range(200)]
    )
    assert page.do("document.querySelectorAll('.row').length") > 2
    tops = """[...document.querySelectorAll('.card')].filter((c) => c.checkVisibility())
        .map((c) => c.getBoundingClientRect().top)"""
    page.do("scrollTo({top: 0, behavior: 'instant'})")
    type_words(page, "50")  # 050 and 150
    assert page.do("new Set(" + tops + ").size") == 1 and page.do(VISIBLE) == ["50", "150"]


@needs_browser
def test_prompts_of_different_length_have_their_images_at_one_height(visit):
    page = visit(
        [
            replace(PLAIN, file=f"{i}.png", prompt=prompt, seed=i)
            for i, prompt in enumerate(["short", "a long one " * 40, "of two lines, " * 4])
        ]
    )
    tops = page.do("[...document.images].map((i) => i.getBoundingClientRect().top)")
    assert len(set(tops)) == 1


@needs_browser
def test_favorites_survive_and_are_exported(visit, tmp_path, the_browser):
    page = visit(ROBOTS)
    page.click("[data-number='1'] .star")
    page.click("[data-number='3'] img")
    page.click("dialog .star")
    page.key("Escape")
    page.load()
    pressed = """[...document.querySelectorAll('.card .star')]
        .map((star) => star.getAttribute('aria-pressed') === 'true')"""
    assert page.do(pressed) == [False, True, False, True]
    page.click("[type=checkbox]")
    assert page.do(VISIBLE) == ["1", "3"]
    (tmp_path / "got").mkdir()
    the_browser.send(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "got")
    )
    page.click(".export")
    end = time.monotonic() + 30
    text = ""
    while not text and time.monotonic() < end:  # the file is there before its text is
        time.sleep(0.05)
        text = "".join(
            path.read_text(encoding="utf-8") for path in (tmp_path / "got").glob("*.txt")
        )
    lines = [line.split("\t") for line in text.splitlines()]
    assert lines == [[ROBOTS[i].file, str(42 + i), ROBOTS[i].prompt] for i in (1, 3)]
    other = tmp_path / "other"
    other.mkdir()
    second = visit([], page=write_gallery(other, pictures(other, ROBOTS), "Others"))
    assert second.do(pressed) == [False] * 4, "another gallery has its own"
    page.click("[data-number='1'] .star")
    assert page.do(VISIBLE) == ["3"] and page.complaints() == []


TABLE = """[...document.querySelectorAll('tr')].filter((row) => row.checkVisibility())
    .map((row) => [...row.cells].filter((cell) => cell.checkVisibility()).length)"""


@needs_browser
def test_a_comparison_without_its_hidden_images_has_no_gaps(visit):
    images = [
        replace(image, seed=seed, file=f"{seed}{image.file}")
        for seed, image in product((1, 2, 3), compared(("out/a", 0.5), ("out/a", 1), ("out/a", 2)))
    ]
    page = visit(images)
    assert page.do(TABLE) == [4, 4, 4, 4]
    page.click("[data-number='4'] .star")
    page.click("[type=checkbox]")
    assert page.do(TABLE) == [2, 2] and page.do(VISIBLE) == ["4"]
    page.click("[type=checkbox]")
    assert page.do(TABLE) == [4, 4, 4, 4] and page.complaints() == []


@needs_browser
@pytest.mark.parametrize(("width", "side"), [(1920, 256), (1440, 256), (390, 128)])
def test_a_comparison_uses_the_window(visit, width, side):
    page = visit(compared(("out/a", 0), ("out/a", 0.5), ("out/a", 1)), width)
    drawn = "[...document.images].map((image) => image.getBoundingClientRect().width)"
    assert page.do(drawn) == [side] * 3
    assert page.do("document.documentElement.scrollWidth") <= width


@needs_browser
def test_pixel_art_in_a_comparison_has_labels_of_one_line(visit):
    images = compared(("out/a", 0), ("out/a", 1))
    page = visit([replace(image, pixel_file=image.file) for image in images])
    lines = (
        "[...document.querySelectorAll('.label')].map((label) => "
        "Math.floor(label.clientHeight / parseFloat(getComputedStyle(label).lineHeight)))"
    )
    assert page.do(lines) == [1] * 4


@needs_browser
@pytest.mark.parametrize(
    "robots",
    [
        [replace(ROBOTS[0], prompt=f"robot {i}", seed=i) for i in range(6)],
        [replace(ROBOTS[0], seed=i) for i in range(2)],
        [replace(ROBOTS[0], base_file=None, seed=i) for i in range(4)],
    ],
    ids=["pairs of several prompts", "pairs of one prompt", "images of one prompt"],
)
def test_the_images_fill_a_wide_window(visit, robots):
    page = visit(robots, 1920)
    right = page.do(
        "Math.max(...[...document.querySelectorAll('.card')].map((c) => "
        "c.getBoundingClientRect().right))"
    )
    assert 0.85 * 1920 <= right <= 1920
    sides = page.do("[...document.images].map((image) => image.clientWidth % 128)")
    assert not any(sides), "pixels of equal size"


@needs_browser
def test_keys_for_the_star_and_the_slider(visit):
    page = visit(ROBOTS)
    page.click("[data-number='1'] img")
    cut = "document.querySelector('.stage').style.getPropertyValue('--cut')"
    for key, wanted in ((".", "55%"), (".", "60%"), (",", "55%")):
        page.send("Input.dispatchKeyEvent", type="keyDown", key=key)
        assert page.do(cut) == wanted
    page.send("Input.dispatchKeyEvent", type="keyDown", key="f")
    starred = "document.querySelector(\"[data-number='1'] .star\").getAttribute('aria-pressed')"
    assert page.do(starred) == "true"
    page.key("Escape")
    page.wait_for("document.activeElement.closest('.card')?.dataset.number === '1'")
    page.send("Input.dispatchKeyEvent", type="keyDown", key="F")
    assert page.do(starred) == "false"
    type_words(page, "f")
    assert page.do(starred) == "false" and page.complaints() == []


@needs_browser
def test_every_button_of_the_page_has_a_label_of_its_own(visit):
    page = visit(ROBOTS + compared(("out/a", 0), ("out/a", 1), seed=99))
    labels = page.do(
        "[...document.querySelectorAll('main button')].map((b) => b.getAttribute('aria-label'))"
    )
    assert None not in labels and len(set(labels)) == len(labels)


@needs_browser
def test_copies(visit, the_browser):
    page = visit(ROBOTS)

    def click_and_wait(selector: str, label: str) -> None:
        """The button says so for 1.5 seconds, which a busy machine may let pass unseen."""
        page.do(f"""window.labels = [];
            new MutationObserver(([{{target}}]) => labels.push(target.textContent))
                .observe(document.querySelector("{selector}"), {{childList: true}})""")
        page.click(selector)
        page.wait_for("labels.length > 0")
        assert page.do("labels[0]") == label

    the_browser.send(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    click_and_wait("section:nth-of-type(2) .copy", "Copied")
    assert page.do("navigator.clipboard.readText()") == ROBOTS[1].prompt
    page.click("[data-number='2'] img")
    for button, text in ((".copy-prompt", ROBOTS[2].prompt), (".copy-command", command(ROBOTS[2]))):
        click_and_wait(button, "Copied")
        assert page.do("navigator.clipboard.readText()") == text
    the_browser.send("Browser.resetPermissions")
    page.do("navigator.clipboard.writeText = () => Promise.reject()")
    page.wait_for("!document.querySelector('.copy-command').disabled")
    click_and_wait(".copy-command", "Selected")
    assert page.do("getSelection().toString()") == command(ROBOTS[2])
    assert page.complaints() == []


@needs_browser
def test_settings_on_demand(visit):
    page = visit([replace(PLAIN, settings={"<b>": "</dl><script>x</script>", "steps": 25})])
    page.click("[data-number='0'] img")
    assert not page.do("document.querySelector('dialog dl').checkVisibility()")
    page.click("dialog summary")
    assert page.do("document.querySelector('dialog dl').checkVisibility()")
    terms = page.do(
        "[...document.querySelectorAll('dialog dl div')]"
        ".map((div) => [...div.children].map((child) => child.textContent))"
    )
    assert (
        ["<b>", "</dl><script>x</script>"] in terms
        and ["steps", "25"] in terms
        and ["seed", "42"] in terms
    )


@needs_browser
def test_prompts_with_markup_run_no_script(visit):
    """MEGAMAN_PROMPTS=2000 for the long form."""
    count = int(os.environ.get("MEGAMAN_PROMPTS", 100))
    attack = "document.title='taken'"
    attacks = [
        f"<script>{attack}</script>",
        f'<img src=x onerror="{attack}">',
        f"</script><script>{attack}</script>",
        f"</h2><svg onload={attack}>",
        f'"><iframe srcdoc="<script>parent.{attack}</script>">',
        f"javascript:{attack}",
        "<!--<script>",
        "{{ 7 * 7 }}",
        f"' onmouseover={attack}",
        "\\u003cscript>",
        "&lt;script&gt;",
    ]
    prompts = [
        f"{attacks[i % 11]} {attacks[i // 11 % 11]} {MARKUP[i % len(MARKUP)]} {i}"
        for i in range(count)
    ]
    images = [
        replace(PLAIN, prompt=p, negative_prompt=p, settings={p: p, "LoRA": p, "strength": p})
        for p in prompts
    ]
    page = visit(images)
    assert page.do("[...document.querySelectorAll('main h2')].map((h) => h.textContent)") == prompts
    page.click("[data-number='0'] img")
    for _ in range(min(count, 30)):
        page.key("ArrowRight")
    page.key("Escape")
    for by in ("LoRA", "strength", "prompt"):
        page.do(
            f"(() => {{ const s = document.querySelector('.tools select'); s.value = '{by}'; "
            "s.dispatchEvent(new Event('change')); })()"
        )
    assert page.do("document.title") == "Robots"
    assert page.do("document.querySelectorAll('script, iframe, svg').length") == 2
    assert page.complaints() == []


# Markup, and what is true in the page if it has its way; None if it has it unless the policy stops
# a file.
INTRUDERS = {
    "<script>document.title = 'taken'</script>": "document.title === 'taken'",
    "<p id=intruder onclick=\"document.title = 'taken'\">x</p>": "document.title === 'taken'",
    "<p id=intruder style='color: rgb(255, 0, 0)'>x</p>": (
        "getComputedStyle(intruder).color === 'rgb(255, 0, 0)'"
    ),
    "<img src='http://127.0.0.1/x.png'>": None,
    "<iframe src='other.html'></iframe>": None,
}


@needs_browser
@pytest.mark.parametrize("intruder", INTRUDERS)
def test_a_browser_refuses_what_the_policy_does_not_name(the_browser, tmp_path, intruder):
    """What counts is what happens: how a browser complains, and when, differs from version to
    version."""
    path = write_gallery(tmp_path, pictures(tmp_path, [PLAIN]), "Robots")
    text = path.read_text(encoding="utf-8").replace("</main>", "</main>" + intruder)
    (policy,) = re.findall("<meta [^>]*Content-Security-Policy[^>]*>", text)

    def has_its_way(content: str) -> bool:
        path.write_text(content, encoding="utf-8")
        page = Visit(the_browser, path)
        if "id=intruder" in intruder:
            page.click("#intruder")
        effect = INTRUDERS[intruder]
        found = page.do(effect) if effect else not page.stopped_by_policy()
        page.close()
        return found

    assert has_its_way(text.replace(policy, "")), "without the policy"
    assert not has_its_way(text)


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_accessibility(the_browser, tmp_path, axe, dark):
    images = [*ROBOTS, *compared(("out/a", 0), ("out/a", 1), prompt="a table")]
    page = Visit(
        the_browser, write_gallery(tmp_path, pictures(tmp_path, images), "Robots"), dark=dark
    )
    page.do(
        "for (const card of document.querySelectorAll('.card'))"
        " card.style.contentVisibility = 'visible'"
    )
    page.do(axe + "; 0")
    assert page.do("axe.run().then(({passes}) => passes.length)") > 20, "something was looked at"
    serious = """axe.run().then(({violations}) => violations
        .filter(({impact}) => ["serious", "critical"].includes(impact))
        .map(({id, nodes}) =>
            [id, nodes.map((node) => node.html.slice(0, 200) + node.failureSummary)]))"""
    assert page.do(serious) == []
    page.click("[data-number='0'] .star")
    page.click("[data-number='0'] img")
    page.click("dialog summary")
    assert page.do(serious) == []
    page.close()
