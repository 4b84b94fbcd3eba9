"""Sample images while training: the same prompt with the same seeds, drawn with the model in hand,
in samples-N/.

And the denoising loss on pictures that were never trained on, at fixed noise and timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from megaman import runtime
from megaman.errors import UserError, summarize_error
from megaman.files import replacing_folder
from megaman.models.text_encoding import encode_captions
from megaman.runtime import default_batch_size
from megaman.sampling import denoise
from megaman.training import loss as diffusion
from megaman.training.signals import StoppedError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from megaman.models.base import Base

STEPS, GUIDANCE = 25, 7.5  # generate_megaman.py's defaults


class Validation:
    """Draws the prompt with each of the seeds, size pixels a side, on the device that the UNet is
    on.

    prompt_embeds holds the states [positions, width] of the prompt and of "", or is None where the
    text encoder is in training and has to be asked each time; tile_vae sets the VAE's tiles, where
    it draws in tiles; keeps_vae tells whether the run needs it on between; autocast makes the
    context in which the models compute; say takes a line; on_step is called after each sampling
    step and may raise StoppedError.
    """

    def __init__(
        self,
        base: Base,
        prompt_embeds: Mapping[str, torch.Tensor] | None,
        prompt: str,
        seeds: Sequence[int],
        size: int,
        tile_vae: Callable[[AutoencoderKL], None],
        keeps_vae: bool,
        autocast: Callable[[], AbstractContextManager],
        say: Callable[[str], None],
        on_step: Callable[[], None],
    ):
        self.base, self.prompt_embeds, self.prompt, self.seeds, self.size = (
            base,
            prompt_embeds,
            prompt,
            seeds,
            size,
        )
        self.tile_vae, self.keeps_vae = tile_vae, keeps_vae
        self.autocast, self.say, self.on_step = autocast, say, on_step
        self.at_once = default_batch_size(size, size)

    def draw(self, step: int, folder: Path) -> list[Image.Image]:
        """Draw after this step and write folder/00.png and so on; whatever fails here is said, and
        nothing is raised.

        Returns the images, those too that could not be written; none where there are no seeds.
        """
        images: list[Image.Image] = []
        if not self.seeds:
            return images
        unet = self.base.unet
        in_training = [unet] if self.prompt_embeds else [unet, self.base.text_encoder]
        try:
            self.tile_vae(self.base.vae)
            for model in in_training:
                model.eval()
            images = runtime.retry_on_oom(self._draw_all, self._one_at_a_time)
            with replacing_folder(folder) as aside:
                for j, image in enumerate(images):
                    image.save(aside / f"{j:02d}.png")
            if not all(image.getbbox() for image in images):
                self.say(
                    f"step {step}: a sample image is black all over; if more are, try --mixed_precision bf16 or no"
                )
        except StoppedError:
            pass
        except Exception as error:
            self.say(f"step {step}: no sample images ({summarize_error(error)}); training goes on")
        finally:
            for model in in_training:
                model.train()
            if self.keeps_vae:
                self.base.vae.disable_tiling()
            else:
                self.base.release("vae")
        return images

    def _draw_all(self) -> list[Image.Image]:
        words, images = [self.prompt, ""], []
        with self.autocast():
            states = self.prompt_embeds or encode_captions(
                self.base.text_encoder, self.base.tokenizer, words
            )
        for first in range(0, len(self.seeds), self.at_once):
            seeds = self.seeds[first : first + self.at_once]
            text, empty = (states[text].expand(len(seeds), -1, -1) for text in words)
            with self.autocast():
                images += denoise.draw_images(
                    self.base.unet,
                    self.base.vae,
                    denoise.make_sampler(self.base.noise_scheduler),
                    text,
                    empty,
                    seeds,
                    self.size,
                    self.size,
                    STEPS,
                    GUIDANCE,
                    self.on_step,
                )
        return images

    def _one_at_a_time(self) -> None:
        if self.at_once == 1:
            raise UserError("one at a time they need more memory than there is")
        self.at_once = 1


@torch.no_grad()
def held_out_loss(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    seed: int,
    draws: int = 8,
) -> float:
    """Mean loss over draws timesteps a picture, spread evenly over the schedule, with noise from
    the seed.

    latents is [N, 4, h, w], scaled; prompt_embeds [N, positions, width]. The same seed asks the same
    questions, so two models can be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = scheduler.config.num_train_timesteps
    losses = []
    for draw in range(draws):
        place = (draw + torch.rand(len(latents), generator=generator)) / draws
        timesteps = (place * steps).long().clamp(max=steps - 1)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps).to(unet.device, unet.dtype)
        states = prompt_embeds.to(unet.device, unet.dtype)
        noise_pred = unet(noisy, timesteps.to(unet.device), encoder_hidden_states=states).sample
        wanted = diffusion.target(scheduler, latents, noise, timesteps).to(unet.device)
        losses.append(diffusion.loss(noise_pred, wanted))
    return float(torch.stack(losses).mean())


def gain(without: Sequence[float], with_lora: Sequence[float]) -> list[float]:
    """The share by which the LoRA lowers each loss."""
    return [1 - after / before for before, after in zip(without, with_lora, strict=True)]
