"""What is imported when, and that only the scripts talk. Read with ast, nothing is run."""

from __future__ import annotations

import ast
import json
import sys
from itertools import chain

import pytest
from sources import MODULES, ROOT, SCRIPTS, at_import, imports, ours, tree

STANDARD_ONLY = [
    "version",
    "console",
    "errors",
    "files",
    "locks",
    "schema",
    "sequences",
    "shell",
    "threads",
    "safe_loading",
    "config.samplers",
    "config.bases",
    "config.colors",
    "config.current_folder",
    "config.values",
    "config.cli",
    "config.foreign_flags",
    "config.presets",
    "config.image_settings",
    "config.learning_settings",
    "config.run_settings",
    "config.evaluation_settings",
    "config.settings",
    "config.contradictions",
    "config.config_file",
    "config.train",
    "config.generate",
    "models.prompt_weights",
    "data.buckets",
    "data.file_index",
    "lora.peft_config",
    "lora.notes",
    "sampling.prompts",
    "sampling.jobs",
    "training.output",
    "training.saved_loras",
    "training.series",
    "training.history",
    "training.pace",
    "training.disk_space",
    "training.summary",
    "training.signals",
    "training.datasets",
]
# Not even in a function.
NEVER_TORCH = [
    *STANDARD_ONLY,
    "pages.html",
    "pages.gallery_images",
    "pages.gallery_command",
    "pages.gallery",
    "pages.grid",
    "pages.training_page",
    "pages.browser",
    "sampling.png",
    "sampling.records",
    "sampling.record_reader",
    "sampling.image_saver",
    "sampling.folder_images",
    "sampling.output_folder",
    "sampling.plan",
    "sampling.defaults",
    "training.samples",
    "training.run_metadata",
    "training.model_card",
]
DOCTOR = [name for name in MODULES if name.startswith("doctor.")]  # numpy yes, torch never
NO_TORCH = [
    *NEVER_TORCH,
    "hub",
    "processes",
    "training.held_out_split",
    "models.configs",
    "data.problems",
    "data.image_files",
    "data.images",
    "data.png_chunks",
    "data.csv_table",
    "data.single_byte_encodings",
    "data.legacy_encodings",
    "data.captions",
    "data.caption_prompts",
    "data.metadata_files",
    "data.folders",
    "data.crops",
    "data.image_info",
    "data.palette",
    "data.dataset",
    "sampling.pixel_grid",
]  # not until it is needed
# Besides the scripts, and to which files other than standard output.
MAY_PRINT: dict[str, set[str]] = {
    "console": set(),
    "errors": {"sys.stderr"},
    "config.cli": {"sys.stderr"},
    "processes": {"sys.stderr"},
}


@pytest.mark.parametrize("name", [*MODULES, *SCRIPTS])
def test_nothing_imports_a_script(name):
    assert not {imported.split(".")[0] for imported in imports(tree(name))} & set(SCRIPTS)


@pytest.mark.parametrize("name", STANDARD_ONLY)
def test_the_lowest_modules_use_the_standard_library_alone(name):
    for imported in imports(tree(name)):
        top = imported.split(".")[0]
        assert top in sys.stdlib_module_names or (top == "megaman" and name != "console"), imported


@pytest.mark.parametrize("name", sorted({*NO_TORCH, *SCRIPTS} & {*MODULES, *SCRIPTS}))
def test_torch_waits(name):
    heavy = {
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "numpy",
        "safetensors",
        "tensorboard",
    }
    assert not {imported.split(".")[0] for imported in at_import(name)} & heavy
    assert ours(at_import(name)) <= set(NO_TORCH)


@pytest.mark.parametrize("name", sorted({*NEVER_TORCH, *DOCTOR} & {*MODULES}))
def test_some_modules_know_no_torch_at_all(name):
    assert not {imported.split(".")[0] for imported in imports(tree(name))} & {
        "torch",
        "diffusers",
        "transformers",
    }


def test_torch_waits_in_truth_too(run_script, tmp_path):
    modules = ", ".join(f"megaman.{name}" for name in NO_TORCH if name in MODULES)
    code = (
        f"import json, sys, megaman_lora, generate_megaman, {modules}; "
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = run_script(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert "megaman.data.dataset" in loaded
    assert not {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy"} & set(loaded)


def test_a_worker_that_decodes_images_waits_for_nothing_else():
    """Where workers are spawned each imports it."""
    imported = at_import("data.crop_reader")
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {
        "torch",
        "megaman",
    }
    assert ours(imported) <= set(NO_TORCH)


@pytest.mark.parametrize("name", MODULES)
def test_only_the_scripts_print(name):
    calls = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]
    prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    keywords = chain.from_iterable(call.keywords for call in prints)
    where = {ast.unparse(keyword.value) for keyword in keywords if keyword.arg == "file"}
    assert where == MAY_PRINT.get(name, set()) and (prints == [] or name in MAY_PRINT)
    assert not any(
        ast.unparse(call.func) in ("sys.stdout.write", "sys.stderr.write") for call in calls
    )


def test_the_package_itself_is_empty():
    """And its packages hold a line on themselves, so that to import one of their modules loads no
    other."""
    assert (ROOT / "megaman" / "__init__.py").read_bytes() == b""
    for path in (ROOT / "megaman").glob("*/__init__.py"):
        (line,) = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant), path
        assert len(str(line.value.value).splitlines()) == 1, path


HOMES = {
    "accelerate": {"training.run"},
    "tensorboard": {"training.tensorboard"},
    "torch.utils.tensorboard": {"training.tensorboard"},
    "tqdm": {"training.run"},
}


@pytest.mark.parametrize("name", MODULES)
def test_the_accelerator_tensorboard_and_bars_have_one_home_each(name):
    found = set(imports(tree(name)))
    found |= {imported.split(".")[0] for imported in found}
    assert [library for library in HOMES if library in found and name not in HOMES[library]] == []


@pytest.mark.parametrize("name", MODULES)
def test_only_the_phases_of_a_run_know_its_whole_config(name):
    """Other modules take plain values or one of its groups."""
    if not name.startswith("config."):
        parsed = {"cli.Parser", "train.parse_train_config", "train.train_parser"}
        if not name.startswith("training."):
            parsed.add("train.TrainConfig")
        forbidden = {f"megaman.config.{name}" for name in parsed} | {"argparse"}
        if name != "sampling.plan":
            forbidden.add("megaman.config.generate")
        assert not forbidden & set(imports(tree(name)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_old_python_gets_as_far_as_the_version_check(name):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    body = ast.parse(source, feature_version=(3, 8)).body
    first_statements = [ast.unparse(node) for node in body[1:3]]
    assert first_statements[0] == "import sys"
    assert first_statements[1].startswith("if sys.version_info < (3, 11):\n    sys.exit(")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_version_check_is_one_line(name):
    """The check itself, run with an old version's number."""
    check = ast.Module(body=[tree(name).body[2]], type_ignores=[])

    class OldSys:
        version_info = (3, 8, 10)
        exit = staticmethod(lambda text: said.append(text))

    said: list[str] = []
    exec(compile(check, name, "exec"), {"sys": OldSys})
    assert said == ["error: Mega Man LoRA needs Python 3.11 or newer, this is 3.8"]
