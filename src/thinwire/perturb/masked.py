"""A round's scalars as plain sums: those of directions that all clients share, see aggregate.linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thinwire.aggregate.linear import Linear
from thinwire.aggregate.mean import Update
from thinwire.core import Client, Server
from thinwire.errors import ConfigError
from thinwire.perturb.directions import Directions
from thinwire.perturb.pool import Pool, draws_key
from thinwire.perturb.scalars import as_floats
from thinwire.perturb.spsa import LARGEST, shrink_of
from thinwire.privacy.secure import Secure
from thinwire.privacy.terms import Term
from thinwire.train.local import scheduled

SCALARS, SHRINK = "scalars", "shrink"
FINE = 1 << 48


class SharedScalars(Linear):
    """The mean of clients' scalars along the directions that all of them drew: as long as a visit, not as the pool.

    With a decay each scalar is what is left of its step at the visit's end, and the mean shrink goes beside. The
    amplitudes, which Pro alone draws by, stay as they are. `form`: of the scalars as they would travel.
    """

    clippable = True

    def __init__(self, method: Any, secure: Secure, form: str) -> None:
        super().__init__(method, secure)
        self.form = form
        if method.pro:
            raise ConfigError("method.pro: draws by the |g| of each client, and under privacy.secure none is seen")
        if not method.shared:
            raise ConfigError(
                "method.shared: must be true under privacy.secure: what is added up has directions in common"
            )

    @property
    def _shape(self) -> tuple[int, int]:
        return self.method.steps, self.method.queries

    def terms(self, net: Any) -> Mapping[str, Term]:
        """The scalars of a visit, and its shrink where there is any."""
        own = {SCALARS: self.secure.term((self._shape[0] * self._shape[1],), LARGEST)}
        return own | ({SHRINK: Term((), 1 / FINE, 0, FINE)} if self.method.weight_decay else {})

    def parts(self, down: Any, up: Any, client: Client) -> Mapping[str, Tensor]:
        """A skipped step adds nothing."""
        scalars = as_floats([(up.scalars, up.unit)], self.form, self._shape)[0]
        taken = ~np.isnan(scalars[:, 0])
        decay = shrink_of(down.lr, self.method.weight_decay)
        left = decay ** (taken.sum() - taken.cumsum())
        found = {SCALARS: torch.from_numpy((left[:, None] * np.nan_to_num(scalars)).ravel())}
        return found | ({SHRINK: torch.tensor(float(decay ** taken.sum()))} if self.method.weight_decay else {})

    def of_terms(self, state: Any, server: Server, mean: Mapping[str, Tensor]) -> Update:
        """The moves along the pool that the mean scalars are."""
        method = self.method
        known = Pool(Directions(state.pool, method.law, method.rank, method.seeds), method.seeds)
        picks = known.picks(draws_key(server.key), [0], self._shape)
        rate = scheduled(method.schedule, method.lr, server.round, server.rounds) / method.queries
        moves = rate * mean[SCALARS].numpy()
        gains = torch.from_numpy(np.bincount(picks.ravel(), moves, method.seeds))
        shrink = float(mean[SHRINK]) if method.weight_decay else 1.0
        return Update({"gains": gains}, 1.0, metrics={"shrink": shrink, "length": float(np.linalg.norm(moves))})
