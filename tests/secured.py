"""A federation under masks, and the plain sum that its rounds must come to, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from federation import Federation

from thinwire.aggregate.mean import Counted
from thinwire.core import Client
from thinwire.methods.fedkseed import FedKSeed, Steps
from thinwire.model.net import Net
from thinwire.privacy.secure import Secure
from thinwire.runtime.masked import MaskedClients
from thinwire.runtime.secure import SecureRound
from thinwire.runtime.sums import Plan


class Quick(FedKSeed):
    """Its scalars are drawn, not measured: what happens to them is the same."""

    def client_update(self, down: Any, client: Client) -> Any:
        self.receive(down, client)
        drawn = np.random.default_rng(client.key.fold("drawn").word()).standard_normal(self.steps * self.queries)
        return Steps(None, torch.from_numpy(drawn).half(), 1.0, len(client.data), 0.5)


@dataclass
class Secured:
    """The same federation twice: one under masks, one whose replies are added up in the open."""

    method: Any
    net: Net
    folder: Path
    secure: Secure = field(default_factory=lambda: Secure(examples=16))
    sizes: tuple[int, ...] = (12, 8, 16, 9)
    rounds: int = 4

    def __post_init__(self) -> None:
        self.open = Federation(self.method, self.net, self.folder / "open", self.rounds, self.sizes)
        self.clients = MaskedClients(self.secure)
        self.masked = self.federation("masked", self.clients, SecureRound(self.secure))

    def federation(self, name: str, clients: MaskedClients, function: SecureRound) -> Federation:
        """One under masks."""
        parts = (self.method, self.net, self.folder / name, self.rounds, self.sizes)
        return Federation(*parts, actions=clients.actions, function=function)

    def plain_round(self, replied: Sequence[int], trained: Sequence[int] | None = None) -> Any:
        """The state after a round in the open, of replies rounded as they are under masks and then added up."""
        here = self.open
        here.round += 1
        everybody = range(len(self.sizes)) if trained is None else trained
        plan = Plan.of(self.method, self.net, self.secure, len(self.sizes))
        server = here.server(here.round, range(len(self.sizes)))
        state, sums, weight = plan.linear.begun(here.state), dict[str, Any](), 0
        for id in everybody:
            down = self.method.broadcast(state, server, id, here.held.get(id))
            client = here.client(id, here.round)
            up = self.method.client_update(down, client)
            here.memories.commit(client.memory, id)
            if client.held is not None:
                here.held[id] = client.held
            if id not in replied:
                continue
            share = up.examples / plan.most if plan.weighted else 1.0
            weight += up.examples if plan.weighted else 1
            for name, part in plan.linear.parts(down, up, client).items():
                whole, _ = plan.sums.terms[name].whole(part if share == 1 else part.double() * share)
                sums[name] = sums.get(name, 0) + whole
        total = weight / plan.most if plan.weighted else float(weight)
        mean = {
            name: (torch.from_numpy(np.asarray(whole)).double() * plan.sums.terms[name].unit / total).reshape(
                plan.sums.terms[name].shape
            )
            for name, whole in sums.items()
        }
        update = plan.linear.of_terms(state, server, mean)
        counted = [Counted(client, 1.0, update.metrics) for client in replied]
        here.state, _ = self.method.step(state, server, dict(update.tensors), counted)
        return here.state
