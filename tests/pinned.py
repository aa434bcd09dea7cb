"""Whether the libraries are those of constraints.txt, by which exact numbers of floats are known."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def other_versions() -> list[str]:
    """Of the libraries that round products, those that are other than make installs."""
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    installed = {name: version(name).partition("+")[0] for name in ("torch", "transformers", "numpy")}
    return [f"{name} {found}, not {pinned[name]}" for name, found in installed.items() if found != pinned[name]]
