"""What is wrong with the installed packages and the GPU's driver, and the remedy; nothing here
raises, whatever is broken."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaman.errors import summarize_error
from megaman.hub import PACKAGE
from megaman.training.import_probe import try_imports

REQUIREMENTS = PACKAGE.parent / "requirements_megaman_lora.txt"
OPTIONAL = ("torchvision", "torchaudio", "xformers", "bitsandbytes", "prodigyopt")
# What a run imports of each package, those first that others need.
TARGETS = {
    "numpy": "numpy",
    "pillow": "PIL.Image",
    "psutil": "psutil",
    "tqdm": "tqdm",
    "jinja2": "jinja2",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "httpx2": "httpx2",
    "torch": "torch",
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
    "xformers": "xformers",
    "accelerate": "accelerate",
    "transformers": "transformers:CLIPTextModel",
    "diffusers": "diffusers:UNet2DConditionModel",
    "peft": "peft",
    "tensorboard": "tensorboard",
}
CUDA_INDEX = "https://download.pytorch.org/whl/{}"
FROM_INDEX = f"pip uninstall torch, then pip install torch=={{}} --index-url {CUDA_INDEX}"
WITHOUT_CUDA = "torch {} is without CUDA, but this machine has an NVIDIA GPU ({})"


@dataclass(frozen=True)
class Package:
    """A package that is required or that others may trip over; "" where there is no version."""

    name: str  # pip's
    required: str
    installed: str


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the remedy."""

    what: str
    remedy: str


@dataclass(frozen=True)
class NvidiaGpus:
    """What nvidia-smi reports: a line with name, memory and driver for each GPU, or its error."""

    lines: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Installation:
    """The packages, what their imports gave (import_probe.py), and the NVIDIA GPUs."""

    packages: tuple[Package, ...]
    imports: Mapping[str, Mapping[str, Any]]  # by TARGETS' values
    gpus: NvidiaGpus

    def version(self, name: str) -> str:
        """The installed version of a package, "" if there is none."""
        return next((each.installed for each in self.packages if each.name == name), "")

    def required(self, name: str) -> str:
        """The version of a package that this project is tested with."""
        return next((each.required for each in self.packages if each.name == name), "")

    def error(self, name: str) -> str:
        """Why an installed package cannot be imported, "" if it can."""
        return str(self.imports.get(TARGETS.get(name, ""), {}).get("error", ""))

    @property
    def torch(self) -> Mapping[str, Any]:
        """The facts on torch; empty if it cannot be imported."""
        facts = self.imports.get("torch", {})
        return {} if facts.get("error") else facts


def inspect_installation() -> Installation:
    """Look at what is installed; takes as long as importing all of it."""
    required = required_versions()
    names = [*required, *OPTIONAL]
    packages = [Package(name, required.get(name, ""), installed_version(name)) for name in names]
    installed = {package.name for package in packages if package.installed}
    targets = [target for name, target in TARGETS.items() if name in installed]
    return Installation(tuple(packages), try_imports(targets), ask_nvidia())


def required_versions() -> dict[str, str]:
    """The version of each required package, by pip's name in lower case; empty if nobody knows."""
    try:
        if REQUIREMENTS.is_file():
            lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
        else:
            lines = importlib.metadata.requires("megaman-lora") or []
    except (OSError, importlib.metadata.PackageNotFoundError):
        return {}
    found = [re.match(r"([\w.-]+)==([\w.]+)$", line) for line in lines]
    return {match[1].lower(): match[2] for match in found if match}


def installed_version(name: str) -> str:
    """The version of an installed package, "" if there is none."""
    try:
        return importlib.metadata.version(name) or "?"
    except importlib.metadata.PackageNotFoundError:
        return ""
    except Exception:  # half an uninstalled package
        return "?"


