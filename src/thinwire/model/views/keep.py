"""Which parts of a view stay at a client: personal adapters, trained there and never sent (FedPer, Arivazhagan et al.,
2019, arXiv:1912.00818)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

_FACTOR = re.compile(r"\.lora_([AB])\.default\.weight$")


def kept(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Those of the `names` of what is trained that a pattern of `keep` hits, in order.

    A factor of LoRA is hit by its short name too, which ends in .A or .B. ModelError: a pattern hits nothing, or they
    hit everything, so that nothing would be shared.
    """
    from thinwire.model.errors import ModelError

    short = {name: _FACTOR.sub(r".\1", name) for name in names}
    found = {p: {n for n, s in short.items() if fnmatchcase(n, p) or fnmatchcase(s, p)} for p in patterns}
    for pattern, hit in found.items():
        if not hit:
            ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in short.values()))
            more = ", ..." if len(ends) > 12 else ""
            known = ", ".join(ends[:12]) + more
            raise ModelError(f"model.view.keep: {pattern} hits nothing that is trained; there are names in {known}")
    stay = set().union(*found.values())
    if stay and len(stay) == len(short):
        raise ModelError("model.view.keep: all that is trained would stay with the clients, and nothing be shared")
    return tuple(name for name in short if name in stay)
