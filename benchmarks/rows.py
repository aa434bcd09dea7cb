"""What every benchmark prints and writes: rows of ours against a named reference, measured in the same run.

python benchmarks/rows.py FOLDER     one table of all the JSON files in a folder
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` is ours over the reference."""

    name: str
    ours: float
    reference: float
    unit: str

    @property
    def ratio(self) -> float:
        return self.ours / self.reference


def finish(rows: Sequence[Row]) -> None:
    """Print the rows, and write them where --json names."""
    for row in rows:
        print(f"{row.name}: {row.ours:,.4g} {row.unit}, reference {row.reference:,.4g}, ratio {row.ratio:.3g}")  # noqa: T201
    if "--json" in sys.argv:
        path = Path(sys.argv[sys.argv.index("--json") + 1])
        path.write_text(json.dumps([{**asdict(row), "ratio": row.ratio} for row in rows], indent=2) + "\n")


def table(folder: Path) -> None:
    """One table of what the benchmarks wrote into a folder."""
    from rich.console import Console
    from rich.table import Column, Table

    whole = Table(
        "benchmark", "what", *(Column(head, justify="right") for head in ("ours", "reference", "unit", "ratio"))
    )
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text()):
            numbers = (f"{row['ours']:,.4g}", f"{row['reference']:,.4g}", row["unit"], f"{row['ratio']:.3g}")
            whole.add_row(path.stem, row["name"], *numbers)
    Console(width=None if sys.stdout.isatty() else 140).print(whole)


if __name__ == "__main__":
    table(Path(sys.argv[1]))
