"""What both ends of a secure sum must have in common: what is added up, what binds it, and what shows a secret."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from thinwire.aggregate.linear import Linear
from thinwire.aggregate.mean import Metrics
from thinwire.core import Averaged, Method
from thinwire.errors import ConfigError
from thinwire.privacy import shares
from thinwire.privacy.masks import derived, numbered
from thinwire.privacy.protection import Protection
from thinwire.privacy.secure import Secure
from thinwire.privacy.terms import Sums, Term

EXAMPLES, LOSS, MEASURED, SKIPPED, CUT = (
    f"report/{name}" for name in ("examples", "loss", "measured", "skipped", "cut")
)
NATS = 1000.0  # the largest loss that a sum of losses takes as it is
FINE = 1 << 30


def linear_of(method: Method, secure: Secure) -> Linear:
    """The method's plain sums; ConfigError with the reason where a round needs more of replies than their sum."""
    found = method.linear(secure)
    assert isinstance(method, Averaged)
    if method.aggregation.kinds != ("mean",):
        kind = method.aggregation.kinds[0]
        raise ConfigError(f"method.aggregation: {kind} looks at each reply, and under privacy.secure none is seen")
    if method.weighting == "examples" and secure.examples is None:
        raise ConfigError(
            'privacy.secure.examples: missing; method.weighting = "examples" needs the most that a client counts as'
        )
    return found


class Plan(NamedTuple):
    """A round's sums: `linear` of the method, `sums` of all that is added up, with what clients report beside."""

    linear: Linear
    sums: Sums
    weighted: bool  # whether a client counts by its examples, out of the most that it may have

    @classmethod
    def of(cls, method: Method, net: Any, secure: Secure, clients: int, protection: Protection | None = None) -> Plan:
        """By the same rule at both ends. `protection`: of whole clients, whose noise comes in shares."""
        linear = linear_of(method, secure)
        assert isinstance(method, Averaged)
        terms = dict(linear.terms(net))
        if protection is not None:
            own = {name: shares.term(term.shape, protection) for name, term in terms.items()}
            return cls(linear, Sums(own, clients, shares.room(secure.minimum)), False)
        if weighted := method.weighting == "examples":
            terms[EXAMPLES] = Term((), 1.0, 0, secure.examples or 0)
        if secure.reports:
            terms[LOSS], terms[MEASURED] = Term((), NATS / FINE, -FINE, FINE), Term((), 1 / FINE, 0, FINE)
            terms[SKIPPED], terms[CUT] = Term((), 1.0, 0, 1 << 31), Term((), 1.0, 0, 1 << 31)
        return cls(linear, Sums(terms, clients), weighted)

    @property
    def most(self) -> int:
        """The most examples that a client counts as."""
        return self.sums.terms[EXAMPLES].high


def noise_in_shares(protection: Protection | None) -> Protection | None:
    """A protection whose noise comes in shares: that of whole clients. A record's is in the reply already."""
    return protection if protection is not None and protection.level == "client" else None


def reported(whole: Mapping[str, Tensor]) -> Metrics:
    """What the sums hold of losses, skipped steps and cut numbers; nothing where they hold none of it."""
    if LOSS not in whole:
        return {}
    measured = float(whole[MEASURED])
    loss = float(whole[LOSS]) / measured if measured else 0.0
    return {"loss": loss, "skipped": int(whole[SKIPPED]), "cut": int(whole[CUT])}


def place_of(run: int, round: int, attempt: bytes, clients: Sequence[int]) -> bytes:
    """What binds all that is made for one sum to it."""
    return hashlib.sha256(numbered(run, round) + attempt + numbered(*clients)).digest()


def commitment(own: bytes) -> bytes:
    """What shows later that a recovered secret is the one that was shared."""
    return derived(own, b"commitment")
