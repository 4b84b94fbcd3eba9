# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportOptionalCall=false, reportOptionalOperand=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# diffusers' models are built here from scratch, and its annotations of them are wrong.
"""Make the embedded base, demo/base/: art -> captioned pictures -> tokenizer -> VAE -> UNet and
text encoder -> export.

    python demo/make_base.py       about two hours on two cores; run again to resume

Every stage keeps what it made in --work_dir and is skipped once complete. A stage's random numbers
come from the seed and its step, so that a stopped and resumed run sees the same batches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from art import SIZE, fetch, make_pictures
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from mosaics import draw_mosaic
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from megaman.files import share

# Stable Diffusion 1.5's; the statistics of our latents are folded into the quant convolutions
SCALING_FACTOR = 0.18215
# Stable Diffusion has 4: too few for two clashing colours in one latent cell (docs/lab-notes.md)
LATENT_CHANNELS = 8
POSITIONS = 77
VOCABULARY = 3200
HELD_OUT = 1024  # pictures at the end of the list that no stage trains on
# Words that the demo's and the documentation's prompts use: whole tokens, though the base's own
# captions lack them.
EXTRA_WORDS = Path(__file__).with_name("words.txt")

SHEET_PROMPTS = [
    "a blue robot, white background", "a red robot, antenna, green background",
    "a green robot, navy background", "a yellow robot, purple background",
    "pixel art, blue robot, running, facing right, green hills background",
    "pixel art, red robot, shooting, arm cannon, facing left, starry night background",
    "pixel art, pink robot, standing, white background",
    "pixel art, green monster, teal background",
    "a purple robot head, white background", "an orange cat, hat, blue background",
    "a green monster, sunset background", "a pixel art person, red shirt, city background",
]  # fmt: skip


@dataclass
class Stage:
    """Where a stage keeps its state, and how it is written so that a stop never leaves half a
    file."""

    folder: Path

    def load(self, name: str) -> dict | None:
        path = self.folder / f"{name}.pt"
        return torch.load(path, weights_only=True) if path.is_file() else None

    def save(self, name: str, state: dict) -> None:
        aside = self.folder / f"{name}.pt.aside"
        torch.save(state, aside)
        os.replace(aside, self.folder / f"{name}.pt")

    def log(self, name: str, **values: float) -> None:
        with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def make_data(work: Path, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    pictures_file, captions_file = work / "pictures.npy", work / "captions.json"
    if not captions_file.is_file():
        fetch(work / "art")
        pictures, captions, kinds = make_pictures(work / "art", count, seed)
        np.save(pictures_file, pictures)
        captions_file.write_text(
            json.dumps({"captions": captions, "kinds": kinds}), encoding="utf-8"
        )
    captions = json.loads(captions_file.read_text(encoding="utf-8"))["captions"]
    return np.load(pictures_file, mmap_mode="r"), captions


def make_mosaics(work: Path, count: int, seed: int) -> np.ndarray:
    """Pictures for the VAE alone: uint8 [count, 64, 64, 3]."""
    path = work / "mosaics.npy"
    if not path.is_file():
        rng = np.random.default_rng((seed, 3))
        mosaics = [
            draw_mosaic(rng) for _ in tqdm(range(count), desc="composing mosaics", unit="picture")
        ]
        aside = work / "mosaics.aside.npy"
        np.save(aside, np.stack(mosaics))
        os.replace(aside, path)
    return np.load(path, mmap_mode="r")


def make_tokenizer(folder: Path, captions: list[str]) -> CLIPTokenizer:
    """Learn a byte-level BPE vocabulary in CLIP's format (end-of-word suffix, lower case, 77
    positions)."""
    if not (folder / "vocab.json").is_file():
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


def _clip_vocabulary(learnt: dict[str, int], alphabet: list[str]) -> dict[str, int]:
    """CLIP's order: bytes, bytes that end a word, merges, then the two special tokens."""
    merged = [token for token, _ in sorted(learnt.items(), key=lambda item: item[1])]
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
    between the channels: small beside that of light and dark, it would be left for last), and a
    light KL term."""
    with torch.autocast("cpu", torch.bfloat16):
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


def train_vae(
    stage: Stage,
    vae: AutoencoderKL,
    pictures: np.ndarray,
    mosaics: np.ndarray,
    steps: int,
    seed: int,
) -> AutoencoderKL:
    """Train the VAE, three parts on pictures and five on mosaics, for four steps of five on crops
    of half the side."""
    vae = vae.to(memory_format=torch.channels_last).train()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    start, train_count = 0, len(pictures) - HELD_OUT
    if state := stage.load("vae"):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    bar = tqdm(
        range(start, steps), desc="VAE", initial=start, total=steps, unit="step", mininterval=10
    )
    for step in bar:
        rng = np.random.default_rng((seed, 1, step))
        torch.manual_seed(seed * 1_000_003 + step)
        whole = step % 5 == 4
        part = 1 if whole else 3
        chosen = [
            source[np.sort(rng.integers(0, count, part * share))]
            for source, count, share in ((pictures, train_count, 3), (mosaics, len(mosaics), 5))
        ]
        batch = np.concatenate(chosen)
        if not whole:  # crops of half the side teach the same textures at a quarter of the cost
            top, left = rng.integers(0, SIZE // 2 + 1, 2)
            batch = batch[:, top : top + SIZE // 2, left : left + SIZE // 2]
        set_rate(optimizer, 1.5e-3, step, steps, warmup=200, decay_from=0.3)
        loss = vae_loss(vae, to_tensor(batch))
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            psnr = vae_psnr(vae, pictures[-256:])
            bar.set_postfix(psnr=f"{psnr:.2f}")
            stage.log("vae", step=step + 1, loss=loss.item(), held_out_psnr=psnr, time=time.time())
            stage.save(
                "vae",
                {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
            )
    return vae.eval()


def set_rate(
    optimizer: torch.optim.Optimizer,
    peak: float,
    step: int,
    steps: int,
    warmup: int,
    decay_from: float,
) -> None:
    """Warm up, hold, and from the share decay_from of the run fall to zero along a cosine."""
    share = max(step / steps - decay_from, 0) / (1 - decay_from)
    rate = peak * min((step + 1) / warmup, 1) * (0.5 + 0.5 * math.cos(math.pi * share))
    for group in optimizer.param_groups:
        group["lr"] = rate


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1 ... 1, channels last."""
    pixels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    return pixels.to(memory_format=torch.channels_last).float() / 127.5 - 1


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB after encoding (to the mean) and
    decoding."""
    ratios = []
    for batch in np.array_split(pictures, max(len(pictures) // 32, 1)):
        pixels = to_tensor(batch)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / ((decoded - pixels) ** 2).mean(dim=(1, 2, 3))))
    return float(torch.cat(ratios).mean())


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Shift and scale the latents, channel by channel, so that latents * 0.18215 have mean 0 and
    deviation 1."""
    sample = pictures[np.linspace(0, len(pictures) - HELD_OUT - 1, 4096).astype(int)]
    means = torch.cat(
        [vae.encode(to_tensor(batch)).latent_dist.mode() for batch in np.array_split(sample, 128)]
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
def encode_pictures(
    stage: Stage, vae: AutoencoderKL, vae_steps: int, pictures: np.ndarray
) -> np.ndarray:
    """Scaled latent means of every picture, float16 [N, 8, 16, 16], kept on disk for this state of
    the VAE."""
    path = stage.folder / f"latents-{vae_steps}.npy"
    if not path.is_file():
        latents = [
            (
                vae.encode(to_tensor(pictures[start : start + 64])).latent_dist.mode()
                * SCALING_FACTOR
            )
            .half()
            .numpy()
            for start in tqdm(
                range(0, len(pictures), 64), desc="encoding", unit="batch", mininterval=10
            )
        ]
        aside = stage.folder / "latents.aside.npy"
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


def train_unet(
    stage: Stage,
    latents: np.ndarray,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    steps: int,
    seed: int,
    peak_rate: float,
    min_snr: float,
) -> None:
    """Train UNet and text encoder together; leaves their moving averages in them.

    Epsilon prediction, timesteps stratified over the batch, a tenth of the captions empty (Ho &
    Salimans 2022, arXiv 2207.12598). For the share min_snr of the steps min-SNR weights with gamma
    5 (Hang et al. 2023, arXiv 2303.09556): they bring shapes and colours early. Then none: they
    leave so little weight on low noise that flat areas stay grainy.
    """
    scheduler = new_scheduler()
    unet.to(memory_format=torch.channels_last)
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    parameters = list(both.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=peak_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    average = {name: value.detach().clone() for name, value in both.state_dict().items()}
    start, train_count, batch_size = 0, len(latents) - HELD_OUT, 16
    if state := stage.load("unet"):
        both.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]
    tokens = tokenizer(
        [*captions, ""],
        padding="max_length",
        truncation=True,
        max_length=POSITIONS,
        return_tensors="pt",
    )
    input_ids, empty = tokens.input_ids[:-1], tokens.input_ids[-1]
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = snr.clamp(max=5.0) / snr
    started, losses = time.time(), []
    bar = tqdm(
        range(start, steps), desc="UNet", initial=start, total=steps, unit="step", mininterval=10
    )
    for step in bar:
        rng = np.random.default_rng((seed, 2, step))
        torch.manual_seed(seed * 1_000_003 + step)
        chosen = rng.integers(0, train_count, batch_size)
        clean = torch.from_numpy(latents[chosen].astype(np.float32))
        ids = input_ids[chosen].clone()
        ids[torch.from_numpy(rng.random(batch_size) < 0.1)] = empty
        noise = torch.randn_like(clean)
        timesteps = torch.from_numpy(
            ((np.arange(batch_size) + rng.random(batch_size)) / batch_size * 1000).astype(int)
        )
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(
            memory_format=torch.channels_last
        )
        set_rate(optimizer, peak_rate, step, steps, warmup=300, decay_from=0.5)
        noise_pred = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        squared = ((noise_pred - noise) ** 2).mean(dim=(1, 2, 3))
        (squared * weights[timesteps] if step < min_snr * steps else squared).mean().backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.999, (1 + step) / (20 + step))
        for name, value in both.state_dict().items():
            if value.is_floating_point():
                average[name].lerp_(value, 1 - decay)
        losses.append(squared.mean().detach())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            loss = float(torch.stack(losses[-250:]).mean())
            bar.set_postfix(loss=f"{loss:.4f}")
            stage.log(
                "unet", step=step + 1, loss=loss, time=time.time(), seconds=time.time() - started
            )
            stage.save(
                "unet",
                {
                    "model": both.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "step": step + 1,
                },
            )
        if (step + 1) % 2000 == 0 or step + 1 == steps:
            kept = {name: value.clone() for name, value in both.state_dict().items()}
            both.load_state_dict(average)
            draw_sheet(
                assemble(tokenizer, text_encoder, vae, unet), stage.folder / f"sheet-{step + 1}.png"
            )
            both.load_state_dict(kept)
    both.load_state_dict(average)
    both.eval()


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


