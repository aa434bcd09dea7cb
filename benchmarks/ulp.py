"""Bits a weight of a model's difference after local training, against entropy and zstandard, and the coder's speed.

    python benchmarks/ulp.py [--json FILE]

SmolLM2-135M in bf16 takes 20 AdamW steps at three rates, through a float32 copy, on the first office's share of the
demo's data; the result is rounded to bf16. Entropy is the order-0 entropy of k, the number of patterns between a
weight's old and its new value, over all weights: what no coder without contexts gets below. Speeds are of one core, in
megabytes of weights; the best of three for each tensor.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from rows import Row, finish
from torch import Tensor

from thinwire import assemble, config
from thinwire.compress.exact import ulp
from thinwire.keys import Key
from thinwire.train.local import Rule, train_locally

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-fedavg.toml"
RATES, STEPS, BATCH, REPEATS = (1e-6, 1e-5, 1e-4), 20, 4, 3
HIGH = 19
"""The slow level of zstandard; it sees every SHARE-th tensor only, the embedding not among them."""
SHARE = 10

Weights = Mapping[str, Tensor]


def differences() -> Iterator[tuple[float, Weights, Weights]]:
    """(rate, old, new) in bf16 for each rate."""
    run = config.load(RECIPE)
    net, rows = assemble.net_of(run), assemble.rows_of(run.data, Key.root(run.seed))
    office = assemble.dataset(run.data, next(iter(rows.clients.values())), net.tokenizer)
    data = replace(office, balanced=run.data.balanced)
    old = {name: net.base[name].bfloat16() for name in net.names}
    for rate in RATES:
        with torch.no_grad():
            for name, parameter in net.parameters():
                parameter.copy_(old[name])
        batches = data.batches(Key.root(0).fold("batches"), BATCH)
        train_locally(net.model, [p for _, p in net.parameters()], batches, Rule("adamw", rate, STEPS, clip=1.0))
        yield rate, old, {name: p.detach().bfloat16() for name, p in net.parameters()}


def planes(values: NDArray[np.unsignedinteger]) -> bytes:
    """Byte by byte of all values."""
    return values.reshape(-1).view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def zigzagged(new: Tensor, old: Tensor) -> NDArray[np.unsignedinteger]:
    k = ulp.ordered(new).astype(np.int32) - ulp.ordered(old)
    return ((k << 1) ^ (k >> 31)).view(np.uint32).astype(np.uint32 if abs(k).max(initial=0) > 32767 else np.uint16)


def patterns(values: Tensor) -> NDArray[np.unsignedinteger]:
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def squeezed(data: bytes, level: int) -> int:
    return len(zstandard.ZstdCompressor(level=level).compress(data))


def sizes(old: Weights, new: Weights) -> tuple[dict[str, float], dict[str, float]]:
    """(bits a weight of each coding, MB/s of ours) over all tensors."""
    size: dict[str, int] = defaultdict(int)
    weights: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    counts = np.zeros(1 << 17, np.int64)
    for place, (name, mine) in enumerate(old.items()):
        theirs = new[name]
        k = ulp.ordered(theirs).astype(np.int64).reshape(-1) - ulp.ordered(mine).reshape(-1)
        counts += np.bincount(k + (1 << 16), minlength=1 << 17)
        for whole in (False, True):
            base, best = None if whole else mine, [np.inf, np.inf]
            for _ in range(REPEATS):
                start = time.perf_counter()
                data = ulp.encode(theirs, base)
                middle = time.perf_counter()
                found = ulp.decode(data, base, theirs.dtype, theirs.shape)
                best = [min(best[0], middle - start), min(best[1], time.perf_counter() - middle)]
            assert torch.equal(found.view(torch.int16), theirs.view(torch.int16)), name
            what = "whole" if whole else "ours"
            size[what] += len(data)
            seconds[f"{what}, encode"] += best[0]
            seconds[f"{what}, decode"] += best[1]
        steps = planes(zigzagged(theirs, mine))
        size["zstd 3, planes of k"] += squeezed(steps, 3)
        size["zstd 3, weights"] += squeezed(planes(patterns(theirs)), 3)
        size["zstd 3, bf16 of the float difference"] += squeezed(
            planes(patterns((theirs.float() - mine.float()).bfloat16())), 3
        )
        if place % SHARE == 5:
            size[f"zstd {HIGH}, planes of k"] += squeezed(steps, HIGH)
            size[f"ours, every {SHARE}th tensor"] += len(ulp.encode(theirs, mine))
            weights["share"] += mine.numel()
        weights["all"] += mine.numel()
    partly = {f"zstd {HIGH}, planes of k", f"ours, every {SHARE}th tensor"}
    bits = {what: 8 * n / weights["share" if what in partly else "all"] for what, n in size.items()}
    counts = counts[counts > 0]
    bits["entropy"] = -float(np.sum(counts * np.log2(counts / weights["all"]))) / weights["all"]
    return bits, {what: 2e-6 * weights["all"] / spent for what, spent in seconds.items()}


def main() -> None:
    """Train, code, compare."""
    warm = torch.linspace(-1, 1, 4096).bfloat16().view(64, 64)
    for base in (None, warm.flip(0)):
        ulp.decode(ulp.encode(warm, base), base, warm.dtype, warm.shape)
    rows = []
    for rate, old, new in differences():
        bits, speeds = sizes(old, new)
        slow, part = f"zstd {HIGH}, planes of k", f"ours, every {SHARE}th tensor"
        for mine, other in (
            ("ours", "entropy"),
            ("ours", "zstd 3, planes of k"),
            (part, slow),
            ("ours", "zstd 3, bf16 of the float difference"),
            ("ours", "zstd 3, weights"),
            ("whole", "zstd 3, weights"),
        ):
            rows.append(Row(f"rate {rate:g}: {mine}, against {other}", bits[mine], bits[other], "bits a weight"))
        rows += [
            Row(f"rate {rate:g}: {what}, against 100 MB/s", speed, 100.0, "MB/s") for what, speed in speeds.items()
        ]
    finish(rows)


if __name__ == "__main__":
    main()
