"""Where a run computes and in what: the rule as a table, the processor as it is and as it is
emulated."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from itertools import product
from pathlib import Path

import pytest
import torch

from megaman import runtime
from megaman.errors import UserError
from megaman.lora import adapter
from megaman.models.base import load_base
from megaman.models.configs import unet_width
from megaman.runtime import (
    MIN_WIDTH_FOR_BF16,
    choose_compute,
    choose_device,
    device_lines,
    has_unused_nvidia_gpu,
    precision,
    prefers_channels_last,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "device", "bf16", "width", "word", "why"),
    [
        ("no", "cpu", True, 320, "no", "as requested"),
        ("fp16", "cpu", True, 320, "bf16", "this processor has instructions"),
        ("fp16", "cpu", True, MIN_WIDTH_FOR_BF16, "bf16", "this processor has instructions"),
        ("fp16", "cpu", True, MIN_WIDTH_FOR_BF16 - 1, "no", "a wider UNet"),
        ("fp16", "cpu", False, 320, "no", "a processor with instructions for it"),
        ("bf16", "cpu", False, 64, "bf16", "base in bf16, LoRA in float32"),  # insisted on
        ("bf16", "cpu", True, 320, "bf16", "base in bf16, LoRA in float32"),
        ("no", "cuda", True, 320, "no", "as requested"),
        ("fp16", "cuda", True, 64, "fp16", "base in fp16"),
        ("bf16", "cuda", True, 64, "bf16", "base in bf16"),
        ("bf16", "cuda", False, 320, "fp16", "this GPU has no bf16"),
        ("fp16", "mps", True, 320, "no", "fp16 needs an NVIDIA GPU, so mps uses float32"),
        ("bf16", "mps", True, 320, "no", "bf16 is not used on mps"),
    ],
)
def test_the_rule_for_the_number_format(asked, device, bf16, width, word, why):
    found, reason = precision(asked, device, bf16, width)
    assert found == word and why in reason


def test_the_rule_for_the_memory_format():
    answers = {
        (device, word): prefers_channels_last(device, word)
        for device, word in product(("cpu", "cuda", "mps"), ("no", "fp16", "bf16"))
    }
    yes = {("cpu", "no"), ("cpu", "fp16"), ("cpu", "bf16"), ("cuda", "fp16"), ("cuda", "bf16")}
    assert {key for key, answer in answers.items() if answer} == yes
    assert choose_compute("no", CPU, 64).memory_format == "channels_last"
    assert choose_compute("no", CPU, 64, "contiguous").memory_format == "contiguous"
    assert (
        choose_compute("no", torch.device("mps"), 64, "channels_last").memory_format
        == "channels_last"
    )


def test_a_cpu_takes_what_it_is_told():
    for word, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        compute = choose_compute(word, CPU, 64)
        assert (compute.dtype, compute.mixed_precision, compute.device) == (dtype, word, CPU)
    compute = choose_compute("fp16", CPU, 64)  # too narrow, whatever the processor
    assert compute.dtype == torch.float32 and "cpu uses float32" in compute.dtype_reason


def test_a_card_need_not_be_there_to_be_planned_for():
    assert choose_compute("fp16", torch.device("cuda"), 320).dtype == torch.float16
    assert choose_compute("no", torch.device("cuda"), 320).dtype == torch.float32


ASK = """
import json, torch
from megaman.runtime import cpu_has_bf16, choose_compute
compute = choose_compute("fp16", torch.device("cpu"), 320)
print(json.dumps([cpu_has_bf16(), str(compute.dtype), compute.dtype_reason]))
"""
EMULATED = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def flags_of_the_processor() -> set[str]:
    """The processor's flags in /proc/cpuinfo, without torch."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        pytest.skip("processor's flags not compared: no x86-64 with Linux")
    return set(
        next(line for line in info.read_text().splitlines() if line.startswith("flags")).split()
    )


