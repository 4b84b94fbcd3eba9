"""Figures of traced memory on the disk: used for equal runs only, and never if damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from megaman.config.train import parse_train_config
from megaman.training import trace_cache
from megaman.training.compute import REQUESTS, choose_training_compute
from megaman.training.fake_models import FakeModels
from megaman.training.memory_plan import fit_to_memory, memory_table
from megaman.training.trace_cache import FILE, MAX_TRACES, TraceCache


def figure(folder: Path | None, settings: Any = "a", traced: int = 1) -> int:
    return TraceCache(folder, settings).get("step", lambda: traced)


def test_an_equal_run_traces_nothing(tmp_path, monkeypatch):
    assert figure(tmp_path / "new", traced=5) == 5
    assert figure(tmp_path / "new", traced=6) == 5
    assert figure(tmp_path / "new", "b", traced=7) == 7
    assert figure(tmp_path / "new", traced=8) == 5, "the other one is still there"
    monkeypatch.setattr(trace_cache, "package_versions", lambda: {"torch": "0"})
    assert figure(tmp_path / "new", traced=9) == 9


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_text(path.read_text().replace('"step": 5', '"step": 4')),
        lambda path: path.write_text(path.read_text().replace('"step": 5', '"step": -5')),
        lambda path: path.write_text(json.dumps({"digest": "", "traces": {}})),
        lambda path: path.write_text("[]"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_file_is_traced_anew(tmp_path, damage):
    figure(tmp_path, traced=5)
    damage(tmp_path / FILE)
    assert figure(tmp_path, traced=6) == 6


def test_what_cannot_be_written_is_not_missed(tmp_path):
    (tmp_path / "file").touch()
    assert figure(tmp_path / "file", traced=5) == 5
    assert figure(None, traced=6) == 6


def test_the_file_stays_small(tmp_path):
    for number in range(MAX_TRACES + 3):
        figure(tmp_path, number, traced=number)
    traces = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["traces"]
    assert len(traces) == MAX_TRACES
    assert figure(tmp_path, 0, traced=100) == 100 and figure(tmp_path, 30, traced=100) == 30


@pytest.mark.slow
def test_the_second_plan_of_a_run_traces_nothing(tmp_path, monkeypatch):
    """That of the run itself and that of --plan; which figures are asked for is their own."""
    traced: list[object] = []

    def peak(*_: object) -> int:
        traced.append(None)
        return 2**20

    monkeypatch.setattr(FakeModels, "peak", peak)
    base = str(ROOT / "demo" / "base")
    config = parse_train_config(["--pretrained_model_name", base, "--resolution", "64"])
    settings = config.settings()
    compute, _ = choose_training_compute(
        {flag: settings[flag] for flag in REQUESTS}, (), torch.device("cpu"), 64, None
    )
    request, counts = config.memory_request(), []
    for _ in range(2):
        fit_to_memory(compute, request, base, 2**33, tmp_path)
        counts.append(len(traced))
        memory_table(config.compute, request, base, tmp_path)
        counts.append(len(traced))
    first, both, *again = counts
    assert 0 < first < both and again == [both, both]
