"""The peak memory of a computation that is not carried out: tensors without contents, whose storages are counted."""

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
    """Follows the bytes of the storages that operators make, and their peak; what was there before does not count."""

    def __init__(self, before: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in before})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage()) not in self._known:
                self._known[storage] = None
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage.nbytes()).atexit = False
        return result

    def _gone(self, size: int) -> None:
        self.live -= size


class Hollow:
    """Models without contents. They come from the device meta, and from here on are as if on the CPU: a torch without
    CUDA cannot differentiate tensors that say they are on a card."""

    def __init__(self, *models: nn.Module):
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._models = models
        with self._mode:
            for module in [module for model in models for module in model.modules()]:
                for name, parameter in list(module.named_parameters(recurse=False)):
                    empty = torch.empty_like(parameter, device="cpu")
                    setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))

    def peak(self, compute: Callable[[], object]) -> int:
        """Bytes at the peak of compute beyond the models' own; all tensors that it makes are without contents."""
        before = [tensor for model in self._models for tensor in (*model.parameters(), *model.buffers())]
        storages = _LiveStorages(before)
        with self._mode, storages:
            compute()
        return storages.peak


def size_of(*models: nn.Module) -> int:
    """Bytes of the models' parameters and buffers."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def norms_in_float32(*models: nn.Module) -> None:
    """Have the models' norms compute in float32 and hand float32 on, as CUDA's autocast does, and the CPU's does not.

    In half precision they are a tenth of a training step's memory.
    """
    for module in [module for model in models for module in model.modules()]:
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.float()
            module.register_forward_pre_hook(lambda _, inputs: tuple(tensor.float() for tensor in inputs))
