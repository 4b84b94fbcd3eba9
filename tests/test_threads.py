"""CPU threads: how many there are and how they wait, decided before torch is loaded; the user's own
settings win."""

from __future__ import annotations

import json
import os
import sys

import pytest
from conftest import FEW_TARGETS, ROOT
from safetensors.torch import load_file

from megaman import threads
from megaman.threads import (
    COUNT_VARIABLES,
    NARROW,
    SPIN_COUNT,
    WAIT_VARIABLES,
    ThreadPolicy,
    choose_threads,
    threads_for_generation,
    threads_for_training,
    usable_cpus,
)

NO_SETTING = dict.fromkeys(
    [*COUNT_VARIABLES, *WAIT_VARIABLES]
)  # for run_script: the variables are removed


@pytest.fixture
def cpus(monkeypatch) -> int:
    monkeypatch.setattr(threads, "_affinity", lambda: 8)
    return 8


@pytest.mark.parametrize(
    ("width", "usable", "count"),
    [
        (64, 8, 1),
        (NARROW - 1, 8, 1),
        (NARROW, 8, None),
        (320, 8, None),
        (0, 8, None),
        (64, 2, 1),
        (320, 3, 3),
    ],
)
def test_the_rule_for_training(cpus, width, usable, count):
    assert threads_for_training(width, usable) == count


def test_generating_uses_what_the_process_may_use(cpus):
    assert threads_for_generation(320, 8) is None, "torch's own count"
    assert threads_for_generation(320, 2) == 2, "a quota"
    assert threads_for_generation(64, 8) == 1, "a batch a CPU"


