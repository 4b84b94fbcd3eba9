"""Who may import whom: docs/architecture.md as a test. Read with ast, nothing is run."""

from __future__ import annotations

import pytest
from sources import MODULES, SCRIPTS, at_import, imports, ours, tree

# Package: level. It may import packages of a lower level, and itself.
LEVELS = {
    "leaves": 1,  # the modules of LEAVES: each may import those before it
    "config": 2,  # leaves
    "models": 2,  # leaves
    "pages": 2,  # leaves
    "data": 3,  # leaves, config, models, pages
    "lora": 3,  # leaves, config, models, pages
    "doctor": 4,  # leaves, config, models, pages, data, lora
    "sampling": 4,  # leaves, config, models, pages, data, lora
    "training": 5,  # all the others
}
LEAVES = [
    "version",
    "console",
    "errors",
    "schema",
    "sequences",
    "shell",
    "files",
    "locks",
    "threads",
    "safe_loading",
    "hub",
    "cuda",
    "runtime",
    "processes",
]
# They load without torch: whole packages, and what data does before anything is captioned or
# encoded.
LIGHT_PACKAGES = {"config", "pages", "doctor"}
LIGHT_MODULES = {
    "data.images",
    "data.png_chunks",
    "data.captions",
    "data.caption_prompts",
    "data.csv_table",
    "data.single_byte_encodings",
    "data.legacy_encodings",
    "data.metadata_files",
    "data.folders",
    "data.buckets",
    "data.file_index",
    "data.dataset",
    "data.problems",
}
# The only modules that may import these.
HOMES = {
    "argparse": {"config.cli"},
    "tensorboard": {"training.tensorboard"},
    "accelerate": {"training.run"},
}
IMPORTS = {name: ours(imports(tree(name))) for name in MODULES}


def package_of(name: str) -> str:
    return name.partition(".")[0] if "." in name else "leaves"


def may_import(name: str, other: str) -> bool:
    package, others = package_of(name), package_of(other)
    if package == others == "leaves":
        return LEAVES.index(other) < LEAVES.index(name)
    return package == others or LEVELS[others] < LEVELS[package]


def test_every_module_has_its_place():
    assert {package_of(name) for name in MODULES} == set(LEVELS), "a new package needs a level"
    assert {name for name in MODULES if "." not in name} <= set(LEAVES), (
        "a new leaf needs its place in LEAVES"
    )


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    """Downwards; imports in functions and for type checkers count too."""
    assert [other for other in sorted(IMPORTS[name]) if not may_import(name, other)] == []


def test_no_two_modules_import_each_other():
    """Not by way of others either."""
    left = dict(IMPORTS)
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize(
    "name", [n for n in MODULES if package_of(n) in LIGHT_PACKAGES or n in LIGHT_MODULES]
)
def test_what_loads_without_torch(name):
    reached: set[str] = set()
    waiting = {name}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        heavy = {imported.split(".")[0] for imported in at_import(module)}
        assert not heavy & {"torch", "diffusers", "transformers", "accelerate", "peft"}, (
            f"by way of {module}"
        )
        waiting |= ours(at_import(module)) - reached


def test_sampling_knows_nothing_of_training():
    sampling = [name for name in MODULES if package_of(name) == "sampling"]
    imported = set().union(*(IMPORTS[name] for name in sampling))
    assert not any(package_of(other) == "training" for other in imported)


@pytest.mark.parametrize("library", HOMES)
def test_a_library_has_one_home(library):
    users = set()
    for name in [*MODULES, *SCRIPTS]:
        foreign = [
            imported for imported in imports(tree(name)) if not imported.startswith("megaman.")
        ]
        if any(library in imported.split(".") for imported in foreign):
            users.add(name)
    assert users and users <= HOMES[library]
