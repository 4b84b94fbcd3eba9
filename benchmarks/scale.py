"""From a hundred pictures to a hundred thousand: what a step, the memory and the start of a run
cost with a full cache.

    python benchmarks/scale.py --work_dir /tmp/scale --counts 100 1000 10000 100000

Tiny pictures that a program drew, with some hundred distinct captions in text files, on the
embedded base. The first run of every count fills the cache, which takes a while: some 5 ms a
picture on one core. Then the counts take turns. The folders stay, so that the next time only the
turns are left. Prints each run, then medians with their ratios to the smallest count; the last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
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


def train(work_dir: Path, count: int, steps: int, batch: int, cpu: str) -> dict[str, Any]:
    """One run on the pictures of that count with the count's own cache."""
    folder = work_dir / str(count)
    words = [
        "--pretrained_model_name",
        ROOT / "demo" / "base",
        "--data_dir",
        folder / "pictures",
        "--cache_dir",
        "cache",
        "--output_dir",
        "out",
        "--overwrite_output",
        "--resolution",
        64,
        "--center_crop",
        "--train_batch_size",
        batch,
        "--max_train_steps",
        steps,
        "--save_steps",
        10**8,
        "--num_validation_images",
        0,
        "--seed",
        0,
    ]
    result = run(stamped(TRAINING_BAR, TRAIN, *words), folder, cpu)
    return {
        "pictures": count,
        "step_s": summary(result["step_s"][WARMUP - 1 :])["median"],
        "rss_mb": result["rss_mb"],
        "peak_mb": result["peak_mb"],
        "first_step_s": result["first"] - result["began"],
        "end_s": result["seconds"],
    }


def beside(found: dict[str, Any], least: dict[str, Any]) -> dict[str, Any]:
    """What more pictures cost than the fewest: step time as a ratio, memory in MB, start-up in µs a
    picture."""
    more = found["pictures"] - least["pictures"]
    start = 1e6 * (found["first_step_s"] - least["first_step_s"]) / more if more else None
    rss = [each["rss_mb"] for each in (found, least)]
    return {
        "step_ratio": significant(found["step_s"] / least["step_s"]),
        "rss_more_mb": significant(rss[0] - rss[1]) if None not in rss else None,
        "peak_more_mb": significant(found["peak_mb"] - least["peak_mb"]),
        "start_us_a_picture": significant(start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--work_dir",
        type=Path,
        required=True,
        help="pictures, caches and runs, some 3 GB with 100,000; kept",
    )
    add(
        "--counts",
        type=int,
        nargs="+",
        default=[100, 1000, 10000, 100000],
        help="how many pictures",
    )
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=100, help=f"of every run; the first {WARMUP} do not count")
    add("--batch", type=int, default=1)
    add(
        "--cpu",
        choices=LESSER,
        default="native",
        help="a lesser processor for the libraries to see",
    )
    options = parser.parse_args()
    if options.steps < WARMUP + 2:
        sys.exit(f"--steps has to be {WARMUP + 2} or more")
    work_dir, counts = options.work_dir.resolve(), sorted(set(options.counts))
    for count in counts:
        make_pictures(work_dir / str(count) / "pictures", count, side=64)
        filled = train(work_dir, count, 2 * WARMUP, options.batch, options.cpu)
        print(
            f"{count:7,} pictures: cache filled, first step after {filled['first_step_s']:.1f} s",
            flush=True,
        )
    results: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for number in range(options.rounds):
        for count in counts:
            results[count].append(
                each := train(work_dir, count, options.steps, options.batch, options.cpu)
            )
            print(
                f"round {number + 1}  {count:7,} pictures  {each['step_s']:.4f} s a step  first step after "
                f"{each['first_step_s']:6.2f} s  resident {each['rss_mb'] or 0:6.0f} MB, at most "
                f"{each['peak_mb']:6.0f} MB",
                flush=True,
            )
    found = [{name: median_of(each, name) for name in each[0]} for each in results.values()]
    table = [
        {
            **each,
            "pictures": count,
            **beside({**each, "pictures": count}, {**found[0], "pictures": counts[0]}),
        }
        for count, each in zip(counts, found, strict=True)
    ]
    for row in table:
        start = (
            ""
            if row["start_us_a_picture"] is None
            else f"  start {row['start_us_a_picture']:.1f} µs a picture"
        )
        print(
            f"{row['pictures']:7,} pictures  step {row['step_s']:.4f} s ({row['step_ratio']:.3f})  resident "
            f"{row['rss_mb'] or 0:.0f} MB ({row['rss_more_mb'] or 0:+.0f}), at most {row['peak_mb']:.0f} MB "
            f"({row['peak_more_mb']:+.0f}){start}"
        )
    print(
        json.dumps(
            {
                "benchmark": "scale",
                "rounds": options.rounds,
                "steps": options.steps,
                "batch": options.batch,
                "captions": CAPTIONS,
                "results": table,
                "machine": machine(options.cpu),
            }
        )
    )


if __name__ == "__main__":
    main()
