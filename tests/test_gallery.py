"""The gallery: what is written comes back whole, prompts stay text, a browser opens the page from disk."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megaman.errors import UserError
from megaman.gallery import GalleryImage, read_images, write_gallery

PLAIN = GalleryImage(
    file="megaman_000_00.png", prompt="blue robot", negative_prompt="blurry", seed=42, width=64, height=64,
    settings={"steps": 25, "guidance": 7.5, "sampler": "DPM++ 2M"})  # fmt: skip
MARKUP = ["<script>alert(1)</script>", "</script>", "</title>", "<!--", "]]>", "<img src=x onerror=alert(1)>",
          "<b>", "&amp;", "&#60;", '"', "'", "{{ 7 * 7 }}", "{% raw %}", "洛克人", "🤖", "\u202e", "\n", " ",
          "javascript:", "//", "..", "?", "#", "%41", "\\"]  # fmt: skip
odd_text = st.text(max_size=20) | st.lists(st.sampled_from(MARKUP), min_size=1, max_size=6).map("".join)


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
        return [attributes[name] for each, attributes in self.tags if each == tag and name in attributes]

    def shape(self) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes in self.tags]


def pictures(folder: Path, images: list[GalleryImage]) -> list[GalleryImage]:
    """Draw the files that the images name."""
    for image in images:
        for file in filter(None, (image.file, image.base_file)):
            Image.new("RGB", (image.width, image.height), (30, 90, image.seed % 256)).save(folder / file)
    return images


any_image = st.builds(
    GalleryImage, file=odd_text, prompt=odd_text, negative_prompt=odd_text, seed=st.integers(0, 2**63),
    width=st.integers(8, 2048), height=st.integers(8, 2048), base_file=st.none() | odd_text,
    settings=st.dictionaries(odd_text, odd_text | st.integers() | st.floats(allow_nan=False), max_size=4),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(any_image, max_size=4))
def test_images_json_gives_back_what_was_written(images):
    with tempfile.TemporaryDirectory() as folder:
        write_gallery(Path(folder), images, "A title")
        assert read_images(Path(folder)) == images


@settings(max_examples=100, deadline=None)
@given(odd_text, odd_text, odd_text, odd_text.filter(bool))
def test_what_people_write_is_text_and_never_markup(prompt, value, title, file):
    with tempfile.TemporaryDirectory() as folder:
        plain = replace(PLAIN, settings={"lora": "mine"})
        expected = Page(write_gallery(Path(folder), [plain], "Plain")).shape()
        odd = replace(plain, file=file, prompt=prompt, negative_prompt=value + "x", settings={"lora": value})
        page = Page(write_gallery(Path(folder), [odd], title))
    assert page.shape() == expected
    assert page.texts["h2"] == [prompt]
    assert page.texts["title"] == page.texts["h1"] == [title]
    assert {value, value + "x"} <= set(page.texts["dd"])
    assert page.attributes("img", "alt") == [f"{prompt}, seed 42"]
    for address in page.attributes("img", "src") + page.attributes("a", "href"):
        assert re.fullmatch(r"\./[\w./~%-]*", address, flags=re.ASCII)
        assert unquote(address) == "./" + file


def test_a_section_per_prompt_with_everything_that_makes_the_image_again(tmp_path):
    images = [PLAIN, replace(PLAIN, file="b.png", prompt="red robot"), replace(PLAIN, file="c.png", seed=43)]
    path = write_gallery(tmp_path, images, "Robots")
    page = Page(path)
    assert path == tmp_path / "index.html"
    assert page.texts["h2"] == ["blue robot", "red robot"]
    assert page.attributes("img", "src") == ["./megaman_000_00.png", "./c.png", "./b.png"]
    text = path.read_text(encoding="utf-8")
    assert text.count("Seed 42") == 2 and text.count("Seed 43") == 1
    assert text.count("DPM++ 2M") == 1 + len(images)  # once for all, and under every image
    assert text.count("blurry") == 1 + len(images)


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
    assert page.attributes("img", "alt") == ["Base: blue robot, seed 42", "With LoRA: blue robot, seed 42"]


def test_the_policy_allows_the_pages_own_style_and_script_alone(tmp_path):
    page = Page(write_gallery(tmp_path, [PLAIN], "Robots"))
    (policy,) = (attributes["content"] for tag, attributes in page.tags
                 if attributes.get("http-equiv") == "Content-Security-Policy")  # fmt: skip
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    for tag in ("style", "script"):
        (block,) = page.texts[tag]
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert rules == {"img-src": "'self' file: data:", "base-uri": "'none'", "form-action": "'none'"}


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
any_record = st.fixed_dictionaries(
    {"file": odd_text | any_json, "prompt": odd_text | any_json, "negative_prompt": odd_text | st.just("\udcff"),
     "seed": st.integers() | any_json, "width": st.integers() | any_json, "height": st.integers(),
     "settings": st.dictionaries(odd_text, any_json, max_size=2) | any_json},
    optional={"base_file": any_json, "x": any_json},
)  # fmt: skip


@given(st.lists(any_record | any_json, max_size=2) | any_json)
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


GOOD = {"file": "a.png", "prompt": "p", "negative_prompt": "", "seed": 1, "width": 8, "height": 8,
        "settings": {}}  # fmt: skip


@pytest.mark.parametrize("content", [
    b"[{", b"\xff\xfe[", b"{}", b"null", b"[1]", b'[{"file": "a.png"}]',
    *(json.dumps([{**GOOD, **change}]).encode()
      for change in ({"seed": "1"}, {"prompt": None}, {"settings": []}, {"base_file": 3}, {"strength": 1})),
])  # fmt: skip
def test_a_broken_images_json_is_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "images.json").write_bytes(json.dumps([GOOD]).encode())
    assert len(read_images(tmp_path)) == 1
    (tmp_path / "images.json").write_bytes(content)
    with pytest.raises(UserError, match=r"images\.json") as caught:
        read_images(tmp_path)
    assert caught.value.remedy and "\n" not in str(caught.value)


# In a real browser, from the disk.

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="page not opened: no chromium or google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
         "--virtual-time-budget=20000", "--dump-dom"]  # fmt: skip

VISIT = """<!doctype html>
<meta charset="utf-8">
<iframe src="index.html" width="WIDTH" height="800"></iframe>
<pre></pre>
<script>
const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const frame = document.querySelector("iframe");
frame.addEventListener("load", async () => {
  const page = frame.contentDocument, pictures = [...page.images];
  const lazy = pictures.every((picture) => picture.loading === "lazy" && picture.width && picture.height);
  for (const picture of pictures) picture.loading = "eager";
  while (!pictures.every((picture) => picture.complete)) await sleep(50);
  const seen = {
    lazy,
    loaded: pictures.filter((picture) => picture.naturalWidth > 0).length,
    drawn: pictures.map((picture) => picture.getBoundingClientRect().width),
    left: pictures.map((picture) => picture.getBoundingClientRect().left),
    prompts: [...page.querySelectorAll("h2")].map((heading) => heading.textContent),
    sideways: page.documentElement.scrollWidth - page.documentElement.clientWidth,
  };
  page.querySelector("main button").click();
  await sleep(200);
  seen.copied = frame.contentWindow.getSelection().toString();
  const view = page.querySelector("dialog");
  pictures[0].click();
  seen.opened = view.open && [...view.querySelectorAll("img")].map((picture) => picture.getAttribute("src"));
  view.querySelector("button").click();
  seen.closed = !view.open;
  document.querySelector("pre").textContent = JSON.stringify(seen);
});
</script>"""


def browse(page: Path, *flags: str) -> tuple[str, list[str]]:
    """Open page from the disk: the document as the browser has it in the end, and what its console says."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [BROWSER, *FLAGS, *flags, f"--user-data-dir={profile}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def visit(folder: Path, width: int) -> dict:
    """What a visitor of the given width, in CSS pixels, finds on the page and gets by clicking."""
    (folder / "visit.html").write_text(VISIT.replace("WIDTH", str(width)), encoding="utf-8")
    document, complaints = browse(folder / "visit.html", "--allow-file-access-from-files")
    assert complaints == []
    return json.loads(html.unescape(re.search(r"<pre>(.+?)</pre>", document, flags=re.DOTALL)[1]))


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_every_image_and_asks_nobody_else(tmp_path, width):
    prompts = ["blue robot", 'a "quoted" <b>robot</b> </script><script>parent.x = 1</script>', "洛克人 🤖"]
    images = [replace(PLAIN, file=f"{i} #1 100%.png", base_file=f"base_{i}.png", prompt=prompt, seed=42 + i)
              for i, prompt in enumerate(prompts)]  # fmt: skip
    write_gallery(tmp_path, pictures(tmp_path, images), "Robots")
    seen = visit(tmp_path, width)
    assert seen["lazy"] and seen["loaded"] == 6
    assert seen["prompts"] == prompts
    assert all(left < right for left, right in zip(seen["left"][::2], seen["left"][1::2], strict=True))
    assert seen["sideways"] <= 0
    assert seen["opened"] == ["./base_0.png", "./0%20%231%20100%25.png"] and seen["closed"]
    assert seen["copied"] == prompts[0]  # no right to the clipboard within a frame: the prompt is selected