def test_how_threads_wait_depends_on_the_system():
    assert choose_threads(1, 8, {}, platform="linux").environment == {
        "GOMP_SPINCOUNT": str(SPIN_COUNT),
        "OMP_NUM_THREADS": "1",
    }
    for platform in ("darwin", "win32"):
        assert choose_threads(None, 8, {}, platform=platform).environment == {"KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_a_user_who_says_how_threads_wait_is_obeyed(name):
    assert choose_threads(1, 8, {name: "7"}).environment == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", COUNT_VARIABLES)
def test_a_user_who_says_how_many_threads_is_obeyed(name):
    policy = choose_threads(1, 8, {name: "3"}, platform="linux")
    assert (policy.count, policy.environment, policy.remark) == (
        None,
        {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
        "",
    )
    assert choose_threads(1, 8, {name: "3"}, saved=3).remark == ""
    assert (
        f"{name} is 3, and it was 2 threads before"
        in choose_threads(1, 8, {name: "3"}, saved=2).remark
    )


def test_a_resumed_run_keeps_its_count_whatever_the_machine():
    assert choose_threads(1, 8, {}, saved=2).count == 2
    assert "4 threads as before, on 2 CPUs" in choose_threads(1, 2, {}, saved=4).remark
    assert choose_threads(1, 8, {}, saved=0).count is None, (
        "an earlier checkpoint: torch's own count"
    )


@pytest.mark.parametrize(
    ("membership", "files", "usable"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a", {"a/cpu.max": "max 100000"}, 8),
        ("0::/a", {"a/cpu.max": "1000 100000"}, 1),
        ("0::/gone", {"cpu.max": "200000 100000\n"}, 2),
        (
            "3:cpu,cpuacct:/x",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "400000",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("5:memory:/x", {"memory/x/cpu.max": "100000 100000"}, 8),
        ("nonsense\n0::", {"cpu.max": "no numbers"}, 8),
        ("0::/", {"cpu.max": "100000 0"}, 8),
    ],
)
def test_a_containers_quota_counts(cpus, tmp_path, membership, files, usable):
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    (tmp_path / "own").write_text(f"{membership}\n", encoding="utf-8")
    assert usable_cpus(tmp_path / "cgroup", tmp_path / "own") == usable


def test_a_system_without_cgroups_has_its_affinity(cpus, tmp_path):
    assert usable_cpus(tmp_path, tmp_path / "none") == 8


def test_what_this_process_may_use_is_what_it_has():
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)


def test_importing_the_dataset_changes_nothing(run_script, tmp_path):
    code = (
        "import os; before = dict(os.environ); from megaman_lora import MegaManDataset; "
        "assert before == os.environ"
    )
    assert run_script(["-c", code], tmp_path).returncode == 0


# What the environment is as torch is first looked for, and what torch makes of it.
WATCH = """
import json, os, sys

class Watch:
    seen = {}
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            for key in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
                self.seen[key] = os.environ.get(key)

sys.meta_path.insert(0, Watch())
import megaman_lora
code = megaman_lora.main(sys.argv[1:])
import torch
print(json.dumps({**Watch.seen, "threads": torch.get_num_threads()}))
sys.exit(code)
"""
FLAGS = [
    "--data_dir",
    str(ROOT / "demo" / "held_out"),
    "--resolution",
    "64",
    "--num_validation_images",
    "0",
    "--seed",
    "3",
    "--logging_dir",
    "logs",
    "--train_batch_size",
    "1",
]
FLAGS += ["--lora_rank", "2", *FEW_TARGETS]


GENERATE = "import sys; sys.exit(generate_megaman.main(sys.argv[1:]))"
# Without a user's setting, in a torch that has more threads than the record says.
WITH_TWO = f"""
import os
import torch
import generate_megaman
for name in {list(NO_SETTING)}:
    os.environ.pop(name, None)
torch.set_num_threads(2)
{GENERATE}
"""


@pytest.fixture(scope="module")
def watched(run_script, base_folder, tmp_path_factory):
    """Three runs as a user starts them: whole, stopped half way by its steps, and resumed."""
    folder = tmp_path_factory.mktemp("watched")
    base = ["--pretrained_model_name", base_folder]

    def run(output_dir: str, *more: str, **environment: str):
        done = run_script(
            ["-c", WATCH, *FLAGS, *base, "--output_dir", output_dir, *more],
            folder,
            NO_SETTING | environment,
        )
        assert (done.returncode, done.stderr) == (0, ""), "no library's warnings either"
        return json.loads(done.stdout.splitlines()[-1]), done.stdout

    return folder, run


def test_processes_share_the_cpus_and_one_thread_means_small_batches(monkeypatch):
    """Whoever chose the thread, so that all give the same bits; a user's one is one busy CPU."""
    monkeypatch.setattr(threads, "usable_cpus", lambda: 8)
    ours, theirs = ThreadPolicy(1, {}), ThreadPolicy(None, {})
    one = {"OMP_NUM_THREADS": "1"}
    assert threads.generation_workers(64, ours, 1, {}) == 8
    assert threads.generation_workers(64, theirs, 1, one) == 1
    assert [threads.generation_workers(64, theirs, count, one) for count in (2, 16)] == [4, 1]
    assert threads.generation_workers(64, theirs, 2, {"OMP_NUM_THREADS": "2"}) is None
    assert threads.generation_workers(320, theirs, 2, one) is None


@pytest.fixture(scope="module")
def own(watched):
    """The run whose user has said how many threads there are and how they wait: what was seen and
    what it said."""
    _, run = watched
    return run(
        "own",
        "--max_train_steps",
        "2",
        "--save_steps",
        "1",
        OMP_NUM_THREADS="2",
        GOMP_SPINCOUNT="77",
    )


@pytest.mark.slow(weight=5)
def test_the_policy_is_in_force_before_torch_is_loaded(watched):
    folder, run = watched
    seen, said = run("whole", "--max_train_steps", "1")
    assert (seen["threads"], seen["OMP_NUM_THREADS"]) == (1, "1")
    if sys.platform == "linux":
        assert seen["GOMP_SPINCOUNT"] == str(SPIN_COUNT)
    assert "; 1 CPU thread\n" in said, "the device line says so"
    state = json.loads(
        (folder / "whole" / "checkpoint-1" / "training_state.json").read_text(encoding="utf-8")
    )
    assert state["choices"]["threads"] == 1


@pytest.mark.slow(weight=5)
def test_a_run_and_its_resumption_have_equal_bits(watched, own):
    """The checkpoint's count is kept, also where the rule would choose another."""
    folder, run = watched
    whole = load_file(folder / "own" / "lora_weights" / "adapter_model.safetensors")
    (folder / "own" / "lora_weights").rename(folder / "before")
    seen, said = run(
        "own",
        "--max_train_steps",
        "2",
        "--save_steps",
        "1",
        "--resume_from_checkpoint",
        "checkpoint-1",
    )
    assert (seen["threads"], seen["OMP_NUM_THREADS"]) == (2, "2") and "; 2 CPU threads\n" in said
    resumed = load_file(folder / "own" / "lora_weights" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys() and all(
        (whole[key] == resumed[key]).all() for key in whole
    )


def test_the_users_own_count_wins(own):
    seen, said = own
    assert (seen["threads"], seen["OMP_NUM_THREADS"], seen["GOMP_SPINCOUNT"]) == (2, "2", "77")
    assert "; 2 CPU threads\n" in said


@pytest.mark.slow(weight=5)
def test_an_image_is_generated_again_with_as_many_threads(watched, own, forked):
    """The record in the image says how many; torch's own count is another here."""
    folder, _ = watched
    flags = [
        "--lora_path",
        "own/checkpoint-1",
        "--num_inference_steps",
        "1",
        "--prompts",
        "a robot",
    ]
    alone = f"import torch, generate_megaman; torch.set_num_threads(1); {GENERATE}"
    one = {"OMP_NUM_THREADS": "1"}
    done = forked.run(["-c", alone, *flags, "--output_dir", "first"], folder, env=one)
    assert done.returncode == 0 and "; 1 CPU thread\n" in done.stdout, done.stderr
    image = folder / "first" / "megaman_000_00.png"
    done = forked.run(["-c", WITH_TWO, "--from_image", image, "--output_dir", "again"], folder)
    assert done.returncode == 0 and "; 1 CPU thread\n" in done.stdout
    assert "may differ" not in done.stdout


def test_contention_measures_what_it_says():
    import contention

    assert contention.SPIN_COUNT == 300_000 and set(contention.settings_of(["A=1,B=2"])) == {
        "none",
        "policy",
        "A=1,B=2",
    }
    found = contention.shares(
        {"none, 0": [2.0, 4.0, 3.0], "policy, 0": [1.0, 4.0, 1.5], "none, 1": [0.5]}
    )
    assert found == {"none, 0": 1.0, "policy, 0": 0.5, "none, 1": 0.25}
    with contention.busy_processes(1):
        pass
