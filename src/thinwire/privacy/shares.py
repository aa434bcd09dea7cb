"""Client-level noise under masks: each client adds a share of it, and the server sees the sum with all shares alone.

    x_i = trunc(u_i min(1, C / |u_i|) / u) + k_i          k_i discrete normal of deviation ceil(s / sqrt(m))

u_i is all that client i adds to the sums, together; s = sigma C / u, the deviation that the sum must have, in units;
m the least number of clients whose sum is ever unmasked (privacy.secure.minimum). Of m or more the noises add up to a
deviation of s at least, so the guarantee is that of aggregate.noised, and nobody is trusted with an update: but what
c clients in league with the server have added is known to them, and the rest has the deviation s sqrt((m - c) / m).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from thinwire.privacy.integers import FINE, TAIL, truncated, within
from thinwire.privacy.protection import Protection
from thinwire.privacy.secrets import Secrets
from thinwire.privacy.terms import Term


def deviation(minimum: int) -> int:
    """Of one client's share of the noise, in units."""
    return math.ceil(FINE / math.sqrt(minimum))


def room(minimum: int) -> int:
    """What a number may be beyond a client's own part: the longest noise that there is."""
    return TAIL * deviation(minimum)


def term(shape: tuple[int, ...], protection: Protection) -> Term:
    """A term of what a client adds: no number of it is longer than the whole."""
    unit = protection.unit(FINE)
    most = math.ceil(protection.clip / unit)
    return Term(shape, unit, -most, most)


def noised(
    parts: Mapping[str, Tensor], protection: Protection, minimum: int, secrets: Secrets
) -> dict[str, NDArray[np.int64]]:
    """A client's whole numbers, shortened to the bound all together, with its share of the noise: int64 [n] each."""
    length = math.sqrt(sum(float(part.double().square().sum()) for part in parts.values()))
    factor, unit = within(length, protection.clip), protection.unit(FINE)
    found = {name: truncated(part, factor, unit).numpy().ravel() for name, part in parts.items()}
    return {name: whole + secrets.integers(whole.size, deviation(minimum)) for name, whole in found.items()}
