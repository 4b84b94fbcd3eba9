"""The project's sources as syntax trees: what each module imports."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ["megaman_lora", "generate_megaman"]
# By dotted name below megaman, such as errors or data.images.
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "megaman").with_suffix("").parts)
    for path in (ROOT / "megaman").rglob("*.py")
    if path.stem != "__init__"
)


@cache  # a dozen tests look at each module, some of them by way of all that import it
def tree(name: str) -> ast.Module:
    path = (
        ROOT / f"{name}.py"
        if name in SCRIPTS
        else ROOT / "megaman" / f"{name.replace('.', '/')}.py"
    )
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports(node: ast.AST, types_too: bool = True) -> tuple[str, ...]:
    """The dotted names that are imported anywhere below the node: megaman.files, torch,
    torch.nn."""
    return tuple(_imports(node, types_too))


def _imports(node: ast.AST, types_too: bool) -> list[str]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are written in full"
            found += [child.module] + [f"{child.module}.{alias.name}" for alias in child.names]
        elif not (_is_type_checking(child) and not types_too):
            found += _imports(child, types_too)
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


@cache
def at_import(name: str) -> tuple[str, ...]:
    """What is imported as soon as the module is: not in its functions, not for type checkers
    alone."""
    body = [node for node in tree(name).body if not isinstance(node, ast.FunctionDef)]
    return imports(ast.Module(body=body, type_ignores=[]), types_too=False)


def ours(names: Iterable[str]) -> set[str]:
    """The modules of megaman among imported names: data.images, whether it or something in it was
    imported."""
    parts = [name.split(".")[1:] for name in names if name.startswith("megaman.")]
    return {".".join(part[:length]) for part, length in product(parts, (1, 2))} & set(MODULES)
