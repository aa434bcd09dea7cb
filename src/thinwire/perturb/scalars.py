"""The scalars of zeroth-order steps as they travel: float32, float16, or int8 in units of the largest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.perturb.spsa import LARGEST
from thinwire.wire import Illegal

SKIPPED = -128  # the int8 code of a skipped step; among floats it is NaN
FORMS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
BITS = {"float32": np.uint32, "float16": np.uint16, "int8": np.uint8}
BOUNDS = {form: np.array(LARGEST, form).view(BITS[form]) << 1 for form in ("float32", "float16")}


def as_sent(scalars: NDArray[np.float32], form: str) -> tuple[Tensor, float]:
    """The scalars as they travel, and their unit. float32 [n], NaN where skipped."""
    if form != "int8":
        return torch.from_numpy(scalars).to(FORMS[form]), 1.0
    largest = float(np.nanmax(np.abs(scalars), initial=0.0))
    unit = largest / 127 or 1.0
    codes = np.where(np.isnan(scalars), SKIPPED, np.rint(np.nan_to_num(scalars) / unit))
    return torch.from_numpy(codes.astype(np.int8)), unit


def as_floats(sent: Sequence[tuple[Tensor, float]], form: str, shape: tuple[int, int]) -> NDArray[np.float64]:
    """The inverse, of each reply's scalars and unit: float64 [replies, steps, queries], NaN where skipped."""
    scalars = torch.stack([scalars for scalars, _ in sent]).double().numpy()
    if form == "int8":
        scalars[scalars == SKIPPED] = np.nan
    scalars *= np.array([[unit] for _, unit in sent])
    return scalars.reshape(len(sent), *shape)


def check_scalars(scalars: Tensor, unit: float, form: str, shape: tuple[int, int]) -> None:
    """Illegal for scalars of another form, a wrong unit, what is beyond LARGEST, a step that is skipped in part."""
    count = shape[0] * shape[1]
    if scalars.dtype != FORMS[form] or scalars.shape != (count,):
        raise Illegal(f"scalars are {scalars.dtype} {list(scalars.shape)}, not {form} [{count}]")
    # what is applied is scalars times unit, and the quick look below is at the scalars alone
    if not (0 < unit <= LARGEST / 127 if form == "int8" else unit == 1.0):
        raise Illegal(f"unit is {unit}")
    # Without their sign, the bits of floats are ordered as they are, NaN last: most replies need no closer look.
    if form != "int8" and np.maximum.reduce(scalars.numpy().view(BITS[form]) << 1) <= BOUNDS[form]:
        return
    found = as_floats([(scalars, unit)], form, shape)[0]
    skipped = np.isnan(found)
    if not (np.abs(found[~skipped]) <= 1.001 * LARGEST).all():
        raise Illegal(f"a scalar is beyond {LARGEST:g}")
    if (skipped.any(axis=1) != skipped.all(axis=1)).any():
        raise Illegal("a step is skipped in part")


def check_picks(seeds: Tensor | None, count: int, size: int) -> None:
    """Illegal for directions that are not `count` of a pool of `size`, int32; None, where none travel, passes."""
    if seeds is None:
        return
    if seeds.dtype != torch.int32 or seeds.shape != (count,):
        raise Illegal(f"seeds are {seeds.dtype} {list(seeds.shape)}, not int32 [{count}]")
    if seeds.min() < 0 or seeds.max() >= size:
        raise Illegal(f"a direction outside the pool of {size}")


def drawn(generator: np.random.Generator, count: int, form: str) -> Tensor:
    """Scalars of a form at random, [count]: what a frame of them may hold."""
    numbers, dtype = torch.from_numpy(generator.standard_normal(count)), FORMS[form]
    return numbers.to(dtype) if dtype.is_floating_point else (numbers * 30).clamp(-127, 127).to(dtype)
