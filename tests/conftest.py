"""What several test files share: the base, the scripts as processes, a folder of images."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from forking import Forks
from hypothesis import settings
from narrow_base import EMBEDDED, make_narrow_base
from PIL import Image, ImageDraw

from megaman.errors import GC_THRESHOLDS
from megaman.threads import usable_cpus

if TYPE_CHECKING or os.name == "posix":
    from browser import CHROMIUM, Visit, chromium
else:
    CHROMIUM = Visit = chromium = None
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="page not opened: no chromium or google-chrome"
)

ROOT = Path(__file__).resolve().parent.parent
# The tests compare pixels and weights, on machines with a GPU as well.
os.environ["ACCELERATE_USE_CPU"] = "true"
# One thread per worker: more would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
CACHE = tempfile.TemporaryDirectory(prefix="megaman-tests-")
# Encoded images are shared by the tests and leave no trace.
os.environ["XDG_CACHE_HOME"] = CACHE.name
# No test may depend on a network; test_base.py's processes talk to their own server.
os.environ["HF_HUB_OFFLINE"] = "1"
# The same examples on every machine, however slow it is: a test that fails does so because of the
# code.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("searching", deadline=None, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# A test that uses one of these trains, generates, starts a process, or loads or traces whole
# models; it is marked slow.
SLOW_FIXTURES = {
    "train_here",
    "run_script",
    "forked",
    "generate",
    "lora_path",
    "sd15",
    "small",
    "trained",
    "planted",
    "axe",
}


def pytest_xdist_auto_num_workers() -> int | None:
    """A worker per core; fewer where OMP_NUM_THREADS asks for several threads, as workers that
    share cores would spin at each other's barriers."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > 1:
        return max(1, usable_cpus() // int(threads))
    return None  # xdist's own count


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Load the libraries and the tests without garbage collection, of which no later one needs to
    look at them: they stay to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        gc.set_threshold(*GC_THRESHOLDS)  # as in run_script


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if "the_browser" in item.fixturenames:
            item.add_marker(pytest.mark.browser)
    # The files that take longest first: what a worker begins last should be short. A test with a
    # weight takes about as long as so many other slow ones.
    weights: Counter[Path] = Counter()
    for item in items:
        if slow := item.get_closest_marker("slow"):
            weights[item.path] += slow.kwargs.get("weight", 1)
    items.sort(key=lambda item: -weights[item.path])


@pytest.fixture(scope="session")
def embedded_base() -> Path:
    """The embedded base."""
    return EMBEDDED


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A Stable Diffusion base in diffusers' layout: the embedded one with a narrow UNet, or the
    folder in MEGAMAN_TEST_BASE, such as demo/base."""
    if name := os.environ.get("MEGAMAN_TEST_BASE"):
        folder = Path(name).resolve()
        assert (folder / "model_index.json").is_file(), f"no base in {folder}"
        return folder
    return make_narrow_base(tmp_path_factory.mktemp("narrow") / "base")


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python as a process: run_script(["megaman_lora.py", "--help"], cwd) or run_script(["-c",
    code], cwd).

    A name that ends in .py is one of the root's scripts. Extra environment variables go into env;
    None removes one.
    """

    def run(args, cwd, env=None) -> subprocess.CompletedProcess[str]:
        first, *rest = map(str, args)
        command = [sys.executable, str(ROOT / first) if first.endswith(".py") else first, *rest]
        variables = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": "utf-8",
            **(env or {}),
        }
        variables = {name: str(value) for name, value in variables.items() if value is not None}
        return subprocess.run(
            command,
            cwd=cwd,
            env=variables,
            capture_output=True,
            encoding=variables["PYTHONIOENCODING"],
            timeout=600,
        )

    return run


@pytest.fixture(scope="session")
def forked() -> Iterator[Forks]:
    """The two scripts as processes whose libraries are there already:
    forked.run(["megaman_lora.py", "--demo"], cwd), or forked.start(...) for one that can be waited
    for and killed."""
    if not hasattr(os, "fork"):
        pytest.skip("Windows has no fork")
    forks = Forks()
    yield forks
    forks.end()


