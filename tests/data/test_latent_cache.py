"""Latents in shards on the disk."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megaman.data.latent_cache import ABANDONED, MAX_READS, LatentCache, prune, vae_folder
from megaman.files import ASIDE


def constant(value: int) -> torch.Tensor:
    return torch.full((8, 2, 3), float(value))


def latents(first: int, count: int = 2) -> dict[str, torch.Tensor]:
    return {f"key{value}": constant(value) for value in range(first, first + count)}


def read(cache: LatentCache, key: str) -> torch.Tensor:
    return cache.read(cache.location(key))


def test_what_is_added_is_there_for_the_next_run(tmp_path):
    cache = LatentCache(tmp_path / "vae")
    cache.add(latents(0))
    cache.add({"other": torch.arange(8 * 4.0).view(8, 2, 2)})
    for other in (cache, LatentCache(tmp_path / "vae")):
        assert "key1" in other and "key2" not in other
        assert torch.equal(read(other, "key1"), constant(1))
        assert torch.equal(read(other, "other"), torch.arange(8 * 4.0).view(8, 2, 2))
    assert len(list((tmp_path / "vae").iterdir())) == 2


def test_a_key_that_two_runs_computed(tmp_path):
    one, other = LatentCache(tmp_path), LatentCache(tmp_path)
    one.add(latents(0))
    other.add(latents(1))
    both = LatentCache(tmp_path)
    for value in range(3):
        assert torch.equal(read(both, f"key{value}"), constant(value))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: save_file({"key0": torch.zeros(8, 2, 3, dtype=torch.float16)}, path),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_damaged_shard_is_as_if_it_were_not_there(tmp_path, damage):
    LatentCache(tmp_path).add(latents(0))
    (shard,) = tmp_path.iterdir()
    damage(shard)
    cache = LatentCache(tmp_path)
    assert "key0" not in cache
    cache.add(latents(0))
    assert torch.equal(read(LatentCache(tmp_path), "key1"), constant(1))


def test_where_nothing_can_be_written_it_stays_in_memory(tmp_path):
    (tmp_path / "file").touch()
    cache = LatentCache(tmp_path / "file" / "vae")
    cache.add(latents(0))
    assert cache.write_error and torch.equal(read(cache, "key1"), constant(1))
    cache.add(latents(2))
    assert torch.equal(read(cache, "key3"), constant(3)) and not cache.use_shards([0, 1])
    in_memory = LatentCache(None)
    in_memory.add(latents(0))
    assert "key0" in in_memory and not in_memory.write_error


def test_deleting_shards_does_not_disturb_a_run(tmp_path):
    cache = LatentCache(tmp_path / "vae")
    cache.add(latents(0))
    shutil.rmtree(tmp_path / "vae")
    for _ in range(2 * MAX_READS):
        read(cache, "key0")
    if os.name == "posix":
        assert torch.equal(read(cache, "key1"), constant(1))


def test_the_oldest_shards_go_first_and_those_in_use_never(tmp_path):
    folder = vae_folder(tmp_path, "a" * 64)
    other = vae_folder(tmp_path, "b" * 64)
    for number in range(4):
        LatentCache(folder if number else other).add(latents(2 * number))
    shards = sorted([*folder.iterdir(), *other.iterdir()], key=lambda path: path.stat().st_mtime_ns)
    for age, path in enumerate(shards):
        os.utime(path, (1000 + age, 1000 + age))
    cache = LatentCache(other)
    in_use = cache.use_shards([0])
    assert in_use == {shards[0]} and shards[0].stat().st_mtime > 10_000, "it was used now"
    size = shards[0].stat().st_size
    prune(tmp_path, 3 * size, in_use)
    assert [path.exists() for path in shards] == [True, False, True, True]
    prune(tmp_path, 0, in_use)
    assert [path.exists() for path in shards] == [True, False, False, False]


def test_what_a_killed_run_was_writing_goes_after_a_day(tmp_path):
    folder = vae_folder(tmp_path, "a" * 64)
    folder.mkdir(parents=True)
    old, new = folder / f"old.safetensors.1{ASIDE}", folder / f"new.safetensors.2{ASIDE}"
    old.touch()
    new.touch()
    os.utime(old, (1000, new.stat().st_mtime - ABANDONED - 60))
    prune(tmp_path, 1e9, set())
    assert not old.exists() and new.exists()
