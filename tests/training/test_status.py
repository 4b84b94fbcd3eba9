"""What a run shows of its progress: a bar in a terminal, lines elsewhere, JSON for programs; before
the loop what it will write, after it what was gained."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import FEW_TARGETS, ROOT
from tqdm import tqdm

from megaman.config.train import parse_train_config
from megaman.pages import browser
from megaman.training import disk_space, status
from megaman.training.history import RunHistory
from megaman.training.optimizer import Schedule
from megaman.training.report import StepReport
from megaman.training.status import BAR_FORMAT, Status, duration
from megaman.training.summary import gain_lines

SCHEDULE = Schedule(95, 0, 1.0)
WHERE = StepReport(10, 100, 20.0, 180.0, 2.0, 4.0, 3 * 2**30)


def history_of(*losses: float) -> RunHistory:
    history = RunHistory()
    history.add_steps(losses, [1.0] * len(losses), [[1e-4]] * len(losses))
    history.add_evaluation(0, "held_out", 0.2)
    return history


@pytest.fixture
def lines(caplog):
    """The messages that are printed."""
    caplog.set_level(logging.INFO, "megaman")
    return lambda: [message for message in caplog.messages if message]


def test_a_terminal_has_a_bar_with_the_numbers(lines):
    screen = io.StringIO()
    bar = tqdm(total=100, file=screen, desc="training", bar_format=BAR_FORMAT, disable=False)
    shown = Status(bar, history_of(0.5))
    shown.advance()
    shown.show(WHERE)
    shown.close()
    assert re.search(r"training: +1%\|.*\| 1/100 \[00:00, loss=0\.5000,", screen.getvalue())
    numbers = "held-out=0.2000, lr=1.00e-04, 4 images/s, 3.0 GB, 3 min left"
    assert numbers in screen.getvalue()
    (line,) = lines()
    assert re.fullmatch(r"speed +2 s a step, 4 images/s: about 3 min left, until \d\d:\d\d", line)


def test_without_a_terminal_there_are_lines_now_and_then(lines, monkeypatch):
    shown = Status(tqdm(total=100, disable=True), history_of(float("nan")))
    shown.show(WHERE)
    shown.show(WHERE)
    assert len(lines()) == 1, "how long it will take"
    monkeypatch.setattr(status, "LINE_SECONDS", 0.0)
    shown.show(WHERE)
    assert lines()[-1].startswith("step 10/100: loss=nan, held-out=0.2000, lr=1.00e-04")


def test_json_lines_for_programs(train_here, tmp_path, capsys):
    flags = ["--data_dir", ROOT / "demo" / "held_out", "--max_train_steps", 2, *FEW_TARGETS]
    train_here(tmp_path, "out", *flags, "--log_format", "json", "--num_validation_images", 1)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [event["event"] for event in events]
    assert {kind: kinds.count(kind) for kind in ("step", "samples", "checkpoint", "done")} == {
        "step": 1, "samples": 2, "checkpoint": 1, "done": 1,
    }  # fmt: skip
    (step,) = [event for event in events if event["event"] == "step"]
    assert step["step"] == step["total_steps"] == 2 and step["loss"] > 0
    paths = [event["path"] for event in events if event["event"] in ("samples", "checkpoint")]
    assert all((tmp_path / path).is_dir() for path in paths)


def test_what_will_be_written_and_a_disk_with_less_room(tmp_path, monkeypatch):
    words = ["--max_train_steps", "95", "--save_steps", "10", "--num_validation_images", "0"]
    config = parse_train_config(words)
    (line,) = disk_space.disk_lines(config, SCHEDULE, tmp_path, 2**20, 0)
    assert line.startswith("disk       10 checkpoints of 12 MB, the LoRA 12 MB: about 132 MB")
    limited = parse_train_config([*words, "--checkpoints_total_limit", "2"])
    assert "2 checkpoints" in next(disk_space.disk_lines(limited, SCHEDULE, tmp_path, 2**20, 0))
    by_epoch = parse_train_config([*words[:2], "--save_every_n_epochs", "2"])
    assert "10 checkpoints" in next(
        disk_space.disk_lines(by_epoch, Schedule(95, 0, 19.0), tmp_path, 2**20, 0)
    )
    assert "5 checkpoints" in next(disk_space.disk_lines(config, SCHEDULE, tmp_path, 2**20, 50))
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 2**20)
    _, warning = disk_space.disk_lines(config, SCHEDULE, tmp_path, 2**20, 0)
    assert "less room than this run will need" in warning and "total_limit" in warning
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: None)
    assert len(list(disk_space.disk_lines(config, SCHEDULE, tmp_path, 2**20, 0))) == 1
    evaluated = parse_train_config([*words, "--validation_split", "0.1", "--use_ema"])
    (line,) = disk_space.disk_lines(evaluated, SCHEDULE, tmp_path, 2**20, 0)
    assert "10 checkpoints of 20 MB, the last and the best LoRA, each 12 MB: about 224 MB" in line


def test_what_is_on_the_disk_already(tmp_path):
    shards = [tmp_path / "a", tmp_path / "b", tmp_path / "pruned"]
    for shard in shards[:2]:
        shard.write_bytes(bytes(2**20))
    base = cast(Any, SimpleNamespace(name="demo/base", files=lambda: shards))
    (line,) = disk_space.present_lines(shards, tmp_path, base)
    assert line == f"           on the disk already: latents 2.0 MB in {tmp_path}"
    assert not list(disk_space.present_lines([], tmp_path, base))
    base.name = "someone/base"
    (line,) = disk_space.present_lines([], None, base)
    assert line.endswith("on the disk already: someone/base 2.0 MB from the hub")


def test_what_was_gained():
    history = history_of(0.5)
    assert not list(gain_lines(history)), "one evaluation is no gain"
    history.add_evaluation(10, "held_out", 0.15)
    history.add_evaluation(20, "held_out", 0.18)
    assert list(gain_lines(history)) == [
        "gained     held-out loss 0.2000 at step 0, 0.1500 at step 10 (-25 %)"
    ]


def test_durations_and_sizes():
    assert [duration(value) for value in (0, 59, 60, 3599, 3600 * 25)] == [
        "0 s", "59 s", "1 min", "1 h 00 min", "25 h 00 min",
    ]  # fmt: skip
    sizes = [disk_space.size(value) for value in (0, 1536, 2**20 * 13, 2**40)]
    assert sizes == ["0.0 KB", "1.5 KB", "13 MB", "1024 GB"]


def test_open_without_a_browser_is_one_line(lines, monkeypatch, tmp_path):
    page = tmp_path / "page.html"
    monkeypatch.setattr(browser.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    opened: list[str] = []
    monkeypatch.setattr(browser.webbrowser, "open", lambda address: bool(opened.append(address)))
    browser.open_page(page)
    assert not opened and len(lines()) == 1
    monkeypatch.setenv("DISPLAY", ":0")
    browser.show_page(page, "2 images", opens=True)
    assert opened == [page.as_uri()] and page.as_uri() in lines()[-1]
    assert Path(page).as_uri() in lines()[1]