def test_the_processor_is_seen_as_it_is(run_script, tmp_path):
    there = bool({"avx512_bf16", "amx_bf16"} & flags_of_the_processor())
    done = run_script(["-c", ASK], tmp_path, dict.fromkeys(EMULATED))
    has_bf16, dtype, _ = json.loads(done.stdout)
    assert has_bf16 == there and dtype == ("torch.bfloat16" if there else "torch.float32")


def test_a_lesser_processor_is_seen_where_it_is_emulated(forked, tmp_path):
    """torch and oneDNN read the variables when they first compute, which is in the fork."""
    lesser = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    for variables in (lesser, {"ATEN_CPU_CAPABILITY": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}):
        done = forked.run(["-c", ASK], tmp_path, env=variables)
        has_bf16, dtype, why = json.loads(done.stdout)
        assert (
            not has_bf16
            and dtype == "torch.float32"
            and "a processor with instructions for it" in why
        )


def test_a_base_is_laid_out_and_its_lora_like_it(base_folder):
    unet = load_base(
        str(base_folder),
        torch.float32,
        memory_format=choose_compute("no", CPU, 64, "contiguous").torch_memory_format,
    ).unet
    assert unet.conv_in.weight.is_contiguous()
    unet = load_base(
        str(base_folder),
        torch.float32,
        memory_format=choose_compute("no", CPU, 64).torch_memory_format,
    ).unet
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not unet.conv_in.weight.is_contiguous()
    trained = adapter.inject(unet, 4, 4, ["conv_in", "conv1"])
    last = {"memory_format": torch.channels_last}
    assert all(p.is_contiguous() or p.is_contiguous(**last) for p in trained)
    convolved = [
        layer for name, layer in unet.named_modules() if name.endswith("conv1.lora_A.default")
    ]
    assert convolved and all(layer.weight.is_contiguous(**last) for layer in convolved)


def test_the_width_of_a_base(base_folder, tmp_path):
    config = json.loads((base_folder / "unet" / "config.json").read_text())
    assert unet_width(str(base_folder)) == config["block_out_channels"][0]
    assert unet_width("somebody/not-on-this-machine") == 320  # planned as Stable Diffusion 1.5
    assert (
        unet_width(str(tmp_path)) == unet_width("no/such/thing.safetensors") == 0
    )  # loading them reports it better
    for part in ("unet", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    for content in (
        "[]",
        "{}",
        *(f'{{"block_out_channels": {value}}}' for value in ("[]", "null", '["x"]', "[1e999]")),
    ):
        (tmp_path / "unet" / "config.json").write_text(content)
        assert unet_width(str(tmp_path)) == 0


def test_the_best_device_there_is(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as accelerate launch --cpu does
    assert choose_device().type == "cpu"
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    assert choose_device().type == next(name for name in there if there[name])
    for name, present in there.items():
        if present:
            assert choose_device(name).type == name
        else:
            with pytest.raises(
                UserError, match=f"--device {name}: this torch sees no such device.*cpu"
            ):
                choose_device(name)


def test_a_card_that_torch_cannot_use(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_unused_nvidia_gpu()
    count = torch.get_num_threads()
    counted = "1 CPU thread" if count == 1 else f"{count} CPU threads"
    assert device_lines(choose_compute("no", CPU, 64), "seed 0") == [
        f"device     cpu: float32 as requested; channels_last; seed 0; {counted}"
    ]
    for name in ("nvidia-smi", "nvidia-smi.bat"):
        (tmp_path / name).touch(mode=0o755)
    assert has_unused_nvidia_gpu() == (not torch.cuda.is_available())
    assert len(device_lines(choose_compute("no", CPU, 64))) == 1 + has_unused_nvidia_gpu()


@pytest.mark.parametrize(
    "version", ["2.13.0", "2.13.0+cu130", "2.13.0+rocm7.1", "2.14.0.dev20261128"]
)
def test_the_recorded_versions_are_the_packages_own(monkeypatch, version):
    """torch from the package index reports 2.13.0+cu130 and is the package 2.13.0."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "torch" else real(name)
    )
    assert runtime.package_versions.__wrapped__()["torch"] == version
