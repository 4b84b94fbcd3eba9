"""Seconds a training step and peak memory: ours, the UNet's step alone, and diffusers' own example,
side by side.

    python benchmarks/step_time.py --work_dir /tmp/step_time                    ours and the bare step
    python benchmarks/step_time.py --work_dir /tmp/step_time --case sd15 --rounds 3 \\
        --peer ../peer --peer_python ../peer/.venv/bin/python --peer_precision no bf16

The same base, pictures, batch, rank, targets and rate on all sides; each run is a process of its
own, and the sides take turns. Ours is megaman_lora.py as it is, with its log and its cache; bare
computes in the precision and memory format that ours chose, and once more between the steps of one
process of ours (paired.py); the peer is train_text_to_image_lora.py of the folder given, in its own
environment. The first steps of every run are left out. Peak memory is that of the whole process,
loading included, and for ours the larger one of a first run, which encodes the pictures, and a
later one. --cpu avx2 stands for a processor without bf16.

docs/performance.md says more. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from processes import (
    BENCHMARKS,
    LESSER,
    LOGS_EVERY,
    ROOT,
    TRAIN,
    TRAINING_BAR,
    machine,
    run,
    significant,
    stamped,
    summary,
)
from random_bases import make_pictures, write_metadata

RANK, RATE = 8, 1e-4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # those of the peer
PICTURES = 16
PEER_PROGRAMS = (
    "run.py",
    "train_text_to_image_lora.py",
)  # the first one that is there; both stand for the example
PEER_BAR = "Steps"  # the description of its bar


class Case(NamedTuple):
    """A base and how it is trained; batches holds those that are measured, steps are those that
    count."""

    resolution: int
    batches: tuple[int, ...]
    steps: int
    warmup: int


CASES = {
    "sd15": Case(256, (1,), steps=10, warmup=2),
    "mid": Case(128, (1, 4), steps=40, warmup=5),
    "demo": Case(64, (1, 4), steps=100, warmup=10),
}


def base_of(case: str, work_dir: Path) -> Path:
    """The case's base, made where it is not there yet, in a process of its own so that this one
    stays small."""
    if case == "demo":
        return ROOT / "demo" / "base"
    folder = work_dir / f"base-{case}"
    if not folder.is_dir():
        run([sys.executable, str(BENCHMARKS / "random_bases.py"), case, str(folder)], work_dir)
    return folder


def pictures_of(case: str, work_dir: Path) -> Path:
    """The case's pictures with a metadata.jsonl: the demo's own, or drawn ones of 512 px."""
    folder = work_dir / ("pictures-demo" if case == "demo" else "pictures-512")
    if case != "demo":
        return make_pictures(folder, PICTURES, captions="jsonl")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    captions = {}
    for path in sorted((ROOT / "demo" / "images").glob("*.png")):
        shutil.copy(path, folder)
        captions[path.name] = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    write_metadata(folder, captions)
    return folder


class Runs:
    """The sides of one case at one batch, each as a function that runs it once in a folder of its
    own."""

    def __init__(self, case: str, batch: int, options: argparse.Namespace):
        self.case, self.batch, self.options = CASES[case], batch, options
        self.work_dir = options.work_dir / f"{case}-{batch}"
        shutil.rmtree(self.work_dir, ignore_errors=True)
        self.base, self.pictures = (
            base_of(case, options.work_dir),
            pictures_of(case, options.work_dir),
        )
        self.warmup = self.case.warmup if options.warmup is None else options.warmup
        self.total = self.warmup + (options.steps or self.case.steps)
        self.chosen: dict[str, Any] = {}  # how our run said that it computes
        self.sides = {"ours": self.ours, "bare": self.bare}
        for precision in options.peer_precision if options.peer else []:
            self.sides["peer" if precision == "no" else f"peer {precision}"] = (
                lambda word=precision: self.peer(word)
            )

    def once(self, side: str) -> dict[str, Any]:
        """Run a side; its result without the steps that do not count."""
        result = self.sides[side]()
        if len(result["step_s"]) != self.total - 1:
            sys.exit(f"{side}: {len(result['step_s']) + 1} steps noted instead of {self.total}")
        return counted(result, self.warmup)

    def our_words(self, folder: Path) -> list[object]:
        return [
            "--pretrained_model_name",
            self.base,
            "--data_dir",
            self.pictures,
            "--cache_dir",
            folder / "cache",
            "--output_dir",
            "out",
            "--overwrite_output",
            "--resolution",
            self.case.resolution,
            "--center_crop",
            "--train_batch_size",
            self.batch,
            "--max_train_steps",
            self.total,
            "--learning_rate",
            RATE,
            "--lora_rank",
            RANK,
            "--lora_alpha",
            RANK,
            "--target_modules",
            *TARGETS,
            "--save_steps",
            10**8,
            "--num_validation_images",
            0,
            "--seed",
            0,
            "--mixed_precision",
            self.options.mixed_precision,
            "--memory_format",
            self.options.memory_format,
        ]

    def ours(self) -> dict[str, Any]:
        folder = self.work_dir / "ours"
        result = run(
            stamped(TRAINING_BAR, TRAIN, *self.our_words(folder)), folder, self.options.cpu
        )
        config = json.loads((folder / "out" / "training_config.json").read_text(encoding="utf-8"))
        choices = {
            name: config["choices"][name] for name in ("dtype", "memory_format", "attention")
        }
        self.chosen = {"device": config["device"], **choices}
        return result

    def paired(self) -> list[float]:
        """Every ten steps of ours as a share of the bare steps before and after them, in one
        process."""
        folder = self.work_dir / "ours"
        words = [self.warmup, TRAIN, *self.our_words(folder)]
        found = run(
            [sys.executable, str(BENCHMARKS / "paired.py"), *map(str, words)],
            folder,
            self.options.cpu,
        )
        return [
            ours / fmean(around)
            for ours, around in zip(found["ours_s"], pairwise(found["bare_s"]), strict=True)
        ]

    def bare(self) -> dict[str, Any]:
        words = [
            self.base,
            "--resolution",
            self.case.resolution,
            "--batch",
            self.batch,
            "--steps",
            self.total,
            "--rank",
            RANK,
            "--learning_rate",
            RATE,
            "--targets",
            *TARGETS,
            "--device",
            self.chosen["device"],
            "--dtype",
            self.chosen["dtype"],
            "--memory_format",
            self.chosen["memory_format"],
        ]
        return run(
            stamped(TRAINING_BAR, BENCHMARKS / "bare.py", *words),
            self.work_dir / "bare",
            self.options.cpu,
        )

    def peer(self, precision: str) -> dict[str, Any]:
        folder = self.work_dir / f"peer-{precision}"
        program = next(
            path for name in PEER_PROGRAMS if (path := self.options.peer.resolve() / name).is_file()
        )
        words = [
            *["--"] * (program.name == "run.py"),
            "--pretrained_model_name_or_path",
            self.base,
            "--train_data_dir",
            self.pictures,
            "--caption_column",
            "text",
            "--cache_dir",
            folder / "datasets",
            "--output_dir",
            "out",
            "--resolution",
            self.case.resolution,
            "--center_crop",
            "--train_batch_size",
            self.batch,
            "--max_train_steps",
            self.total,
            "--learning_rate",
            RATE,
            "--rank",
            RANK,
            "--seed",
            0,
            "--mixed_precision",
            precision,
            "--checkpointing_steps",
            10**8,
        ]
        return run(
            stamped(PEER_BAR, program, *words, python=self.options.peer_python),
            folder,
            self.options.cpu,
        )


def counted(result: dict[str, Any], warmup: int) -> dict[str, Any]:
    """The result without the times of the first steps; that of the very first has no beginning and
    is never there."""
    return {
        **result,
        **{name: result[name][max(0, warmup - 1) :] for name in ("step_s", "step_cpu_s")},
    }


def measure(case: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """All the rounds of one case at one batch: a line for each run, then medians and ratios."""
    runs = Runs(case, batch, options)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in runs.sides}
    pairs: list[float] = []
    for number in range(options.rounds):
        for side in runs.sides:
            result = runs.once(side)
            results[side].append(result)
            step, cpu = summary(result["step_s"]), summary(result["step_cpu_s"])
            print(
                f"{case} batch {batch}  round {number + 1}  {side:9} {step['median']:8.4f} s a step  CPU "
                f"{cpu['median']:8.4f} s  peak {result['peak_mb']:7.0f} MB  whole run {result['seconds']:6.1f} s",
                flush=True,
            )
        pairs += runs.paired() if runs.total - runs.warmup >= LOGS_EVERY else []
    found = {side: together(each) for side, each in results.items()}
    ratios = {
        f"ours / {side}": ratio(found["ours"], found[side]) for side in found if side != "ours"
    }
    print(f"{case} batch {batch}: ours chose {', '.join(runs.chosen.values())}")
    for side, each in found.items():
        print(
            f"  {side:9} {each['step_s']['median']:8.4f} s ({each['step_s']['quartile_1']:.4f} to "
            f"{each['step_s']['quartile_3']:.4f}), with the log {each['logged_s']['median']:.4f}  CPU "
            f"{each['step_cpu_s']['median']:8.4f} s  peak {each['peak_mb']:7.0f} MB"
        )
    for name, each in ratios.items():
        words = [f"{figure} {value:.3f}" for figure, value in each.items()]
        print(f"  {name:18} {', '.join(words)}", flush=True)
    paired = summary(pairs) if pairs else None
    if paired:
        print(
            f"  ours / bare, by turns in one process: {paired['median']:.3f} ({paired['quartile_1']:.3f} to "
            f"{paired['quartile_3']:.3f})",
            flush=True,
        )
    return {
        "case": case,
        "batch": batch,
        "resolution": runs.case.resolution,
        "steps": runs.total - runs.warmup,
        "chosen": runs.chosen,
        "sides": found,
        "ratios": ratios,
        "paired": paired,
    }


def together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's rounds as one: all the steps together, also as means of some in a row; the highest
    of the peaks."""
    steps = {
        name: summary([value for each in results for value in each[name]])
        for name in ("step_s", "step_cpu_s")
    }
    steps |= {
        name: summary([value for each in results for value in in_a_row(each[all_of_them])])
        for name, all_of_them in (("logged_s", "step_s"), ("logged_cpu_s", "step_cpu_s"))
    }
    peaks = {
        name: significant(max(each[name] for each in results))
        for name in ("peak_mb", "cuda_peak_mb")
        if all(each.get(name) is not None for each in results)
    }
    rounds = {
        "rounds_s": [summary(each["step_s"])["median"] for each in results],
        "rounds_peak_mb": [significant(each["peak_mb"]) for each in results],
    }
    return {**steps, **peaks, **rounds, "threads": results[0].get("threads")}


