"""What is asked of an NVIDIA GPU, with one that is not there (see fake_cuda.py)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import fake_cuda
import pytest
import torch
from conftest import FEW_TARGETS
from fake_cuda import GB, FakeGpu

import megaman_lora
from megaman import cuda, runtime
from megaman.errors import UserError, out_of_memory
from megaman.models.base import load_base
from megaman.runtime import choose_compute, choose_device, finer_precisions
from megaman.sampling.jobs import Job
from megaman.sampling.limits import limits_for
from megaman.training.compute import choose_training_compute
from megaman.training.memory_plan import hold_to_limit, memory_limit
from megaman.training.optimizer import PATIENCE, SkippedSteps

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    return fake_cuda.install(monkeypatch, FakeGpu(free=8 * GB, total=10 * GB))


@pytest.fixture
def windows(monkeypatch) -> None:
    monkeypatch.setattr(cuda, "os", SimpleNamespace(name="nt"))


def test_the_fake_gpu_is_as_strict_as_a_real_one(gpu):
    assert choose_device() == CUDA
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_per_process_memory_fraction(0.5, CUDA)
    with pytest.raises(TypeError, match="float"):
        torch.cuda.set_per_process_memory_fraction(1, 0)
    with pytest.raises(AssertionError, match="Invalid device"):
        torch.cuda.get_device_properties(1)


@pytest.mark.parametrize("device", [CUDA, torch.device("cuda:0")])
def test_torch_is_held_to_a_limit(gpu, device):
    assert hold_to_limit(device, 4) == 4 * GB
    assert gpu.fractions == [(0.4, 0)]
    assert hold_to_limit(device, 9) == 8 * GB, "no more is free"
    assert gpu.fractions[1:] == [(0.8, 0)]


def test_without_a_limit_torch_may_take_what_becomes_free(gpu):
    assert hold_to_limit(CUDA, None) == 8 * GB and gpu.fractions == []


def test_a_cpu_has_no_limit_but_the_given_one(gpu):
    cpu = torch.device("cpu")
    assert hold_to_limit(cpu, None) == math.inf and hold_to_limit(cpu, 2) == 2 * GB
    assert gpu.fractions == []


def test_windows_must_not_spill_into_shared_memory(gpu, windows):
    assert hold_to_limit(CUDA, None) == 8 * GB
    assert gpu.fractions == [(0.8, 0)]


def test_generation_does_not_spill_either(gpu, windows, base_folder):
    job = Job(0, 0, "x", "", 1, 64, 64, num_inference_steps=2, guidance_scale=7.5)
    limits_for(load_base(str(base_folder), torch.float32), [job], None, CUDA)
    assert gpu.fractions == [(0.8, 0)]


@pytest.mark.slow
def test_plan_on_a_gpu_with_a_limit(gpu, base_folder, capsys):
    """The README's line, which once ended in a traceback."""
    flags = [
        "--plan",
        "--pretrained_model_name",
        str(base_folder),
        "--resolution",
        "64",
        "--vram_limit",
        "2",
    ]
    assert megaman_lora.main([*flags, "--num_validation_images", "0", *FEW_TARGETS]) == 0
    printed = capsys.readouterr().out
    assert "limit      2.0 GB" in printed and "For an NVIDIA GPU" not in printed
    assert gpu.fractions == [], "a plan computes nothing"


def test_what_the_vae_leaves_is_returned_to_the_gpu(gpu, base_folder):
    load_base(str(base_folder), torch.float16, CUDA).release("vae")
    assert gpu.cache_emptied == 1
    load_base(str(base_folder), torch.float32).release("vae")
    assert gpu.cache_emptied == 1, "there is nothing of a CPU's"


def test_memory_is_released_before_a_step_is_computed_again(gpu):
    tries = iter([torch.OutOfMemoryError("CUDA out of memory"), None])

    def compute() -> str:
        if error := next(tries):
            raise error
        return "computed"

    assert runtime.retry_on_oom(compute, lambda: None) == "computed"
    assert gpu.cache_emptied == 1 and memory_limit(CUDA, None) == 8 * GB


@pytest.mark.parametrize(
    "text",
    [
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a "
        "non-contiguous input.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
    ],
)
def test_cudnn_and_cublas_run_out_of_memory_in_their_own_words(text):
    assert out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(("major", "finer"), [(8, ["bf16", "no"]), (7, ["no"])])
def test_advice_names_what_the_gpu_has(monkeypatch, major, finer):
    fake_cuda.install(monkeypatch, FakeGpu(major=major))
    assert finer_precisions(choose_compute("fp16", CUDA, 320)) == finer
    assert finer_precisions(choose_compute("no", CUDA, 320)) == []
    wanted = choose_compute("bf16", CUDA, 320)
    assert wanted.mixed_precision == ("bf16" if major == 8 else "fp16")
    skipped = SkippedSteps("fp16", finer)
    with pytest.raises(UserError, match=rf"fp16 \(try --mixed_precision {' or '.join(finer)}\)"):
        skipped.add([False] * PATIENCE, PATIENCE)
    with pytest.raises(UserError) as in_float32:
        SkippedSteps().add([False] * PATIENCE, PATIENCE)
    assert "--mixed_precision" not in str(in_float32.value)


def test_settings_of_a_gpu(gpu):
    requested = {
        "mixed_precision": "fp16",
        "memory_format": "auto",
        "enable_xformers_memory_efficient_attention": False,
        "compile": True,
        "gradient_checkpointing": False,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }
    compute, notes = choose_training_compute(requested, (), choose_device(), 320, None)
    assert (compute.dtype, compute.memory_format) == (torch.float16, "channels_last")
    assert compute.compile and notes == []


class Recorded:
    """A tensor on the CPU that records how it is moved."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def to(self, *args, **kwargs) -> Recorded:
        self.calls.append((args, kwargs))
        return self

    def pin_memory(self) -> Recorded:
        self.calls.append(("pin",))
        return self


def test_an_upload_never_waits():
    tensor = Recorded()
    cuda.upload(tensor, CUDA, torch.float16)  # type: ignore[arg-type]
    assert tensor.calls == [
        ((torch.float16,), {}),
        ("pin",),
        ((CUDA,), {"non_blocking": True}),
    ]
