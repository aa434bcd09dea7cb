"""Peak memory of a run with 200 simulated clients over one with 2, on SmolLM2-135M, all clients in every round.

    python benchmarks/memory_clients.py [--json FILE]

Each run is a process of its own; one FedKSeed step a client, the same batch size, one round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import Row, finish

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-fedkseed.toml"


def peak(clients: int, folder: Path) -> float:
    """MB at the peak of a run with so many clients."""
    settings = ["rounds=1", f"data.clients={clients}", "data.partition=iid", "data.max_length=16", "data.too_long=cut"]
    settings += ["eval.rows=16", "method.steps=1", "method.batch_size=2", "method.seeds=16"]
    command = [sys.executable, "-c", "from thinwire.cli import main; main()", "run", str(RECIPE), *settings]
    subprocess.run([*command, "--out", str(folder / str(clients))], check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((folder / str(clients) / "summary.json").read_text())["peak_memory_bytes"]) / 1e6


def main() -> None:
    """Run both."""
    with tempfile.TemporaryDirectory() as folder:
        few, many = (peak(clients, Path(folder)) for clients in (2, 200))
    finish([Row("200 simulated clients over 2, peak memory of the run", many, few, "MB")])


if __name__ == "__main__":
    main()
