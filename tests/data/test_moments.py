"""VAE moments in shards on the disk."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megaman.data.latent_cache import ABANDONED, MAX_READS, LatentCache, prune, vae_folder
from megaman.files import ASIDE


def moments(first: int, count: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"key{number}": torch.full((8, 2, 3), float(number))
        for number in range(first, first + count)
    }


def at(store: LatentCache, key: str) -> torch.Tensor:
    return store.read(store.location(key))


def test_what_is_added_is_there_for_the_next_run(tmp_path):
    store = LatentCache(tmp_path / "vae")
    store.add(moments(0))
    store.add({"other": torch.arange(8 * 4.0).view(8, 2, 2)})
    for each in (store, LatentCache(tmp_path / "vae")):
        assert "key1" in each and "key2" not in each
        assert torch.equal(at(each, "key1"), torch.full((8, 2, 3), 1.0))
        assert torch.equal(at(each, "other"), torch.arange(8 * 4.0).view(8, 2, 2))
    assert len(list((tmp_path / "vae").iterdir())) == 2


def test_a_key_that_two_runs_computed(tmp_path):
    one, other = LatentCache(tmp_path), LatentCache(tmp_path)
    one.add(moments(0))
    other.add(moments(1))
    both = LatentCache(tmp_path)
    assert all(
        torch.equal(at(both, f"key{number}"), torch.full((8, 2, 3), float(number)))
        for number in range(3)
    )


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
    LatentCache(tmp_path).add(moments(0))
    (shard,) = tmp_path.iterdir()
    damage(shard)
    store = LatentCache(tmp_path)
    assert "key0" not in store
    store.add(moments(0))
    assert torch.equal(at(LatentCache(tmp_path), "key1"), torch.full((8, 2, 3), 1.0))


def test_where_nothing_can_be_written_it_stays_in_memory(tmp_path):
    (tmp_path / "file").touch()
    store = LatentCache(tmp_path / "file" / "vae")
    store.add(moments(0))
    assert store.write_error and torch.equal(at(store, "key1"), torch.full((8, 2, 3), 1.0))
    store.add(moments(2))
    assert torch.equal(at(store, "key3"), torch.full((8, 2, 3), 3.0)) and not store.use_shards(
        [0, 1]
    )
    in_memory = LatentCache(None)
    in_memory.add(moments(0))
    assert "key0" in in_memory and not in_memory.write_error


def test_deleting_shards_does_not_disturb_a_run(tmp_path):
    store = LatentCache(tmp_path / "vae")
    store.add(moments(0))
    shutil.rmtree(tmp_path / "vae")
    for _ in range(2 * MAX_READS):
        at(store, "key0")
    assert (
        torch.equal(at(store, "key1"), torch.full((8, 2, 3), 1.0)) if os.name == "posix" else True
    )


def test_the_oldest_shards_go_first_and_those_in_use_never(tmp_path):
    folder = vae_folder(tmp_path, "a" * 64)
    other = vae_folder(tmp_path, "b" * 64)
    for number in range(4):
        LatentCache(folder if number else other).add(moments(2 * number))
    shards = sorted([*folder.iterdir(), *other.iterdir()], key=lambda path: path.stat().st_mtime_ns)
    for age, path in enumerate(shards):
        os.utime(path, (1000 + age, 1000 + age))
    store = LatentCache(other)
    in_use = store.use_shards([0])
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
    old.touch(), new.touch()
    os.utime(old, (1000, new.stat().st_mtime - ABANDONED - 60))
    prune(tmp_path, 1e9, set())
    assert not old.exists() and new.exists()
