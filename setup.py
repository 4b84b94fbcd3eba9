"""Puts the demo and the built-in prompts into the built package; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ASSETS = ("demo/base", "demo/images", "demo/held_out", "demo/prompts.txt", "prompts.txt")


class BuildWithAssets(build_py):
    """An editable install reads the assets from the repository instead."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for asset in ASSETS:
            target = Path(self.build_lib, "megaman", "assets", asset)
            target.parent.mkdir(parents=True, exist_ok=True)
            if Path(asset).is_dir():
                shutil.copytree(asset, target, dirs_exist_ok=True)
            else:
                shutil.copy(asset, target)


setup(cmdclass={"build_py": BuildWithAssets})
