"""pyproject.toml, the requirements, the hooks and the version agree with each other."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from sources import MODULES, SCRIPTS, imports, tree

from megaman.version import VERSION

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_dependencies_are_the_requirements_file():
    assert PYPROJECT["project"]["dependencies"] == requirements("requirements_megaman_lora.txt")


def test_what_the_package_imports_is_required():
    """Not by way of another package alone, which may drop it."""
    imported: set[str] = set()
    for name in [*MODULES, *SCRIPTS]:
        imported |= {module.split(".")[0] for module in imports(tree(name))}
    others = imported - set(sys.stdlib_module_names) - {"megaman"} - set(SCRIPTS)
    names = {
        line.partition("==")[0].lower() for line in requirements("requirements_megaman_lora.txt")
    }
    assert {"psutil", "torch"} <= others
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    names |= {line.partition("==")[0] for extra in extras for line in extra}
    assert {{"PIL": "pillow"}.get(name, name) for name in others} <= names


def test_every_requirement_is_pinned():
    lines = requirements("requirements_megaman_lora.txt") + requirements("requirements_dev.txt")
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)


def test_the_commands_are_functions_of_the_scripts():
    for command in PYPROJECT["project"]["scripts"].values():
        module, _, name = command.partition(":")
        assert module in PYPROJECT["tool"]["setuptools"]["py-modules"]
        assert callable(getattr(importlib.import_module(module), name))


def test_the_version_is_that_of_the_changelog():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert (
        PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "megaman.version.VERSION"
    )
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", changelog, flags=re.MULTILINE)
    assert versions[0] == VERSION


def test_a_changelog_entry_is_one_line():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = [line for line in changelog.splitlines() if line.startswith("- ")]
    assert entries and all(len(entry) <= 120 for entry in entries)


def test_the_hooks_run_tools_of_the_dev_requirements():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    tools = set(re.findall(r"entry: (\S+)", hooks))
    assert tools == {"ruff", "typos", "check-added-large-files"}
    names = {line.partition("==")[0] for line in requirements("requirements_dev.txt")}
    assert {"ruff", "typos", "pre_commit_hooks", "pre-commit"} <= names
    assert set(re.findall(r"language: (\S+)", hooks)) == {"system"}


def test_contributing_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_a_wheel_holds_the_templates_and_the_demo(tmp_path):
    """Built from a copy, without a network, so that no build folder is left in the repository."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    patterns = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", "tests", "benchmarks", ".work"
    )
    shutil.copytree(ROOT, source, ignore=patterns)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob(f"megaman_lora-{VERSION}-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "megaman_lora.py",
        "generate_megaman.py",
        "megaman/pages/templates/gallery.html",
        "megaman/models/sd15/unet.json",
        "megaman/assets/prompts.txt",
        "megaman/assets/demo/prompts.txt",
        "megaman/assets/demo/base/unet/diffusion_pytorch_model.safetensors",
    }
    assert expected <= names
    for folder in ("images", "held_out"):
        assert any(name.startswith(f"megaman/assets/demo/{folder}/") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "demo/")) for name in names)
