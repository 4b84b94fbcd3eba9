"""How a run computes its steps: by a rule, or as stored in its checkpoint.

These settings change the speed, the memory and the last bits of a step, never its mathematics. A
checkpoint stores them, so that a resumed run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import is_xformers_available

from megaman import schema
from megaman.errors import UserError, summarize_error
from megaman.runtime import DTYPES, ComputeSettings, choose_compute
from megaman.threads import MAX_THREADS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

XFORMERS = "enable_xformers_memory_efficient_attention"  # diffusers' flag
# Each setting as a checkpoint stores it, with the flags that decide it. The VAE's tile size
# follows from the memory alone.
FLAGS = {
    "dtype": ("mixed_precision",),
    "memory_format": ("memory_format",),
    "attention": (XFORMERS,),
    "compile": ("compile",),
    "gradient_checkpointing": ("gradient_checkpointing",),
    "vae_tile": (),
    "split": ("train_batch_size", "gradient_accumulation_steps"),
}
REQUESTS = list(chain.from_iterable(FLAGS.values()))
PRECISIONS = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
# torch stops compiling a function, here the forward of all blocks of a kind, after eight variants:
# a block's channels and LoRA and a bucket's shape each make one.
COMPILED_SHAPES = 256
INDENT = "           "  # of a line that continues the one above


@dataclass(frozen=True)
class MicroBatching:
    """How a process computes its images of an optimizer step: accumulation_steps micro-batches of
    size images."""

    size: int
    accumulation_steps: int

    def smaller(self) -> MicroBatching | None:
        """The same images in micro-batches of at most half the size; None if the size is 1."""
        if self.size == 1:
            return None
        size = next(half for half in range(self.size // 2, 0, -1) if self.size % half == 0)
        return MicroBatching(size, self.accumulation_steps * (self.size // size))


@dataclass(frozen=True)
class TrainingCompute(ComputeSettings):
    """Everything that shapes the computation of a step but not its mathematics.

    attention is sdpa or xformers; vae_tile the side in pixels of the VAE's tiles for sample images,
    0 for none; requested the values of the flags in REQUESTS; threads torch's CPU threads.
    """

    attention: str
    compile: bool
    gradient_checkpointing: bool
    vae_tile: int
    micro_batching: MicroBatching
    requested: Mapping[str, Any]
    threads: int


def to_record(compute: TrainingCompute) -> dict[str, Any]:
    """The settings as JSON, for checkpoints and training_config.json."""
    batching = compute.micro_batching
    return {
        "device": compute.device.type,
        "dtype": dtype_name(compute.dtype),
        "memory_format": compute.memory_format,
        "attention": compute.attention,
        "compile": compute.compile,
        "gradient_checkpointing": compute.gradient_checkpointing,
        "vae_tile": compute.vae_tile,
        "split": {"size": batching.size, "count": batching.accumulation_steps},
        "asked": dict(compute.requested),
        "threads": compute.threads,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def choose_training_compute(
    requested: Mapping[str, Any],
    explicit: Collection[str],
    device: torch.device,
    width: int,
    saved: Any,
) -> tuple[TrainingCompute, list[str]]:
    """The settings of a run, and lines to print about them.

    A setting that a checkpoint stored on the same kind of device stays, unless a typed flag asks
    for something else than it did then.

    Args:
        requested: the values of the flags in REQUESTS.
        explicit: the names of the flags that were typed.
        width: channels of the UNet's first block.
        saved: what the checkpoint stored, of whatever type; None for a new run.

    Raises:
        UserError: xformers is requested on an NVIDIA GPU and not installed.
    """
    rule = _by_rule(requested, device, width)
    checkpoint, notes = _usable(saved, device.type)
    chosen = rule
    if checkpoint is not None:
        kept = _kept_settings(checkpoint, requested, explicit, device.type)
        chosen = _keep(rule, checkpoint, kept, width)
        notes += _differences(chosen, rule)
    if requested[XFORMERS] and device.type != "cuda":
        notes.append(f"{INDENT}xformers needs an NVIDIA GPU: torch's own attention (sdpa) is used")
    if requested["compile"] and device.type != "cuda":
        notes.append(
            f"{INDENT}--compile is for NVIDIA GPUs: on {device.type} it costs more than it saves"
        )
    return chosen, notes


def _by_rule(requested: Mapping[str, Any], device: torch.device, width: int) -> TrainingCompute:
    """The settings of a new run."""
    common = choose_compute(requested["mixed_precision"], device, width, requested["memory_format"])
    on_cuda = device.type == "cuda"
    xformers = requested[XFORMERS] and on_cuda
    if xformers and not is_xformers_available():
        raise UserError(
            f"--{XFORMERS}: xformers is not installed",
            "pip install xformers, or leave the flag out",
        )
    return TrainingCompute(
        **_fields(common),
        attention="xformers" if xformers else "sdpa",
        compile=requested["compile"] and on_cuda,
        gradient_checkpointing=requested["gradient_checkpointing"],
        vae_tile=0,
        micro_batching=MicroBatching(
            requested["train_batch_size"], requested["gradient_accumulation_steps"]
        ),
        requested=dict(requested),
        threads=torch.get_num_threads(),
    )


def _fields(common: ComputeSettings) -> dict[str, Any]:
    """The fields that TrainingCompute inherits."""
    return {field.name: getattr(common, field.name) for field in fields(ComputeSettings)}


def _usable(saved: Any, device: str) -> tuple[dict[str, Any] | None, list[str]]:
    """What a checkpoint stored, None if it is of no use on this kind of device, and lines about
    that."""
    if saved is None:  # a new run, or a checkpoint of the first versions
        return None, []
    if isinstance(saved, dict):
        saved = {"threads": torch.get_num_threads(), **saved}  # early versions did not store it
    if not _is_record(saved):
        return None, [f"{INDENT}the checkpoint's compute settings are damaged: chosen anew"]
    if saved["device"] != device:
        return None, [
            f"{INDENT}the checkpoint was computed on {saved['device']}: chosen anew for {device}"
        ]
    return saved, []


def _kept_settings(
    checkpoint: dict[str, Any],
    requested: Mapping[str, Any],
    explicit: Collection[str],
    device: str,
) -> list[str]:
    """The names of the checkpoint's settings that stay."""

    def same_request(flag: str) -> bool:
        return flag not in explicit or requested[flag] == checkpoint["asked"].get(flag)

    return [
        name
        for name, flags in FLAGS.items()
        if all(map(same_request, flags)) and _is_possible(name, checkpoint, requested, device)
    ]