def in_a_row(values: list[float]) -> list[float]:
    """The means of LOGS_EVERY steps each, so that one holds the cost of one log; of all where they
    are fewer."""
    count = max(1, len(values) // LOGS_EVERY)
    size = min(len(values), LOGS_EVERY)
    return [fmean(values[part * size : (part + 1) * size]) for part in range(count)]


def ratio(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The medians of ours as shares of another side's, and the peaks."""
    figures = {
        "time": "step_s",
        "time with the log": "logged_s",
        "CPU": "step_cpu_s",
        "CPU with the log": "logged_cpu_s",
    }
    shares = {
        figure: significant(ours[name]["median"] / other[name]["median"])
        for figure, name in figures.items()
    }
    peaks = {
        name: significant(ours[name] / other[name])
        for name in ("peak_mb", "cuda_peak_mb")
        if name in ours and name in other
    }
    return {**shares, **peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--work_dir",
        type=Path,
        required=True,
        help="bases, pictures and runs; some 5 GB with sd15, kept for later",
    )
    add("--case", nargs="+", choices=CASES, default=list(CASES))
    add("--batch", type=int, nargs="+", help="pictures a step (default: the case's own)")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, help="steps that count in every run (default: the case's own)")
    add("--warmup", type=int, help="steps before them (default: the case's own)")
    add(
        "--peer",
        type=Path,
        help="folder with train_text_to_image_lora.py, and a run.py that starts it if need be",
    )
    add("--peer_python", help="the Python of the peer's own virtual environment")
    add("--peer_precision", nargs="+", choices=["no", "fp16", "bf16"], default=["no"])
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default="fp16",
        help="ours (default: as in the script)",
    )
    add(
        "--memory_format",
        choices=["auto", "contiguous", "channels_last"],
        default="auto",
        help="ours",
    )
    add(
        "--cpu",
        choices=LESSER,
        default="native",
        help="a lesser processor for the libraries to see",
    )
    options = parser.parse_args()
    if bool(options.peer) != bool(options.peer_python):
        parser.error("--peer and --peer_python go together")
    if options.peer and not any((options.peer / name).is_file() for name in PEER_PROGRAMS):
        parser.error(f"--peer {options.peer} holds no {PEER_PROGRAMS[1]}")
    options.work_dir = options.work_dir.resolve()  # every run has a folder of its own to be in
    options.peer_python = options.peer_python and os.path.abspath(
        options.peer_python
    )  # a link that is not followed
    options.work_dir.mkdir(parents=True, exist_ok=True)
    results = [
        measure(case, batch, options)
        for case in options.case
        for batch in options.batch or CASES[case].batches
    ]
    print(
        json.dumps(
            {
                "benchmark": "step_time",
                "rounds": options.rounds,
                "results": results,
                "machine": machine(options.cpu),
            }
        )
    )


if __name__ == "__main__":
    main()
