"""What gpu.py asks of the two scripts, each as a process under gpu_probe.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import BENCHMARKS, DRAW, ROOT, TRAIN, last_json, run, stamped
from random_bases import make_pictures

# Lines of the scripts that belong to an answer.
TELLING = re.compile(
    r"memory |device |too little|taken for|gradients|step \d|resuming|  so that|error:|\w+Error"
)
PEER_BAR = "Steps"  # the description of its bar
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all runs share: a base on this machine, a folder for outputs, the images' side, and
    whether there is no GPU. Runs have as many steps as a GPU needs, or a few on a CPU."""

    base: str
    work_dir: Path
    resolution: int
    cpu: bool

    @property
    def steps(self) -> int:
        return 4 if self.cpu else 100

    def train(self, name: str, *flags: object, probe: tuple[str, ...] = ()) -> Row:
        """Train into a folder of this name; returns the probe's figures."""
        words = ["--pretrained_model_name", self.base, "--data_dir", ROOT / "demo" / "held_out"]
        words += ["--resolution", self.resolution, "--seed", 0, "--max_train_steps", self.steps]
        words += ["--output_dir", name, "--num_validation_images", 0]
        return self.run(TRAIN, *words, *flags, probe=probe)

    def generate(self, name: str, *flags: object) -> Row:
        """Generate with the LoRA of the run in the folder a."""
        words: list[object] = ["--output_dir", name]
        if "--from_image" not in flags:
            words += ["--lora_path", "a/lora_weights", "--prompts", "mega man"]
        if self.cpu:
            words += [] if "--from_image" in flags else ["--num_inference_steps", 2]
        return self.run(DRAW, *words, *flags)

    def run(self, script: Path, *words: object, probe: tuple[str, ...] = ()) -> Row:
        command = [sys.executable, str(BENCHMARKS / "gpu_probe.py"), *probe, str(script)]
        env = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(self.work_dir / "cache"),
            "PYTHONIOENCODING": "utf-8",
        }
        if self.cpu:
            env["ACCELERATE_USE_CPU"] = "true"
        done = subprocess.run(
            [*command, *map(str, words)],
            cwd=self.work_dir,
            env=env,
            capture_output=True,
            encoding="utf-8",
        )
        lines = re.split(r"[\r\n]+", done.stdout + done.stderr)
        row = last_json(done.stdout) or {"code": done.returncode, "error": lines[-1]}
        said = [line.strip()[:160] for line in lines if TELLING.match(line)]
        return {**row, "said": said[-6:]}


def training(bench: Bench) -> Iterator[Row]:
    """A step with everything around it, at two batch sizes."""
    yield {"case": "training", **bench.train("a", "--save_steps", bench.steps // 2)}
    yield {"case": "training, batch 4", **bench.train("b", "--train_batch_size", 4)}


def resuming(bench: Bench) -> Iterator[Row]:
    """Whether a resumed run comes to the same LoRA."""
    whole, copy = bench.work_dir / "a", bench.work_dir / "c"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "lora_weights")
    shutil.rmtree(copy / f"checkpoint-{bench.steps}")
    row = bench.train("c", "--save_steps", bench.steps // 2, "--resume_from_checkpoint", "latest")
    yield {"case": "resumed", **row, "largest_difference": _difference(whole, copy)}


def _difference(whole: Path, copy: Path) -> float | None:
    """The largest difference of two runs' LoRAs, as a share of the largest number in them."""
    from safetensors.torch import load_file

    names = [run / "lora_weights" / "adapter_model.safetensors" for run in (whole, copy)]
    if not all(name.is_file() for name in names):
        return None
    one, other = map(load_file, names)
    apart = max(float((one[key] - other[key]).abs().max()) for key in one)
    return apart / max(float(tensor.abs().max()) for tensor in one.values())


def waiting(bench: Bench) -> Iterator[Row]:
    """Whether anything between two logs waits for the GPU, which then is an error."""
    for flags in ([], ["--shuffle_caption"], ["--no_cache"]):
        row = bench.train("d", "--overwrite_output", *flags, probe=("--waits_fail",))
        yield {"case": f"no waits {' '.join(flags)}".strip(), **row}


def running_out(bench: Bench) -> Iterator[Row]:
    """Whether a run that does not fit continues with less, to the same losses."""
    flags = ["--train_batch_size", 4, "--overwrite_output"]
    row = bench.train("e", *flags, probe=("--limit_gb", "2.3"))
    yield {"case": "batch 4 in 2.3 GB", **row, "losses_differ_by": _losses_apart(bench, "b", "e")}
    yield {"case": "--vram_limit 3", **bench.train("f", *flags, "--vram_limit", 3)}


def _losses_apart(bench: Bench, one: str, other: str) -> float | None:
    """The largest difference of two runs' losses, as a share."""
    losses = []
    for name in (one, other):
        path = bench.work_dir / name / f"checkpoint-{bench.steps}" / "run_history.json"
        if not path.is_file():
            return None
        losses.append(json.loads(path.read_text(encoding="utf-8"))["loss"])
    pairs = [pair for pair in zip(*losses, strict=False) if None not in pair]
    return max((abs(a - b) / a for a, b in pairs), default=None)


def generating(bench: Bench) -> Iterator[Row]:
    """Eight images at once and one by one, and one of them again to the pixel."""
    count = 2 if bench.cpu else 8
    for size in (None, 1):
        flags = [] if size is None else ["--batch_size", size]
        name = f"g{size or ''}"
        row = bench.generate(name, "--num_images_per_prompt", count, *flags)
        yield {"case": f"{count} images, {'one by one' if size else 'together'}", **row}
    yield {"case": "two scales", **bench.generate("s", "--lora_scales", "0.5,1")}
    source = sorted((bench.work_dir / "s").glob("megaman_*_1.png"))
    if source:
        row = bench.generate("r", "--from_image", source[-1])
        yield {"case": "--from_image", **row, "pixels_differ_by": _pixels_apart(bench, source[-1])}


def _pixels_apart(bench: Bench, source: Path) -> int | None:
    """The largest difference of an image and its repetition, from 0 to 255."""
    from PIL import Image, ImageChops

    again = sorted((bench.work_dir / "r").glob("megaman*.png"))
    if not again:
        return None
    first, second = (Image.open(path).convert("RGB") for path in (source, again[0]))
    bands: Any = ImageChops.difference(first, second).getextrema()
    return max(high for _, high in bands)


def compiled(bench: Bench) -> Iterator[Row]:
    """The step of a compiled run."""
    yield {"case": "training, compiled", **bench.train("k", "--compile")}


def peer(bench: Bench, folder: Path, python: str) -> Iterator[Row]:
    """The peer's step, measured by stamped.py, which waits for the GPU after each."""
    images = make_pictures(bench.work_dir / "pictures", 20, bench.resolution, "jsonl")
    words = ["--pretrained_model_name_or_path", bench.base, "--train_data_dir", images]
    words += ["--caption_column", "text", "--output_dir", "out", "--resolution", bench.resolution]
    words += ["--center_crop", "--train_batch_size", 1, "--rank", 4, "--seed", 0]
    words += ["--max_train_steps", bench.steps, "--mixed_precision", "fp16"]
    program = folder.resolve() / "run.py"
    command = stamped(PEER_BAR, program, "--", *words, python=python)
    row = run(command, bench.work_dir / "peer")
    seconds = row.get("step_s", [])[-30:]
    mean = 1000 * sum(seconds) / max(1, len(seconds))
    yield {"case": "the peer", "step_ms": round(mean, 1), "peak_mb": row.get("cuda_peak_mb")}
