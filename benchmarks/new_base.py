"""Recompute everything that depends on demo/base/: the LoRA, levels, figures, the README's image.

    python benchmarks/new_base.py --work_dir new_base

For whoever commits a new base (python demo/make_base.py --export). Each step keeps its output and
its last JSON line in --work_dir and is skipped if it is there, so a stopped run resumes; --only
names single steps. When all are done, figures.json has the figures to carry over into
demo/base/README.md, docs/lab-notes.md and the README.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """A script with its arguments; {work} is --work_dir, {art} where the art's packages are."""

    name: str
    script: str
    arguments: Sequence[str] = ()


LORA = "{work}/training/lora_weights"
STEPS = [
    Step("kept images", "demo/make_kept.py"),
    Step(
        "training",
        "megaman_lora.py",
        [
            "--demo",
            "--output_dir",
            "{work}/training",
            "--logging_dir",
            "{work}/logs",
            "--overwrite_output",
        ],
    ),
    Step(
        "generation",
        "generate_megaman.py",
        ["--demo", "--lora_path", LORA, "--output_dir", "{work}/generated"],
    ),
    Step("quality", "benchmarks/base_quality.py", ["--lora_path", LORA, "--work_dir", "{art}"]),
    Step("guidance", "benchmarks/guidance.py", ["--lora_path", LORA, "--work_dir", "{art}"]),
    Step("shuffled captions", "benchmarks/held_out.py", ["--make_shuffled", "{work}/shuffled"]),
    Step(
        "training on shuffled captions",
        "megaman_lora.py",
        [
            "--demo",
            "--data_dir",
            "{work}/shuffled",
            "--output_dir",
            "{work}/control",
            "--logging_dir",
            "{work}/logs",
            "--num_validation_images",
            "0",
            "--overwrite_output",
        ],
    ),
    Step(
        "held-out loss",
        "benchmarks/held_out.py",
        ["--lora_path", LORA, "{work}/control/lora_weights"],
    ),
    Step("class images", "benchmarks/prior.py", ["--work_dir", "{work}/prior"]),
    Step(
        "class images, blue alone",
        "benchmarks/prior.py",
        ["--work_dir", "{work}/prior_blue", "--blue_only"],
    ),
    Step("tall images", "benchmarks/tall_pictures.py", ["{work}/tall"]),
    Step(
        "README picture",
        "demo/make_readme_picture.py",
        ["--work_dir", "{work}/readme", "--output", "{work}/demo.png"],
    ),
]


def last_json(text: str) -> object:
    """The last line that is JSON, None if there is none."""
    for line in reversed(text.splitlines()):
        if line.startswith(("{", "[")):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return None


def run_step(step: Step, places: dict[str, str], record: Path) -> dict:
    """Run a step, keep what it prints, and return its figures with the seconds it took."""
    arguments = [argument.format(**places) for argument in step.arguments]
    log = record.with_suffix(".log")
    started = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        command = [sys.executable, str(ROOT / step.script), *arguments]
        subprocess.run(command, cwd=ROOT, check=True, stdout=file, stderr=subprocess.STDOUT)
    seconds = round(time.perf_counter() - started, 1)
    content = {"seconds": seconds, "figures": last_json(log.read_text(encoding="utf-8"))}
    record.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [step.name for step in STEPS]
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument(
        "--art_dir", type=Path, default=ROOT / "demo" / ".work", help="make_base.py's --work_dir"
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names)
    )
    options = parser.parse_args()
    work_dir = options.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    places = {"work": str(work_dir), "art": str(options.art_dir.resolve())}
    figures = {}
    for step in STEPS:
        if step.name not in options.only:
            continue
        record = work_dir / f"{step.name.replace(' ', '_').replace(',', '')}.json"
        if record.is_file():
            figures[step.name] = json.loads(record.read_text(encoding="utf-8"))
        else:
            print(f"{step.name} ...", flush=True)
            figures[step.name] = run_step(step, places, record)
        print(f"{step.name}: {figures[step.name]['seconds']} s", flush=True)
    (work_dir / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(work_dir / "figures.json")


if __name__ == "__main__":
    main()
