"""From a hundred images to a hundred thousand: the cost of a step, of memory and of the start of a
run with a full cache.

    python benchmarks/scale.py --work_dir /tmp/scale --counts 100 1000 10000 100000

Tiny synthetic images, with a few hundred distinct captions in text files, on the embedded base.
The first run of every count fills the cache, which takes about 5 ms per image on one core. Then the
counts take turns. The folders stay, so that the next time only the turns are run. Prints each run,
then medians with their ratios to the smallest count; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from processes import (
    LESSER,
    ROOT,
    TRAIN,
    TRAINING_BAR,
    machine,
    median_of,
    run,
    significant,
    stamped,
    summary,
)
from random_bases import CAPTIONS, make_pictures

WARMUP = 10  # steps that do not count


def train(folder: Path, steps: int, batch_size: int, cpu: str) -> dict[str, Any]:
    """One run on the images in a folder with the folder's own cache."""
    flags: dict[str, object] = {
        "--pretrained_model_name": ROOT / "demo" / "base",
        "--data_dir": folder / "pictures",
        "--cache_dir": "cache",
        "--output_dir": "out",
        "--resolution": 64,
        "--train_batch_size": batch_size,
        "--max_train_steps": steps,
        "--save_steps": 10**8,
        "--num_validation_images": 0,
        "--seed": 0,
    }
    words = chain.from_iterable(flags.items())
    command = stamped(TRAINING_BAR, TRAIN, *words, "--overwrite_output", "--center_crop")
    result = run(command, folder, cpu)
    return {
        "step_s": summary(result["step_s"][WARMUP - 1 :])["median"],
        "rss_mb": result["rss_mb"],
        "peak_mb": result["peak_mb"],
        "first_step_s": result["first"] - result["began"],
        "end_s": result["seconds"],
    }


def compare(row: dict[str, Any], smallest: dict[str, Any]) -> dict[str, Any]:
    """The cost of more images than the fewest: step time as a ratio, memory in MB, start-up in µs
    per image."""
    start = rss = None
    if more := row["pictures"] - smallest["pictures"]:
        start = 1e6 * (row["first_step_s"] - smallest["first_step_s"]) / more
    if row["rss_mb"] is not None and smallest["rss_mb"] is not None:
        rss = row["rss_mb"] - smallest["rss_mb"]
    return {
        "step_ratio": significant(row["step_s"] / smallest["step_s"]),
        "rss_more_mb": significant(rss),
        "peak_more_mb": significant(row["peak_mb"] - smallest["peak_mb"]),
        "start_us_a_picture": significant(start),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add(
        "--work_dir",
        type=Path,
        required=True,
        help="for images, caches and runs, about 3 GB with 100,000 images; not deleted",
    )
    add(
        "--counts",
        type=int,
        nargs="+",
        default=[100, 1000, 10000, 100000],
        help="how many images",
    )
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=100, help=f"of every run; the first {WARMUP} do not count")
    add("--batch", type=int, default=1)
    add("--cpu", choices=LESSER, default="native", help="hide newer instructions from libraries")
    options = parser.parse_args()
    if options.steps < WARMUP + 2:
        sys.exit(f"--steps has to be {WARMUP + 2} or more")
    return options


def fill_caches(work_dir: Path, counts: list[int], batch_size: int, cpu: str) -> None:
    """Make the images of each count and encode them in a short run."""
    for count in counts:
        folder = work_dir / str(count)
        make_pictures(folder / "pictures", count, side=64)
        first = train(folder, 2 * WARMUP, batch_size, cpu)["first_step_s"]
        print(f"{count:7,} images: cache filled, first step after {first:.1f} s", flush=True)


def print_run(round_number: int, count: int, result: dict[str, Any]) -> None:
    print(
        f"round {round_number}  {count:7,} images  {result['step_s']:.4f} s a step  "
        f"first step after {result['first_step_s']:6.2f} s  "
        f"resident {result['rss_mb'] or 0:6.0f} MB, peak {result['peak_mb']:6.0f} MB",
        flush=True,
    )


def print_row(row: dict[str, Any]) -> None:
    start = ""
    if row["start_us_a_picture"] is not None:
        start = f"  start {row['start_us_a_picture']:.1f} µs an image"
    print(
        f"{row['pictures']:7,} images  step {row['step_s']:.4f} s ({row['step_ratio']:.3f})  "
        f"resident {row['rss_mb'] or 0:.0f} MB ({row['rss_more_mb'] or 0:+.0f}), "
        f"peak {row['peak_mb']:.0f} MB ({row['peak_more_mb']:+.0f}){start}"
    )


def main() -> None:
    options = parse()
    work_dir, counts = options.work_dir.resolve(), sorted(set(options.counts))
    fill_caches(work_dir, counts, options.batch, options.cpu)
    results: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for number in range(1, options.rounds + 1):
        for count in counts:
            result = train(work_dir / str(count), options.steps, options.batch, options.cpu)
            results[count].append(result)
            print_run(number, count, result)
    rows = [
        {"pictures": count, **{name: median_of(runs, name) for name in runs[0]}}
        for count, runs in results.items()
    ]
    table = [{**row, **compare(row, rows[0])} for row in rows]
    for row in table:
        print_row(row)
    report = {
        "benchmark": "scale",
        "rounds": options.rounds,
        "steps": options.steps,
        "batch": options.batch,
        "captions": CAPTIONS,
        "results": table,
        "machine": machine(options.cpu),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
