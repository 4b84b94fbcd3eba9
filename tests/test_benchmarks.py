"""The measurements' own parts: what they measure with is what the product reads, and their figures
are what was noted.

Nothing is timed here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import learning
import numpy as np
import processes
import pytest
import random_bases
import step_time
from conftest import FEW_TARGETS, ROOT
from hypothesis import given
from hypothesis import strategies as st

from megaman.data.dataset import MegaManDataset
from megaman.models.base import load_base
from megaman.models.text_encoding import encode_captions
from megaman.models.typed import encode_pixels

PROGRAM = """
import sys
from tqdm.auto import tqdm
for _ in tqdm(range(3), desc="other"):
    pass
bar = tqdm(total=4, desc="training")
for _ in range(4):
    sum(range(10**5))
    bar.update()
bar.close()
print("{not JSON", sys.argv[1:])
sys.exit(int(sys.argv[1]))
"""

PAIRED_BY_TWOS = f"""
import sys
sys.path.insert(0, {str(processes.BENCHMARKS)!r})
import paired
paired.LOGS_EVERY = 2
paired.main()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A middle-sized base and two folders with the same five pictures, one for each kind of
    captions."""
    folder = tmp_path_factory.mktemp("made")
    base = random_bases.make_base("mid", folder / "base")
    return base, *(
        random_bases.make_pictures(folder / kind, 5, 128, kind) for kind in ("txt", "jsonl")
    )


@pytest.mark.slow
def test_a_random_base_and_drawn_pictures_are_what_the_product_reads(made):
    import torch

    folder, beside, listed = made
    base = load_base(str(folder), torch.float32)
    assert base.native_size == 128 and base.vae_scale_factor == 8
    datasets = [MegaManDataset(path, None, 128) for path in (beside, listed)]
    wanted = [random_bases.caption(number) for number in range(5)]
    assert [dataset.captions for dataset in datasets] == [wanted, wanted]
    for dataset in datasets:
        assert dataset.num_written_captions == 5
        assert not dataset.skipped and not dataset.metadata_warnings
    states = encode_captions(base.text_encoder, base.tokenizer, wanted)
    with torch.no_grad():
        pixel_values = torch.stack([item["pixel_values"] for item in datasets[0]])
        latents = encode_pixels(base.vae, pixel_values).mode()
        noise_pred = base.unet(
            latents, torch.tensor(500), torch.stack([states[text] for text in wanted])
        ).sample
    assert noise_pred.shape == (5, 4, 16, 16) and noise_pred.isfinite().all()


def test_what_is_there_already_is_kept_and_the_rest_is_the_same_again(made, tmp_path):
    folder, beside, _ = made
    before = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert random_bases.make_base("mid", folder) == folder
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    again = random_bases.make_pictures(tmp_path / "again", 2, 128)
    assert [path.read_bytes() for path in sorted(again.iterdir())] == [
        (beside / path.name).read_bytes() for path in sorted(again.iterdir())
    ]


def test_the_captions_are_as_many_as_is_said_and_the_pictures_differ():
    assert len({random_bases.caption(number) for number in range(1000)}) == random_bases.CAPTIONS
    assert len({random_bases.picture(number, 64).tobytes() for number in (0, 1, 300, 600)}) == 4


def test_the_demos_pictures_with_the_captions_that_the_peer_reads(tmp_path):
    folder = step_time.pictures_of("demo", tmp_path)
    rows = [
        json.loads(line)
        for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    dataset = MegaManDataset(folder, None, 64)
    assert sorted(row["file_name"] for row in rows) == sorted(
        path.name for path in folder.glob("*.png")
    )
    assert sorted(dataset.captions) == sorted(row["text"] for row in rows)
    assert sorted(dataset.captions) == sorted(
        MegaManDataset(ROOT / "demo" / "images", None, 64).captions
    )


def test_a_program_is_stamped_at_every_step_of_its_bar(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    result = processes.run(processes.stamped("training", program, 0), tmp_path / "work")
    assert len(result["step_s"]) == len(result["step_cpu_s"]) == 3 and all(
        value > 0 for value in result["step_s"]
    )
    assert result["began"] < result["first"] < result["began"] + result["seconds"]
    assert 0 < result["rss_mb"] <= result["peak_mb"]
    assert "device" not in result


@pytest.mark.slow
def test_bare_steps_stand_between_the_loops_own_and_the_loop_goes_on_to_its_end(
    base_folder, tmp_path, forked
):
    words = [
        "--pretrained_model_name",
        base_folder,
        "--data_dir",
        ROOT / "demo" / "held_out",
        "--resolution",
        64,
        "--output_dir",
        "out",
        "--max_train_steps",
        8,
        "--num_validation_images",
        0,
        "--seed",
        0,
    ]
    words += ["--train_batch_size", 1, "--lora_rank", 2, *FEW_TARGETS]
    done = forked.run(["-c", PAIRED_BY_TWOS, 3, processes.TRAIN, *words], tmp_path)
    assert done.returncode == 0, done.stderr
    result = processes.last_json(done.stdout)
    assert result is not None
    assert len(result["ours_s"]) == 2 and len(result["bare_s"]) == 3  # around steps 4, 5 and 6, 7
    assert all(value > 0 for value in result["ours_s"] + result["bare_s"])
    assert (tmp_path / "out" / "lora_weights" / "adapter_model.safetensors").is_file()


def test_a_program_that_fails_ends_the_measurement(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    with pytest.raises(SystemExit, match="failed with 3"):
        processes.run(processes.stamped("training", program, 3), tmp_path / "work")


def test_the_memory_of_the_one_who_asks_is_not_counted(tmp_path):
    """On Linux the kernel's own figure of a child would be at least its parent's size."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    code = f"""
