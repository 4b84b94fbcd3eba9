"""Read crops of images in the workers of a DataLoader.

In a module of its own, as a worker that is spawned (Windows, macOS) loads it anew: diffusers and
peft would take each worker seconds and memory, and it needs neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from megaman.data.images import BadImageError

if TYPE_CHECKING:
    import torch

    from megaman.data.crops import Crop
    from megaman.data.dataset import MegaManDataset


class CropReader(Dataset):
    """Loads the given crops of each image, by the image's index in the dataset; for a damaged
    image, the reason in place of an exception."""

    def __init__(self, dataset: MegaManDataset, requests: Sequence[tuple[int, list[Crop]]]):
        self._dataset = dataset
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, i: int) -> list[torch.Tensor] | str:
        try:
            return self._dataset.load_crops(*self._requests[i])
        except BadImageError as error:
            return str(error)
