"""Imports point one way, and only the scripts talk: docs/architecture.md as a test. Read with ast, nothing is run."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["megaman_lora", "generate_megaman"]
# Every module may import those before it and none after it. A new module has to find its place here.
ORDER = [
    "errors",
    "files",
    "names",
    "versions",
    "safety",
    "adapter_config",
    "allocator",
    "threads",
    "stops",
    "output",
    "tracking",
    "buckets",
    "samplers",
    "commandline",
    "presets",
    "contradictions",
    "base_configs",
    "options",
    "generation_options",
    "prompts",
    "prompt_weights",
    "jobs",
    "images",
    "captions",
    "imagefolder",
    "layouts",
    "stamps",
    "dataset",
    "problems",
    "schedule",
    "batches",
    "diffusion",
    "finite",
    "memory",
    "moments",
    "room",
    "placement",
    "choices",
    "hub",
    "lora_formats",
    "weights",
    "single_file",
    "base_folder",
    "base",
    "lora_forward",
    "lora",
    "peak",
    "plan",
    "fit",
    "kohya",
    "png",
    "grid",
    "lora_metadata",
    "model_card",
    "caption_states",
    "cache",
    "fresh",
    "encoded",
    "training_step",
    "auto_caption",
    "text_states",
    "sample",
    "validation",
    "lora_files",
    "checkpoint",
    "evaluate",
    "page",
    "gallery",
    "records",
    "drawn",
    "drawing",
    "appearance",
    "duplicates",
    "findings",
    "wording",
    "doctor",
    "report",
]
STANDARD_ONLY = [
    "errors",
    "files",
    "names",
    "versions",
    "safety",
    "adapter_config",
    "allocator",
    "threads",
    "stops",
    "output",
    "tracking",
    "buckets",
    "samplers",
    "commandline",
    "presets",
    "contradictions",
    "options",
    "generation_options",
    "prompts",
    "prompt_weights",
    "jobs",
    "stamps",
]
# Not even in a function.
NEVER_TORCH = [*STANDARD_ONLY, "png", "grid", "lora_metadata", "model_card", "page", "gallery", "records", "drawn"]
DOCTOR = ["appearance", "duplicates", "findings", "wording", "doctor", "report"]  # numpy yes, torch never
NO_TORCH = [
    *NEVER_TORCH,
    "base_configs",
    "problems",
    "images",
    "captions",
    "imagefolder",
    "layouts",
    "dataset",
]  # not until it is needed
MAY_PRINT = {"errors": "sys.stderr", "commandline": "sys.stderr"}  # and the scripts

MODULES = sorted(path.stem for path in (ROOT / "megaman").glob("*.py") if path.stem != "__init__")


def tree(name: str) -> ast.Module:
    path = ROOT / f"{name}.py" if name in SCRIPTS else ROOT / "megaman" / f"{name}.py"
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(node: ast.AST, types_too: bool = True) -> list[str]:
    """The dotted names that are imported anywhere below the node: megaman.files, torch, torch.nn."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are written in full"
            found += [child.module] + [f"{child.module}.{alias.name}" for alias in child.names]
        elif not (_is_type_checking(child) and not types_too):
            found += imports(child, types_too)
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def at_import(name: str) -> list[str]:
    """What is imported as soon as the module is: not in its functions, not for type checkers alone."""
    body = [node for node in tree(name).body if not isinstance(node, ast.FunctionDef)]
    return imports(ast.Module(body=body, type_ignores=[]), types_too=False)


def ours(names: list[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("megaman.")} & set(MODULES)


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER), "give a new module its place in ORDER, and a line in docs/architecture.md"
    assert {"base", "lora", "dataset", "options"} <= set(MODULES), "the package was not found"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    earlier = set(ORDER[: ORDER.index(name)])
    assert ours(imports(tree(name))) <= earlier


@pytest.mark.parametrize("name", [*MODULES, *SCRIPTS])
def test_nothing_imports_a_script(name):
    assert not {imported.split(".")[0] for imported in imports(tree(name))} & set(SCRIPTS)


@pytest.mark.parametrize("name", STANDARD_ONLY)
def test_the_lowest_modules_use_the_standard_library_alone(name):
    for imported in imports(tree(name)):
        top = imported.split(".")[0]
        assert top in sys.stdlib_module_names or (top == "megaman" and name != "errors"), imported


@pytest.mark.parametrize("name", sorted({*NO_TORCH, *SCRIPTS} & {*MODULES, *SCRIPTS}))
def test_torch_waits(name):
    heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "safetensors", "tensorboard"}
    assert not {imported.split(".")[0] for imported in at_import(name)} & heavy
    assert ours(at_import(name)) <= set(NO_TORCH)


@pytest.mark.parametrize("name", sorted({*NEVER_TORCH, *DOCTOR} & {*MODULES}))
def test_some_modules_know_no_torch_at_all(name):
    assert not {imported.split(".")[0] for imported in imports(tree(name))} & {"torch", "diffusers", "transformers"}


def test_torch_waits_in_truth_too(run_script, tmp_path):
    modules = ", ".join(f"megaman.{name}" for name in NO_TORCH if name in MODULES)
    code = f"import json, sys, megaman_lora, generate_megaman, {modules}; print(json.dumps(sorted(sys.modules)))"
    done = run_script(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert "megaman.dataset" in loaded
    assert not {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy"} & set(loaded)


@pytest.mark.parametrize("name", MODULES)
def test_only_the_scripts_print(name):
    calls = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]
    prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    where = {ast.unparse(keyword.value) for call in prints for keyword in call.keywords if keyword.arg == "file"}
    allowed = {MAY_PRINT[name]} if name in MAY_PRINT else set()
    assert where == allowed and (prints == [] or name in MAY_PRINT)
    assert not any(ast.unparse(call.func) in ("sys.stdout.write", "sys.stderr.write") for call in calls)


def test_the_package_itself_is_empty():
    assert (ROOT / "megaman" / "__init__.py").read_bytes() == b""


@pytest.mark.parametrize("name", MODULES)
def test_the_accelerator_and_tensorboard_stay_in_the_scripts(name):
    found = imports(tree(name))
    assert not {imported.split(".")[0] for imported in found} & {"accelerate", "tensorboard", "tqdm"}
    assert "torch.utils.tensorboard" not in found


@pytest.mark.parametrize("name", MODULES)
def test_modules_know_no_parsed_options(name):
    """Modules take plain values; a Namespace stays in the script."""
    if name not in ("commandline", "contradictions", "options", "generation_options"):
        assert not {"argparse", "megaman.options", "megaman.generation_options"} & set(imports(tree(name)))


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
