"""A training step on the device meta in place of a GPU: tensors without contents fail where a step
mixes devices or waits for one."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import FEW_TARGETS, ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from megaman import cuda
from megaman.config.settings import TrainConfig
from megaman.config.train import parse_train_config
from megaman.data.encoding import encode_dataset
from megaman.data.latent_cache import LatentCache
from megaman.data.latents import LatentSource, OnlineLatents
from megaman.data.vae_encoder import EncodingConfig, VaeEncoder
from megaman.models.base import Base, load_base
from megaman.models.text_encoding import CaptionEmbeddings, RunTexts
from megaman.models.typed import move
from megaman.processes import Processes
from megaman.training.adapters import inject_lora
from megaman.training.checkpoint import TrainState
from megaman.training.compute import REQUESTS, choose_training_compute
from megaman.training.datasets import Datasets, find_datasets
from megaman.training.optimizer import make_optimizer, make_schedule
from megaman.training.output import OutputFolder
from megaman.training.progress import Progress
from megaman.training.run import Run, Team
from megaman.training.step import TrainingStep
from megaman.training.step_images import StepImages
from megaman.training.tensorboard import TrainingLog
from megaman.training.training_set import make_training_sets

META = torch.device("meta")


class NoBlockingCopies(TorchDispatchMode):
    """Fails at an upload that the CPU would wait for; reading a tensor of meta fails by itself.

    pinned has the tensors that were pinned so far.
    """

    def __init__(self, pinned: list[torch.Tensor]):
        super().__init__()
        self._pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == META:
            is_upload = args[0].device.type == "cpu" and args[0].dim() > 0
            is_pinned = any(args[0] is tensor for tensor in self._pinned)
            assert not is_upload or (is_pinned and kwargs.get("non_blocking")), "blocks"
        return func(*args, **kwargs)


class MetaAccelerator:
    """Stands for accelerate's on a GPU, in float32."""

    device, scaler = META, None

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        return Prepared(optimizer)

    def prepare_model(self, model: torch.nn.Module, evaluation_mode: bool) -> torch.nn.Module:
        return model

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


class Prepared:
    """An optimizer as accelerate prepares it."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


def make_run(config: TrainConfig, folder: Path) -> Run:
    settings = config.settings()
    requested = {flag: settings[flag] for flag in REQUESTS}
    compute, _ = choose_training_compute(requested, config.explicit, META, 64, None)
    images = config.optimizer.train_batch_size
    steps = StepImages(images, config.optimizer.gradient_accumulation_steps, images)
    return Run(
        Team(Processes(), cast(Any, MetaAccelerator()), steps),
        compute,
        TrainState(0, 0, None, 0.0, {}),
        OutputFolder(folder, None, ()),
        TrainingLog(lambda _: None, None),
        [],
    )


def make_latents(config: TrainConfig, datasets: Datasets, base: Base) -> LatentSource:
    """Those of the images, encoded on the CPU, or from now on by the VAE on the device."""
    encoding = EncodingConfig()
    if config.cache.no_cache:
        return OnlineLatents(VaeEncoder(move(base.vae, META)), datasets.images, encoding)
    cache, index = LatentCache(None), datasets.file_index
    return encode_dataset(lambda: base.vae, datasets.images, encoding, index, cache)


@pytest.fixture
def pinned(monkeypatch) -> list[torch.Tensor]:
    """Treat meta as a GPU, to which uploads are pinned and where AdamW is fused; returns the
    tensors that were pinned."""
    tensors: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    monkeypatch.setattr(cuda, "PINNED_FOR", ("meta",))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # knows no meta
    module = sys.modules["torch.optim.optimizer"]  # torch.optim hides it
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--shuffle_caption", "--gradient_checkpointing"],
        ["--no_cache", "--alpha_mask", "--snr_gamma", "5", "--noise_offset", "0.1"],
        ["--train_text_encoder", "--lora_dropout", "0.1", "--train_batch_size", "2"],
    ],
    ids=["captions", "no cache", "text encoder"],
)
def test_a_step_mixes_no_devices_and_waits_for_none(flags, pinned, tmp_path):
    words = ["--data_dir", str(ROOT / "demo" / "held_out"), "--resolution", "64", "--seed", "0"]
    words += ["--mixed_precision", "no"]
    config = parse_train_config([*words, "--max_train_steps", "9", *FEW_TARGETS, *flags])
    datasets = find_datasets(config)
    assert datasets is not None
    run = make_run(config, tmp_path)
    base = load_base(str(ROOT / "demo" / "base"), torch.float32)
    latents = make_latents(config, datasets, base)
    captions = CaptionEmbeddings(
        base,
        RunTexts(datasets.captions),
        config.captions.varies_tags,
        config.lora.train_text_encoder,
    )
    captions._device = META
    for model in (base.unet, base.text_encoder):
        move(model, META)
    adapters = inject_lora(base, config.lora, run.compute, seed=0, notes=dict)
    training_sets = make_training_sets(config, datasets, [latents], run)
    schedule = make_schedule(training_sets[0], config.optimizer, config.explicit, run)
    training_step = TrainingStep(base, adapters, training_sets, captions, config.loss, run)
    adamw = make_optimizer(adapters, config.optimizer, schedule, run)
    progress = Progress(run, schedule, adamw, save_steps=100, validation_steps=100)
    for step in (1, 2):
        # The first step moves what is the same in all of them.
        with NoBlockingCopies(pinned) if step > 1 else contextlib.nullcontext():
            adamw.set_lr(step)
            loss = training_step.accumulate(step)
            norm = run.clip_gradients(adapters.parameters, 1.0)
            progress.record(step, loss, norm, adamw.step_if_finite(norm))
            assert not any(progress.due(step))
        assert loss.device == norm.device == META
    with pytest.raises((RuntimeError, NotImplementedError)):  # the log does wait
        progress.flush(2)
