"""Who may import whom: what keeps a method one file, and the wire free of all else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "thinwire"

# part -> the parts of ours that it may import; a part is a folder or a module of the package
PARTS = {"model", "train", "perturb", "compress", "privacy"}
ALLOWED = {
    "wire": set[str](),
    "keys": set[str](),
    "memory": set[str](),
    "errors": set[str](),
    "records": set[str](),
    "core": {"wire", "keys"},
    "data": {"keys"},
    "model": {"keys", "data"},
    "train": {"keys", "data", "model"},
    "perturb": {"keys", "data", "model", "train"},
    "compress": {"perturb", "model"},
    "methods": {"core", "wire", "keys", "memory", "data"} | PARTS,
    "evaluate": {"keys", "data", "model", "train"},
    "runtime": {"core", "wire", "keys", "memory", "errors", "records"},
    "config": {"core", "methods", "runtime", "errors"},
    "report": {"data"},
}
TOP = {
    "__init__",
    "api",
    "apart",
    "build",
    "card",
    "cli",
    "commands",
    "compare",
    "estimate",
    "federation",
    "show",
    "standings",
    "terminal",
    "trackers",
}


def imports(path: Path) -> set[str]:
    """The parts of ours that a module imports when it runs; what stands under TYPE_CHECKING does not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found.update(name.split(".")[1] for name in names if name.startswith("thinwire."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found - {"__version__"}


def modules(part: str) -> list[Path]:
    folder = SOURCE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [SOURCE / f"{part}.py"]


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_it_may(part: str) -> None:
    for path in modules(part):
        assert imports(path) <= ALLOWED[part] | {part}, path


def test_every_part_is_listed() -> None:
    ours = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())}
    assert ours - set(ALLOWED) == TOP  # which may import all


def test_no_module_is_named_for_nothing() -> None:
    assert not [p for p in SOURCE.rglob("*.py") if p.stem in {"utils", "common", "helpers", "base", "misc"}]
