"""Everything that only a GPU can answer, in eight minutes, what matters most first.

    python benchmarks/gpu.py                       # a base of SD 1.5's shape with random weights
    python benchmarks/gpu.py --base FOLDER --peer FOLDER --peer_python ITS_PYTHON
    python benchmarks/gpu.py --cpu                 # the same on the demo's base, for tests

Answers are printed as they come, and written as a page into benchmarks/results/ at the end, also if
it is stopped before. A question that fails is an answer as well. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path

import gpu_runs
from gpu_runs import Bench, Row
from processes import BENCHMARKS, ROOT, machine

MINUTES = 8
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
Question = Callable[[Bench], Iterable[Row]]


def steps(bench: Bench, *cases: str) -> Iterator[Row]:
    """The bare steps of gpu_steps.py as they are printed."""
    command = [sys.executable, str(BENCHMARKS / "gpu_steps.py"), bench.base]
    command += ["--resolution", str(bench.resolution), "--steps", "2" if bench.cpu else "30"]
    if bench.cpu:
        command.append("--cpu")
    if cases:
        command += ["--case", *cases]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("{"):
                row = json.loads(line)
                yield {**row, "case": f"bare step, {row['case']}"}
        messages = process.stderr.read()
    if process.returncode:
        yield {"case": "bare steps", "error": messages.strip()[-200:]}


def questions(cpu: bool, peer: Path | None, python: str) -> dict[str, Question]:
    """All of them by name, the most important first."""
    if cpu:
        return {
            "steps": steps,
            "training": gpu_runs.training,
            "resuming": gpu_runs.resuming,
            "generating": gpu_runs.generating,
        }
    layouts = ("default", "contiguous", "cudnn.benchmark", "checkpointing", "batch 4")
    limits = [f"in {limit} GB" for limit in (2.7, 2.5, 2.3, 2.1, 1.95)]
    found: dict[str, Question] = {
        "steps": lambda bench: steps(bench, *layouts, "batch 4 contiguous"),
        "training": gpu_runs.training,
        "resuming": gpu_runs.resuming,
        "waiting": gpu_runs.waiting,
        "running out": gpu_runs.running_out,
        "generating": gpu_runs.generating,
        "limits": lambda bench: steps(bench, *limits),
    }
    if peer is not None:
        found["peer"] = partial(gpu_runs.peer, folder=peer, python=python)
    return found | {
        "compiled": gpu_runs.compiled,
        "compiled steps": lambda bench: steps(bench, "compiled"),
    }


def ask(
    bench: Bench, asked: dict[str, Question], minutes: float, report: Callable[[str], None]
) -> None:
    """Report the answers as lines of Markdown; questions that would begin too late are named."""
    deadline = time.monotonic() + 60 * minutes
    for name, question in asked.items():
        if time.monotonic() > deadline:
            report(f"- {name}: not asked, the {minutes:g} minutes were over")
            continue
        try:
            for row in question(bench):
                report(to_line(row))
        except Exception as error:  # the other questions are still to be answered
            report(f"- {name}: failed ({type(error).__name__}: {error})")


def to_line(row: Row) -> str:
    """A row as an item of a list, with what the script printed below it."""
    facts = [f"{key} {value}" for key, value in row.items() if key not in ("case", "said")]
    lines = [f"- **{row['case']}**: {', '.join(facts)}"]
    lines += [f"  - `{line}`" for line in row.get("said", [])]
    return "\n".join(lines)


def device_name(cpu: bool) -> str:
    """The GPU's name, or the processor's."""
    if cpu:
        return machine()["processor"]
    code = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    if done.returncode:
        sys.exit("There is no NVIDIA GPU that torch can use; --cpu asks the CPU.")
    return done.stdout.strip()


def installed(package: str) -> str:
    """The package with its version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def find_base(base: str | None, cpu: bool, work_dir: Path) -> str:
    """The base to measure on: the given one, the demo's on a CPU, or one that is made."""
    if base or cpu:
        return base or str(ROOT / "demo" / "base")
    command = [sys.executable, str(BENCHMARKS / "random_bases.py"), "sd15", str(work_dir / "sd15")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(work_dir / "sd15")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="a folder or file")
    parser.add_argument("--resolution", type=int, help="default: 512, on a CPU 64")
    parser.add_argument("--peer", type=Path, help="a folder with the peer's run.py")
    parser.add_argument("--peer_python", default=sys.executable, help="of its environment")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", nargs="+", metavar="QUESTION")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, help="the page; default: in benchmarks/results/")
    options = parser.parse_args()
    if mistake := find_mistake(options):
        parser.error(mistake)
    return options


def find_mistake(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, before minutes are spent on them; None if nothing is."""
    if options.base and not Path(options.base).exists():
        return f"--base {options.base}: there is no such folder or file"
    if options.resolution is not None and (options.resolution < 8 or options.resolution % 8):
        return f"--resolution {options.resolution} is not a multiple of 8"
    if options.peer and not (options.peer / "run.py").is_file():
        return f"--peer {options.peer}: there is no run.py in it"
    if not options.minutes > 0:
        return f"--minutes {options.minutes:g} must be above 0"
    asked = questions(options.cpu, options.peer, options.peer_python)
    if unknown := [name for name in options.only or () if name not in asked]:
        return f"--only {unknown[0]!r} is none of {', '.join(map(repr, asked))}"
    if options.output and options.output.exists():
        return f"--output {options.output} exists already"
    if options.output and not options.output.parent.is_dir():
        return f"--output {options.output}: its folder does not exist"
    return None


def page_for(name: str) -> Path:
    """A page of today's that does not exist yet, for the device of this name."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    stem = "-".join([str(date.today()), *words])
    stems = chain([stem], (f"{stem}-{number}" for number in count(2)))
    pages = (BENCHMARKS / "results" / f"{unique}.md" for unique in stems)
    return next(page for page in pages if not page.exists())


def main() -> int:
    options = parse_options()
    name = device_name(options.cpu)
    page = options.output or page_for(name)
    lines = [f"# {name}, {date.today()}", "", ", ".join(map(installed, PACKAGES)), ""]
    print("\n".join(lines), flush=True)

    def report(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    with tempfile.TemporaryDirectory(prefix="megaman-gpu-") as folder:
        resolution = options.resolution or (64 if options.cpu else 512)
        base = find_base(options.base, options.cpu, Path(folder))
        bench = Bench(base, Path(folder), resolution, options.cpu)
        asked = questions(options.cpu, options.peer, options.peer_python)
        if options.only:
            asked = {question: asked[question] for question in options.only}
        try:
            ask(bench, asked, options.minutes, report)
        finally:
            page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
