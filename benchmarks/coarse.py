"""Bits a weight of a model in 8 or 4 bits, whole and after local training, against entropy and zstandard; and speeds.

    python benchmarks/coarse.py [--json FILE]

The weights are those of `ulp.py`: SmolLM2-135M in bf16, and after 20 AdamW steps at three rates; matrices only. A
client that returns holds the old ones as the same code sent them. Entropy is the order-0 entropy of the levels, or of
how many levels a weight has moved by. Speeds are of one core, in millions of weights a second.
"""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np
import zstandard
from numpy.typing import NDArray
from rows import Row, finish
from torch import Tensor
from ulp import differences

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.exact import coarse


def entropy(counts: NDArray[np.float64]) -> float:
    some = counts[counts > 0]
    return -float(np.sum(some * np.log2(some / some.sum()))) / some.sum()


def measured(code: Blocks, new: list[Tensor], old: list[Tensor] | None) -> dict[str, float]:
    """Bits a weight of ours, of zstandard's and by entropy; millions of weights a second."""
    bits, spent, counts, weights = defaultdict[str, float](float), defaultdict[str, float](float), np.zeros(511), 0
    for place, tensor in enumerate(new):
        count = tensor.numel()
        scales, codes = code.rounded(tensor.float(), 0)
        base = None if old is None else old[place]
        start = time.perf_counter()
        sent = coarse.encode(scales, codes, code, base)
        middle = time.perf_counter()
        assert (coarse.decode(sent, code, base, count)[1] == codes).all()
        spent["encode"] += middle - start
        spent["decode"] += time.perf_counter() - middle
        bits["ours"] += 8 * len(sent)
        bits["zstd 3"] += 8 * len(zstandard.ZstdCompressor(level=3).compress(code.join(scales, codes)))
        moved = codes.astype(np.int64) - coarse.predicted(base, scales, code, count)
        counts += np.bincount(moved + 255, minlength=511)
        weights += count
    return (
        {what: n / weights for what, n in bits.items()}
        | {"entropy": entropy(counts)}
        | {what: weights / seconds / 1e6 for what, seconds in spent.items()}
    )


def main() -> None:
    """Code whole models and what has moved of them."""
    rows = []
    for rate, old, new in differences():
        before, after = ([w for w in weights.values() if w.dim() == 2] for weights in (old, new))
        for bits in (8, 4):
            code = Blocks(bits)
            held = [code.decode(code.encode(w.float(), 0), w.shape, 0).to(w.dtype) for w in before]
            for what, base in (("whole", None), (f"rate {rate:g}", held)):
                if base is None and rate > 1e-6:
                    continue
                found = measured(code, after, base)
                rows += [
                    Row(f"{bits} bits, {what}, against {other}", found["ours"], found[other], "bits")
                    for other in ("entropy", "zstd 3")
                ]
                rows += [
                    Row(f"{bits} bits, {what}, {side}, against 10", found[side], 10.0, "M weights/s")
                    for side in ("encode", "decode")
                ]
    finish(rows)


if __name__ == "__main__":
    main()
