"""What a private run may spend, what it has spent after each round, and who cannot be made private as asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinwire.config import ConfigError, Run, method_name
from thinwire.config.privacy import Privacy
from thinwire.core import Averaged
from thinwire.keys import Key
from thinwire.privacy.accountant import epsilon, grid_for, least_noise
from thinwire.privacy.protection import Protection
from thinwire.records import Record
from thinwire.runtime.seats import Seats
from thinwire.train import parallel

NOT_COUNTED = (
    "other runs on the same rows, and what they have chosen: rates, clip, noise",
    "evaluation on rows of the clients, and which round they choose",
    "a codec that was fitted to the clients' updates",
    "how many rows a client has, how long a visit takes, and that it fails",
)
AT_SERVER = "as the server adds the noise, what its records hold of each reply: bytes and hashes"


@dataclass(frozen=True)
class Unit:
    """A client as the accountant sees it: its noise, the probability of a row to be drawn, releases a visit."""

    noise: float
    rate: float
    releases: int

    def spent(self, visits: int, asked: Privacy) -> float:
        """The epsilon of so many visits."""
        return epsilon(self.noise, self.rate, self.releases * visits, asked.delta, grid_for(asked.most))


class Budget:
    """How each client's records, or the client, are protected; and what that comes to, round by round.

    A visit counts whether or not its reply was used; who is in a round's cohort follows from the run's key, which is no
    secret: so no chance of not being there is credited.
    """

    def __init__(self, run: Run, rows: Mapping[int, int], clients: int) -> None:
        """`rows`: client -> how many it has, of those here. ConfigError for a delta that is not below 1 / rows."""
        assert run.privacy is not None
        self.privacy, self.rounds = run.privacy, run.rounds
        seats = Seats(Key.root(run.seed), run.rounds)
        self.visits = {id: [0] for id in range(clients)}
        for round in range(1, run.rounds + 1):
            cohort = seats.cohort(run.cohort, range(clients), round)
            for id, counts in self.visits.items():
                counts.append(counts[-1] + (id in cohort))
        whom = rows if run.privacy.level == "record" else range(clients)
        self.units = {id: self._unit(run, id, rows.get(id)) for id in whom}

    def _unit(self, run: Run, id: int, rows: int | None) -> Unit:
        asked, visits = self.privacy, self.visits[id][-1]
        rate, releases = 1.0, 1
        if asked.level == "record":
            assert rows is not None
            if asked.delta >= 1 / rows:
                raise ConfigError(f"privacy.delta: {asked.delta:g} is not below one in a client's {rows:,} rows")
            work = run.method.work(1)
            rate, releases = min(1.0, work.batch / rows), int(work.steps)
        noise = asked.noise or least_noise(asked.epsilon, rate, releases * visits, asked.delta) if visits else 1.0
        return Unit(noise, rate, releases)

    @property
    def protected(self) -> dict[int, Protection]:
        """Client -> how it is protected."""
        if (whole := self.protection) is not None:
            return dict.fromkeys(self.visits, whole)
        return {id: Protection("record", self.privacy.clip, unit.noise) for id, unit in self.units.items()}

    @property
    def protection(self) -> Protection | None:
        """Of whole clients: the noise that suits the one who comes most often."""
        asked = self.privacy
        if asked.level == "record":
            return None
        return Protection("client", asked.clip, max(unit.noise for unit in self.units.values()))

    def spent(self, round: int) -> float | None:
        """The epsilon after a round, of the client who has spent most; None where each site counts its own."""
        if self.protection is not None:
            each = Unit(self.protection.noise, 1.0, 1)
            return each.spent(max(visits[round] for visits in self.visits.values()), self.privacy)
        found = [unit.spent(self.visits[id][round], self.privacy) for id, unit in self.units.items()]
        return max(found, default=None)

    def beyond(self, client: int, answers: int) -> bool:
        """Whether so many answers of a client, each with noise of its own, would spend more than the run may."""
        unit = self.units.get(client)
        return unit is not None and unit.spent(answers, self.privacy) > self.privacy.most

    def statement(self, round: int) -> Record:
        """What was promised by a run of so many rounds, for its summary."""
        asked = self.privacy
        noises = {each.noise for each in self.protected.values()} or {asked.noise or 0.0}
        epsilon = self.spent(round) or asked.epsilon
        spent = {"epsilon": epsilon, "delta": asked.delta, "clip": asked.clip, "noise": sorted(noises)}
        at_server = asked.level == "client" and asked.secure is None
        of_server = {} if asked.level == "record" else {"server": not at_server}  # whether it sees no more than others
        return {
            "level": asked.level,
            **of_server,
            **spent,
            "not_counted": [*NOT_COUNTED, *([AT_SERVER] if at_server else [])],
        }

    def ends(self, round: int) -> str | None:
        """Why the run ends after a round, before its rounds are over; None where the next one is within the budget."""
        most = self.privacy.most
        if round >= self.rounds or (after := self.spent(round + 1)) is None or after <= most:
            return None
        return f"round {round + 1} would spend an epsilon of {after:.4g}, and privacy.epsilon is {most:g}"


def check_privacy(run: Run, names: Sequence[str]) -> None:
    """ConfigError for a run that cannot be private as it asks, with clients of these names."""
    asked = run.privacy
    if asked is None or asked.level is None:
        return
    if run.federation is not None and run.federation.join:
        raise ConfigError("federation.join: a private run's budget is for the sites that it begins with")
    method, name = run.method, method_name(run.method)
    if method.released(asked.level) is None:
        raise ConfigError(f"privacy.level: {name} cannot be made private of a {asked.level} as it is set here")
    assert isinstance(method, Averaged)
    if method.aggregation.kind != "mean":
        raise ConfigError(f"method.aggregation: [privacy] noises a mean alone, and this is {method.aggregation.kind}")
    weights = run.federation.weights if run.federation is not None else None
    if weights is not None and (weights.by not in ("equal", "method") or weights.bounded or weights.stale < 1):
        raise ConfigError("federation.weights: in a private run all clients count alike; leave it out")
    if parallel.ranks()[1] > 1:
        raise ConfigError("privacy: each of several processes would draw noise of its own; run it in one")
    if asked.level == "record":
        data = run.data
        for field, odd in (("pack", data.pack), ("balanced", data.balanced), ("order", data.order != "random")):
            if odd:
                raise ConfigError(f"data.{field}: a private run draws each row in secret, apart from the others")
    elif run.federation is not None and (run.federation.keep_replies or run.federation.cross):
        raise ConfigError(
            "federation.keep_replies, cross: replies of a run private of a client are without noise; leave it out"
        )
    elif asked.delta >= 1 / max(1, len(names)):
        raise ConfigError(f"privacy.delta: {asked.delta:g} is not below one in {len(names)} clients")
    for segment in run.cohort:
        few = len(segment.pick(range(len(names)), 0, Key.root(0))) if names else asked.minimum
        if few < asked.minimum:
            raise ConfigError(f"cohort: a round of {few} clients, and privacy.minimum is {asked.minimum}")


def budget_of(run: Run, rows: Mapping[int, int], clients: int) -> Budget | None:
    """The budget of a run, and of its clients that are here their rows; ConfigError where round 1 is beyond it."""
    if run.privacy is None or run.privacy.level is None:
        return None
    budget = Budget(run, rows, clients)
    if (why := budget.ends(0)) is not None:
        raise ConfigError(f"privacy.epsilon: {why}")
    return budget
