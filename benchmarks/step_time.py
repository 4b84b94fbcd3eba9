"""Time per step and peak memory of megaman_lora.py, the bare UNet step, and diffusers' example.

    python benchmarks/step_time.py --work_dir /tmp/step_time
    python benchmarks/step_time.py --work_dir /tmp/step_time --case sd15 --rounds 3 \\
        --peer ../peer --peer_python ../peer/.venv/bin/python --peer_precision no bf16

All sides have the same base, images, batch size, rank, target modules and learning rate; each run
is a process of its own, and the sides take turns. `ours` is megaman_lora.py with its log and its
cache. `bare` computes with the dtype and memory format that ours chose, and once more between the
steps of one process of ours (paired.py). `peer` is train_text_to_image_lora.py in the given folder,
in its own environment. The first steps of every run are not counted. Peak memory is that of the
whole process, including loading; for ours it is the larger one of a first run, which encodes the
images, and a later run. --cpu avx2 stands for a processor without bf16.

docs/performance.md says more. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from itertools import chain, pairwise
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

RANK, LEARNING_RATE = 8, 1e-4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # those of the peer
PICTURES = 16
# The first one that exists is run; run.py starts the example if it needs preparation.
PEER_PROGRAMS = ("run.py", "train_text_to_image_lora.py")
PEER_BAR = "Steps"  # the description of its bar


class Case(NamedTuple):
    """A base and its training; each batch size is measured, over steps after the warm-up."""

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
    """The case's base, made if need be by another process so that this one stays small."""
    if case == "demo":
        return ROOT / "demo" / "base"
    folder = work_dir / f"base-{case}"
    if not folder.is_dir():
        run([sys.executable, str(BENCHMARKS / "random_bases.py"), case, str(folder)], work_dir)
    return folder


def pictures_of(case: str, work_dir: Path) -> Path:
    """The case's images with metadata.jsonl: the demo's, or synthetic ones of 512 px."""
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


def peer_command(options: argparse.Namespace, words: Sequence[object]) -> list[str]:
    """The command that runs the peer in --peer, under stamped.py, with its own words."""
    program = next(
        path for name in PEER_PROGRAMS if (path := options.peer.resolve() / name).is_file()
    )
    separator = ["--"] if program.name == "run.py" else []
    return stamped(PEER_BAR, program, *separator, *words, python=options.peer_python)


class Runs:
    """The sides of one case at one batch size; each runs once in a folder of its own."""

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
        self.chosen: dict[str, Any] = {}  # the compute settings of our last run
        self.sides = {"ours": self.ours, "bare": self.bare}
        for precision in options.peer_precision if options.peer else []:
            self.sides["peer" if precision == "no" else f"peer {precision}"] = (
                lambda word=precision: self.peer(word)
            )

    def once(self, side: str) -> dict[str, Any]:
        """Run a side once; the result has only the steps that count."""
        result = self.sides[side]()
        if len(result["step_s"]) != self.total - 1:
            sys.exit(f"{side}: {len(result['step_s']) + 1} steps recorded instead of {self.total}")
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
            LEARNING_RATE,
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
        """Ratios of every ten steps of ours to the bare steps around them, in one process."""
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
            LEARNING_RATE,
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
        words = [
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
            LEARNING_RATE,
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
            peer_command(self.options, words),
            folder,
            self.options.cpu,
        )


def counted(result: dict[str, Any], warmup: int) -> dict[str, Any]:
    """The result without the warm-up; the first step has no time, since its start is unknown."""
    return {
        **result,
        **{name: result[name][max(0, warmup - 1) :] for name in ("step_s", "step_cpu_s")},
    }


