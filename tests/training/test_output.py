"""What an output folder holds."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from megaman.training.saved_loras import different_loras


@pytest.mark.parametrize(("weight", "equal"), [(1.0, True), (2.0, False)])
def test_equal_loras_are_recognized_whatever_their_headers_say(tmp_path, weight, equal):
    """safetensors writes a header's texts in another order each time."""
    checkpoint, finished = tmp_path / "checkpoint-4", tmp_path / "lora_weights"
    for folder, value, header in ((checkpoint, 1.0, "a"), (finished, weight, "b")):
        folder.mkdir()
        path = folder / "adapter_model.safetensors"
        save_file({"x": np.full(3, value, np.float32)}, path, {"format": header})
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert different_loras([checkpoint], finished) == [checkpoint, finished][: 1 if equal else 2]
