"""Codes of what local training changes in a whole model: bits a weight, and the cosine with the change.

    python benchmarks/factors.py data.path=ROWS.jsonl [method.lr=3e-5 ...] [--json FILE]

SmolLM2-135M takes 20 AdamW steps of four rows of recipes/compare-gradualdiff.toml from bfloat16 weights. Each row's
reference is EDEN at half a bit, so its ratio is how many times nearer the code comes; its bits stand in its name.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from rows import Row, finish
from torch import Tensor

from thinwire import assemble, config
from thinwire.compress.codecs.eden import Eden
from thinwire.compress.codecs.factors import Factors
from thinwire.compress.codecs.topk import TopK
from thinwire.keys import Key
from thinwire.train.local import Rule, train_locally

RECIPE = Path(__file__).parent.parent / "recipes" / "compare-gradualdiff.toml"
CODES = {
    "top 3 % in 2 bits": TopK(0.03, bits=2),
    "top 5 % in 2 bits": TopK(0.05, bits=2),
    "eden, half a bit": Eden(0.5),
    "rank 8 in 4 bits": Factors(8, 4),
    "rank 16 in 2 bits": Factors(16, 2),
    "rank 16 in 4 bits": Factors(16, 4),
    "rank 32 in 2 bits": Factors(32, 2),
    "rank 32 in 4 bits": Factors(32, 4),
}


def change(settings: list[str]) -> dict[str, Tensor]:
    """What 20 steps of the first client change, float32."""
    run = config.load(RECIPE, settings)
    net, rows = assemble.net_of(run), assemble.rows_of(run.data, Key.root(run.seed))
    data = assemble.client_data(run, next(iter(rows.clients.values())), net)
    old = {name: net.base[name].bfloat16() for name in net.names}
    for name, parameter in net.parameters():
        parameter.data.copy_(old[name])
    lr, batches = float(run.method.model_dump()["lr"]), data.batches(Key.root(0).fold("batches"), 4)
    train_locally(net.model, [p for _, p in net.parameters()], batches, Rule("adamw", lr, 20, clip=1.0))
    return {name: p.detach() - old[name].float() for name, p in net.parameters()}


def judge(moves: dict[str, Tensor], code: Eden | Factors | TopK) -> tuple[float, float]:
    """(bits a weight, cosine) over all tensors."""
    size = product = sent = whole = 0.0
    for name, move in moves.items():
        data = code.encode(move, len(name))
        decoded = code.decode(data, move.shape, len(name))
        size += 8 * len(data)
        product += float((move * decoded).sum())
        sent += float(decoded.square().sum())
        whole += float(move.square().sum())
    return size / sum(move.numel() for move in moves.values()), product / math.sqrt(sent * whole)


def main() -> None:
    """All rows."""
    moves = change([argument for argument in sys.argv[1:] if "=" in argument])
    found = {name: judge(moves, code) for name, code in CODES.items()}
    least = found["eden, half a bit"][1]
    finish([Row(f"{name} ({bits:.3f} bits a weight)", alike, least, "cosine") for name, (bits, alike) in found.items()])


if __name__ == "__main__":
    main()
