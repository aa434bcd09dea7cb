"""Bytes of a FedKSeed client and round against the paper's count, and of FedAvg on the same model.

    python benchmarks/frames.py [--json FILE]

The frames are encoded for real; the tensors in them are of the real sizes, their content does not matter.
"""

from __future__ import annotations

import torch
from rows import Row, finish

from thinwire import wire
from thinwire.methods.fedkseed import Gains, Steps

PAPER = {
    "FedKSeed, K = 4096, 200 steps": (4096, False, 17_988),
    "FedKSeed-Pro, K = 1024, 200 steps": (1024, True, 9_796),
}


def main() -> None:
    """Encode and count."""
    rows = []
    for name, (seeds, pro, paper) in PAPER.items():
        down = Gains(2**63, torch.ones(seeds), 1.0, 1e-5, torch.ones(seeds) if pro else None)
        up = Steps(torch.ones(200, dtype=torch.int32), torch.ones(200), 1000, 0.5, 0)
        frames = [wire.encode(payload, run=2**31, round=40, client=199) for payload in (down, up)]
        rows.append(Row(f"{name}: bytes down and up", sum(map(len, frames)), paper, "B"))
    finish(rows)


if __name__ == "__main__":
    main()