def draw_sheet(pipeline: StableDiffusionPipeline, path: Path, across: int = 6) -> None:
    """Samples of SHEET_PROMPTS, a row a prompt, the seeds 0 ... across - 1 side by side, at twice
    their size."""
    pipeline.set_progress_bar_config(disable=True)
    sheet = Image.new("RGB", (across * SIZE * 2, len(SHEET_PROMPTS) * SIZE * 2))
    for row, prompt in enumerate(SHEET_PROMPTS):
        generators = [torch.Generator().manual_seed(seed) for seed in range(across)]
        images = pipeline(
            [prompt] * across, generator=generators, num_inference_steps=20, guidance_scale=5.0
        ).images
        for column, image in enumerate(images):
            large = image.resize((SIZE * 2, SIZE * 2), Image.Resampling.NEAREST)
            sheet.paste(large, (column * SIZE * 2, row * SIZE * 2))
    sheet.save(path)


def export(pipeline: StableDiffusionPipeline, folder: Path, work: Path) -> None:
    """Write the base in fp16 in diffusers' layout, with the sample sheet and the curves of its
    card."""
    half = pipeline.to(torch.float16)
    half.save_pretrained(folder, safe_serialization=True)
    for weights in folder.rglob("*.safetensors"):
        share(weights)
    text_config = (
        folder / "text_encoder" / "config.json"
    )  # transformers would load in the dtype that stands there
    content = text_config.read_text(encoding="utf-8").replace(
        '"dtype": "float16"', '"dtype": "float32"'
    )
    text_config.write_text(content, encoding="utf-8")
    curves = {
        name: [
            json.loads(line)
            for line in (work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("vae", "unet")
    }
    (folder / "training_curve.json").write_text(json.dumps(curves, indent=1), encoding="utf-8")
    shutil.copy(
        max(work.glob("sheet-*.png"), key=lambda path: int(path.stem.split("-")[1])),
        folder / "samples.png",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--work_dir", type=Path, default=here / ".work")
    parser.add_argument("--output_dir", type=Path, default=here / "base")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--vae_steps", type=int, default=18_000)
    parser.add_argument("--unet_steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--continue_from",
        type=Path,
        help="a base that was made before: go on from its weights, with a new optimizer",
    )
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    stage = Stage(args.work_dir)

    pictures, captions = make_data(args.work_dir, args.pictures + HELD_OUT, args.seed)
    mosaics = make_mosaics(args.work_dir, args.pictures // 2, args.seed)
    if args.continue_from:
        tokenizer = CLIPTokenizer.from_pretrained(args.continue_from / "tokenizer")
        vae, unet, text_encoder = (
            kind.from_pretrained(args.continue_from / part, dtype=torch.float32)
            for kind, part in (
                (AutoencoderKL, "vae"),
                (UNet2DConditionModel, "unet"),
                (CLIPTextModel, "text_encoder"),
            )
        )
        unet_rate, min_snr = 4e-4, 0.0
    else:
        tokenizer = make_tokenizer(args.work_dir / "tokenizer", captions[:-HELD_OUT])
        torch.manual_seed(args.seed)
        vae, unet, text_encoder = new_vae(), new_unet(), new_text_encoder(len(tokenizer))
        unet_rate, min_snr = 6e-4, 0.65
    vae = train_vae(stage, vae, pictures, mosaics, args.vae_steps, args.seed)
    fold_statistics(vae, pictures)
    latents = encode_pictures(stage, vae, args.vae_steps, pictures)
    train_unet(
        stage,
        latents,
        captions,
        tokenizer,
        vae,
        unet,
        text_encoder,
        args.unet_steps,
        args.seed,
        unet_rate,
        min_snr,
    )
    export(assemble(tokenizer, text_encoder, vae, unet), args.output_dir, args.work_dir)
    print(
        f"The base is in {args.output_dir}; "
        f"held-out VAE quality {vae_psnr(vae.float(), pictures[-512:]):.2f} dB"
    )


if __name__ == "__main__":
    main()
