"""Time and memory of both scripts on Stable Diffusion 1.5's exact shape with random weights.

    python benchmarks/sd15_shape.py --work_dir /tmp/sd15

Two training steps and one image at 256 px by default. Prints the seconds and the peak resident
memory of each process, and a last JSON line for programs. The weights are random, so the image is
noise; the tokenizer is the embedded base's, since CLIP's vocabulary comes with the real model only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from processes import BENCHMARKS, DRAW, ROOT, TRAIN, TRAINING_BAR, run, stamped


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="a new folder; about 4 GB are written to it"
    )
    parser.add_argument("--resolution", default="256")
    parser.add_argument("--steps", default="2")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True)
    work_dir = options.work_dir.resolve()
    base = work_dir / "base"
    run([sys.executable, str(BENCHMARKS / "random_bases.py"), "sd15", str(base)], work_dir)
    train = [
        "--pretrained_model_name",
        base,
        "--data_dir",
        ROOT / "demo" / "images",
        "--cache_dir",
        "cache",
    ]
    train += ["--max_train_steps", options.steps, "--seed", "0"]
    train += ["--resolution", options.resolution, "--num_validation_images", "0"]
    draw = ["--prompts", "mega man", "--num_inference_steps", "10"]
    draw += ["--height", options.resolution, "--width", options.resolution]
    commands = {
        "train": stamped(TRAINING_BAR, TRAIN, *train),
        "generate": stamped("generating", DRAW, *draw),
    }
    results = {}
    for name, command in commands.items():
        result = run(command, work_dir)
        results[name] = {
            "seconds": round(result["seconds"], 1),
            "peak_gb": round(result["peak_mb"] / 1024, 2),
        }
        print(
            f"{name:9} {results[name]['seconds']:7.1f} s   peak {results[name]['peak_gb']:.2f} GB",
            flush=True,
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