from pathlib import Path
import processes
large = bytearray(400 * 2**20)
large[::4096] = b"1" * len(large[::4096])
command = processes.stamped("training", Path({str(program)!r}), 0)
print(processes.run(command, Path({str(tmp_path)!r}))["peak_mb"])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env=environment
    )
    assert float(done.stdout) < 200


@given(st.lists(st.floats(1e-6, 1e6), min_size=1))
def test_a_summary_lies_in_order(values):
    found = processes.summary(values)
    near = pytest.approx
    assert found["median"] == near(statistics.median(values), rel=1e-3)
    assert (
        min(values) * 0.999
        <= found["quartile_1"]
        <= found["median"]
        <= found["quartile_3"]
        <= max(values) * 1.001
    )
    assert found["mean"] == near(sum(values) / len(values), rel=1e-3)


def test_the_last_line_that_is_json_counts():
    assert processes.last_json('{"a": 1}\nwords\n{"a": 2}\n{broken\n') == {"a": 2}
    assert processes.last_json("words\n[1]\n") is None


def test_the_steps_that_do_not_count_are_left_out():
    """Between five updates lie four times; the first of them is that of the second step."""
    result = {"step_s": [2.0, 3.0, 4.0, 5.0], "step_cpu_s": [20.0, 30.0, 40.0, 50.0], "peak_mb": 1}
    assert step_time.counted(result, warmup=3) == {
        "step_s": [4.0, 5.0],
        "step_cpu_s": [40.0, 50.0],
        "peak_mb": 1,
    }
    assert step_time.counted(result, warmup=0) == step_time.counted(result, warmup=1) == result


def test_the_rounds_are_put_together():
    slow, fast = (
        {"step_s": [s] * 3, "step_cpu_s": [2 * s] * 3, "peak_mb": p}
        for s, p in ((4.0, 900), (2.0, 1000))
    )
    side = step_time.together([slow, fast])
    assert side["step_s"]["median"] == 3 and side["peak_mb"] == 1000 and side["rounds_s"] == [4, 2]
    other = step_time.together([{"step_s": [4.0] * 3, "step_cpu_s": [24.0] * 3, "peak_mb": 2000}])
    shares = step_time.ratio(side, other)
    assert shares == {
        "time": 0.75,
        "time with the log": 0.75,
        "CPU": 0.25,
        "CPU with the log": 0.25,
        "peak_mb": 0.5,
    }


def test_what_one_step_in_ten_costs_more_is_seen():
    steps = [1.0] * 35
    steps[9::10] = [2.0] * 3
    result = {"step_s": steps, "step_cpu_s": steps, "peak_mb": 1}
    found = step_time.together([result, result])
    assert found["step_s"]["median"] == 1 and found["logged_s"] == processes.summary([1.1] * 6)
    assert step_time.in_a_row([1.0, 2.0]) == [1.5]


