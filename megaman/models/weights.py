"""A model's weights out of safetensors files: each number read once, straight into its precision
and place.

What was read of a mapped file counts as this process's memory until the mapping goes. So a file is
mapped anew for every PORTION of it, and loading needs no more than the model and one portion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from megaman.errors import UserError

PORTION = 128 * 2**20  # bytes; a large tensor of Stable Diffusion 1.5 in float32 is as much
CPU = torch.device("cpu")


def tensor_index(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors by name, and its metadata. The tensors are mapped: for names, shapes and
    places, not to read."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read(path: Path, wanted: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The wanted tensors of a file with their names, in the order in which they lie there.

    Each is mapped memory: whoever wants to keep it copies it, and lets go of it before the next.
    """
    with safe_open(path, framework="pt") as file:
        left = sorted(
            wanted,
            key={key: place for place, key in enumerate(file.offset_keys())}.__getitem__,
            reverse=True,
        )
    while left:
        with safe_open(path, framework="pt") as file:
            taken = 0
            while left and taken < PORTION:
                key = left.pop()
                tensor = file.get_tensor(key)
                taken += tensor.nbytes
                yield key, tensor
                del tensor


def shape_mismatch(model: nn.Module, found: Mapping[str, torch.Tensor]) -> str | None:
    """The first of a model's tensors that was found in another shape, or as whole numbers, in
    words."""
    for name, wanted in model.state_dict().items():
        tensor = found.get(name, wanted)
        if tensor.shape != wanted.shape or not tensor.is_floating_point():
            sides, own = (
                "x".join(map(str, shape)) or "one number" for shape in (tensor.shape, wanted.shape)
            )
            return f"{name} is {sides}{'' if tensor.is_floating_point() else ' of whole numbers'} instead of {own}"
    return None


def missing(model: nn.Module, found: Mapping[str, torch.Tensor]) -> str | None:
    """The first of a model's tensors that was not found; it would stay random or without
    contents."""
    names = list(model.state_dict())
    if not isinstance(model, PreTrainedModel):  # whose library makes what stands in no file
        names += [name for name, _ in model.named_buffers()]
    return next((name for name in names if name not in found), None)


def build(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model on the meta device, where tensors have shapes alone: to draw random numbers for them
    takes long."""
    with torch.device("meta"):
        return kind(config) if issubclass(kind, PreTrainedModel) else kind.from_config(config)


class LazyModel:
    """One model of a base, to be loaded when it is needed and as often as that is.

    place (the base's folder or file) and label name it where something is wrong. model is as build
    makes it; sources tells for each of its tensors the file and the name in there. The files, its
    configuration among them, have to stay as they are from now on.
    """

    def __init__(
        self,
        place: Path,
        label: str,
        model: nn.Module,
        sources: Mapping[str, tuple[Path, str]],
        dtype: torch.dtype,
        files: Sequence[Path],
    ):
        self.place, self.label, self.sources, self.dtype = place, label, sources, dtype
        self.config = model.config
        self.kind = type(model)
        self.files = {path: _size_and_time(path) for path in files}
        self._built: nn.Module | None = model  # becomes the first that is loaded

    def layers(self) -> list[str]:
        """The names of the model's layers."""
        self._built = self._built or build(self.kind, self.config)
        return [name for name, _ in self._built.named_modules()]

    def load(self, device: torch.device = CPU) -> nn.Module:
        """The model on the device, frozen, with copies of its weights in dtype.

        Raises UserError where a file is gone or another one, and for numbers that are not finite.
        The random state stays as it is, so that when a part is loaded makes no difference to what a
        seed draws.
        """
        for path, as_it_was in self.files.items():
            if not path.is_file() or _size_and_time(path) != as_it_was:
                raise UserError(
                    f"{path} is gone or has changed since the start",
                    "Bring it back, or start again",
                )
        with torch.random.fork_rng(devices=[]):
            model, self._built = self._built or build(self.kind, self.config), None
            tensors = self._read(
                {name: tensor.shape for name, tensor in model.state_dict().items()}, device
            )
            if isinstance(model, PreTrainedModel):  # some of its buffers stand in no file
                model = self.kind.from_pretrained(
                    None, config=self.config, state_dict=tensors, dtype=self.dtype
                )
            else:
                model.load_state_dict(tensors, assign=True)
        return model.to(device).requires_grad_(False).eval()

    def _read(
        self, shapes: Mapping[str, torch.Size], device: torch.device
    ) -> dict[str, torch.Tensor]:
        names_in: dict[Path, dict[str, str]] = defaultdict(dict)
        for name, (path, key) in self.sources.items():
            names_in[path][key] = name
        tensors = {}
        for path, names in names_in.items():
            for key, mapped in read(path, names):
                name = names[key]
                tensor = mapped.to(device, self.dtype, copy=True)
                del mapped
                # NaN and infinity both show in the extremes, which takes no memory to ask.
                if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    raise UserError(
                        f"{self.place}, {self.label}: {name} holds numbers that are not finite",
                        "Take another copy of the base",
                    )
                tensors[name] = tensor.reshape(
                    shapes[name]
                )  # some files have 1x1 convolutions in the place of layers
        return tensors


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