def ask_nvidia() -> NvidiaGpus:
    """What NVIDIA's driver says; nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return NvidiaGpus()
    query = "--query-gpu=name,memory.total,driver_version"
    command = [program, query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return NvidiaGpus(error=summarize_error(error))
    lines = done.stdout.decode("utf-8", "replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    if done.returncode or not lines:
        return NvidiaGpus(error=lines[0][:150] if lines else f"exit code {done.returncode}")
    return NvidiaGpus(tuple(lines))


def find_problems(installation: Installation) -> list[Problem]:
    """What is wrong with the packages and the driver, with the remedies."""
    return [
        *_version_problems(installation.packages),
        *_companion_problems(installation),
        *_import_problems(installation),
        *_gpu_problems(installation),
    ]


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without a build such as +cpu: 2.13.0+cpu is (2, 13, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _version_problems(packages: Sequence[Package]) -> list[Problem]:
    required = [package for package in packages if package.required]
    missing = [package.name for package in required if not package.installed]
    old = [
        f"{package.name} {package.installed} (older than {package.required})"
        for package in required
        if package.installed and release(package.installed) < release(package.required)
    ]
    problems = []
    remedy = "pip install -r requirements_megaman_lora.txt"
    if missing:
        what = f"not installed: {', '.join(missing)}"
        problems.append(Problem(what, f"activate the project's environment, or {remedy}"))
    if old:
        problems.append(Problem(f"too old: {', '.join(old)}", remedy))
    return problems


def _companion_problems(installation: Installation) -> list[Problem]:
    """torchvision, torchaudio and xformers of another torch break what imports them, transformers
    and diffusers among others."""
    problems = []
    for name in ("torchvision", "torchaudio", "xformers"):
        if not installation.version(name):
            continue
        wanted, error = _required_torch(name), installation.error(name)
        torch = installation.version("torch").partition("+")[0]
        reason = f"cannot be imported ({error})" if error else ""
        if wanted and torch and release(wanted) != release(torch):
            reason = f"was built for torch {wanted}, and this is torch {torch}"
        if reason and not installation.imports.get("torch", {}).get("error"):
            what = f"{name} {installation.version(name)} {reason}"
            problems.append(Problem(what, f"pip uninstall {name}; this project does not need it"))
    return problems


def _required_torch(name: str) -> str:
    """The one version of torch that an installed package requires, "" if it takes several."""
    try:
        lines = importlib.metadata.requires(name) or []
    except Exception:
        return ""
    found = [re.match(r"torch\s*\(?==\s*([\w.]+)", line) for line in lines]
    return next((match[1] for match in found if match), "")


def _import_problems(installation: Installation) -> list[Problem]:
    """The first import of a required package that fails: others mostly fail because of it."""
    for package in installation.packages:
        error = installation.error(package.name)
        if error and package.required and not _is_explained(installation):
            what = f"{package.name} {package.installed} cannot be imported ({error})"
            return [Problem(what, _reinstall(package))]
    return []


def _is_explained(installation: Installation) -> bool:
    """Whether transformers and others may fail only because of a torchvision that does."""
    is_torch_fine = bool(installation.torch)
    return is_torch_fine and any(
        installation.error(name) for name in ("torchvision", "torchaudio", "xformers")
    )


def _reinstall(package: Package) -> str:
    command = f"pip install --force-reinstall --no-deps {package.name}=={package.required}"
    if os.name == "nt" and package.name == "torch":  # a DLL of Microsoft's is missing
        return f"install the Visual C++ Redistributable, or {command}"
    return command


def _gpu_problems(installation: Installation) -> list[Problem]:
    gpus, torch = installation.gpus, installation.torch
    if gpus.error:
        what = f"NVIDIA's driver does not answer ({gpus.error})"
        return [Problem(what, "restart the machine, or install the driver again")]
    if not gpus.lines or not torch or "gpu" in torch or torch.get("hip"):
        return []
    version = installation.version("torch")
    required = installation.required("torch") or version.partition("+")[0]
    if not torch.get("cuda"):
        what = WITHOUT_CUDA.format(version, gpus.lines[0])
        return [Problem(what, FROM_INDEX.format(required, "cu130"))]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        what = f"CUDA_VISIBLE_DEVICES={hidden} hides the GPU ({gpus.lines[0]})"
        return [Problem(what, "unset that environment variable")]
    error = torch.get("cuda_error", "")
    what = f"torch {version} cannot use the GPU {gpus.lines[0]} ({error})"
    if "no kernel image" in error:  # a GTX 10 or older with CUDA 13
        return [Problem(what, FROM_INDEX.format(required, "cu126"))]
    return [Problem(what, f"install a newer driver, for CUDA {torch['cuda']}")]