@needs_browser
def test_tiny_images_are_drawn_large_and_large_ones_fit(tmp_path):
    write_gallery(tmp_path, pictures(tmp_path, [PLAIN, replace(PLAIN, file="b.png", seed=43)]), "Robots")
    assert visit(tmp_path, 1280)["drawn"] == [256, 256]
    write_gallery(tmp_path, pictures(tmp_path, [replace(PLAIN, width=1024, height=768)]), "Robots")
    seen = visit(tmp_path, 1280)
    assert 220 <= seen["drawn"][0] <= 1024 and seen["sideways"] <= 0


@needs_browser
def test_a_browser_has_nothing_to_complain_of(tmp_path):
    document, complaints = browse(write_gallery(tmp_path, pictures(tmp_path, [PLAIN]), "Robots"))
    assert complaints == [] and "<title>Robots</title>" in document


@needs_browser
@pytest.mark.parametrize("intruder", [
    "<script>document.title = 'taken'</script>", "<p onclick='alert(1)'>", "<p style='color: red'>",
    "<img src='http://127.0.0.1/x.png'>", "<iframe src='other.html'></iframe>",
])  # fmt: skip
def test_a_browser_refuses_what_the_policy_does_not_name(tmp_path, intruder):
    page = write_gallery(tmp_path, pictures(tmp_path, [PLAIN]), "Robots")
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</main>", "</main>" + intruder), encoding="utf-8")
    document, complaints = browse(page)
    assert "<title>Robots</title>" in document
    assert len(complaints) == 1 and "Content Security Policy" in complaints[0]
