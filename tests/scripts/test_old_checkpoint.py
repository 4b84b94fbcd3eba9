"""A checkpoint that an early version wrote (17da076, on the base of today) resumes, and ends as
it did then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megaman.errors import UserError
from megaman.training.checkpoint import require_same_settings

HERE = Path(__file__).parent
FLAGS = """--pretrained_model_name demo/base --max_train_steps 4 --save_steps 2 --learning_rate 1e-3
    --lora_rank 1 --train_batch_size 2 --shuffle_caption --mixed_precision no
    --target_modules mid_block.attentions.0.transformer_blocks.0.attn1.to_q
    mid_block.resnets.0.conv1"""


def test_a_checkpoint_of_an_early_version_resumes(train_here, tmp_path, capsys):
    shutil.copytree(HERE / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    data = ["--data_dir", HERE / "early_images"]  # demo/held_out as it was then
    resumed = train_here(
        tmp_path, "out", *data, *FLAGS.split(), "--resume_from_checkpoint", "latest"
    )
    assert "checkpoint-2, step 2" in capsys.readouterr().out
    before = load_file(HERE / "checkpoint-2" / "adapter_model.safetensors")
    expected = load_file(HERE / "checkpoint-4-adapter.safetensors")
    assert resumed.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (tensor - before[key]).abs().max() > 1e-4, "there is something to compare"
        # Another processor may round differently, and AdamW makes whole steps of it.
        assert (resumed[key] - tensor).abs().mean() < 0.1 * (tensor - before[key]).abs().mean()


def test_images_that_an_early_version_enlarged_in_another_way_have_a_remedy():
    """The rule by which --upscale auto recognizes pixel art has changed, too."""
    nearest, other = "nearest for 2 (755b7808), else lanczos", "nearest for 3 (43049e5f)"
    same = {"upscale": "lanczos; lanczos"}
    require_same_settings("checkpoint-1", same, same)
    with pytest.raises(UserError, match=r"Add --upscale lanczos"):
        require_same_settings("checkpoint-1", {}, {"upscale": nearest})
    with pytest.raises(UserError, match=r"Add --upscale lanczos"):
        require_same_settings("checkpoint-1", same, {"upscale": nearest})
    with pytest.raises(UserError, match=r"earlier version .*begin a new run"):
        require_same_settings("checkpoint-1", {"upscale": nearest}, {"upscale": other})
    with pytest.raises(UserError, match=r"Give the same settings"):
        require_same_settings("checkpoint-1", {"seed": 1}, {"seed": 2, "upscale": nearest})
