"""Four images trained on for too long: the held-out loss shows it, the best LoRA is kept, and the
run ends. A resumed run does the same, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from megaman.training.ema import LoraEma, decay_at, loaded
from megaman.training.evaluation_plan import MAX_SHARE, EvaluationPlan, plan_evaluations

FLAGS = [
    # A base that has learned something: on another there is little to overfit.
    *("--pretrained_model_name", ROOT / "demo" / "base"),
    *("--data_dir", "images", "--validation_data_dir", "held_out", "--resolution", 32),
    *("--train_batch_size", 2, "--learning_rate", 1e-2, "--lora_rank", 16, "--lora_alpha", 16),
    *("--max_train_steps", 150, "--save_steps", 6, "--eval_steps", 4),
    *("--early_stopping_patience", 2, "--use_ema", "--target_modules", "to_q", "to_v", "ff.net.2"),
]


class Overfit(NamedTuple):
    """A run's working folder, its last checkpoint and the history in that."""

    folder: Path
    checkpoint: Path
    history: dict[str, Any]

    def losses(self, name: str) -> dict[int, float]:
        """The losses of this name by step."""
        return {
            item["step"]: item["loss"]
            for item in self.history["evaluations"]
            if item["name"] == name
        }

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.checkpoint / "training_state.json").read_text())

    @property
    def best(self) -> dict[str, Any]:
        return self.state["evaluation"]["best"]


def read_run(folder: Path) -> Overfit:
    checkpoints = sorted(folder.glob("out/checkpoint-*"), key=lambda path: int(path.name[11:]))
    history = json.loads((checkpoints[-1] / "run_history.json").read_text())
    return Overfit(folder, checkpoints[-1], history)


def copy_images(source: Path, target: Path, count: int) -> None:
    target.mkdir()
    paths = sorted(source.glob("*.png"))
    for path in paths[:: len(paths) // count][:count]:
        shutil.copy(path, target)
        shutil.copy(path.with_suffix(".txt"), target)


@pytest.fixture(scope="module")
def overfit(train_here, tmp_path_factory) -> Overfit:
    folder = tmp_path_factory.mktemp("overfit")
    copy_images(ROOT / "demo" / "images", folder / "images", 4)
    copy_images(ROOT / "demo" / "held_out", folder / "held_out", 2)
    train_here(folder, "out", *FLAGS)
    return read_run(folder)


@pytest.mark.slow
def test_the_curves_part(overfit):
    held_out, train = overfit.losses("held_out"), overfit.losses("train")
    first, last = min(train), max(train)
    assert train[last] < 0.8 * train[first]
    assert held_out[last] - train[last] > held_out[first] - train[first]
    bins = [len(item["by_bin"]) for item in overfit.history["evaluations"]]
    assert set(bins) == {8}


@pytest.mark.slow
def test_early_stopping_ends_the_run_and_the_best_is_not_the_last(overfit):
    held_out = overfit.losses("held_out")
    assert overfit.state["step"] == max(held_out) < 150
    assert overfit.best["loss"] < held_out[max(held_out)]
    assert overfit.best["step"] == max(held_out) - 2 * 4
    assert overfit.best["loss"] == min(*held_out.values(), *overfit.losses("ema").values())


@pytest.mark.slow
def test_the_best_is_saved_with_its_own_step(overfit):
    from megaman.lora.files import read_metadata

    for name in ("lora_weights", "lora_weights_best"):  # as the run could stop early
        folder = overfit.folder / "out" / name
        header = read_metadata(folder / "megaman_lora.safetensors")
        assert header["ss_steps"] == str(overfit.best["step"])


@pytest.mark.slow
def test_the_curve_is_that_of_the_benchmark(overfit, embedded_base):
    """Which encodes the images itself and loads the LoRA from its files."""
    from megaman.data.dataset import MegaManDataset
    from megaman.data.encoding import encode_dataset
    from megaman.data.file_index import FileIndex
    from megaman.data.latent_cache import LatentCache
    from megaman.data.vae_encoder import EncodingConfig
    from megaman.lora.files import load_lora
    from megaman.models.base import load_base
    from megaman.models.text_encoding import encode_captions
    from megaman.training.held_out import held_out_loss

    base = load_base(str(embedded_base), torch.float32)
    dataset = MegaManDataset(overfit.folder / "held_out", None, 32)
    moments = encode_dataset(
        lambda: base.vae, dataset, EncodingConfig(), FileIndex(None), LatentCache(None)
    )
    latents = torch.cat([moments[index] for index in range(len(dataset))]).chunk(2, dim=1)[0]
    embeds = encode_captions(base.text_encoder, base.tokenizer, dataset.captions)
    texts = torch.stack([embeds[caption] for caption in dataset.captions])
    load_lora(overfit.folder / "out" / "lora_weights_best", base.unet)
    loss = held_out_loss(
        base.unet, base.noise_scheduler, latents * base.scaling_factor, texts, seed=0
    )
    assert loss == pytest.approx(overfit.best["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_ends_the_same_bit_for_bit(overfit, train_here, tmp_path):
    """Killed after a checkpoint between two evaluations."""
    shutil.copytree(overfit.folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "out").glob("*"):
        if path.name != "checkpoint-6":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train_here(tmp_path, "out", *FLAGS, "--resume_from_checkpoint", "latest")
    resumed = read_run(tmp_path)
    assert resumed.history == overfit.history
    assert resumed.state["evaluation"] == overfit.state["evaluation"]
    files = [path.relative_to(overfit.folder) for path in overfit.checkpoint.glob("*.safetensors")]
    assert len(files) == 4
    files.append(Path("out", "lora_weights_best", "adapter_model.safetensors"))
    for file in files:
        one, other = load_file(overfit.folder / file), load_file(tmp_path / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file


def test_evaluations_are_as_many_as_cost_little():
    demo = EvaluationPlan(900, 900, 4, sample_passes=800, num_images=8, has_ema=False)
    assert plan_evaluations(demo, patience=None).eval_steps == 450
    plan = EvaluationPlan(1000, 1000, 4, sample_passes=0, num_images=8, has_ema=False)
    frequent = plan_evaluations(plan, patience=None)
    assert frequent.share < MAX_SHARE and 100 <= frequent.eval_steps <= 1000
    long = EvaluationPlan(10**6, 10**6, 4, sample_passes=0, num_images=8, has_ema=True)
    assert plan_evaluations(long, patience=None).eval_steps == 10**5
    assert plan_evaluations(plan, patience=3).eval_steps <= 200
    assert frequent.is_due(0) and frequent.is_due(1000) and not frequent.is_due(1)
    assert frequent.is_full(1000)


def test_the_average_is_that_of_diffusers():
    from diffusers.training_utils import EMAModel

    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ours, theirs = LoraEma({"a": parameter}), EMAModel([parameter])
    for step in range(1, 40):
        with torch.no_grad():
            parameter.add_(torch.tensor([0.3, 0.1]) * step)
        ours.update(step)
        theirs.step([parameter])
    torch.testing.assert_close(ours.tensors["a"], theirs.shadow_params[0])
    assert decay_at(1) == 0 and decay_at(10**9) == 0.9999


def test_parameters_come_back_after_an_exchange():
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ZeroDivisionError), loaded({"a": parameter}, {"a": torch.zeros(2)}):
        assert parameter.tolist() == [0, 0]
        raise ZeroDivisionError
    assert parameter.tolist() == [1, 1]
