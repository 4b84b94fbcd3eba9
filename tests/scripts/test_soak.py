"""The short form of soak.py: a run that is killed again and again ends like the uninterrupted
one."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT


@pytest.mark.slow(weight=6)
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_and_resumed_ends_bit_for_bit_alike(base_folder, forked, tmp_path):
    flags = [
        "--kills",
        "3",
        "--steps",
        "12",
        "--save_steps",
        "2",
        "--seed",
        "1",
        "--sampling_steps",
        "3",
    ]
    data = ["--data_dir", ROOT / "demo" / "held_out", "--resolution", "64", "--seed", "0"]
    flags += ["--source", "--pretrained_model_name", base_folder, *data]
    done = forked.run(["-c", "import soak; soak.main()", *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kill ") == 3
    assert "ended as the undisturbed one" in done.stdout
