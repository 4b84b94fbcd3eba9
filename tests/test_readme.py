"""The READMEs and docs/ say what the code does: flags, defaults, commands, files; both languages
say the same."""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from megaman.config import options_page
from megaman.config.generate import generate_parser, parse_generate_config
from megaman.config.presets import PRESETS
from megaman.config.train import parse_train_config, train_parser
from megaman.data import problems
from megaman.sampling import prompts

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-TW.md"
READMES = [README, CHINESE]
USER_PAGES = [
    DOCS / f"{name}.md"
    for name in (
        "install", "dataset", "training", "results", "generation", "options", "troubleshooting",
        "how-it-works",
    )
]  # fmt: skip
TRANSLATIONS = {CHINESE: README} | {
    page: DOCS / page.name for page in sorted((DOCS / "zh-TW").glob("*.md"))
}
PAGES = [
    *READMES,
    *sorted(DOCS.rglob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "demo" / "CREDITS.md",
]
FOR_USERS = [README, *USER_PAGES, *TRANSLATIONS]
SCRIPTS = {
    "megaman_lora.py": (train_parser, parse_train_config),
    "generate_megaman.py": (generate_parser, parse_generate_config),
}
HELP = ("help", "version", argparse.SUPPRESS)  # --help, --version and --help_all
MAX_LINES, MAX_WORDS = 150, 1500  # of the README
MAX_BYTES = 300 * 1024  # of an image
INSTALL = (
    "python -m venv .venv && . .venv/bin/activate && pip install -r requirements_megaman_lora.txt"
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def both(name: str) -> list[Path]:
    """A page in both languages, as far as it is translated."""
    page = ROOT / name
    return [page, *(other for other, english in TRANSLATIONS.items() if english == page)]


in_both = pytest.mark.parametrize("readme", READMES, ids=name_of)
of_every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
of_user_pages = pytest.mark.parametrize("page", FOR_USERS, ids=name_of)
of_translations = pytest.mark.parametrize("page", TRANSLATIONS, ids=name_of)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page as (language, content)."""
    return re.findall(
        r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(
        r"^```\w+\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def headings(page: Path) -> list[tuple[int, str]]:
    return [
        (len(marks), words)
        for marks, words in re.findall(r"^(#+) (.+)$", prose(page), flags=re.MULTILINE)
    ]


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings; equal ones are numbered."""
    found: list[str] = []
    for _, heading in headings(page):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


def links(page: Path) -> list[str]:
    """The targets of all links and images."""
    return re.findall(r"\]\(([^)]+)\)", prose(page))


def in_english(page: Path, target: str) -> tuple[str, bool]:
    """Where a link of a page leads in English, and whether to a heading."""
    if "://" in target:
        return target, False
    place, _, anchor = target.partition("#")
    file = (page.parent / place).resolve() if place else page
    return name_of(TRANSLATIONS.get(file, file)), bool(anchor)


def commands(page: Path) -> list[str]:
    """Every command of the page's shell blocks, continued lines joined and chains taken apart."""
    shell = [content for language, content in blocks(page) if language in ("bash", "powershell")]
    lines = "\n".join(shell).replace("\\\n", " ").replace("&&", "\n").splitlines()
    return [line.strip() for line in lines if line.strip()]


def is_default(cell: str, action: argparse.Action) -> bool:
    """Whether a table's cell has the action's default, in backticks as it is typed; without a
    default the cell is in words."""
    code = re.fullmatch(r"`([^`]+)`", cell)
    if action.default is None or action.default is False:
        return bool(cell) and code is None
    if code is None:
        return False
    if action.nargs == "+":
        return code[1].split() == action.default
    parse = cast(Callable[[str], object], action.type or str)
    return parse(code[1]) == action.default


def test_the_options_pages_are_what_their_script_writes():
    written = (options_page.PAGE.read_bytes(), options_page.CHINESE_PAGE.read_bytes())
    assert written == (
        options_page.options_page().encode(),
        options_page.chinese_page().encode(),
    ), "run python -m megaman.config.options_page"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_page_is_the_parser(script):
    text = options_page.PAGE.read_text(encoding="utf-8")
    _, _, part = text.partition(f"\n## `{script}`\n")
    rows = re.findall(
        r"^\| `(--\w+)`(?: †)? \| (.+?) \| (.+) \|$", part.partition("\n## ")[0], re.M
    )
    actions = {
        action.option_strings[-1]: action
        for action in SCRIPTS[script][0]()._actions
        if action.dest not in HELP
    }
    assert {flag for flag, _, _ in rows} == set(actions)
    assert len(rows) == len(actions)
    assert [flag for flag, default, _ in rows if not is_default(default, actions[flag])] == []
    for flag, _, meaning in rows:
        assert all(choice in meaning for choice in actions[flag].choices or []), flag


@of_every_page
def test_every_command_parses(page):
    for command in commands(page):
        words = shlex.split(command, posix=True)
        if words[0] == "python" and words[1] in SCRIPTS:
            SCRIPTS[words[1]][1](words[2:])


@in_both
def test_the_set_up_lines_are_in_the_readme(readme):
    shell = [content.strip() for language, content in blocks(readme) if language == "bash"]
    assert shell[0] == (
        f"{INSTALL} && python megaman_lora.py --demo && python generate_megaman.py --demo"
    )
    tests = re.findall(r"^.*python -m pytest$", readme.read_text(encoding="utf-8"), re.MULTILINE)
    newest_pip = INSTALL.replace("-m venv", "-m venv --upgrade-deps")
    wanted = f"{newest_pip} -r requirements_dev.txt && python -m pytest"
    assert tests == [wanted], ".ci/run runs it"


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert len(text.split()) <= MAX_WORDS


@pytest.mark.parametrize("page", [README, DOCS / "README.md"], ids=name_of)
def test_every_page_is_one_click_away(page):
    reached = {(page.parent / target).resolve() for target in links(page)}
    wanted = USER_PAGES if page == README else {*DOCS.glob("*.md")} - {page}
    assert set(wanted) <= reached


@of_user_pages
def test_every_option_named_in_the_text_exists(page):
    known = set()
    for parser, _ in SCRIPTS.values():
        known.update(*(action.option_strings for action in parser()._actions))
    known |= {f"--{name}" for name in [*prompts.OPTIONS, *prompts.IGNORED_OPTIONS]}
    text = prose(page)
    if page.name == "training.md":  # the first column has the other trainers' flags
        text = re.sub(r"^\| [^|]*\|", "", text, flags=re.MULTILINE)
        text += " ".join(row[0] for row in preset_rows(page))
    named = set(re.findall(r"`(--\w+)", text)) | set(re.findall(r"(?<=[ `])--\w+_\w+", text))
    assert named <= known


@pytest.mark.parametrize("page", both("docs/generation.md"), ids=name_of)
def test_the_example_of_a_prompts_file_is_one(page, tmp_path):
    (example,) = [
        content
        for language, content in blocks(page)
        if language == "text" and "--negative_prompt" in content
    ]
    (tmp_path / "prompts.txt").write_text(example, encoding="utf-8")
    listed, remarks = prompts.read_prompts(tmp_path / "prompts.txt")
    assert remarks == []
    assert listed[1:] == [
        prompts.Prompt("mega man, side view, jumping", "blurry, low quality", 512, 768, 1, 7.5, 28),
        prompts.Prompt("mega man, portrait", "blurry", 512, 768, 1, 7.0, 20),
    ]


def preset_rows(page: Path) -> list[list[str]]:
    """The table of strategies: preset and flags."""
    rows = re.findall(r"^\| `(--preset \w+)` \| `(--[^`]+)` \|", prose(page), flags=re.MULTILINE)
    return [list(row) for row in rows]


@pytest.mark.parametrize("page", both("docs/training.md"), ids=name_of)
def test_the_strategies_are_the_presets(page):
    rows = preset_rows(page)
    assert [preset.split()[1] for preset, _ in rows] == list(PRESETS)
    for preset, flags in rows:
        short, spelled = parse_train_config(preset.split()), parse_train_config(flags.split())
        assert all(
            short.settings()[name] == spelled.settings()[name]
            for name in PRESETS[preset.split()[1]]
        )
        assert spelled.explicit == set(PRESETS[preset.split()[1]])


@pytest.mark.parametrize("page", both("docs/install.md"), ids=name_of)
def test_pinned_versions_are_the_requirements(page):
    requirements = (ROOT / "requirements_megaman_lora.txt").read_text(encoding="utf-8")
    pins = re.findall(r"\b[\w-]+==[\w.]+", page.read_text(encoding="utf-8"))
    assert pins
    assert [
        pin
        for pin in pins
        if not re.search(rf"{re.escape(pin)}$", requirements, flags=re.MULTILINE)
    ] == []


@of_translations
def test_a_translation_is_of_the_current_page(page):
    """When an English page has changed, its translation follows, and the hash in its head."""
    english = TRANSLATIONS[page]
    head = page.read_text(encoding="utf-8").partition("\n")[0]
    digest = hashlib.sha256(english.read_bytes()).hexdigest()[:16]
    assert head == f"<!-- Translation of {name_of(english)}, sha256 {digest} -->"


@of_translations
def test_a_translation_has_the_shape_of_its_page(page):
    english = TRANSLATIONS[page]
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(page)]
    for mark in (r"^- ", r"^\d\. ", r"^\|", r"^\*\*"):
        one, other = (
            len(re.findall(mark, prose(side), flags=re.MULTILINE)) for side in (english, page)
        )
        assert one == other, mark
    ours, theirs = ([in_english(side, link) for link in links(side)] for side in (page, english))
    assert ours == theirs


@of_translations
def test_a_translation_has_the_blocks_of_its_page(page):
    english = TRANSLATIONS[page]
    assert [language for language, _ in blocks(english)] == [
        language for language, _ in blocks(page)
    ]
    for (language, one), (_, other) in zip(blocks(english), blocks(page), strict=True):
        if language == "mermaid":  # the labels are translated, nodes and arrows are not
            one, other = (re.sub(r'"[^"]*"', "", content) for content in (one, other))
        elif language == "text":  # so are the phrases behind the paths
            one, other = (
                [line.split()[:1] for line in content.splitlines()] for content in (one, other)
            )
        assert one == other


@of_every_page
def test_links_lead_to_files_and_headings(page):
    local = [target for target in links(page) if "://" not in target]
    wrong = []
    for target in local:
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("image", sorted(DOCS.rglob("*.png")), ids=name_of)
def test_images_are_used_and_small(image):
    used = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    assert image in used
    assert image.stat().st_size <= MAX_BYTES


@pytest.mark.parametrize("page", [*READMES, DOCS / "architecture.md"], ids=name_of)
def test_the_tree_names_what_is_there(page):
    tree = next(content for language, content in blocks(page) if language == "text")
    paths = [line.split()[0] for line in tree.splitlines()]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert all(len(line.split()) > 1 for line in tree.splitlines()), "a phrase each"


def test_the_architecture_names_every_module():
    tree = next(
        content for language, content in blocks(DOCS / "architecture.md") if language == "text"
    )
    named = set()
    for line in tree.splitlines():
        folder, _, phrase = line.partition(" ")
        names = phrase.rpartition(": ")[2].split(", ")
        named.update(f"{folder}{name}.py" for name in names)
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "megaman").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert modules <= named


@of_user_pages
def test_code_in_python_blocks_compiles(page):
    for language, content in blocks(page):
        if language == "python":
            compile(content, page.name, "exec")


def test_counting_the_dataset_works(run_script, pictures):
    """The one-liner of the debugging tips, in a folder whose megaman_images/ holds four
    pictures."""
    (line,) = [
        command for command in commands(DOCS / "troubleshooting.md") if "MegaManDataset" in command
    ]
    python, *words = shlex.split(line)
    assert python == "python"
    pictures.rename(pictures.parent / "megaman_images")
    done = run_script(words, pictures.parent)
    assert (done.stdout.strip(), done.stderr) == ("4", "")


def test_the_folder_for_pictures_holds_the_instructions():
    guide = ROOT / "megaman_images" / "README.md"
    assert guide.read_text(encoding="utf-8") == problems.INSTRUCTIONS.read_text(encoding="utf-8")


@of_every_page
def test_pages_have_no_paths_of_a_machine(page):
    assert not re.search(r"/(?:home|root|Users|work|tmp)/", page.read_text(encoding="utf-8"))
