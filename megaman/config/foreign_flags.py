"""Flags of kohya's scripts and diffusers' examples, and what to write here instead.

Whoever comes from there types these by habit. Without the table a misspelling's nearest name would
be proposed, such as --validation_data_dir for --train_data_dir. Names that both have are missing.
"""

from __future__ import annotations

import re
from collections.abc import Collection

REMEDIES = {
    # kohya's train_network.py
    "pretrained_model_name_or_path": "write --pretrained_model_name",
    "train_data_dir": "write --data_dir",
    "reg_data_dir": "write --class_data_dir",
    "dataset_config": "name the images' folder with --data_dir: there is no dataset file",
    "datasets": "name the images' folder with --data_dir: there is no dataset file",
    "general": "name the images' folder with --data_dir: there is no dataset file",
    "config_file": "write --config",
    "network_dim": "write --lora_rank",
    "network_alpha": "write --lora_alpha",
    "network_dropout": "write --lora_dropout",
    "network_module": "remove it: a LoRA is what is trained",
    "network_args": "for convolutions, add conv1 conv2 to --target_modules",
    "network_train_unet_only": "remove it: that is the default",
    "network_train_text_encoder_only": "remove it: the UNet is always trained",
    "unet_lr": "write --learning_rate",
    "optimizer_type": "write --optimizer",
    "max_train_epochs": "write --num_train_epochs",
    "min_snr_gamma": "write --snr_gamma",
    "flip_aug": "write --random_flip",
    "random_crop": "remove it: that is the default",
    "cache_latents": "remove it: that is the default",
    "cache_latents_to_disk": "remove it: that is the default",
    "cache_text_encoder_outputs": "remove it: that is the default",
    "max_token_length": "remove it: captions have 75 tokens",
    "clip_skip": "remove it: training uses the last layer; generate_megaman.py has --clip_skip",
    "sdpa": "remove it: that is the default",
    "xformers": "write --enable_xformers_memory_efficient_attention",
    "mem_eff_attn": "remove it: PyTorch's own attention is the default",
    "fp8_base": "write --base_precision fp8",
    "full_fp16": "remove it: the LoRA stays in float32",
    "full_bf16": "remove it: the LoRA stays in float32",
    "save_every_n_steps": "write --save_steps",
    "save_state": "remove it: every checkpoint can be resumed",
    "save_last_n_steps": "write --checkpoints_total_limit",
    "save_last_n_epochs": "write --checkpoints_total_limit",
    "save_model_as": "remove it: all LoRAs are safetensors",
    "output_name": "remove it: the file is megaman_lora.safetensors in --output_dir",
    "resume": "write --resume_from_checkpoint latest",
    "sample_prompts": "write --validation_prompts_file",
    "sample_every_n_steps": "write --validation_steps",
    "sample_every_n_epochs": "write --validation_epochs",
    "sample_at_first": "remove it: that is always done",
    "max_data_loader_n_workers": "write --dataloader_num_workers",
    "persistent_data_loader_workers": "remove it: images are encoded before the first step",
    "log_prefix": "remove it: logs are named after --output_dir",
    # diffusers' train_dreambooth_lora.py
    "rank": "write --lora_rank",
    "instance_data_dir": "write --data_dir",
    "instance_prompt": "write the character's name in --trigger_word",
    "checkpointing_steps": "write --save_steps",
    "num_class_images": "remove it: all images of --class_data_dir are used",
    # kohya's gen_img.py
    "ckpt": "write --base_model",
    "network_weights": "write --lora_path",
    "network_mul": "write the strength after a colon: --lora_path PATH:0.8",
    "from_file": "write --prompts_file",
    "outdir": "write --output_dir",
    "images_per_prompt": "write --num_images_per_prompt",
    "W": "write --width",
    "H": "write --height",
    "steps": "write --num_inference_steps",
    "scale": "write --guidance_scale",
    "sampler": "write --scheduler",
}
FLAG = re.compile(r"--(\w+)")


def remedy_of(name: str, flags: Collection[str]) -> str | None:
    """What to write instead of another program's flag, if it is one; flags are the script's own.

    A remedy for the other script's flags is not given.
    """
    remedy = REMEDIES.get(name)
    if remedy is None or remedy.startswith("remove"):
        return remedy
    return remedy if set(FLAG.findall(remedy)) <= set(flags) else None
