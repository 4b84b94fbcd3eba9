"""What suits a base other than Stable Diffusion 1.5, for which the flags' defaults are made."""

from __future__ import annotations

from typing import Any

from megaman.hub import EMBEDDED_BASE

# By the base's name (models.configs.settings_name), under the names of
# generate_megaman.py's flags. A LoRA's files note it (lora.notes).
SUITED: dict[str, dict[str, Any]] = {
    EMBEDDED_BASE: {
        "negative_prompt": "",  # the small base was not trained on the words of the default
        "guidance_scale": 5.0,
        "num_inference_steps": 20,
    }
}


def suited_to(base: str) -> dict[str, Any]:
    """The settings that suit a base, by flag; none for Stable Diffusion 1.5 and unknown ones."""
    return dict(SUITED.get(base, {}))