def measure(case: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one case at one batch size: a line for each run, then medians and ratios."""
    runs = Runs(case, batch, options)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in runs.sides}
    pairs: list[float] = []
    for number in range(1, options.rounds + 1):
        for side in runs.sides:
            result = runs.once(side)
            results[side].append(result)
            report_run(f"{case} batch {batch}  round {number}  {side:9}", result)
        if runs.total - runs.warmup >= LOGS_EVERY:
            pairs += runs.paired()
    sides = {side: together(rounds) for side, rounds in results.items()}
    ratios = {f"ours / {side}": ratio(sides["ours"], sides[side]) for side in sides}
    del ratios["ours / ours"]
    paired = summary(pairs) if pairs else None
    print(f"{case} batch {batch}: ours chose {', '.join(runs.chosen.values())}")
    report(sides, ratios, paired)
    return {
        "case": case,
        "batch": batch,
        "resolution": runs.case.resolution,
        "steps": runs.total - runs.warmup,
        "chosen": runs.chosen,
        "sides": sides,
        "ratios": ratios,
        "paired": paired,
    }


def report_run(label: str, result: dict[str, Any]) -> None:
    step, cpu = (summary(result[name])["median"] for name in ("step_s", "step_cpu_s"))
    print(
        f"{label} {step:8.4f} s per step  CPU {cpu:8.4f} s  peak {result['peak_mb']:7.0f} MB  "
        f"whole run {result['seconds']:6.1f} s",
        flush=True,
    )


def report(
    sides: dict[str, dict[str, Any]],
    ratios: dict[str, dict[str, float]],
    paired: dict[str, float] | None,
) -> None:
    for side, result in sides.items():
        step, cpu = result["step_s"], result["step_cpu_s"]["median"]
        print(
            f"  {side:9} {step['median']:8.4f} s ({quartiles(step, '.4f')}), with the log "
            f"{result['logged_s']['median']:.4f}  CPU {cpu:8.4f} s  "
            f"peak {result['peak_mb']:7.0f} MB"
        )
    for name, values in ratios.items():
        words = [f"{figure} {value:.3f}" for figure, value in values.items()]
        print(f"  {name:18} {', '.join(words)}", flush=True)
    if paired:
        median = f"{paired['median']:.3f} ({quartiles(paired, '.3f')})"
        print(f"  ours / bare, by turns in one process: {median}", flush=True)


def quartiles(values: dict[str, float], digits: str) -> str:
    return f"{values['quartile_1']:{digits}} to {values['quartile_3']:{digits}}"


def together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's rounds as one: all steps, the means of steps in a row, and the highest peaks."""
    steps = {
        name: summary(list(chain.from_iterable(result[name] for result in results)))
        for name in ("step_s", "step_cpu_s")
    }
    steps |= {
        name: summary(list(chain.from_iterable(in_a_row(result[steps_of]) for result in results)))
        for name, steps_of in (("logged_s", "step_s"), ("logged_cpu_s", "step_cpu_s"))
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
    """The means of LOGS_EVERY steps in a row, each of which includes one log; of all if they are
    fewer."""
    count = max(1, len(values) // LOGS_EVERY)
    size = min(len(values), LOGS_EVERY)
    return [fmean(values[part * size : (part + 1) * size]) for part in range(count)]


def ratio(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The ratios of our medians and peaks to another side's."""
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


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--work_dir",
        type=Path,
        required=True,
        help="bases, images and runs; about 5 GB with sd15, kept for later",
    )
    add("--case", nargs="+", choices=CASES, default=list(CASES))
    add("--batch", type=int, nargs="+", help="images per step (default: the case's own)")
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
        help="pretend to be a lesser processor",
    )
    options = parser.parse_args()
    if bool(options.peer) != bool(options.peer_python):
        parser.error("--peer and --peer_python go together")
    if options.peer and not any((options.peer / name).is_file() for name in PEER_PROGRAMS):
        parser.error(f"--peer {options.peer} holds no {PEER_PROGRAMS[1]}")
    options.work_dir = options.work_dir.resolve()
    if options.peer_python:  # made absolute without following links
        options.peer_python = os.path.abspath(options.peer_python)
    return options


def main() -> None:
    options = parse_options()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for case in options.case:
        batches = options.batch or CASES[case].batches
        results += [measure(case, batch, options) for batch in batches]
    report = {"rounds": options.rounds, "results": results, "machine": machine(options.cpu)}
    print(json.dumps({"benchmark": "step_time", **report}))


if __name__ == "__main__":
    main()