def _is_possible(
    name: str, checkpoint: dict[str, Any], requested: Mapping[str, Any], device: str
) -> bool:
    """Whether a setting of the checkpoint can be used in this run."""
    value = checkpoint[name]
    if name == "attention":
        return value == "sdpa" or (device == "cuda" and is_xformers_available())
    if name == "compile":
        return not value or device == "cuda"
    if name == "split":
        images = requested["train_batch_size"] * requested["gradient_accumulation_steps"]
        return value["size"] * value["count"] == images
    return True


def _keep(
    rule: TrainingCompute, checkpoint: dict[str, Any], kept: Collection[str], width: int
) -> TrainingCompute:
    """The settings of a new run with these of the checkpoint in their place."""
    settings = {**to_record(rule), **{name: checkpoint[name] for name in kept}}
    requested = dict(rule.requested)
    for name in kept:
        requested |= {flag: checkpoint["asked"].get(flag) for flag in FLAGS[name]}
    rule_dtype = dtype_name(rule.dtype)
    precision = PRECISIONS[settings["dtype"]]
    if settings["dtype"] == rule_dtype:
        precision = rule.requested["mixed_precision"]
    # Another device of the same kind may not have the checkpoint's precision.
    common = choose_compute(precision, rule.device, width, settings["memory_format"])
    if common.dtype != rule.dtype:
        reason = f"{dtype_name(common.dtype)} as in the checkpoint"
        common = replace(common, dtype_reason=reason)
    return replace(
        rule,
        **_fields(common),
        attention=settings["attention"],
        compile=settings["compile"],
        gradient_checkpointing=settings["gradient_checkpointing"],
        vae_tile=settings["vae_tile"],
        micro_batching=MicroBatching(settings["split"]["size"], settings["split"]["count"]),
        requested=requested,
    )


def _differences(chosen: TrainingCompute, rule: TrainingCompute) -> list[str]:
    """A line about the settings in which a resumed run differs from a new one."""
    ours, theirs = to_record(chosen), to_record(rule)
    pairs = [
        f"{name} {_show(ours[name])} instead of {_show(theirs[name])}"
        for name in FLAGS
        if ours[name] != theirs[name]
    ]
    return [f"{INDENT}as in the checkpoint: {', '.join(pairs)}"] if pairs else []


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['size']} x {value['count']}"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def prepare_unet(unet: UNet2DConditionModel, compute: TrainingCompute) -> None:
    """Have the UNet use the attention and compile its blocks as set, before a LoRA is injected.

    Raises UserError if xformers does not work here.
    """
    if compute.attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except Exception as error:  # its kernels are of another build or for other GPUs
            reason = summarize_error(error)
            remedy = f"Leave --{XFORMERS} out: torch's own attention is as frugal"
            raise UserError(f"xformers cannot be used here ({reason})", remedy) from None
    if compute.compile:
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, COMPILED_SHAPES
        )
        # In place: parameters keep their names, and blocks of one kind share what is compiled.
        unet.compile_repeated_blocks()


_is_on_or_off = schema.one_of(True, False)
_is_count = schema.whole(1, 2**28)
_is_record = schema.record(
    {
        "device": schema.one_of("cuda", "mps", "cpu"),
        "dtype": schema.one_of(*PRECISIONS),
        "memory_format": schema.one_of("contiguous", "channels_last"),
        "attention": schema.one_of("sdpa", "xformers"),
        "compile": _is_on_or_off,
        "gradient_checkpointing": _is_on_or_off,
        "vae_tile": schema.whole(0, 8192),
        "split": schema.record({"size": _is_count, "count": _is_count}, exact=True),
        "asked": schema.mapping(schema.instance(bool, int, str, type(None))),
        "threads": schema.whole(1, MAX_THREADS),
    }
)
