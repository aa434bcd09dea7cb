"""What keeps the house in order: who imports whom (lazily and for types too), private names, sizes, names on pages.

What is not as it should be stands in a list below, with its reason. An entry that is no longer
needed fails its test: the lists only shrink.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "thinwire"

# the floors of the house, the lowest first: a part imports parts of lower floors only, and none of its own floor
FLOORS = (
    {"errors", "files", "keys", "memory", "moved", "streams", "threads", "units", "versions", "wire"},
    {"privacy"},
    {"aggregate", "records"},
    {"compress", "data", "model"},
    {"costs"},
    {"core"},
    {"runtime", "train"},
    {"evaluate", "perturb"},
    {"methods"},
    {"config"},
    {"assemble"},
    {"api", "compare", "estimate", "federation", "leaks", "report", "trackers"},
    {"operations"},
    {"commands"},
    {"cli"},
    {"flower_app", "thinwire"},
)

LONG = {  # and why
    "methods/cgfed.py": "two directions, two stages of codecs and their costs",
    "methods/fedcybgd.py": "cycles, cuts and veils are the method; its coding is train/proxy.py",
    "wire/frame.py": "the format is frozen, and read as one",
}
MOST = 300  # lines of a module


@cache
def modules() -> dict[str, Path]:
    """Each module of the package by its dotted name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(("thinwire", *path.relative_to(SOURCE).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = path
    return found


@cache
def imports(module: str) -> frozenset[tuple[str, str]]:
    """(module of ours, name that is taken from it or "") for every import anywhere in a module."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "thinwire":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add((full, "") if full in modules() else (node.module, alias.name))
        elif isinstance(node, ast.Import):
            found.update((alias.name, "") for alias in node.names if alias.name in modules())
    return frozenset((other, name) for other, name in found if other != module)


def part(module: str) -> str:
    """The folder or module of the package that a module lies in."""
    return [*module.split("."), "thinwire"][1]


def parts() -> set[tuple[str, str]]:
    """(part, part that it imports)."""
    pairs = {
        (part(module), part(other)) for module in modules() for other, name in imports(module) if name != "__version__"
    }
    return {(a, b) for a, b in pairs if a != b}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_every_part_has_a_floor() -> None:
    assert {part(module) for module in modules()} == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(set().union(*FLOORS))


def test_imports_go_downwards_only() -> None:
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert {(a, b) for a, b in parts() if floor[b] >= floor[a]} == set()


def test_there_is_no_circle() -> None:
    graph = networkx.DiGraph((module, other) for module in modules() for other, _ in imports(module))
    circles = [circle for circle in networkx.strongly_connected_components(graph) if len(circle) > 1]
    assert circles == []


def test_no_private_name_is_imported_by_another_module() -> None:
    taken = [(module, name) for module in modules() for _, name in imports(module) if re.match("_[^_]", name)]
    assert taken == []


def test_no_method_imports_another() -> None:
    found = {
        (module.rpartition(".")[2], other.rpartition(".")[2])
        for module in modules()
        for other, _ in imports(module)
        if module.startswith("thinwire.methods.") and other.startswith("thinwire.methods.")
    }
    assert found == set()


def test_the_estimate_imports_no_method() -> None:
    names = (other for module in modules() if part(module) == "estimate" for other, _ in imports(module))
    assert not [other for other in names if part(other) == "methods"]


def test_no_module_is_too_long_to_read() -> None:
    long = {str(path.relative_to(SOURCE)) for path in modules().values() if lines(path) > MOST}
    assert long == set(LONG)


def test_no_module_is_named_for_nothing() -> None:
    assert not [p for p in SOURCE.rglob("*.py") if p.stem in {"utils", "common", "helpers", "base", "misc"}]


PAGES = ("docs/methods.md", "docs/howto/choosing.md", "docs/reference/run-file.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_method_stands_on_every_page_that_lists_methods(page: str) -> None:
    from thinwire.methods import METHODS

    text = (ROOT / page).read_text().lower()
    assert {name for name in METHODS if not re.search(rf"\b{name}\b", text)} == set()


def test_every_method_has_a_demo_which_make_lists() -> None:
    from thinwire.methods import METHODS

    demos = {path.stem.removeprefix("demo-"): path for path in (ROOT / "recipes").glob("demo-*.toml")}
    assert {tomllib.loads(path.read_text())["method"]["name"] for path in demos.values()} == set(METHODS)
    listed = subprocess.run(["make", "--no-print-directory", "demos"], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.split() == sorted(demos)
    refused = subprocess.run(["make", "demo", "METHOD=nothing"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode
    assert all(name in refused.stderr for name in demos)
