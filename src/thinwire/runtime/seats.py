"""The seats of a run: what either half is handed in a round. Only here is the tree of their keys spelled.

key -- "server", round
    |- "client", id, "round", round
    '- "cohort", round
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from thinwire.core import Client, Server
from thinwire.runtime.cohort import cohort_of
from thinwire.wire import Together, alone

if TYPE_CHECKING:
    from torch import Tensor

    from thinwire.data.batch import Dataset
    from thinwire.keys import Key
    from thinwire.privacy.protection import Protection
    from thinwire.runtime.cohort import Segment


class Memories(Protocol):
    """What is private to each client, and outlives its rounds."""

    def of(self, client: int, round: int) -> MutableMapping[str, Tensor]:
        """The memory of a client as it is before that round."""
        ...

    def commit(self, memory: MutableMapping[str, Tensor], client: int) -> None:
        """Keep what the client has changed in it."""
        ...


@dataclass(frozen=True)
class Seats:
    """The contexts of a run's server and clients.

    `net` and `versions` are None only where cohorts alone are drawn, or a half is run that does not look at them.
    `data`: client -> its rows; `held`: the version that a client holds before a round.
    """

    key: Key
    rounds: int
    net: Any = None
    versions: Any = None
    data: Mapping[int, Dataset] | Sequence[Dataset] = ()
    memories: Memories | None = None
    held: Callable[[int, int], str | None] = lambda client, before: None
    public: Dataset | None = None
    clients: int | None = None  # of the run; None: those with rows here
    loss: Callable[[], float] | None = None  # on the public rows, of the weights in the net
    protected: Mapping[int, Protection] = field(default_factory=dict)  # client -> how, in a private run
    protection: Protection | None = None  # of whole clients, in the server's mean
    together: Together = alone

    def server(self, round: int, cohort: Sequence[int] = ()) -> Server:
        """What the server half is handed in a round; round 0 is `init`."""
        key = self.key.fold("server", round)
        clients = len(self.data) if self.clients is None else self.clients
        parts = (self.net, key, round, self.rounds, tuple(cohort), self.versions)
        return Server(*parts, self.public, clients, self.loss, protection=self.protection)

    def client(self, id: int, round: int) -> Client:
        """What the client half of that client is handed in a round."""
        key = self.key.fold("client", id, "round", round)
        memory = {} if self.memories is None else self.memories.of(id, round)
        data = self.data[id].remembered(memory)
        held, protection = self.held(id, round), self.protected.get(id)
        parts = (self.net, data, key, memory, self.versions, held)
        return Client(id, *parts, protection=protection, together=self.together)

    def cohort(self, segments: Sequence[Segment], clients: int | Sequence[int], round: int) -> tuple[int, ...]:
        """Who of so many clients, or of these, takes part in a round."""
        among = range(clients) if isinstance(clients, int) else clients
        return cohort_of(segments, among, round, self.key.fold("cohort", round))
