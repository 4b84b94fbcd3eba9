"""The versions that a result hangs on, for the record."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ["torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pillow"]


def installed() -> dict[str, str]:
    """The version of each package."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}
