# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportOptionalCall=false, reportOptionalOperand=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# diffusers' models are built here from scratch, and its annotations of them are wrong.
"""Make the embedded base, demo/base/: art -> captioned images -> tokenizer -> VAE -> UNet and text
encoder -> export.

    python demo/make_base.py                                            # from nothing
    python demo/make_base.py --continue_from demo/base --vae_steps 0    # from the committed base
    python demo/make_base.py --export                                   # write the trained base
    python demo/make_base.py --continue_from demo/base --vae_steps 0 --export --decay_steps 0
                                      # settle the words that no caption has, without training

The first two stop after --unet_steps, and at any time with Ctrl+C or SIGTERM: then they save and
end. Run again with the same --work_dir, they resume, whatever they started from. UNet and text
encoder train at a constant rate, so a run is usable wherever it stops; --export lets the rate decay
for a few hundred steps on a copy of the weights, which takes minutes, and leaves the run itself as
it was.

A step's random numbers come from the seed and the step alone, so that a resumed run sees the same
batches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from art import SIZE, compose_images, fetch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from mosaics import draw_mosaic
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaman.files import share

# Stable Diffusion 1.5's; the statistics of our latents are folded into the quant convolutions.
SCALING_FACTOR = 0.18215
# Stable Diffusion has 4: too few for two clashing colors in a latent cell (docs/lab-notes.md).
LATENT_CHANNELS = 8
POSITIONS = 77
VOCABULARY = 3200
HELD_OUT = 1024  # images at the end of the list that no stage trains on
# Words of the demo's and the documentation's prompts: whole tokens, even if the base's own captions
# lack them.
EXTRA_WORDS = Path(__file__).with_name("words.txt")

BATCH_SIZE = 16
# Of a batch; expressions are few cells of a tenth of the art and hardly learned without it. Half
# of a batch costs the other art its hues (docs/lab-notes.md).
PORTRAIT_SHARE = 0.2
UNET_RATE = 4e-4
WARMUP_STEPS = 300
AVERAGE_DECAY = 0.9995
MIN_SNR_STEPS = 4000  # of a run from nothing
UNKNOWN_WORD_SPREAD = 0.02  # that of transformers' new embeddings
SAVE_STEPS = 250
SHEET_STEPS = 2000

SHEET_PROMPTS = [
    "a blue robot, white background",
    "a red robot, antenna, green background",
    "pixel art, blue robot, running, round helmet, visor, facing right, green hills background",
    "pixel art, red robot, shooting, arm cannon, square helmet, facing left, "
    "starry night background",
    "pixel art, pink robot, standing, front view, white background",
    "pixel art, yellow robot, waving, front view, purple background",
    "pixel art, green robot, arms raised, front view, orange background",
    "pixel art, purple robot, kneeling, facing right, white background",
    "pixel art, teal robot, jumping, facing left, pink background",
    "pixel art, white robot, flying, facing right, navy background",
    "pixel art, orange robot, sitting, front view, teal background",
    "pixel art, gray robot, aiming up, arm cannon, facing right, yellow background",
    "pixel art, blue robot, portrait, happy, yellow background",
    "pixel art, green robot, portrait, angry, white background",
    "pixel art, green monster, teal background",
    "an orange cat, hat, blue background",
]


class StopSignal:
    """Set by SIGTERM or Ctrl+C; loops look at it between two steps."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True


def load_state(path: Path) -> dict | None:
    return torch.load(path, weights_only=True, map_location="cpu") if path.is_file() else None


def save_state(path: Path, state: dict) -> None:
    """Write aside and rename, so that a stop never leaves half a file."""
    aside = path.with_suffix(".aside")
    torch.save(state, aside)
    os.replace(aside, path)


