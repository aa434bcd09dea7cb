"""Secure sums: the server learns what its clients' replies add up to, and nothing else of any of them.

Bonawitz et al. 2017 (masks between each two clients, a mask of each client's own, both recoverable from shares); with
`neighbours` Bell et al. 2020 (a client shares masks with some others alone). What holds, and what does not:

- Against a server that keeps to the protocol and is curious, and any clients in league with it: what they learn of the
  others is their sum. Of a sum over n clients, c of them in league, that is a sum over n - c: so `minimum` is 2 more
  than the clients that may be in league, at least. A sum of a few is still a fact about them: noise is for that
  ([privacy]), not masks.
- A share goes to each neighbour and stays with its owner, and `threshold` of them recover a secret: up to that many
  less one may be in league. It is more than half in any case, so no two sets of holders that do not overlap recover
  both secrets of one client; each holder reveals one of the two alone, once, and for the set of clients that it was
  first asked about. With `neighbours` all this is of a client's neighbourhood, and whoever knows the round's key knows
  who stands beside whom: clients must not be in league by plan there; where that may be, let all mask with all.
- A server that hands out keys of its own sits in the middle of every agreement, and with masks that it knows it reads
  every reply, unless sites sign their public halves with keys that they know of each other (federation.vouching): then
  no reply is masked with another's.
- A server that asks for another round gets another sum: of two rounds with one client more in one of them, what changed
  is near that client's. A repeated round (one that has died) uses fresh keys, and is unmasked for the same clients and
  the same broadcast alone. Noise is what holds over rounds.
- Masks hide a hostile client's update as well as an honest one's: no median, no bound, no gate sees it. A client whose
  shares do not recover its secret can make a round fail; it is named.
- What stays in the open: who takes part and who drops out, sizes, times, and each client's own scores where it
  evaluates.

All secrets come from the operating system and stay in a process's memory for one round: never from a run's key, and
never in a file, a record or a log.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from thinwire.privacy.terms import Term, even


class Secure(BaseModel):
    """[privacy.secure]: replies are added up under masks.

    `threshold`: the share of a client's holders that recover its secrets, more than half; the others may drop out.
    `neighbours`: whom a client shares masks with, beside it on a circle that is drawn each round; None: all others.
    `minimum`: no client helps to unmask the sum of fewer. Numbers travel in `bits` between -bound and `bound`, which
    clients may not exceed: larger ones are cut, and counted together; None: as the method has it. `examples`: that a
    client counts as at most, where the mean is weighted by them. `reports`: whether the sums hold the losses and what
    was skipped and cut, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(2 / 3, gt=0.5, le=1)
    neighbours: PositiveInt | None = Field(None, ge=2)
    minimum: int = Field(3, ge=3)
    bits: int = Field(24, ge=8, le=40)
    bound: PositiveFloat | None = None
    examples: PositiveInt | None = None
    reports: bool = True

    def term(self, shape: tuple[int, ...], bound: float) -> Term:
        """A term of numbers that a method bounds so, where the run file has no bound of its own."""
        return even(shape, self.bound or bound, self.bits)
