"""What a method has whose clients may find gradients by probes: a client without room for activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveInt

from thinwire.core import Client, Server
from thinwire.costs.memory import Memory, Side, probing
from thinwire.costs.sketch import Pass, Sketch, Work
from thinwire.errors import ConfigError
from thinwire.privacy.protection import Level
from thinwire.privacy.released import Released
from thinwire.train.differences import Differences, cosine
from thinwire.train.first_order import FirstOrder

Gradient: TypeAlias = Literal["backward", "probe"]


class Probing(FirstOrder):
    """Local steps along gradients of backward passes or, at some clients or all, of central differences.

    A probe moves every number that is trained by `eps` one way and the other: two passes forward.
    """

    gradient: Gradient | dict[NonNegativeInt, Gradient] = "backward"  # of all, or by client
    probes: PositiveInt = 8  # a step
    eps: float = Field(1e-2, gt=0, le=1)

    def probes_at(self, client: Client) -> Differences | None:
        """The probes of a client's visit; None where it has backward passes."""
        return Differences(self.probes, self.eps, client.key.fold("probes")) if self.probes_in(client.id) else None

    def probes_in(self, client: int, skipped: int = 0) -> int | None:
        """How many a client makes in a visit of which so many steps are skipped; None: it has backward passes."""
        gradient = self.gradient.get(client) if isinstance(self.gradient, dict) else self.gradient
        return max(1, self.probes * (self.steps - skipped)) if gradient == "probe" else None

    def counts(self, up: Any, size: int) -> float:
        """How much a reply counts: of updates of one length, what probes have found by its cosine with the gradient."""
        return self.weight(up) * (1.0 if up.probes is None else cosine(up.probes, size))

    def weighed(self, server: Server, replies: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any, float]]:
        return server.weighing(replies, lambda up: self.counts(up, server.net.size))

    def check_clients(self, clients: int) -> None:
        named = self.gradient if isinstance(self.gradient, dict) else {}
        if unknown := [client for client in named if client >= clients]:
            there = f"are {clients} clients, 0 to {clients - 1}" if clients > 1 else "is one client, 0"
            raise ConfigError(f"method.gradient: no client {', '.join(map(str, unknown))}: there {there}")

    def released(self, level: Level) -> Released | None:
        return super().released(level) if self.gradient == "backward" else None

    def work(self, round: int) -> Work:
        if self.gradient != "probe":
            return super().work(round)
        return Work(self.steps, 2 * self.probes * self.steps * self.batch_size, self.batch_size, probes=True)

    def memory(self, at: Sketch, forward: Pass, side: Side) -> Memory | None:
        if side == "client" and self.gradient == "probe":
            return probing(at, forward, "lowrank")  # nothing but the numbers is moved: no copy of a layer is made
        return super().memory(at, forward, side)
