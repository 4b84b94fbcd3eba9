"""ImageGenerator: batches that run in parallel give the images of batches that run one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megaman import runtime
from megaman.config import samplers
from megaman.lora.stack import LoraStack
from megaman.models.base import load_base
from megaman.sampling.generator import PARALLEL_BATCH_SIZE, ImageGenerator, Sampling
from megaman.sampling.jobs import LoraVariant, make_jobs
from megaman.sampling.limits import limits_for
from megaman.sampling.prompts import Prompt, PromptSettings

VARIANT = LoraVariant((), 1.0)
DEFAULTS = PromptSettings("blurry", 64, 64, 0, 5.0, 3)
JOBS = make_jobs([Prompt("a blue robot"), Prompt("a red cat, " * 30)], DEFAULTS, 4)


@pytest.fixture(scope="module")
def make_generator(base_folder):
    """make_generator(workers) is a generator on the demo base, with one thread a batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compute = runtime.choose_compute("no", torch.device("cpu"), 64)
    base = load_base(str(base_folder), compute.dtype, memory_format=compute.torch_memory_format)
    loras = LoraStack(base, [], fuse=False, rescale=False)

    def make(workers: int | None) -> ImageGenerator:
        limits = limits_for(base, JOBS, None, compute.device)
        sampling = Sampling(samplers.DEFAULT, 1, workers)
        return ImageGenerator(base, loras, compute, limits, sampling)

    yield make
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_parallel_batches_give_the_same_images(make_generator):
    parallel, one_by_one = make_generator(2), make_generator(None)
    batches = parallel.make_batches(JOBS, None)
    assert [len(batch) for batch in batches] == [3, 1, 3, 1]
    steps = []
    images = parallel.generate(batches, steps.append)
    expected = one_by_one.generate(batches, lambda part: None)
    assert len(steps) == 3 * len(batches)
    assert sum(steps) == pytest.approx(len(JOBS))
    assert [item.job for item in images] == JOBS
    for item, other in zip(images, expected, strict=True):
        assert item.batch == other.batch
        assert item.image.tobytes() == other.image.tobytes()


def test_the_size_of_parallel_batches_does_not_depend_on_the_machine(make_generator):
    for workers in (1, 2, 64):
        batches = make_generator(workers).make_batches(JOBS, None)
        assert max(map(len, batches)) == PARALLEL_BATCH_SIZE
    assert [len(batch) for batch in make_generator(2).make_batches(JOBS, 8)] == [4, 4]
    assert [len(batch) for batch in make_generator(None).make_batches(JOBS, None)] == [4, 4]


def test_groups_hold_a_batch_for_each_worker_and_one_variant(make_generator):
    other = LoraVariant((), 0.5)
    pending = [SimpleNamespace(variant=variant) for variant in [VARIANT] * 3 + [other] * 2]
    groups = make_generator(2).parallel_groups(pending)
    assert [len(group) for group in groups] == [2, 1, 2]
    assert [len(group) for group in make_generator(None).parallel_groups(pending)] == [1] * 5


@pytest.mark.slow
def test_an_interrupted_batch_stops_the_others_at_their_next_step(make_generator):
    generator = make_generator(2)
    batches = generator.make_batches(JOBS, None)
    steps = []

    def interrupt(part: float) -> None:
        steps.append(part)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(batches, interrupt)
    assert len(steps) <= 4, "not the 12 steps of all batches"


def test_the_vae_decodes_in_tiles_of_half_a_side(make_generator, monkeypatch):
    """Its own tile would do nothing for images of up to its size."""
    generator = make_generator(None)
    vae, sizes = generator.base.vae, []
    own = vae.tile_sample_min_size, vae.tile_latent_min_size
    decode = vae.decoder.forward
    monkeypatch.setattr(vae.decoder, "forward", lambda z: sizes.append(z.shape[2:]) or decode(z))
    generator.limits.tiling = True
    (image,) = generator.generate([JOBS[:1]], lambda part: None)
    assert image.vae_tile == 32 and image.image.size == (64, 64)
    half = 32 // generator.base.vae_scale_factor
    assert len(sizes) > 1 and all(max(size) <= half for size in sizes)
    vae.use_tiling = False
    vae.tile_sample_min_size, vae.tile_latent_min_size = own