def append_log(path: Path, **values: float) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def make_data(work: Path, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    images_file, captions_file = work / "images.npy", work / "captions.json"
    if not captions_file.is_file():
        fetch(work / "art")
        images, captions, kinds = compose_images(work / "art", count, seed)
        np.save(images_file, images)
        content = json.dumps({"captions": captions, "kinds": kinds})
        captions_file.write_text(content, encoding="utf-8")
    captions = json.loads(captions_file.read_text(encoding="utf-8"))["captions"]
    return np.load(images_file, mmap_mode="r"), captions


def make_mosaics(work: Path, count: int, seed: int) -> np.ndarray:
    """Images for the VAE alone: uint8 [count, 64, 64, 3]."""
    path = work / "mosaics.npy"
    if not path.is_file():
        rng = np.random.default_rng((seed, 3))
        mosaics = [
            draw_mosaic(rng) for _ in tqdm(range(count), desc="composing mosaics", unit="image")
        ]
        aside = work / "mosaics.aside.npy"
        np.save(aside, np.stack(mosaics))
        os.replace(aside, path)
    return np.load(path, mmap_mode="r")


def make_tokenizer(folder: Path, captions: list[str]) -> CLIPTokenizer:
    """Learn a byte-level BPE vocabulary in CLIP's format (end-of-word suffix, lower case, 77
    positions)."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
        bpe.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(r"\s+", " "), normalizers.Lowercase()]
        )
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY - 2,
            end_of_word_suffix="</w>",
            initial_alphabet=alphabet,
            show_progress=False,
        )
        words = EXTRA_WORDS.read_text(encoding="utf-8").split()
        bpe.train_from_iterator([*captions, *([" ".join(words)] * 200)], trainer)
        content = json.loads(bpe.to_str())["model"]
        vocabulary = _clip_vocabulary(content["vocab"], alphabet)
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["merges"]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "merges.txt").write_text(
            "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
        )
        (folder / "vocab.json").write_text(
            json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8"
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=POSITIONS)
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _clip_vocabulary(learned: dict[str, int], alphabet: list[str]) -> dict[str, int]:
    """CLIP's order: bytes, bytes that end a word, merges, then the two special tokens."""
    merged = [token for token, _ in sorted(learned.items(), key=lambda item: item[1])]
    basic = [*alphabet, *(f"{character}</w>" for character in alphabet)]
    tokens = [
        *basic,
        *(token for token in merged if token not in set(basic)),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return {token: index for index, token in enumerate(tokens)}


def new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
        scaling_factor=SCALING_FACTOR,
    )
    with torch.no_grad():  # the default posterior's noise drowns the latents: begin almost without
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.05
        vae.quant_conv.bias[LATENT_CHANNELS:] = -8.0
    return vae


def vae_loss(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, those of hues too (of 4 x 4 averages, and of the difference
    between the channels: small next to that of light and dark, it would be learned last), and a
    light KL term."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        moments = vae.quant_conv(vae.encoder(pixels)).float()
        mean, logvar = moments.chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * logvar.clamp(-20, 4)) * torch.randn_like(mean)
        decoded = vae.decode(latents).sample.float()
    error = decoded - pixels
    hue = F.avg_pool2d(error, 4)
    clash = error - error.mean(dim=1, keepdim=True)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return (
        error.abs().mean()
        + 2 * (error**2).mean()
        + hue.abs().mean()
        + 6 * (clash**2).mean()
        + 2e-5 * kl
    )


@dataclass(frozen=True)
class VaeData:
    """What the VAE learns from: images, of which the last HELD_OUT are never trained on, and
    mosaics."""

    images: np.ndarray
    mosaics: np.ndarray

    def batch(self, rng: np.random.Generator, whole: bool) -> np.ndarray:
        """Three parts images and five parts mosaics; unless whole, crops of half the side, and
        three times as many: they teach the same textures at a quarter of the cost."""
        size = self.images.shape[1]
        parts = 1 if whole else 3
        from_images = rng.integers(0, len(self.images) - HELD_OUT, parts * 3)
        from_mosaics = rng.integers(0, len(self.mosaics), parts * 5)
        batch = np.concatenate(
            [self.images[np.sort(from_images)], self.mosaics[np.sort(from_mosaics)]]
        )
        if whole:
            return batch
        top, left = rng.integers(0, size // 2 + 1, 2)
        return batch[:, top : top + size // 2, left : left + size // 2]


def train_vae(
    work: Path, vae: AutoencoderKL, data: VaeData, steps: int, seed: int, stop: StopSignal
) -> bool:
    """Train the VAE, four steps of five on crops; False if stopped before the last step."""
    vae.to(memory_format=torch.channels_last).train()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    start = 0
    if state := load_state(work / "vae.pt"):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    bar = tqdm(
        range(start, steps), desc="VAE", initial=start, total=steps, unit="step", mininterval=10
    )
    for step in bar:
        torch.manual_seed(seed * 1_000_003 + step)
        batch = data.batch(np.random.default_rng((seed, 1, step)), whole=step % 5 == 4)
        decayed = max(step / steps - 0.3, 0) / 0.7  # from 30 % the rate falls along a cosine
        rate = 1.5e-3 * min((step + 1) / 200, 1) * (0.5 + 0.5 * math.cos(math.pi * decayed))
        set_rate(optimizer, rate)
        loss = vae_loss(vae, to_tensor(batch).to(vae.device))
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 500 == 0 or done == steps:
            psnr = vae_psnr(vae, data.images[-256:])
            bar.set_postfix(psnr=f"{psnr:.2f}")
            append_log(
                work / "vae.jsonl",
                step=done,
                loss=loss.item(),
                held_out_psnr=psnr,
                time=time.time(),
            )
        if done % 500 == 0 or done == steps or stop.received:
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            save_state(work / "vae.pt", state)
        if stop.received and done < steps:
            return False
    vae.eval()
    return True


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1 to 1, channels last."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    return pixels.to(memory_format=torch.channels_last).float() / 127.5 - 1


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB after encoding (to the mean) and
    decoding."""
    ratios = []
    for batch in np.array_split(images, max(len(images) // 32, 1)):
        pixels = to_tensor(batch).to(vae.device)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / ((decoded - pixels) ** 2).mean(dim=(1, 2, 3))))
    return float(torch.cat(ratios).mean())


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Shift and scale the latents, channel by channel, so that latents * 0.18215 have mean 0 and
    deviation 1."""
    sample = images[np.linspace(0, len(images) - HELD_OUT - 1, 4096).astype(int)]
    means = torch.cat(
        [
            vae.encode(to_tensor(batch).to(vae.device)).latent_dist.mode()
            for batch in np.array_split(sample, 128)
        ]
    )
    shift, spread = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    gain = 1 / (spread * SCALING_FACTOR)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:LATENT_CHANNELS] = (quant.bias[:LATENT_CHANNELS] - shift) * gain
    quant.weight[:LATENT_CHANNELS] *= gain[:, None, None, None]
    quant.bias[LATENT_CHANNELS:] += 2 * gain.log()
    post.bias += (post.weight * shift[None, :, None, None]).sum(dim=(1, 2, 3))
    post.weight /= gain[None, :, None, None]


@torch.no_grad()
def encode_images(path: Path, vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Scaled latent means of every image, float16 [N, 8, 16, 16]; kept on disk."""
    if not path.is_file():
        latents = []
        for start in tqdm(range(0, len(images), 64), desc="encoding", unit="batch", mininterval=10):
            pixels = to_tensor(images[start : start + 64]).to(vae.device)
            mean = vae.encode(pixels).latent_dist.mode() * SCALING_FACTOR
            latents.append(mean.half().cpu().numpy())
        aside = path.with_suffix(".aside.npy")
        np.save(aside, np.concatenate(latents))
        os.replace(aside, path)
    return np.load(path)


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 160, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=4,
        cross_attention_dim=128,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@dataclass(frozen=True)
class LatentData:
    """What UNet and text encoder learn from: scaled latents [N, 8, 16, 16] and token ids [N, 77];
    the last HELD_OUT are never trained on. empty_ids are those of no caption at all, portraits the
    rows of sprites with an expression."""

    latents: torch.Tensor
    input_ids: torch.Tensor
    empty_ids: torch.Tensor
    portraits: np.ndarray

    @classmethod
    def from_captions(
        cls,
        latents: np.ndarray,
        captions: list[str],
        tokenizer: CLIPTokenizer,
        device: torch.device,
    ) -> LatentData:
        tokens = tokenizer(
            [*captions, ""],
            padding="max_length",
            truncation=True,
            max_length=POSITIONS,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(device)
        portraits = [
            row for row, caption in enumerate(captions[:-HELD_OUT]) if ", portrait, " in caption
        ]
        return cls(
            torch.from_numpy(latents).to(device), ids[:-1], ids[-1], np.array(portraits, dtype=int)
        )

    def batch(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random latents with their token ids, PORTRAIT_SHARE of them portraits; one caption in
        ten is empty, which guidance needs (Ho & Salimans 2022, arXiv 2207.12598)."""
        rows = rng.integers(0, len(self.latents) - HELD_OUT, BATCH_SIZE)
        portraits = int(BATCH_SIZE * PORTRAIT_SHARE)
        rows[:portraits] = rng.choice(self.portraits, portraits)
        chosen = torch.from_numpy(rng.permutation(rows)).to(self.latents.device)
        ids = self.input_ids[chosen]
        ids[torch.from_numpy(rng.random(BATCH_SIZE) < 0.1)] = self.empty_ids
        return self.latents[chosen].float(), ids


class DenoiserTrainer:
    """UNet and text encoder, trained together to predict the noise, with a moving average of their
    weights.

    Timesteps are stratified over the batch. A run from nothing begins with min-SNR weights, gamma 5
    (Hang et al. 2023, arXiv 2303.09556), which bring shapes and colors early; kept on, they would
    leave flat areas grainy.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        data: LatentData,
        seed: int,
        min_snr_steps: int,
    ) -> None:
        unet.to(memory_format=torch.channels_last)
        self.model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
        self.parameters = list(self.model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=UNET_RATE, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
        )
        self.data, self.seed, self.min_snr_steps = data, seed, min_snr_steps
        self.device = data.latents.device
        self.scheduler = new_scheduler()
        snr = self.scheduler.alphas_cumprod / (1 - self.scheduler.alphas_cumprod)
        self.min_snr_weights = snr.clamp(max=5.0) / snr
        self.step = 0

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "min_snr_steps": self.min_snr_steps,
        }

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = [value.to(self.device) for value in state["average"]]
        self.step, self.min_snr_steps = state["step"], state["min_snr_steps"]

    def train_step(self, rate: float) -> torch.Tensor:
        """One step of 16 images; returns the mean squared error of the noise."""
        rng = np.random.default_rng((self.seed, 2, self.step))
        clean, ids = self.data.batch(rng)
        noise = self._noise(clean.shape, self.seed * 1_000_003 + self.step)
        timesteps = (np.arange(BATCH_SIZE) + rng.random(BATCH_SIZE)) / BATCH_SIZE * 1000
        timesteps = torch.from_numpy(timesteps.astype(int))
        squared = self._squared_error(clean, ids, noise, timesteps)
        loss = squared
        if self.step < self.min_snr_steps:
            loss = squared * self.min_snr_weights[timesteps].to(self.device)
        set_rate(self.optimizer, rate)
        loss.mean().backward()
        clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(AVERAGE_DECAY, self.step / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        return squared.mean().detach()

    def _noise(self, shape: torch.Size, seed: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def _squared_error(
        self, clean: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Per image, of the predicted noise."""
        timesteps = timesteps.to(self.device)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        prompt_embeds = self.model["text_encoder"](ids).last_hidden_state
        noise_pred = self.model["unet"](noisy, timesteps, prompt_embeds).sample
        return ((noise_pred - noise) ** 2).mean(dim=(1, 2, 3))

    @torch.no_grad()
    def held_out_loss(self, count: int = 256) -> float:
        """The error on images that were never trained on, with the same noise and timesteps every
        time."""
        start = len(self.data.latents) - HELD_OUT
        errors = []
        for first in range(0, count, 64):
            rows = slice(start + first, start + first + 64)
            timesteps = torch.arange(64) * 1000 // 64
            noise = self._noise(self.data.latents[rows].shape, first)
            clean = self.data.latents[rows].float()
            errors.append(self._squared_error(clean, self.data.input_ids[rows], noise, timesteps))
        return float(torch.cat(errors).mean())

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the model has the averages as its weights."""
        with torch.no_grad():
            own = [parameter.clone() for parameter in self.parameters]
            torch._foreach_copy_(self.parameters, self.average)
            yield
            torch._foreach_copy_(self.parameters, own)


class DenoiserRun:
    """A DenoiserTrainer with what it writes: its state, its curve, sample sheets and snapshots."""

    def __init__(
        self,
        trainer: DenoiserTrainer,
        pipeline: StableDiffusionPipeline,
        work: Path,
        snapshot_hours: float,
    ) -> None:
        self.trainer, self.pipeline, self.work = trainer, pipeline, work
        self.snapshot_seconds = snapshot_hours * 3600
        self.losses: list[torch.Tensor] = []

    def train(self, steps: int, stop: StopSignal) -> None:
        """Train at a constant rate up to `steps` or the stop signal."""
        trainer = self.trainer
        last_snapshot = time.monotonic()
        bar = tqdm(
            range(trainer.step, steps),
            desc="UNet",
            initial=trainer.step,
            total=steps,
            unit="step",
            mininterval=30,
        )
        for step in bar:
            self.losses.append(trainer.train_step(UNET_RATE * min((step + 1) / WARMUP_STEPS, 1)))
            done = trainer.step
            ending = stop.received or done == steps
            if done % SAVE_STEPS == 0 or ending:
                bar.set_postfix(loss=f"{self.log():.4f}")
                save_state(self.work / "unet.pt", trainer.state())
            if done % (SHEET_STEPS // 2) == 0:
                with trainer.averaged_weights():
                    append_log(
                        self.work / "held_out.jsonl", step=done, loss=trainer.held_out_loss()
                    )
            if done % SHEET_STEPS == 0:
                with trainer.averaged_weights():
                    draw_sheet(self.pipeline, self.work / f"sheet-{done:06d}.png")
            if ending or time.monotonic() - last_snapshot > self.snapshot_seconds:
                self.write_snapshot()
                last_snapshot = time.monotonic()
            if stop.received:
                break

    def log(self) -> float:
        loss = float(torch.stack(self.losses).mean())
        self.losses.clear()
        values = {
            "step": self.trainer.step,
            "loss": loss,
            "time": time.time(),
            "cpu_seconds": time.process_time(),
        }
        append_log(self.work / "unet.jsonl", **values)
        return loss

    def write_snapshot(self) -> None:
        """The averaged weights as a base of its own; the two newest are kept."""
        folder = self.work / "snapshots" / f"step-{self.trainer.step:06d}"
        with self.trainer.averaged_weights():
            save_half(self.pipeline, folder)
        for old in sorted(folder.parent.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    def decay(self, steps: int) -> None:
        """Let the rate fall to zero over `steps`: the end that a schedule would have had. Nothing
        of it is saved."""
        bar = tqdm(range(steps), desc="decay", unit="step", mininterval=30)
        losses = [self.trainer.train_step(UNET_RATE * (1 - step / steps)) for step in bar]
        last = float(torch.stack(losses[-100:]).mean())
        print(
            f"loss over the last steps of the decay {last:.4f}, "
            f"held out {self.trainer.held_out_loss():.4f}"
        )


def assemble(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def draw_sheet(pipeline: StableDiffusionPipeline, path: Path, across: int = 4) -> None:
    """Samples of SHEET_PROMPTS, a row a prompt, the seeds 0 ... across - 1 side by side, at twice
    their size."""
    pipeline.set_progress_bar_config(disable=True)
    sheet = Image.new("RGB", (across * SIZE * 2, len(SHEET_PROMPTS) * SIZE * 2))
    for row, prompt in enumerate(SHEET_PROMPTS):
        generators = [torch.Generator().manual_seed(seed) for seed in range(across)]
        images = pipeline(
            [prompt] * across, generator=generators, num_inference_steps=20, guidance_scale=4.0
        ).images
        for column, image in enumerate(images):
            large = image.resize((SIZE * 2, SIZE * 2), Image.Resampling.NEAREST)
            sheet.paste(large, (column * SIZE * 2, row * SIZE * 2))
    sheet.save(path)


def save_half(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in fp16 in diffusers' layout; the pipeline itself keeps its precision."""
    parts = {name: getattr(pipeline, name) for name in ("vae", "unet", "text_encoder")}
    kept = {
        name: {key: value.clone() for key, value in part.state_dict().items()}
        for name, part in parts.items()
    }
    aside = folder.with_name(folder.name + ".aside")
    pipeline.to(torch.float16).save_pretrained(aside, safe_serialization=True)
    pipeline.to(torch.float32)
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    for weights in aside.rglob("*.safetensors"):
        share(weights)
    for config in aside.glob("*/config.json"):
        content = json.loads(config.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)  # where these weights came from on this machine
        if "dtype" in content:
            content["dtype"] = "float32"  # transformers would load in the dtype named there
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


@torch.no_grad()
def settle_unknown_words(
    text_encoder: CLIPTextModel, input_ids: torch.Tensor, comma: int, seed: int
) -> None:
    """Give each token that no caption has the embedding of a comma, with a little noise of its own.

    No training has touched these tokens, of which trigger words are made. As they begin, they
    change what the words behind them mean; captions are full of commas, which change nothing
    (docs/lab-notes.md).
    """
    embeddings = cast(torch.nn.Embedding, text_encoder.get_input_embeddings()).weight
    unknown = torch.ones(len(embeddings), dtype=torch.bool)
    unknown[input_ids.unique().cpu()] = False
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(seed))
    settled = embeddings[comma] + UNKNOWN_WORD_SPREAD * noise.to(embeddings.device)
    embeddings[unknown] = settled[unknown]


def export(run: DenoiserRun, folder: Path, decay_steps: int, seed: int) -> None:
    """Decay, then replace the weights in `folder`, with the sample sheet and the curves of its
    card, if this run has any."""
    if decay_steps:
        run.decay(decay_steps)
    pipeline, trained_ids = run.pipeline, run.trainer.data.input_ids[:-HELD_OUT]
    comma = pipeline.tokenizer.convert_tokens_to_ids(",</w>")
    settle_unknown_words(pipeline.text_encoder, trained_ids, comma, seed)
    written = run.work / "export"
    save_half(run.pipeline, written)
    shutil.copytree(written, folder, dirs_exist_ok=True)
    curves = {}
    for name in ("vae", "unet", "held_out"):
        path = run.work / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        curves[name] = [json.loads(line) for line in lines]
    if any(curves.values()):
        (folder / "training_curve.json").write_text(json.dumps(curves, indent=1), encoding="utf-8")
    draw_sheet(run.pipeline, folder / "samples.png", across=6)
    print(
        f"The base is in {folder}: "
        f"{run.trainer.step - decay_steps} steps and {decay_steps} of decay"
    )


def prepare_vae(
    args: argparse.Namespace, images: np.ndarray, stop: StopSignal
) -> AutoencoderKL | None:
    """The finished VAE: from --work_dir, or taken over, trained and folded. None if stopped."""
    finished = args.work_dir / "vae"
    if not finished.is_dir():
        if args.continue_from:
            vae = AutoencoderKL.from_pretrained(args.continue_from / "vae", dtype=torch.float32)
        else:
            torch.manual_seed(args.seed)
            vae = new_vae()
        vae.to(args.device)
        if args.vae_steps:
            mosaics = make_mosaics(args.work_dir, args.images // 2, args.seed)
            data = VaeData(images, mosaics)
            if not train_vae(args.work_dir, vae, data, args.vae_steps, args.seed, stop):
                return None
            fold_statistics(vae, images)
        vae.save_pretrained(finished)
    return AutoencoderKL.from_pretrained(finished).to(args.device).eval()


def prepare_run(
    args: argparse.Namespace, vae: AutoencoderKL, images: np.ndarray, captions: list[str]
) -> DenoiserRun:
    """Tokenizer, UNet and text encoder: new, from --continue_from, or as an earlier run left them
    in --work_dir."""
    tokenizer_folder, state = args.work_dir / "tokenizer", load_state(args.work_dir / "unet.pt")
    if args.continue_from and not tokenizer_folder.is_dir():
        shutil.copytree(args.continue_from / "tokenizer", tokenizer_folder)
    tokenizer = make_tokenizer(tokenizer_folder, captions[:-HELD_OUT])
    if args.continue_from and not state:
        unet = UNet2DConditionModel.from_pretrained(
            args.continue_from / "unet", dtype=torch.float32
        )
        text_encoder = CLIPTextModel.from_pretrained(
            args.continue_from / "text_encoder", dtype=torch.float32
        )
    else:
        torch.manual_seed(args.seed)
        unet, text_encoder = new_unet(), new_text_encoder(len(tokenizer))
    latents = encode_images(args.work_dir / "latents.npy", vae, images)
    data = LatentData.from_captions(latents, captions, tokenizer, args.device)
    trainer = DenoiserTrainer(
        unet.to(args.device),
        text_encoder.to(args.device),
        data,
        args.seed,
        0 if args.continue_from else MIN_SNR_STEPS,
    )
    if state:
        trainer.restore(state)
    pipeline = assemble(tokenizer, text_encoder, vae, unet)
    return DenoiserRun(trainer, pipeline, args.work_dir, args.snapshot_hours)


def parse_args() -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--work_dir",
        type=Path,
        default=here / ".work",
        help="everything that a run needs to resume",
    )
    add("--output_dir", type=Path, default=here / "base", help="where --export writes")
    add("--continue_from", type=Path, help="a finished base whose weights to begin with")
    add("--images", type=int, default=40_000)
    add("--vae_steps", type=int, default=18_000)
    add("--unet_steps", type=int, default=30_000)
    add("--seed", type=int, default=0)
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    add(
        "--snapshot_hours",
        type=float,
        default=2.0,
        help="between averaged weights in --work_dir/snapshots",
    )
    add(
        "--export",
        action="store_true",
        help="decay and write the base, without training it further",
    )
    add("--decay_steps", type=int, default=600)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    stop = StopSignal()
    images, captions = make_data(args.work_dir, args.images + HELD_OUT, args.seed)
    vae = prepare_vae(args, images, stop)
    if vae is None:
        print("Stopped while training the VAE; run again to resume")
        return
    run = prepare_run(args, vae, images, captions)
    if args.export:
        export(run, args.output_dir, args.decay_steps, args.seed)
        return
    run.train(args.unet_steps, stop)
    print(
        f"{run.trainer.step} of {args.unet_steps} steps; "
        "run again to resume, or with --export to write the base"
    )


if __name__ == "__main__":
    main()
