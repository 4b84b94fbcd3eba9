"""Models without contents, which trace the memory that a computation needs in a second, whatever
the size."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class _LiveStorages(TorchDispatchMode):
    """Follows the bytes of the storages that operators allocate, and their peak; storages that
    existed before do not count."""

    def __init__(self, existing: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in existing})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = None
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage.nbytes()).atexit = False

    def _remove(self, size: int) -> None:
        self.live -= size


class FakeModels:
    """Makes models from the device meta fake: without contents, but as if on the CPU.

    On the CPU even for a GPU, because a torch without CUDA cannot differentiate CUDA tensors.
    """

    def __init__(self, *models: nn.Module):
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._models = models
        with self._mode:
            for model in models:
                for module in model.modules():
                    _make_fake(module)

    def peak(self, compute: Callable[[], object]) -> int:
        """Bytes at the peak of compute beyond the models' own; every tensor that it makes is
        fake."""
        storages = _LiveStorages(_tensors(self._models))
        with self._mode, storages:
            compute()
        return storages.peak


def _make_fake(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        empty = torch.empty_like(parameter, device="cpu")
        setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, torch.empty_like(buffer, device="cpu"))


def _tensors(models: Iterable[nn.Module]) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for model in models:
        tensors += [*model.parameters(), *model.buffers()]
    return tensors


def tensor_bytes(*models: nn.Module) -> int:
    """Bytes of the models' parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(models))


def norms_in_float32(*models: nn.Module) -> None:
    """Have the models' norms compute in float32 and return float32, as under CUDA's autocast, but
    not under the CPU's.

    In half precision they are a tenth of a training step's memory.
    """

    def to_float32(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.float() for tensor in inputs)

    for model in models:
        for module in model.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.float()
                module.register_forward_pre_hook(to_float32)
