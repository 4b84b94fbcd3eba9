"""CLIP's image features, by which images are alike if they show alike things (Radford et al. 2021,
arXiv 2103.00020). The model is a folder on this machine; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError

from megaman.errors import UserError, summarize_error
from megaman.safe_loading import check_model_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import CLIPVisionModelWithProjection

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 16  # images
REMEDY = "Name a folder with config.json and model.safetensors of a CLIP model"


class ClipFeatures:
    """The images' features of the CLIP model in a folder, computed on the CPU.

    Raises UserError if there is no such model.
    """

    def __init__(self, folder: Path):
        self._model = _load(folder)
        self.side = int(cast(Any, self._model.config).image_size)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float16]:
        """The features [N, D] of these images, each of length 1."""
        parts = []
        for start in range(0, len(images), BATCH):
            batch = [self._prepare(image) for image in images[start : start + BATCH]]
            features = self._model(pixel_values=torch.stack(batch)).image_embeds
            parts.append(torch.nn.functional.normalize(features, dim=-1).half())
        return torch.cat(parts).numpy()

    def _prepare(self, image: Image.Image) -> torch.Tensor:
        """The middle square of an image, as CLIP was trained: float32 [3, side, side]."""
        square = ImageOps.fit(
            image.convert("RGB"), (self.side, self.side), Image.Resampling.BICUBIC
        )
        pixels = torch.from_numpy(np.array(square, np.float32)) / 255
        return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


def _load(folder: Path) -> CLIPVisionModelWithProjection:
    from transformers import CLIPVisionModelWithProjection

    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UserError(f"--clip_model {folder} holds no CLIP model", REMEDY)
    check_model_folder(folder)
    try:
        model = CLIPVisionModelWithProjection.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = summarize_error(error)
        raise UserError(f"--clip_model {folder} cannot be loaded ({reason})", REMEDY) from None
    return model.float().eval()
