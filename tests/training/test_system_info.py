"""--system_info on broken installations: packages that are made up, and a driver."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megaman.errors import run_script as run_main
from megaman.training import installation
from megaman.training.import_probe import try_imports
from megaman.training.installation import Installation, NvidiaGpus, Package, find_problems
from megaman.training.system_info import inspect_folder

ROOT = Path(__file__).resolve().parents[2]
TORCH = {"error": "", "cuda": "13.0", "hip": None, "threads": 8, "mps": False, "cuda_error": ""}
GPU = "NVIDIA GeForce GTX 1080, 8192 MiB, 580.10"
HEALTHY = Installation(
    (Package("torch", "2.13.0", "2.13.0+cpu"), Package("peft", "0.21.2", "0.21.2")),
    {"torch": TORCH | {"cuda": None}, "peft": {"error": ""}},
    NvidiaGpus(),
)


def install(folder: Path, name: str, code: str, version: str = "1.0", requires: str = "") -> None:
    """Put a package into a folder that stands first on Python's path."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")


def problems(**changes) -> dict[str, str]:
    return {each.what: each.remedy for each in find_problems(replace(HEALTHY, **changes))}


def test_nothing_is_wrong_with_a_healthy_installation():
    assert problems() == {}


def test_packages_that_are_missing_or_too_old():
    packages = (Package("torch", "2.13.0", "2.9.1"), Package("peft", "0.21.2", ""))
    found = problems(packages=packages)
    assert list(found) == [
        "not installed: peft",
        "too old: torch 2.9.1 (older than 2.13.0)",
    ]
    assert all("pip install -r requirements_megaman_lora.txt" in each for each in found.values())


@pytest.mark.parametrize(
    ("torch", "environment", "what", "remedy"),
    [
        ({"cuda": None}, None, "is without CUDA, but this machine has an NVIDIA GPU", "whl/cu130"),
        ({}, "", "CUDA_VISIBLE_DEVICES= hides the GPU", "unset"),
        ({"cuda_error": "no kernel image is available"}, None, "cannot use the GPU", "whl/cu126"),
        ({"cuda_error": "driver is too old"}, None, "cannot use the GPU", "a newer driver"),
    ],
)
def test_a_gpu_that_torch_cannot_use(monkeypatch, torch, environment, what, remedy):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if environment is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment)
    ((found, answer),) = problems(imports={"torch": TORCH | torch}, gpus=NvidiaGpus((GPU,))).items()
    assert what in found and GPU in found and remedy in answer
    assert problems(imports={"torch": TORCH | {"gpu": "GTX"}}, gpus=NvidiaGpus((GPU,))) == {}


@pytest.mark.skipif(os.name == "nt", reason="shell scripts as programs")
def test_what_the_driver_says(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    program.write_text(f"#!/bin/sh\necho '{GPU}'\n")
    program.chmod(0o755)
    assert installation.ask_nvidia() == NvidiaGpus((GPU,))
    program.write_text("#!/bin/sh\necho 'Driver/library version mismatch'\nexit 18\n")
    failed = installation.ask_nvidia()
    assert failed == NvidiaGpus(error="Driver/library version mismatch")
    assert "restart the machine" in " ".join(problems(gpus=failed).values())
    program.write_bytes(b"\x7fELF no program")
    assert installation.ask_nvidia().error


def test_folders_that_can_and_cannot_be_written(tmp_path):
    text, problem = inspect_folder("--cache_dir", tmp_path / "new" / "deep")
    assert "can be written" in text and (problem is None or "GB free" in problem.what)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    text, problem = inspect_folder("--cache_dir", tmp_path / "file" / "cache")
    assert "cannot be written" in text
    assert problem and problem.remedy.startswith("name another folder with --cache_dir")
    assert inspect_folder("HF_HOME", None)[1]


@pytest.mark.slow
def test_an_import_that_ends_python_is_named_and_the_rest_is_tried(tmp_path, monkeypatch):
    for name, code in {
        "crashing": "import os; os.abort()",
        "exiting": "raise SystemExit('no license')",
        "talking": "import os; print('{}'); os.write(1, b'megaman')",
    }.items():
        install(tmp_path, name, code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = try_imports(["crashing", "exiting", "talking", "talking:nothing"])
    errors = [result["error"] for result in found.values()]
    assert errors[0].startswith("ends Python with exit code")
    assert errors[1:3] == ["no license", ""] and "no attribute 'nothing'" in errors[3]


@pytest.mark.slow
def test_the_report_of_an_installation_with_much_that_is_broken(run_script, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    broken = "raise ModuleNotFoundError(\"No module named '{0}'\", name='{0}')"
    install(packages, "PIL", broken.format("PIL"))
    install(packages, "psutil", broken.format("psutil"))
    error = "raise RuntimeError('operator torchvision::nms does not exist')"
    install(packages, "torchvision", error, "0.20.1", "torch (==2.5.1)")
    install(packages, "xformers", "", "0.0.35", "torch>=2.10")
    library = "class _Lib:\n    pass\n_cpp_library_load_exception = ImportError('built for: X')\n"
    (packages / "xformers" / "_cpp_lib.py").write_text(library)
    (tmp_path / "file").touch()
    environment = {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", "HOME": str(tmp_path)}
    done = run_script(
        ["megaman_lora.py", "--system_info", "--cache_dir", "file/cache"], tmp_path, environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    assert "torchvision 0.20.1 was built for torch 2.5.1" in text
    assert "remedy: pip uninstall torchvision" in text
    assert "xformers 0.0.35 cannot be imported (built for: X)" in text
    assert "--cache_dir file/cache: cannot be written" in text
    assert "memory unknown (No module named 'psutil')" in text
    assert str(tmp_path) not in text and len(done.stdout.splitlines()) <= 40
    done = run_script(["megaman_lora.py", "--demo"], tmp_path, environment)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: No module named 'PIL'. Activate the project's")


def test_a_package_that_is_missing_is_one_line(capsys):
    def main(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    assert run_main(main, []) == 1
    assert "--system_info shows what is wrong" in capsys.readouterr().err

    def own(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'megaman.nothing'", name="megaman.nothing")

    with pytest.raises(ModuleNotFoundError):
        run_main(own, [])
