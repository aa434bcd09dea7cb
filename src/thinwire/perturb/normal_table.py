"""The fixed table of standard normal quantiles behind every Gaussian direction.

Number i of 0..65535 stands for z_i = Phi^-1((i + 1/2) / 65536), rounded correctly to float32. The law is symmetric,
so `gaussian_table.npy` holds the positive half only: half[j] = z_(32768 + j), and z_(32767 - j) = -half[j].

The table is data and not a formula on purpose: log and cos differ in the last bit between libraries, a file does not.
`python -m thinwire.perturb.normal_table PATH` makes the file again (needs mpmath, about a minute).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HALF = 32768
"""Entries of the positive half."""


@cache
def quantiles() -> NDArray[np.float32]:
    """All 65,536 quantiles in ascending order, read-only float32; read from the package once."""
    half = np.load(Path(__file__).with_name("gaussian_table.npy")).astype(np.float32, copy=False)
    table = np.concatenate([-half[::-1], half])
    table.flags.writeable = False
    return table


def exact_half(indices: Iterable[int]) -> NDArray[np.float32]:
    """The correctly rounded half[j] for each j in `indices`, from mpmath at 120 bits; float32."""
    import mpmath

    rounded = []
    for j in indices:
        with mpmath.workprec(120):
            # 2p - 1 with p = (32768 + j + 1/2) / 65536
            value = mpmath.sqrt(2) * mpmath.erfinv(mpmath.mpf(2 * j + 1) / 65536)
        with mpmath.workprec(24):
            # one rounding straight to float32's 24 bits: going through float64 would round twice
            rounded.append(float(+value))
    return np.array(rounded, dtype="<f4")


if __name__ == "__main__":
    np.save(sys.argv[1], exact_half(range(HALF)))
