"""Time of a replay of 4096 seeds on a GPU, for each parameter and seed, and how near it comes to what limits it.

    python benchmarks/gpu.py [--elements N] [--json FILE]

The weights are N bfloat16 parameters (3 billion if not given, 51 million at least) in three tensors. Under the sign
law each is moved by one `triton_kernels.accumulate`. Under the low-rank law (r = 1) they are matrices of 4096 x 4096:
both factors from `triton_kernels.matrix`, and their product, added to the weights in float32, from `torch.addmm`
without TF32; what is left of a tensor stays as it is and is not counted. The reference is for each seed
`torch.manual_seed`, and for each tensor `torch.normal` into another and `add_` with the seed's coefficient; it needs
the same time for every seed, and is given 4. All is measured three times, in turn, after a first time that does not
count; the shortest time counts.

The limit of the sign law is the GPU's 32-bit integer multiplier: Philox takes 20 products for four elements and 32
seeds, and a multiprocessor makes 64 a clock (compute capability 7.0 to 10.0) at its highest clock. To read and write
the weights once takes an H200 about a fortieth of that time. The limit of the low-rank law is its multiply-adds, one
for each parameter and seed, at the rate of a float32 product of 8192 x 8192 matrices measured in the same run. The rows
of the limits have the rate reached, and as reference the limit's: their ratio is the share of the limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from rows import Row, finish

SEEDS = 4096
REFERENCE_SEEDS = 4
SIDE = 4096
LARGE = 8192
REPEATS = 3


def seconds(work: Callable[[], None]) -> float:
    """How long the GPU takes for it."""
    torch.cuda.synchronize()
    begin = perf_counter()
    work()
    torch.cuda.synchronize()
    return perf_counter() - begin


def main() -> int:
    """Time both laws, the reference and a large product."""
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks/gpu.py needs a CUDA GPU\n")
        return 2
    import triton

    from thinwire.perturb import triton_kernels

    # no TF32
    torch.set_float32_matmul_precision("highest")
    elements = int(sys.argv[sys.argv.index("--elements") + 1]) if "--elements" in sys.argv else 3_000_000_000
    pieces = [torch.full((elements // 3,), 0.5, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    direction = torch.empty_like(pieces[0])
    matrices = [matrix for piece in pieces for matrix in piece[: len(piece) // SIDE**2 * SIDE**2].view(-1, SIDE, SIDE)]
    seeds, coefs = np.arange(SEEDS), np.linspace(-1e-3, 1e-3, SEEDS, dtype=np.float32)
    spread = torch.from_numpy(coefs).cuda()
    large, product = torch.randn(LARGE, LARGE, device="cuda"), torch.empty(LARGE, LARGE, device="cuda")

    def sign() -> None:
        for pid, piece in enumerate(pieces):
            triton_kernels.accumulate("sign", piece, piece, 1, pid, seeds, coefs)

    def lowrank() -> None:
        for pid, matrix in enumerate(matrices):
            both = triton_kernels.matrix(1, pid, seeds, 0, 2 * SIDE)
            matrix.copy_(torch.addmm(matrix.float(), both[:SIDE], both[SIDE:].mul_(spread).T))

    def reference() -> None:
        for seed in range(REFERENCE_SEEDS):
            torch.manual_seed(seed)
            for piece in pieces:
                torch.normal(0.0, 1.0, direction.shape, out=direction)
                piece.add_(direction, alpha=1e-4)

    def multiply() -> None:
        torch.mm(large, large, out=product)

    moved = {"sign": 3 * (elements // 3), "lowrank": len(matrices) * SIDE**2}
    found = dict.fromkeys((reference, sign, lowrank, multiply), float("inf"))
    for work in found:
        # kernels are compiled, and memory is taken
        work()
    for _ in range(REPEATS):
        found = {work: min(seconds(work), time) for work, time in found.items()}

    device = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    limits = {
        # clocks are given in kHz; 5 products an element serve 32 seeds
        "sign": 64 * device["multiprocessor_count"] * device["sm_clock_rate"] * 1e3 / (5 / 32),
        "lowrank": LARGE**3 / found[multiply],
    }
    each = found[reference] / moved["sign"] / REFERENCE_SEEDS
    rows = []
    for law, work in (("sign", sign), ("lowrank", lowrank)):
        time, name = found[work] / moved[law] / SEEDS, f"replay of {SEEDS} seeds, {law} law, GPU"
        rows.append(Row(f"{name}: time for each parameter and seed", time * 1e12, each * 1e12, "ps"))
        rows.append(Row(f"{name}: share of the limit", 1e-12 / time, limits[law] * 1e-12, "T parameters x seeds/s"))
    finish(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