@pytest.fixture(scope="session", autouse=True)
def no_flush() -> Iterator[None]:
    """Nothing here outlasts a power cut: a flush to the disk would be waited for a hundred times a
    minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with four small PNGs, one of them not square, each with a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (width, color) in enumerate(
        [(64, "blue"), (64, "red"), (96, "green"), (64, "orange")], start=1
    ):
        image = Image.new("RGB", (width, 64), "white")
        ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill=color)
        image.save(folder / f"megaman_{number:02d}.png")
        caption = f"mega man, {color} robot, white background"
        (folder / f"megaman_{number:02d}.txt").write_text(caption, encoding="utf-8")
    return folder


SAMPLING_STEPS = 3  # of validation images, instead of 25
FEW_SAMPLING_STEPS = {"megaman.training.validation.NUM_INFERENCE_STEPS": SAMPLING_STEPS}  # forked
FEW_TARGETS = [
    "--target_modules",
    "to_q",
    "to_v",
]  # where it does not matter which: a third of the time of two steps


@pytest.fixture(scope="session")
def train_here(base_folder) -> Callable:
    """Train in this process, which saves the seconds of importing torch: train_here(cwd,
    output_dir, *flags).

    Returns the LoRA's tensors. Without flags: one picture a step at 64 px, no validation images,
    seed 0. Validation images are drawn in SAMPLING_STEPS.
    """
    from accelerate.state import AcceleratorState, GradientState
    from safetensors.torch import load_file

    import megaman_lora
    from megaman import runtime
    from megaman.training import validation

    def run(cwd: Path, output_dir: str, *flags) -> dict:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        words = [
            *(
                "--pretrained_model_name",
                base_folder,
                "--output_dir",
                output_dir,
                "--logging_dir",
                f"logs-{output_dir}",
            ),
            *("--resolution", 64, "--num_validation_images", 0, "--seed", 0, *flags),
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(validation, "NUM_INFERENCE_STEPS", SAMPLING_STEPS)
            # The heap of all tests so far would be copied, for a run of a few steps.
            patch.setattr(runtime, "use_huge_pages", lambda: None)
            assert megaman_lora.main([str(word) for word in words]) == 0
            return load_file(Path(output_dir) / "lora_weights" / "adapter_model.safetensors")

    return run


def save_visible_lora(
    folder: Path, base_folder: Path, rank: int, alpha: float, targets: list[str]
) -> Path:
    """Save a LoRA that visibly changes the base, which its folder names; returns the folder."""
    import torch
    from diffusers import UNet2DConditionModel

    from megaman.lora import adapter
    from megaman.lora.saving import save_lora

    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet", dtype=torch.float32)
    torch.manual_seed(0)
    adapter.inject(unet, rank, alpha, targets)
    with torch.no_grad():
        for name, parameter in adapter.parameters(unet).items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    save_lora(folder, {"unet": unet}, str(base_folder), {})
    return folder


def learned_alike(one: dict, other: dict, share: float = 1e-3) -> bool:
    """Whether two LoRAs that began alike have moved alike, all in all: by the norm of their
    difference as a share of how far B came from zero.

    Single weights may differ by whole steps: with another batch size, number of threads or
    processor a gradient that is next to nothing rounds to the other sign, and AdamW makes a step of
    it. A large --adam_epsilon prevents that.
    """
    assert one.keys() == other.keys()
    moved = sum(float(one[key].double().square().sum()) for key in one if "lora_B" in key)
    apart = sum(float((one[key].double() - other[key].double()).square().sum()) for key in one)
    return moved > 0 and apart <= share**2 * moved


@pytest.fixture(scope="session")
def the_browser():
    """A browser for the tests of a page; they are marked with needs_browser."""
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str:
    """axe-core's source, from npm."""
    if not shutil.which("npm"):
        pytest.skip("accessibility not checked: no npm")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "axe-core@4.11.0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip("accessibility not checked: axe-core could not be installed")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