def test_the_machine_in_words():
    found = processes.machine("avx2")
    assert found["processor"] and found["as"] == "avx2" and found["torch"]
    assert set(found["instructions"]) <= set(processes.INSTRUCTIONS)
    json.dumps(found)


def test_a_drawn_picture_is_no_flat_colour():
    image = random_bases.picture(7, 64)
    assert image.size == (64, 64) and image.mode == "RGB"
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 500


@pytest.mark.slow
def test_the_gpu_page_answers_on_a_cpu_and_survives_what_fails(tmp_path, monkeypatch, capsys):
    """The script runs are replaced: as processes they would take a minute."""
    import gpu
    import gpu_runs

    def run(bench, script, *words, probe=()):
        if script == gpu_runs.DRAW:
            raise RuntimeError("on purpose")
        folder = bench.work_dir / words[words.index("--output_dir") + 1]
        folder.mkdir(exist_ok=True)
        for name in ("lora_weights", f"checkpoint-{bench.steps}"):
            (folder / name).mkdir(exist_ok=True)
        return {"code": 0, "step_ms": 1.5, "said": ["step 1 skipped"]}

    monkeypatch.setattr(gpu_runs.Bench, "run", run)
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cpu", "--output", str(page), "--only"])
    sys.argv += ["training", "resuming", "generating"]
    assert gpu.main() == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ") and "torch 2" in text
    assert "- **training**: code 0, step_ms 1.5\n  - `step 1 skipped`" in text
    assert "largest_difference None" in text
    assert "- generating: failed (RuntimeError: on purpose)" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "steps", "compiled"], "--only 'compiled' is none of 'steps', 'training', "),
        (["--base", "missing"], "--base missing: there is no such folder or file"),
        (["--resolution", "100"], "--resolution 100 is not a multiple of 8"),
        (["--minutes", "0"], "--minutes 0 must be above 0"),
        (["--peer", "."], "--peer .: there is no run.py in it"),
        (["--output", "missing/page.md"], "--output missing/page.md: its folder does not exist"),
        (["--output", "page.md"], "--output page.md exists already"),
    ],
)
def test_the_gpu_page_refuses_a_mistake_at_once(flags, said, tmp_path, monkeypatch, capsys):
    import gpu

    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").touch()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cpu", *flags])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and f"error: {said}" in capsys.readouterr().err


def test_the_gpu_page_of_the_same_day_stays(tmp_path, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "BENCHMARKS", tmp_path)
    (tmp_path / "results").mkdir()
    pages = []
    for _ in range(3):
        pages.append(gpu.page_for("NVIDIA H200"))
        pages[-1].touch()
    assert len(set(pages)) == 3 and pages[2].name.endswith("-nvidia-h200-3.md")


def test_a_cached_crop_takes_its_numbers_and_little_more():
    import scaling

    assert 8 * 8 * 8 * 4 < scaling.cached_bytes(64, crops=8) < 8 * 8 * 8 * 4 * 1.1


@pytest.mark.slow
def test_the_bare_steps_of_the_gpu_page(base_folder):
    import gpu_runs
    from gpu import steps

    (row,) = steps(gpu_runs.Bench(str(base_folder), ROOT, 64, True), "contiguous")
    assert row["case"] == "bare step, contiguous" and row["step_ms"] > 0 < row["planned_gb"]


def test_the_probe_stamps_steps_and_reports_what_is_raised(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from tqdm import tqdm\n"
        "for _ in tqdm(range(5), desc='training', miniters=1): pass\n"
        "bar = tqdm(total=3, desc='training')\n"
        "[bar.update() for _ in range(3)]\n"
        "raise ValueError('at the end')\n"
    )
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_probe.py"), str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    figures = processes.last_json(done.stdout)
    assert figures is not None and figures["error"] == "ValueError: at the end"
    assert figures["code"] == 1 and figures["step_ms"] >= 0


def test_the_first_step_at_the_peers_loss_is_found():
    curve = [(10, 0.07), (20, 0.05), (30, 0.06)]
    assert learning.first_at(0.05, curve) == 20
    assert learning.first_at(0.04, curve) is None
