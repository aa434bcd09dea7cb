"""A mean as plain sums: what a method declares whose server half needs no reply by itself, so that masks can cover it.

At a client `parts` are what its reply adds to each of the `terms`; at the server `of_terms` makes of their means the
one virtual reply that `step` is given. The default is of updates that are changes, or weights by what they change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from thinwire.aggregate.mean import Update
from thinwire.privacy.secure import Secure
from thinwire.privacy.terms import Term


class Linear:
    """The plain sums of a method's mean; `secure` is the run's table.

    `clippable`: whether parts times a factor below 1 are those of a smaller update, so that a bound on the length of
    all together bounds what a client does to the sum.
    """

    clippable: ClassVar[bool] = False

    def __init__(self, method: Any, secure: Secure) -> None:
        self.method, self.secure = method, secure

    def terms(self, net: Any) -> Mapping[str, Term]:
        """What is added up, by name; the same at both ends."""
        raise NotImplementedError

    def parts(self, down: Any, up: Any, client: Any) -> Mapping[str, Tensor]:
        """What a client's reply `up` to `down` adds to each term, before its weight."""
        raise NotImplementedError

    def extra_bytes(self, net: Any) -> int:
        """The most bytes that a broadcast of `begun` has beside those of a plain one."""
        return 0

    def begun(self, state: Any) -> Any:
        """The state that a round begins with: its broadcasts may have to say more than those of a plain one."""
        return state

    def of_terms(self, state: Any, server: Any, mean: Mapping[str, Tensor]) -> Update:
        """The virtual reply of the terms' means, float64."""
        origin = self.method.origin(state)
        found = {n: m.float() if n not in origin else origin[n].float() + m.float() for n, m in mean.items()}
        return Update(found, 1.0)


class Changes(Linear):
    """Of weights that travel both ways: `down.weights` and `up.weights`."""

    clippable = True
    BOUND = 1.0  # of what a visit changes in a weight

    def terms(self, net: Any) -> Mapping[str, Term]:
        """Each tensor that the net trains."""
        return {name: self.secure.term(tuple(p.shape), self.BOUND) for name, p in net.parameters()}

    def parts(self, down: Any, up: Any, client: Any) -> Mapping[str, Tensor]:
        """What the visit has changed in each, float32."""
        return {n: after.float() - down.weights[n].to(after.device).float() for n, after in up.weights.items()}
