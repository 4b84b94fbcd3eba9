"""--config FILE: a file of flags counts as the command line that it stands for."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.config.cli import flags_of
from megaman.config.generate import GenerateConfig, parse_generate_config
from megaman.config.presets import PRESETS
from megaman.config.settings import TrainConfig
from megaman.config.train import parse_train_config

PARSERS = {TrainConfig: parse_train_config, GenerateConfig: parse_generate_config}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, text) in the current folder; returns the name."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write_file


def refused(parse, argv: list[str]) -> list[str]:
    """The lines of a refusal."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stopped:
        parse(argv)
    assert stopped.value.code == 2
    return err.getvalue().splitlines()


def record(config: TrainConfig, **changes: Any) -> str:
    """What write_training_config leaves of a run."""
    settings = {**config.settings(), "seed": 7}
    return json.dumps({"settings": settings, "explicit": sorted(config.explicit), **changes})


def without(config: TrainConfig, *names: str) -> dict[str, Any]:
    return {key: value for key, value in config.settings().items() if key not in names}


@pytest.mark.parametrize("name", ["flags.toml", "flags.json"])
def test_a_file_counts_as_typed(write, name):
    flags = {"preset": "quality", "lora_rank": 2, "random_flip": True, "target_modules": ["to_q"]}
    toml = "# mine\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in flags.items())
    write(name, json.dumps(flags) if name.endswith("json") else toml)
    typed = ["--preset", "quality", "--lora_rank", "2", "--random_flip", "--target_modules", "to_q"]
    from_file, from_line = parse_train_config(["--config", name]), parse_train_config(typed)
    assert without(from_file, "config") == without(from_line, "config")
    assert from_file.explicit == from_line.explicit | {"config"}


def test_the_command_line_wins(write):
    write("flags.toml", 'seed = 1\nmax_train_steps = 9\noverwrite_output = true\ndata_dir = "a"')
    argv = "--config flags.toml --seed 2 --num_train_epochs 3 --resume_from_checkpoint latest"
    config = parse_train_config(argv.split())
    assert (config.run.seed, config.data.data_dir) == (2, "a")
    assert config.optimizer.max_train_steps is None and not config.output.overwrite_output
    write("prompts.toml", 'prompts_file = "p.txt"\nseed = 3')
    images = parse_generate_config(["--config", "prompts.toml", "--prompts", "a robot"])
    assert (images.prompts.prompts_file, images.sampling.seed) == (None, 3)


def test_a_switch_can_be_switched_off(write):
    write("flags.toml", "demo = true\ncenter_crop = false")
    assert not parse_train_config(["--config", "flags.toml"]).data.center_crop


@pytest.mark.parametrize(
    "argv",
    [
        ["--demo"],
        ["--demo", "--crop_variants", "2", "--overwrite_output"],
        *[["--preset", preset] for preset in PRESETS],
        ["--num_validation_images", "0", "--num_train_epochs", "2"],
        ["--trigger_word", "volto", "--shuffle_caption", "--train_text_encoder"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("is_earlier", [False, True], ids=["", "without explicit"])
def test_a_runs_own_file_repeats_it(write, argv, is_earlier):
    first = parse_train_config(argv)
    content = json.loads(record(first))
    if is_earlier:
        del content["explicit"]
    write("training_config.json", json.dumps(content))
    again = parse_train_config(["--config", "training_config.json", "--output_dir", "again"])
    changed = ("config", "output_dir", "overwrite_output", "seed")
    assert without(again, *changed) == without(first, *changed)
    assert again.run.seed == 7
    assert not again.output.overwrite_output
    if not is_earlier:
        assert again.explicit | {"overwrite_output"} == {
            *first.explicit, "overwrite_output", "config", "output_dir"
        }  # fmt: skip


WRONG = [
    ("a.toml", 'config = "a.toml"', "config: a file of flags names no other, nor itself"),
    ("a.toml", "lora_rnk = 8", "lora_rnk: is not a flag, did you mean lora_rank"),
    ("a.toml", "network_dim = 8", "network_dim: is another program's flag: write --lora_rank"),
    ("a.toml", "[general]\nseed = 1", "general: is another program's flag: name the images'"),
    ("a.toml", "guidance_scale = 3", "guidance_scale: is a flag of generate_megaman.py"),
    ("a.toml", "learning_rate = [1e-4]", "learning_rate: takes one value, not a list"),
    ("a.toml", "[training]\nlora_rank = 8", "training: is a table: move its flags to the top"),
    ("a.toml", "lora_rank = {a = 1}", "lora_rank: takes one value, not a table"),
    ("a.toml", "seed = 2026-01-01", "seed: takes one value, not a date"),
    ("a.toml", "lora_rank = true", "lora_rank: takes one value, not true or false"),
    ("a.toml", 'center_crop = "yes"', "center_crop: is true or false, not a text"),
    ("a.toml", "target_modules = []", "target_modules: the list is empty"),
    ("a.toml", "resolution = 511", "resolution: 511 is not a multiple of 8: take 512"),
    ("a.toml", "lora_rank = 4\nlora_rank", "is not valid TOML"),
    ("a.json", '{\n  // rank\n  "lora_rank": 8}', "line 2: JSON has no comments"),
    ("a.json", '{"lora_rank": 8, # rank\n"seed": 1}', "line 1: JSON has no comments"),
    ("a.json", '{\n"lora_rank": 8,,}', "line 2 is not valid JSON"),
    ("a.json", '{"lora_rank": 8, "lora_rank": 4}', "'lora_rank' is there more than once"),
    ("a.json", "[1]", "holds no flags"),
    ("a.json", '{"settings": {}, "explicit": ["lora_rank"]}', "settings lacks 'lora_rank'"),
    ("a.json", '{"settings": {}, "explicit": 3}', "explicit is no list of flags"),
    ("a.json", "[" * 100_000, "is nested too deeply"),
    ("a.json", '{"seed": ' + "9" * 5000 + "}", "--config a.json"),
]


@pytest.mark.parametrize(("name", "text", "reason"), WRONG, ids=[wrong[2] for wrong in WRONG])
def test_what_is_wrong_is_one_line(write, name, text, reason):
    (line,) = refused(parse_train_config, ["--config", write(name, text)])
    assert line.startswith(f"error: --config {name}") and reason in line


def test_a_missing_file_and_another_scripts_record(write):
    (line,) = refused(parse_train_config, ["--config", "none.toml"])
    assert "--config none.toml: cannot be read" in line
    write("training_config.json", record(parse_train_config([])))
    (line,) = refused(parse_generate_config, ["--config", "training_config.json"])
    assert "it belongs to megaman_lora.py" in line


KEYS = sorted({*flags_of(TrainConfig), *flags_of(GenerateConfig), "settings", "explicit"})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=5)
CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.text(alphabet='{}[]"=,:#/ \n\ta1-.', max_size=60).map(str.encode),
    ENTRIES.map(lambda entries: json.dumps(entries).encode()),
    st.builds(
        lambda settings, typed: json.dumps({"settings": settings, "explicit": typed}).encode(),
        ENTRIES,
        st.lists(st.sampled_from(KEYS), max_size=3) | VALUES,
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("config_type", PARSERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("suffix", [".toml", ".json"])
@given(content=CONTENTS)
def test_any_file_ends_in_a_config_or_in_lines(tmp_path_factory, config_type, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    path.write_bytes(content)
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            assert isinstance(PARSERS[config_type](["--config", str(path)]), config_type)
        except SystemExit as stopped:
            assert stopped.code == 2
    assert all(line.startswith("error: ") for line in err.getvalue().split("\n") if line)
