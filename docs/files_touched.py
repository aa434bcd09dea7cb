"""The files that each method touches, found in METHODS, tests, recipes and docs: python docs/files_touched.py

It writes the table between the marks of docs/howto/adding.md anew.
"""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

from thinwire.methods import PLACES

ROOT = Path(__file__).parent.parent
PAGE, BEGIN, END = ROOT / "docs" / "howto" / "adding.md", "<!-- files -->\n", "<!-- /files -->\n"
SOURCE = ROOT / "src" / "thinwire"
HEADS = ("method", "its file", "rows of the matrix", "recipes", "paragraph", "oracles", "named elsewhere in src")


def rows(cls: str) -> list[str]:
    """The rows of the conformance matrix that are of a class, as tests/rows.py has them: ROW: Row(CLASS(...), ...)."""
    found = []
    for node in ast.walk(ast.parse((ROOT / "tests" / "rows.py").read_text())):
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            method = value.args[0] if isinstance(value, ast.Call) and value.args else None
            if isinstance(key, ast.Constant) and isinstance(method, ast.Call) and ast.unparse(method.func) == cls:
                found.append(str(key.value))
    return found


def recipes(name: str) -> list[str]:
    """The demos of a method."""
    files = sorted((ROOT / "recipes").glob("demo-*.toml"))
    return [path.stem for path in files if tomllib.loads(path.read_text())["method"]["name"] == name]


def paragraph(name: str) -> str:
    """Where docs/methods.md has it: under a heading of its own, or under one in whose text its name stands."""
    parts = re.split(r"^## (.+)$", (ROOT / "docs" / "methods.md").read_text(), flags=re.MULTILINE)[1:]
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    own = [title for title in texts if re.sub("[^a-z]", "", title.lower()).startswith(name)]
    title = (own or [title for title, text in texts.items() if f"`{name}`" in text])[0]
    return f"[{title}](../methods.md#{re.sub('[^a-z0-9-]', '', title.lower().replace(' ', '-'))})"


def oracles(name: str) -> list[str]:
    """The tests of methods that are its own, or else those that import it."""
    files = sorted((ROOT / "tests" / "methods").glob("test_*.py"))
    own = [path.stem for path in files if path.stem == f"test_{name}"]
    return own or [path.stem for path in files if f"from thinwire.methods.{name} import" in path.read_text()]


@cache
def named() -> dict[str, set[str]]:
    """By module all texts that stand alone in it, and the modules that it imports from."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        found[path.relative_to(SOURCE).as_posix()] = texts | modules
    return found


def elsewhere(name: str) -> list[str]:
    """Modules besides its own and the table of methods that import it, or have its name as a text of their own."""
    own = {"methods/__init__.py", f"methods/{name}.py"}
    return [path for path, texts in named().items() if path not in own and {name, f"thinwire.methods.{name}"} & texts]


def table() -> str:
    """The table as Markdown."""
    lines: list[tuple[str, ...]] = [HEADS, ("---",) * len(HEADS)]
    for name, place in sorted(PLACES.items()):
        module, _, cls = place.partition(":")
        file = f"{module.rpartition('.')[2]}.py"
        cells = (rows(cls), recipes(name), [paragraph(name)], oracles(name), elsewhere(name))
        lines.append((name, file, *(", ".join(cell) for cell in cells)))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def written(page: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
