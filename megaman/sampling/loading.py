"""From a plan to what generates its images: device, base, LoRAs, and the limits of memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megaman import runtime
from megaman.lora.stack import LoraStack, misfits
from megaman.models.base import load_base
from megaman.models.configs import alias_notice, resolve_name, unet_width
from megaman.sampling.generator import ImageGenerator, Sampling
from megaman.sampling.limits import limits_for, tightest
from megaman.threads import ThreadPolicy, generation_workers

if TYPE_CHECKING:
    from megaman.processes import Processes
    from megaman.sampling.jobs import Job
    from megaman.sampling.plan import GenerationPlan

log = logging.getLogger(__name__)


def load_generator(
    plan: GenerationPlan,
    policy: ThreadPolicy,
    processes: Processes,
    requested_device: str | None,
    skips_misfits: bool,
) -> tuple[GenerationPlan, ImageGenerator, list[Job]]:
    """The plan, without LoRAs that do not fit the base if it skips_misfits, what generates its
    images, and its jobs.

    The limits are those of the process with the least memory, so that all make the same batches.
    Raises UserError if the device, the base or a LoRA cannot be used.
    """
    device = processes.own_device(runtime.choose_device(requested_device))
    width = unet_width(plan.base)
    compute = runtime.choose_compute(plan.precision, device, width, plan.memory_format)
    runtime.set_threads(policy)
    runtime.keep_freed_memory()

    base_name = resolve_name(plan.base)
    noun = "LoRA" if len(plan.loras) == 1 else "LoRAs"
    source = f" and the {noun} in {plan.lora_source}" if plan.loras else ""
    log.info(f"loading {base_name}{source}")
    if notice := alias_notice(plan.base):
        log.info(f"  {notice}")
    base = load_base(base_name, compute.dtype, memory_format=compute.torch_memory_format)
    plan = plan.without(misfits(base, plan.loras) if skips_misfits else {})
    loras = LoraStack(base, plan.loras, plan.fuse, rescale=len(plan.variants) > 1)
    jobs = plan.make_jobs(base.native_size)
    sharing = processes.local_count if device.type == "cpu" else 1
    own_limits = limits_for(base, jobs, plan.batch_size, device, sharing)
    limits = tightest(processes.exchange(own_limits))
    limits.tiling = limits.tiling or plan.vae_tiling
    workers = None
    if device.type == "cpu":
        workers = generation_workers(width, policy, processes.local_count)
    sampling = Sampling(plan.sampler, plan.clip_skip, workers, plan.pixel_grid)
    return plan, ImageGenerator(base, loras, compute, limits, sampling), jobs
