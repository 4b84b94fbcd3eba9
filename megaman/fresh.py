"""Pictures without a cache: decoded and encoded anew at every visit, with a new random crop each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from megaman.errors import UserError
from megaman.images import BadImageError

if TYPE_CHECKING:
    from megaman.cache import Encoder
    from megaman.dataset import MegaManDataset


def drop_damaged(dataset: MegaManDataset, threads: int, progress: Callable[[Iterable], Iterable] = iter) -> None:
    """Decode every picture once and drop those that cannot be: later one of them would stop the run."""

    def reason_against(index: int) -> str | None:
        try:
            dataset.read(index, dataset.forms(index, 1, False, 0))
        except BadImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, threads)) as pool:
        reasons = list(progress(pool.map(reason_against, range(len(dataset)))))
    dataset.drop({path: reason for path, reason in zip(dataset.pictures, reasons, strict=True) if reason})


class Fresh:
    """Moments of a dataset's pictures, made when they are asked for; the counterpart of cache.Kept.

    The crop hangs on the seed and the visit's number in the run. Pictures are decoded ahead by threads, since Pillow
    lets others work while it decodes; on a card they wait in pinned memory.

    Args:
        vae_factor: pixels a side of one latent cell.
        threads: that decode.
    """

    def __init__(self, encoder: Encoder, dataset: MegaManDataset, flip: bool, seed: int, vae_factor: int, threads: int):
        self._encoder, self._dataset, self._flip, self._seed = encoder, dataset, flip, seed
        self._factor, self._pin = vae_factor, encoder.vae.device.type == "cuda"
        self._threads = ThreadPoolExecutor(max(1, threads), thread_name_prefix="decoding")
        self._coming: dict[int, Future[torch.Tensor]] = {}  # by number

    def __len__(self) -> int:
        return len(self._dataset)

    def count(self, index: int) -> int:
        """How many variants the picture has: itself, and its mirror image where that is wanted."""
        return 1 + (self._flip and not self._dataset.keeps_sides(index))

    def cells(self, index: int) -> tuple[int, int]:
        """Height and width of the picture in latents."""
        width, height = self._dataset.forms(index, 1, False, 0)[0].size
        return height // self._factor, width // self._factor

    def look_ahead(self, visits: Sequence[tuple[int, int]]) -> None:
        """Begin to decode the pictures of these visits, by number and index, and forget all others."""
        self._coming = {
            number: self._coming.get(number) or self._threads.submit(self._decode, number, index)
            for number, index in visits
        }

    def of(self, numbers: Sequence[int], indices: Sequence[int], picks: Sequence[int]) -> torch.Tensor:
        """Moments [B, 8, h, w] of these visits on the VAE's device, mirrored where the pick is 1."""
        missing = [visit for visit in zip(numbers, indices, strict=True) if visit[0] not in self._coming]
        for number, index in missing:
            self._coming[number] = self._threads.submit(self._decode, number, index)
        pictures = []
        for number, index, pick in zip(numbers, indices, picks, strict=True):
            try:
                picture = self._coming[number].result()
            except BadImageError as error:
                path = self._dataset.pictures[index]
                remedy = "Put it back as it was and go on with --resume_from_checkpoint latest"
                raise UserError(f"{path}: {error}", remedy) from None
            pictures.append(picture.flip(-1) if pick else picture)
        return self._encoder.moments(torch.stack(pictures))

    def _decode(self, number: int, index: int) -> torch.Tensor:
        form = self._dataset.forms(index, 1, False, f"{self._seed} visit {number}")[0]
        picture = self._dataset.read(index, [form])[0]
        return picture.pin_memory() if self._pin else picture
