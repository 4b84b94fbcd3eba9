"""What a training run's settings are without flags, with --preset and with --demo."""

from __future__ import annotations

from typing import Any

from megaman.hub import PROJECT

DEFAULT_PROMPT = "mega man, blue robot, helmet, game character, high quality"
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
DEMO = PROJECT / "demo"
DEFAULT_SPLIT = 0.1  # if images have to be held out and none are named
AUTO_PATIENCE = 3  # evaluations, with --max_train_steps auto

PRESETS: dict[str, dict[str, Any]] = {
    "starter": {"lora_rank": 4, "lora_alpha": 16, "learning_rate": 1e-4, "max_train_steps": 1000},
    "quality": {"lora_rank": 8, "lora_alpha": 32, "learning_rate": 5e-5, "max_train_steps": 2000},
    "professional": {
        "lora_rank": 16,
        "lora_alpha": 64,
        "learning_rate": 2e-5,
        "max_train_steps": 3000,
    },
}

# What teaches the embedded base its hero on two cores in about two minutes.
# Convolutions are among the targets because they hold most shapes of a small UNet.
DEMO_TRAINING: dict[str, Any] = {
    "pretrained_model_name": str(DEMO / "base"),
    "data_dir": str(DEMO / "images"),
    "validation_data_dir": str(DEMO / "held_out"),
    "output_dir": "./megaman_demo_output",
    "resolution": 64,
    "center_crop": True,
    "train_batch_size": 4,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "lora_rank": 16,
    "lora_alpha": 16,
    "snr_gamma": 5.0,
    "target_modules": [*DEFAULT_TARGETS, "conv1", "conv2", "conv_in"],
    "max_train_steps": 900,
    "save_steps": 300,
    "validation_steps": 300,
    "validation_prompt": ("volto, blue robot hero, pixel art, waving, front view, pink background"),
    "mixed_precision": "no",
    "seed": 0,
}
