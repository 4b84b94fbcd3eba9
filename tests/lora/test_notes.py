"""What a LoRA's header notes on generating with it comes back, and a stranger's header does no
harm."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file

from megaman.lora.notes import LoraNotes, read_notes, to_header


@pytest.fixture
def noted(tmp_path):
    """The notes of a file with this header."""

    def write(**header: str) -> LoraNotes:
        path = tmp_path / "lora.safetensors"
        save_file({"x": np.zeros(1, np.float32)}, path, header)
        return read_notes(path)

    return write


def test_what_is_written_comes_back(noted):
    prompts = ["pix, a cat", "洛克"]
    settings = {
        "guidance_scale": 5.0,
        "num_inference_steps": 20,
        "scheduler": "euler_a",
        "negative_prompt": "",
    }
    notes = noted(**to_header(prompts, settings))
    assert notes == LoraNotes(prompts, settings)


def test_for_stable_diffusion_nothing_is_noted(noted):
    assert to_header([], {}) == {} and noted() == LoraNotes()


def test_kohyas_table_and_the_trigger_phrase_are_read(noted):
    table = {"10_pix": {"pix": 3, "cat": 1}, "2_more": {"pix": 2}}
    header = {"ss_tag_frequency": json.dumps(table), "modelspec.trigger_phrase": "pix"}
    assert noted(**header) == LoraNotes(tag_counts={"pix": 5, "cat": 1}, trigger="pix")


@pytest.mark.parametrize(
    "header",
    [
        {"megaman.prompts": "[1]"},
        {"megaman.prompts": "[" * 100_000},
        {"megaman.prompts": json.dumps(["x" * 3000])},
        {"megaman.guidance_scale": "nan", "megaman.num_inference_steps": "1e9"},
        {"megaman.scheduler": "__import__"},
        {"ss_tag_frequency": '{"a": {"b": -1}}'},
        {"ss_tag_frequency": "[]", "modelspec.trigger_phrase": "a\x1b[31m"},
    ],
    ids=["number", "depth", "length", "range", "sampler", "count", "control character"],
)
def test_impossible_values_are_ignored(noted, caplog, header):
    caplog.set_level(logging.INFO)
    assert noted(**header) == LoraNotes()
    assert len(caplog.messages) == len([key for key in header if key.startswith("megaman.")])


def test_a_file_that_cannot_be_read_notes_nothing(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"no")
    assert read_notes(tmp_path / "lora.safetensors") == LoraNotes()
    assert read_notes(tmp_path / "none") == LoraNotes()
