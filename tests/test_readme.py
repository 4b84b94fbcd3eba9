"""The READMEs and docs/ say what the code does: flags, defaults, commands, files; both languages
say the same."""

from __future__ import annotations

import argparse
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
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-TW.md"
READMES = [README, CHINESE]
PAGES = [
    *READMES,
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CHANGELOG.md",
    ROOT / "demo" / "CREDITS.md",
]
SCRIPTS = {
    "megaman_lora.py": (train_parser, parse_train_config),
    "generate_megaman.py": (generate_parser, parse_generate_config),
}
HELP = ("help", "version", argparse.SUPPRESS)  # --help, --version and --help_all
INSTALL = (
    "python -m venv .venv && . .venv/bin/activate && pip install -r requirements_megaman_lora.txt"
)

in_both = pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


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


def section(page: Path, heading: str) -> str:
    """What stands under a heading, down to the next one."""
    pattern = rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)"
    match = re.search(pattern, prose(page), flags=re.DOTALL | re.MULTILINE)
    assert match, heading
    return match[1]


def table(text: str) -> list[list[str]]:
    """The rows of a Markdown table without its head, as cells."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return rows[2:]


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


def test_the_options_page_is_what_its_script_writes():
    written = options_page.PAGE.read_bytes()
    assert written == options_page.options_page().encode(), (
        "run python -m megaman.config.options_page"
    )


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
def test_the_set_up_lines_stand_at_the_top(readme):
    shell = [content.strip() for language, content in blocks(readme) if language == "bash"]
    assert shell[:2] == [
        f"{INSTALL} && python megaman_lora.py --demo && python generate_megaman.py --demo",
        f"{INSTALL} -r requirements_dev.txt && python -m pytest",
    ]
    assert "DEMO_MINUTES" not in readme.read_text(encoding="utf-8"), (
        "the measured minutes go in its place"
    )


@in_both
def test_every_option_named_in_the_text_exists(readme):
    known = set()
    for parser, _ in SCRIPTS.values():
        known.update(*(action.option_strings for action in parser()._actions))
    known |= {f"--{name}" for name in [*prompts.OPTIONS, *prompts.IGNORED_OPTIONS]}
    named = set(re.findall(r"`(--\w+)", prose(readme))) | set(
        re.findall(r"(?<=[ `])--\w+_\w+", prose(readme))
    )
    assert named <= known


@in_both
def test_the_example_of_a_prompts_file_is_one(readme, tmp_path):
    (example,) = [
        content
        for language, content in blocks(readme)
        if language == "text" and "--negative_prompt" in content
    ]
    (tmp_path / "prompts.txt").write_text(example, encoding="utf-8")
    listed, remarks = prompts.read_prompts(tmp_path / "prompts.txt")
    assert remarks == []
    assert listed[1:] == [
        prompts.Prompt("mega man, side view, jumping", "blurry, low quality", 512, 768, 1, 7.5, 28),
        prompts.Prompt("mega man, portrait", "blurry", 512, 768, 1, 7.0, 20),
    ]


@in_both
def test_the_strategies_are_the_presets(readme):
    rows = [
        [cell.strip("`") for cell in row[:2]]
        for row in table(prose(readme))
        if row[0].startswith("`--preset ")
    ]
    assert [preset.split()[1] for preset, _ in rows] == list(PRESETS)
    for preset, flags in rows:
        short, spelled = parse_train_config(preset.split()), parse_train_config(flags.split())
        assert all(
            short.settings()[name] == spelled.settings()[name]
            for name in PRESETS[preset.split()[1]]
        )
        assert spelled.explicit == set(PRESETS[preset.split()[1]])


@in_both
def test_pinned_versions_are_the_requirements(readme):
    requirements = (ROOT / "requirements_megaman_lora.txt").read_text(encoding="utf-8")
    pins = re.findall(r"\b[\w-]+==[\w.]+", readme.read_text(encoding="utf-8"))
    assert pins
    assert [
        pin
        for pin in pins
        if not re.search(rf"{re.escape(pin)}$", requirements, flags=re.MULTILINE)
    ] == []


def test_both_languages_have_the_same_shape():
    english, chinese = headings(README), headings(CHINESE)
    assert [level for level, _ in english] == [level for level, _ in chinese]
    one, other = (
        len(re.findall(r"^(?:- |\|)", prose(page), flags=re.MULTILINE)) for page in READMES
    )
    assert one == other, "list items and table rows"
    links = [re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")) for page in READMES]
    assert links[0][0] == CHINESE.name
    assert links[1][0] == README.name
    assert links[0][1:] == links[1][1:]


def test_both_languages_have_the_same_blocks():
    english, chinese = blocks(README), blocks(CHINESE)
    assert [language for language, _ in english] == [language for language, _ in chinese]
    for (language, one), (_, other) in zip(english, chinese, strict=True):
        if language == "mermaid":  # the labels are translated, nodes and arrows are not
            one, other = (re.sub(r'"[^"]*"', "", content) for content in (one, other))
        elif language == "text":  # so are the phrases behind the paths
            one, other = (
                [line.split()[:1] for line in content.splitlines()] for content in (one, other)
            )
        assert one == other


@of_every_page
def test_local_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(
    "page", [*READMES, ROOT / "docs" / "architecture.md"], ids=lambda path: path.name
)
def test_the_tree_names_what_is_there(page):
    tree = next(content for language, content in blocks(page) if language == "text")
    paths = [line.split()[0] for line in tree.splitlines()]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert all(len(line.split()) > 1 for line in tree.splitlines()), "a phrase each"


def test_the_architecture_names_every_module():
    tree = next(
        content
        for language, content in blocks(ROOT / "docs" / "architecture.md")
        if language == "text"
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


@in_both
def test_code_in_python_blocks_compiles(readme):
    sources = [content for language, content in blocks(readme) if language == "python"]
    assert sources
    for source in sources:
        compile(source, readme.name, "exec")


def test_counting_the_dataset_works(run_script, pictures):
    """The one-liner of the debugging tips, in a folder whose megaman_images/ holds four
    pictures."""
    (line,) = [command for command in commands(README) if "MegaManDataset" in command]
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
