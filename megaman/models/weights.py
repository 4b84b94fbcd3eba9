"""A model's weights from safetensors files, each tensor read once, to its dtype and device.

The pages that were read of a mapped file count as this process's memory until it is unmapped. So a
file is mapped again for every PORTION, and loading needs no more than the model and one portion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers import DDPMScheduler
from safetensors import safe_open
from torch import nn
from transformers import CLIPTokenizer, PreTrainedModel

from megaman.errors import UserError
from megaman.files import stamp_of
from megaman.models.typed import Model, move

PORTION = 128 * 2**20  # bytes; a large tensor of Stable Diffusion 1.5 in float32
CPU = torch.device("cpu")


def tensor_index(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors by name and its metadata; the tensors are mapped, for their shapes only."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Some of a file's tensors with their names, in the order in which they are stored.

    Each is mapped memory: to keep it, copy it, and drop the reference before the next one.
    """
    with safe_open(path, framework="pt") as file:
        offsets = {key: position for position, key in enumerate(file.offset_keys())}
    remaining = sorted(keys, key=offsets.__getitem__, reverse=True)
    while remaining:
        with safe_open(path, framework="pt") as file:
            bytes_read = 0
            while remaining and bytes_read < PORTION:
                key = remaining.pop()
                tensor = file.get_tensor(key)
                bytes_read += tensor.nbytes
                yield key, tensor
                del tensor


def shape_mismatch(model: nn.Module, found: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with the first tensor that has another shape than the model's, or is an int."""
    for name, expected in model.state_dict().items():
        tensor = found.get(name, expected)
        if not tensor.is_floating_point():
            return f"{name} is {_shape(tensor)} of whole numbers instead of {_shape(expected)}"
        if tensor.shape != expected.shape:
            return f"{name} is {_shape(tensor)} instead of {_shape(expected)}"
    return None


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def missing(model: nn.Module, found: Mapping[str, torch.Tensor]) -> str | None:
    """The first of a model's tensors that was not found; it would stay uninitialized."""
    names = list(model.state_dict())
    if not isinstance(model, PreTrainedModel):  # transformers computes the buffers itself
        names += [name for name, _ in model.named_buffers()]
    return next((name for name in names if name not in found), None)


def build(model_class: type[Model], config: Any) -> Model:
    """A model on the meta device, without memory and without the time for a random
    initialization."""
    with torch.device("meta"):
        if issubclass(model_class, PreTrainedModel):
            return model_class(config)
        return cast(Any, model_class).from_config(config)


class LazyModel:
    """A model of a base that is loaded on demand, as often as needed."""

    def __init__(
        self,
        base: Path,
        part: str,
        model: nn.Module,
        sources: Mapping[str, tuple[Path, str]],
        dtype: torch.dtype,
        files: Sequence[Path],
    ):
        """Keep what is needed to load the model.

        Args:
            base: the base's folder or file, for error messages.
            part: unet, vae or text_encoder, for error messages.
            model: as `build` makes it.
            sources: the file of each of the model's tensors, and the tensor's name in that file.
            dtype: of the weights after loading.
            files: all files that the model depends on; they must not change from now on.
        """
        self.config: Any = model.config
        self.stamps = {path: stamp_of(path) for path in files}
        self._base, self._part, self._sources, self._dtype = base, part, sources, dtype
        self._class: Any = type(model)
        self._unloaded: nn.Module | None = model  # becomes the first that is loaded

    def layers(self) -> list[str]:
        """The names of the model's layers."""
        model = self._unloaded or build(self._class, self.config)
        self._unloaded = model
        return [name for name, _ in model.named_modules()]

    def load(self, device: torch.device = CPU) -> nn.Module:
        """The model on the device, frozen and in eval mode, with copies of its weights in dtype.

        Raises UserError if a file has changed, and for weights that are not finite. The random
        state is preserved, so that the time of loading does not change what a seed generates.
        """
        for path, stamp in self.stamps.items():
            if not path.is_file() or stamp_of(path) != stamp:
                raise UserError(
                    f"{path} is gone or has changed since the start",
                    "Bring it back, or start again",
                )
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = self._unloaded or build(self._class, self.config)
            self._unloaded = None
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            tensors = self._read(shapes, device)
            if isinstance(model, PreTrainedModel):  # some of its buffers are in no file
                model = self._class.from_pretrained(
                    None, config=self.config, state_dict=tensors, dtype=self._dtype
                )
            else:
                model.load_state_dict(tensors, assign=True)
        return move(model, device).requires_grad_(False).eval()

    def _read(
        self, shapes: Mapping[str, torch.Size], device: torch.device
    ) -> dict[str, torch.Tensor]:
        names_by_file: dict[Path, dict[str, str]] = defaultdict(dict)
        for name, (path, key) in self._sources.items():
            names_by_file[path][key] = name
        tensors = {}
        for path, names in names_by_file.items():
            for key, mapped in read(path, names):
                name = names[key]
                tensor = mapped.to(device, self._dtype, copy=True)
                del mapped
                self._check_finite(name, tensor)
                # Some files have 1x1 convolutions in place of linear layers.
                tensors[name] = tensor.reshape(shapes[name])
        return tensors

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        # NaN and infinity both show in the extremes, which need no memory to compute.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(
                f"{self._base}, {self._part}: {name} holds numbers that are not finite",
                "Take another copy of the base",
            )


class BaseParts(NamedTuple):
    """What a base consists of."""

    tokenizer: CLIPTokenizer
    noise_scheduler: DDPMScheduler
    text_encoder: LazyModel
    vae: LazyModel
    unet: LazyModel
